"""Integer weights: one symmetric scale for each output, rounding errors made up for by the columns still to come."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from autoprune.sparsity.base import LayerView
from autoprune.sparsity.sparsegpt import BLOCK, DAMPING, inverse_factor

_SHRINKS = 20
"""Scales tried for each output, from the largest weight's down to half of it."""


@dataclass(frozen=True, slots=True)
class Quantised:
    """`codes` (outputs, columns) int8, `scales` (outputs,) float32: weight = codes * scale."""

    codes: Tensor
    scales: Tensor

    @property
    def weight(self) -> Tensor:
        """What the layer computes with, (outputs, columns) float32."""
        return self.codes.float() * self.scales[:, None]


def most(bits: int) -> int:
    """The largest code: symmetric, so that zero is exact and -128 unused."""
    return int(2 ** (bits - 1)) - 1


def scales_of(weight: Tensor, *, power: Tensor, bits: int = 8) -> Tensor:
    """For each output the scale of least rounding error, weighted by the inputs' `power` (columns,); float32."""
    largest = weight.abs().amax(1).clamp_min(1e-12)
    best = torch.full_like(largest, torch.inf)
    chosen = largest / most(bits)
    for step in range(_SHRINKS):
        scale = largest * (1 - 0.5 * step / _SHRINKS) / most(bits)
        error = ((_rounded(weight, scale, bits) - weight).square() * power).sum(1)
        better = error < best
        best, chosen = torch.where(better, error, best), torch.where(better, scale, chosen)
    return chosen.float()


def quantise(view: LayerView, *, bits: int = 8) -> Quantised:
    """GPTQ (arXiv:2210.17323, algorithm 1) with one scale an output; a weight that is zero stays zero.

    Columns are rounded from left to right, and those to the right make up for each rounding error.
    """
    factor = inverse_factor(view.moments, damping=DAMPING)
    scale = scales_of(view.weight, power=view.moments.diagonal().clamp_min(0.0), bits=bits)
    exact = scale.double()
    weight, stays = view.weight.clone(), view.weight != 0
    for first in range(0, weight.shape[1], BLOCK):
        last = min(first + BLOCK, weight.shape[1])
        errors = torch.zeros_like(weight[:, first:last])
        for column in range(first, last):
            rounded = _rounded(weight[:, column, None], exact, bits)[:, 0] * stays[:, column]
            error = (weight[:, column] - rounded) / factor[column, column]
            weight[:, column + 1 : last] -= error[:, None] * factor[column, column + 1 : last]
            weight[:, column] = rounded
            errors[:, column - first] = error
        weight[:, last:] -= errors @ factor[first:last, last:]
    codes = torch.round(weight / exact[:, None]).to(torch.int8)
    return Quantised(codes, scale)


def _rounded(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    return torch.round(weight / scale[:, None]).clamp(-most(bits), most(bits)) * scale[:, None]
