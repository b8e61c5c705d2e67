"""Integer weights: one symmetric scale for each output, rounding errors made up for by the columns still to come."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from autoprune.packing.coding import Codes
from autoprune.sparsity.base import LayerView
from autoprune.sparsity.sweep import even_runs, sweep

_SHRINKS = 20
"""Scales tried for each output, from the largest weight's down to half of it."""


def most(bits: int) -> int:
    """The largest code: symmetric, so that zero is exact and -128 unused."""
    return int(2 ** (bits - 1)) - 1


def scales_of(weight: Tensor, *, power: Tensor, limit: Tensor) -> Tensor:
    """For each row of `weight` (rows, columns) the scale of least rounding error, weighted by the inputs' `power`
    (columns,); float32. `limit` (rows,) is the largest code of each.
    """
    largest = weight.abs().amax(1).clamp_min(1e-12)
    best = torch.full_like(largest, torch.inf)
    chosen = largest / limit
    for step in range(_SHRINKS):
        scale = largest * (1 - 0.5 * step / _SHRINKS) / limit
        error = ((_rounded(weight, scale[:, None], limit[:, None]) - weight).square() * power).sum(1)
        better = error < best
        best, chosen = torch.where(better, error, best), torch.where(better, scale, chosen)
    return chosen.float()


def quantise(view: LayerView, weights: Sequence[Tensor], bits: Sequence[int]) -> list[Codes]:
    """GPTQ (arXiv:2210.17323, algorithm 1) of several `weights` (outputs, columns) of one layer, each in its `bits`,
    with one scale an output; a weight that is zero stays zero.
    """
    outputs = len(view.weight)
    stacked = torch.cat(tuple(weights))
    limit = torch.tensor([most(each) for each in bits], dtype=stacked.dtype).repeat_interleave(outputs)
    scale = scales_of(stacked, power=view.moments.diagonal().clamp_min(0.0), limit=limit)
    exact, stays = scale.double(), (stacked != 0).T.contiguous()

    def settle(run: slice, _now: Tensor) -> Callable[[int, Tensor], Tensor]:
        return lambda place, values: _rounded(values, exact, limit) * stays[run.start + place]

    settled = sweep(stacked, view.factor, even_runs(stacked.shape[1]), settle)
    codes = torch.round(settled / exact[:, None]).to(torch.int8)
    parts = zip(torch.split(codes, outputs), torch.split(scale, outputs), strict=True)
    return [Codes(each, scales, tuple(each.shape)) for each, scales in parts]


def _rounded(values: Tensor, scale: Tensor, limit: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(torch.round(values / scale), -limit), limit) * scale
