"""What a sparsifier is: given one layer's weights and what calibration saw of its inputs, the weights with zeros."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from autoprune.core.pattern import Pattern


@dataclass(frozen=True, slots=True)
class LayerView:
    """One layer as a matrix, float64, not to be written to.

    `weight` is (outputs, columns), where the columns go by kernel position first and by input channel within it, so
    that N:M groups are neighbouring inputs at one position; `inputs` is how many channels there are. `moments` is
    E[x x^T] (columns, columns) in the same order. `scale` (outputs,): what a following norm multiplies each output by.
    """

    weight: Tensor
    moments: Tensor
    inputs: int
    scale: Tensor | None = None


class Sparsifier(Protocol):
    """A criterion for single weights. `version` changes when its results do."""

    name: str
    version: int

    def sparsify(self, view: LayerView, pattern: Pattern, generator: torch.Generator) -> Tensor:
        """The new weight (outputs, columns): exactly as many zeros as `pattern` asks, and what the others become."""
        ...
