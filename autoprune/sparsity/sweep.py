"""The sweep over columns that pruning and rounding share: each column is settled, those to its right make up for it.

Rows are independent of each other, so the rows of many edits of one layer go through together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

BLOCK = 128
"""Columns between two updates of all that follow."""

Settle = Callable[[slice, Tensor], Callable[[int, Tensor], Tensor]]
"""Called when a run of columns is reached, with their weights (rows, width) as they are by then; what it returns turns
each column (its place in the run, (rows,) just before it is settled) into its final values."""


def sweep(weight: Tensor, factor: Tensor, runs: Sequence[slice], settle: Settle) -> Tensor:
    """`weight` (rows, columns) settled from left to right (arXiv:2301.00774, algorithm 1; arXiv:2210.17323, too).

    `factor` (columns, columns) is the upper Cholesky factor of the inverse Hessian; `runs` cover the columns.
    """
    # One column is one contiguous row here: single columns are what the loop reads and writes.
    columns = weight.T.contiguous()
    for runs_of_block in _blocks(runs):
        first, last = runs_of_block[0].start, runs_of_block[-1].stop
        errors = torch.empty_like(columns[first:last])
        for run in runs_of_block:
            final = settle(run, columns[run].T)
            for column in range(run.start, run.stop):
                settled = final(column - run.start, columns[column])
                error = (columns[column] - settled) / factor[column, column]
                columns[column] = settled
                columns[column + 1 : last].addr_(factor[column, column + 1 : last], error, alpha=-1)
                errors[column - first] = error
        columns[last:] -= factor[first:last, last:].T @ errors
    return columns.T


def even_runs(columns: int, width: int = BLOCK) -> list[slice]:
    """Runs of `width` columns, the last one shorter."""
    return [slice(start, min(start + width, columns)) for start in range(0, columns, width)]


def _blocks(runs: Sequence[slice]) -> Iterator[list[slice]]:
    """Neighbouring runs, together about as wide as a block."""
    block: list[slice] = []
    for run in runs:
        if block and run.stop - block[0].start > BLOCK:
            yield block
            block = []
        block.append(run)
    yield block
