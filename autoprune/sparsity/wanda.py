"""Wanda: weights that are small beside what their inputs carry go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from autoprune.core.pattern import Pattern
from autoprune.sparsity.base import LayerView, SparsityNeed
from autoprune.sparsity.masks import kept_mask


@final
class Wanda:
    """Score |w_ij| * ||x_j||, compared within each output (arXiv:2306.11695, section 3)."""

    __slots__ = ()

    name: str = "wanda"
    version: int = 1
    needs: frozenset[SparsityNeed] = frozenset()

    def sparsify(self, view: LayerView, patterns: Sequence[Pattern], generator: torch.Generator) -> list[Tensor]:  # noqa: ARG002
        """The weights with zeros; what stays is as it was."""
        scores = view.weight.abs() * view.moments.diagonal().clamp_min(0.0).sqrt()
        return [view.weight * kept_mask(scores, pattern, inputs=view.inputs, scope="output") for pattern in patterns]
