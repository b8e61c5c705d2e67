"""SparseGPT: columns are pruned from left to right, and those to the right make up for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor

from autoprune.core.pattern import Pattern
from autoprune.sparsity.base import LayerView, SparsityNeed
from autoprune.sparsity.masks import kept_mask
from autoprune.sparsity.sweep import BLOCK, even_runs, sweep


@final
class SparseGPT:
    """Optimal brain surgery with one inverse Hessian for all outputs (arXiv:2301.00774, algorithm 1).

    Scores w_ij^2 / [U_jj]^2, where U is the upper Cholesky factor of the inverse Hessian, are compared within blocks of
    128 columns (unstructured, blocks) or when a group of M is reached (N:M); errors count as the norm after them does.
    """

    __slots__ = ()

    name: str = "sparsegpt"
    version: int = 1
    needs: frozenset[SparsityNeed] = frozenset()

    def sparsify(self, view: LayerView, patterns: Sequence[Pattern], generator: torch.Generator) -> list[Tensor]:  # noqa: ARG002
        """The weights with zeros, and what stays as the solution of the sequential updates."""
        found: dict[int, Tensor] = {}
        for together in _alike(patterns, view):
            weights = _pruned(view, [patterns[index] for index in together])
            found |= dict(zip(together, weights, strict=True))
        return [found[index] for index in range(len(patterns))]


def _alike(patterns: Sequence[Pattern], view: LayerView) -> list[list[int]]:
    """Indices of the patterns whose scores are compared in the same runs of columns."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, pattern in enumerate(patterns):
        ends = tuple(run.stop for run in _runs(view.weight.shape[1], pattern, view.inputs))
        groups.setdefault(ends, []).append(index)
    return list(groups.values())


def _pruned(view: LayerView, patterns: Sequence[Pattern]) -> list[Tensor]:
    """One weight for each of `patterns`, all in one sweep."""
    outputs, pivots = len(view.weight), view.factor.diagonal()
    power = view.weight.new_ones(outputs) if view.scale is None else view.scale.square()

    def settle(run: slice, now: Tensor) -> Callable[[int, Tensor], Tensor]:
        scores = torch.stack(torch.split(now.square() / pivots[run].square(), outputs)) * power[:, None]
        masks = [
            kept_mask(each, pattern, inputs=run.stop - run.start)
            for each, pattern in zip(scores, patterns, strict=True)
        ]
        keep = torch.cat(masks).T.contiguous()
        return lambda place, values: values * keep[place]

    runs = _runs(view.weight.shape[1], patterns[0], view.inputs)
    stacked = view.weight.repeat(len(patterns), 1)
    return list(torch.split(sweep(stacked, view.factor, runs, settle), outputs))


def _runs(columns: int, pattern: Pattern, inputs: int) -> list[slice]:
    """The runs of columns in which scores are compared: 128 columns, one N:M group, or the whole blocks in 128."""
    if pattern.kind == "unstructured":
        return even_runs(columns)
    step = pattern.columns if pattern.kind == "n:m" else max(1, BLOCK // pattern.columns) * pattern.columns
    return [
        slice(start, min(start + step, position + inputs))
        for position in range(0, columns, inputs)
        for start in range(position, position + inputs, step)
    ]
