"""Chance: the baseline that every criterion must beat."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from autoprune.methods.base import Need, UnitView


@final
class Random:
    """Channels go in an order drawn from the generator (a strong baseline after fine-tuning: arXiv:1801.10447)."""

    __slots__ = ()

    name: str = "random"
    version: int = 1
    needs: frozenset[Need] = frozenset()

    def removal_order(self, view: UnitView, generator: torch.Generator) -> Tensor:
        """A permutation of the channels (width,), uniform over all permutations."""
        return torch.randperm(view.width, generator=generator)
