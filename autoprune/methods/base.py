"""What a method is: an order in which a unit's channels go, given what calibration saw of them.

A method never writes: cutting and compensation are the same for all methods and live elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

Need = Literal["moments", "activity", "gradients"]
"""What calibration must collect for a method: input second moments, activation statistics, gradients."""


@dataclass(frozen=True, slots=True)
class Consumer:
    """One layer that reads the unit's channels.

    `weight` is (outputs, width, columns): for every channel the columns that multiply it (kernel area times the
    positions a flatten gave it). `moments` is the mean over samples and positions of x x^T for these inputs,
    (width * columns, width * columns), channel-major, float64; None where no method asked for it.
    `scale` is (outputs,): what a following norm layer multiplies each output by (ones where there is none).
    """

    name: str
    weight: Tensor
    moments: Tensor | None
    scale: Tensor


@dataclass(frozen=True, slots=True)
class Activity:
    """What the unit's channels did on calibration data, as their consumers saw it (after norm and activation).

    `mean_abs`, `mean_square` and `zero_share` are (width,). `per_sample` is (samples, width): the mean over positions.
    `targets` is (samples,): the class of each sample (its label, or the dense model's answer).
    """

    mean_abs: Tensor
    mean_square: Tensor
    zero_share: Tensor
    per_sample: Tensor
    targets: Tensor


@dataclass(frozen=True, slots=True)
class UnitView:
    """All a method may look at for one unit. Tensors are float64 on the CPU and must not be written to."""

    name: str
    width: int
    producers: tuple[Tensor, ...]  # each (width, fan-in): the weights that make each channel
    norm_scales: tuple[Tensor, ...]  # each (width,): |gamma| of norm layers the channels pass through
    consumers: tuple[Consumer, ...]
    activity: Activity | None
    taylor: Tensor | None  # (width,): sum over samples of (sum over positions of activation * gradient)^2


class Method(Protocol):
    """A pruning criterion. `version` changes when its results do, so that banks made by an older one are rebuilt."""

    name: str
    version: int
    needs: frozenset[Need]

    def removal_order(self, view: UnitView, generator: torch.Generator) -> Tensor:
        """A permutation of the channels (width,), int64: the first goes first, the last stays longest."""
        ...


def order_by(scores: Tensor) -> Tensor:
    """The removal order in which the lowest score goes first; ties go by index, so that it is deterministic."""
    return torch.argsort(scores, stable=True)
