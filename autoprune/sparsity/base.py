"""What a sparsifier is: given one layer's weights and what calibration saw of its inputs, the weights with zeros."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import torch
from torch import Tensor

from autoprune.core.pattern import Pattern
from autoprune.definite import damped_cholesky, mean_diagonal

DAMPING = 1e-2
"""Of the mean of the moments' diagonal, added to it before they are inverted."""

SparsityNeed = Literal["movement"]
"""What calibration must collect for a sparsifier besides second moments."""


@dataclass(frozen=True)
class LayerView:
    """One layer as a matrix, float64, not to be written to.

    `weight` is (outputs, columns), where the columns go by kernel position first and by input channel within it, so
    that N:M groups are neighbouring inputs at one position; `inputs` is how many channels there are. `moments` is
    E[x x^T] (columns, columns) in the same order. `scale` (outputs,): what a following norm multiplies each output by.
    `movement` (outputs, columns): how strongly a fine-tune drew each weight away from zero, for whoever needs it.
    """

    weight: Tensor
    moments: Tensor
    inputs: int
    scale: Tensor | None = None
    movement: Tensor | None = None

    @cached_property
    def factor(self) -> Tensor:
        """The upper Cholesky factor U of the damped inverse Hessian, inv(H) = U^T U, (columns, columns) float64.

        Row j of U is the update direction once columns 0..j-1 are fixed, divided by the root of the pivot.
        """
        lower = damped_cholesky(self.moments, DAMPING * mean_diagonal(self.moments))
        factor: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
        return factor


class Sparsifier(Protocol):
    """A criterion for single weights. `version` changes when its results do."""

    name: str
    version: int
    needs: frozenset[SparsityNeed]

    def sparsify(self, view: LayerView, patterns: Sequence[Pattern], generator: torch.Generator) -> list[Tensor]:
        """For each pattern the new weight (outputs, columns): as many zeros as it asks, and what the others become."""
        ...
