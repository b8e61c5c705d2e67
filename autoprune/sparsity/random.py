"""Random: any weights go. What every other criterion must beat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from autoprune.core.pattern import Pattern
from autoprune.sparsity.base import LayerView, SparsityNeed
from autoprune.sparsity.masks import kept_mask


@final
class Random:
    """Scores drawn from the seed (arXiv:1810.05270 calls it the baseline that matters)."""

    __slots__ = ()

    name: str = "random"
    version: int = 1
    needs: frozenset[SparsityNeed] = frozenset()

    def sparsify(self, view: LayerView, patterns: Sequence[Pattern], generator: torch.Generator) -> list[Tensor]:
        """The weights with zeros; what stays is as it was."""
        scores = torch.rand(view.weight.shape, generator=generator, dtype=torch.float64)
        return [view.weight * kept_mask(scores, pattern, inputs=view.inputs) for pattern in patterns]
