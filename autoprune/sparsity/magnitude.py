"""Magnitude: the smallest weights go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from autoprune.core.pattern import Pattern
from autoprune.sparsity.base import LayerView, SparsityNeed
from autoprune.sparsity.masks import kept_mask


@final
class Magnitude:
    """The weights of least absolute value in the layer go (Han et al., arXiv:1506.02626, section 3)."""

    __slots__ = ()

    name: str = "magnitude"
    version: int = 1
    needs: frozenset[SparsityNeed] = frozenset()

    def sparsify(self, view: LayerView, patterns: Sequence[Pattern], generator: torch.Generator) -> list[Tensor]:  # noqa: ARG002
        """The weights with zeros; what stays is as it was."""
        return [view.weight * kept_mask(view.weight.abs(), pattern, inputs=view.inputs) for pattern in patterns]
