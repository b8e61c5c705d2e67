"""SparseGPT: columns are pruned from left to right, and those to the right make up for each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import final

import torch
from torch import Tensor

from autoprune.core.pattern import Pattern
from autoprune.methods.compensate import damped_cholesky, mean_diagonal
from autoprune.sparsity.base import LayerView
from autoprune.sparsity.masks import kept_mask

BLOCK = 128
"""Columns between two updates of all that follow, and in which unstructured scores are compared."""
DAMPING = 1e-2


@final
class SparseGPT:
    """Optimal brain surgery with one inverse Hessian for all outputs (arXiv:2301.00774, algorithm 1).

    Scores w_ij^2 / [U_jj]^2, where U is the upper Cholesky factor of the inverse Hessian, are compared within blocks of
    128 columns (unstructured, blocks) or when a group of M is reached (N:M); errors count as the norm after them does.
    """

    __slots__ = ()

    name: str = "sparsegpt"
    version: int = 1

    def sparsify(self, view: LayerView, pattern: Pattern, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """The weight with zeros, and what stays as the solution of the sequential updates."""
        factor = inverse_factor(view.moments, damping=DAMPING)
        weight = view.weight.clone()
        power = torch.ones(len(weight), dtype=weight.dtype) if view.scale is None else view.scale.square()
        for pieces in _blocks(_pieces(weight.shape[1], pattern, view.inputs)):
            _prune_block_(weight, factor, pieces, pattern, power=power)
        return weight


def inverse_factor(moments: Tensor, *, damping: float) -> Tensor:
    """The upper Cholesky factor U of the damped inverse Hessian, inv(H) = U^T U, (columns, columns) float64.

    Row j of U is the update direction once columns 0..j-1 are fixed, divided by the root of the pivot.
    """
    lower = damped_cholesky(moments, damping * mean_diagonal(moments))
    factor: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    return factor


def _pieces(columns: int, pattern: Pattern, inputs: int) -> list[slice]:
    """The runs of columns in which scores are compared: 128 columns, one N:M group, or the whole blocks in 128."""
    if pattern.kind == "unstructured":
        return [slice(start, min(start + BLOCK, columns)) for start in range(0, columns, BLOCK)]
    step = pattern.columns if pattern.kind == "n:m" else max(1, BLOCK // pattern.columns) * pattern.columns
    return [
        slice(start, min(start + step, position + inputs))
        for position in range(0, columns, inputs)
        for start in range(position, position + inputs, step)
    ]


def _blocks(pieces: Sequence[slice]) -> Iterator[list[slice]]:
    """Neighbouring pieces, together about as wide as a block."""
    block: list[slice] = []
    for piece in pieces:
        if block and piece.stop - block[0].start > BLOCK:
            yield block
            block = []
        block.append(piece)
    yield block


def _prune_block_(weight: Tensor, factor: Tensor, pieces: Sequence[slice], pattern: Pattern, *, power: Tensor) -> None:
    """Prune the columns of one block in place and let the block, then everything right of it, make up for them."""
    pivots, first, last = factor.diagonal(), pieces[0].start, pieces[-1].stop
    errors = torch.zeros_like(weight[:, first:last])
    for piece in pieces:
        scores = weight[:, piece].square() / pivots[piece].square() * power[:, None]
        keep = kept_mask(scores, pattern, inputs=piece.stop - piece.start)
        for column in range(piece.start, piece.stop):
            stays = keep[:, column - piece.start]
            error = torch.where(stays, 0.0, weight[:, column]) / pivots[column]
            weight[:, column + 1 : last] -= error[:, None] * factor[column, column + 1 : last]
            weight[:, column] *= stays
            errors[:, column - first] = error
    weight[:, last:] -= errors @ factor[first:last, last:]
