"""Magnitude by the l2 norm of the weights that make a channel."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from autoprune.methods.base import Need, UnitView, order_by
from autoprune.methods.scores import summed


def l2_scores(view: UnitView) -> Tensor:
    """The l2 norm of each channel's weights (width,): each producer's divided by their mean, then summed."""
    return summed((weight.square().sum(dim=1).sqrt() for weight in view.producers), view.width)


@final
class L2:
    """Channels with the smallest Euclidean weight norm go first (arXiv:1608.08710, which compares it to l1).

    In a coupled group each producer's norms are divided by their mean over the channels, then summed.
    """

    __slots__ = ()

    name: str = "l2"
    version: int = 1
    needs: frozenset[Need] = frozenset()

    def removal_order(self, view: UnitView, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """A permutation of the channels (width,): the smallest l2 norm goes first."""
        return order_by(l2_scores(view))
