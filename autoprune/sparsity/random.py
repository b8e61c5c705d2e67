"""Random: any weights go. What every other criterion must beat."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from autoprune.core.pattern import Pattern
from autoprune.sparsity.base import LayerView
from autoprune.sparsity.masks import kept_mask


@final
class Random:
    """Scores drawn from the seed (arXiv:1810.05270 calls it the baseline that matters)."""

    __slots__ = ()

    name: str = "random"
    version: int = 1

    def sparsify(self, view: LayerView, pattern: Pattern, generator: torch.Generator) -> Tensor:
        """The weight with zeros; what stays is as it was."""
        scores = torch.rand(view.weight.shape, generator=generator, dtype=torch.float64)
        return view.weight * kept_mask(scores, pattern, inputs=view.inputs)
