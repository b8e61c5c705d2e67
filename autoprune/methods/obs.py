"""Structured Optimal Brain Surgeon: channels go one by one, and those left make up for each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from autoprune.definite import damped_cholesky, mean_diagonal
from autoprune.methods.base import Consumer, Need, UnitView, order_by
from autoprune.methods.compensate import DAMPING
from autoprune.methods.scores import needed

WORK = 2e8
"""Numbers that an elimination one at a time would write (channels x columns^2), up to which it is done so."""


@final
class OBS:
    """At each step the channel goes whose loss the others can best make up for (ZipLM, arXiv:2302.04089, section 3).

    The Hessian of a consumer's squared output error is its input second moments; removing a channel's columns S with
    the optimal update of all others adds sum_o scale_o^2 W[o,S] inv(Hinv[S,S]) W[o,S]^T (arXiv:2203.07259, section
    3). Each consumer's error is divided by its dense output energy, so that several consumers count alike. Of
    wide units (2,048 features) some go between two scorings, 2 % at first; their update is still exact.
    """

    __slots__ = ()

    name: str = "obs"
    version: int = 2
    needs: frozenset[Need] = frozenset({"moments"})

    def removal_order(self, view: UnitView, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """A permutation of the channels (width,): the easiest to make up for goes first. DataError without moments."""
        layers = [start(consumer, needed(consumer.moments, "moments", view)) for consumer in view.consumers]
        return eliminate_(layers, view.width)


@dataclass(frozen=True, slots=True)
class Layer:
    """One consumer at one step, its tensors views of buffers that elimination owns and writes to.

    `weight` (outputs, alive, columns) is compensated, its rows scaled so that squared errors add up over consumers;
    `inverse` (alive, columns, alive, columns) is the inverse Hessian of the inputs alive.
    """

    weight: Tensor
    inverse: Tensor


def start(consumer: Consumer, moments: Tensor, *, damping: float = DAMPING) -> Layer:
    """The dense layer: rows times their scale, over the root of the dense output energy trace(W M W^T)."""
    _, width, columns = consumer.weight.shape
    rows = (consumer.weight * consumer.scale[:, None, None]).flatten(1)
    energy = float((rows @ moments * rows).sum())
    rows = rows / math.sqrt(energy) if energy > 0 else torch.zeros_like(rows)
    inverse = torch.cholesky_inverse(damped_cholesky(moments, damping * mean_diagonal(moments)))
    return Layer(rows.view(-1, width, columns), inverse.view(width, columns, width, columns))


def eliminate_(layers: Sequence[Layer], width: int, *, work: float = WORK) -> Tensor:
    """The order (width,) in which channels go; one at a time once that writes no more than `work` numbers.

    Ties go by index. Uses `layers` up.
    """
    alive = torch.arange(width)
    order: list[Tensor] = []
    columns = max((layer.weight.shape[2] for layer in layers), default=0)
    while len(alive) > 1:
        scores = torch.zeros(len(alive), dtype=torch.float64)
        for layer in layers:
            scores += added_errors(layer)
        by_index = alive.argsort()  # dropping moves channels about
        ranked = by_index[order_by(scores[by_index])]
        count = max(1, math.ceil(len(alive) * (len(alive) * columns) ** 2 / work))
        order.append(alive[ranked[:count]])
        gone = ranked[:count].sort().values
        layers = [without_(layer, gone) for layer in layers]
        alive = drop_(alive, gone, dim=0)
    return torch.cat([*order, alive])


def added_errors(layer: Layer) -> Tensor:
    """The squared error (alive,) that removing each channel adds when all others make up for it."""
    if layer.weight.shape[2] == 1:  # features: no need to factor numbers one by one
        return layer.weight[:, :, 0].square().sum(0) / layer.inverse[:, 0, :, 0].diagonal()
    blocks = layer.inverse.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # (alive, columns, columns)
    rows = layer.weight.permute(1, 2, 0)  # (alive, columns, outputs)
    half: Tensor = torch.linalg.solve_triangular(torch.linalg.cholesky(blocks), rows, upper=False)
    return half.square().sum(dim=(1, 2))


def without_(layer: Layer, gone: Tensor) -> Layer:
    """Block elimination of the channels at the ascending positions `gone`, in place; the narrower views of the rest.

    W -= W[:,S] inv(Hinv[S,S]) Hinv[S,:] and Hinv -= Hinv[:,S] inv(Hinv[S,S]) Hinv[S,:], by the Cholesky factor of
    Hinv[S,S]. In place because a fresh inverse at every step costs more than the arithmetic (page faults).
    """
    outputs, alive, columns = layer.weight.shape
    coupling = layer.inverse.index_select(0, gone)  # (gone, columns, alive, columns)
    block = coupling.index_select(2, gone).reshape(len(gone) * columns, -1)
    owed = layer.weight.index_select(1, gone).reshape(outputs, -1).T  # (gone * columns, outputs)
    factor = torch.linalg.cholesky(block)
    half = torch.linalg.solve_triangular(factor, coupling.view(-1, alive * columns), upper=False)
    half_owed = torch.linalg.solve_triangular(factor, owed, upper=False)
    layer.weight.view(outputs, -1).addmm_(half_owed.T, half, alpha=-1.0)
    layer.inverse.view(alive * columns, -1).addmm_(half.T, half, alpha=-1.0)
    return Layer(drop_(layer.weight, gone, dim=1), drop_(drop_(layer.inverse, gone, dim=0), gone, dim=2))


def drop_(tensor: Tensor, gone: Tensor, *, dim: int) -> Tensor:
    """The view of `tensor` that is left when the last positions of `dim` have moved to the ascending ones of `gone`."""
    for position in reversed(gone.tolist()):
        last = tensor.shape[dim] - 1
        if position != last:
            tensor.select(dim, position).copy_(tensor.select(dim, last))
        tensor = tensor.narrow(dim, 0, last)
    return tensor
