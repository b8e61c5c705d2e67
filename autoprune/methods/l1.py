"""Magnitude by the l1 norm of the weights that make a channel."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from autoprune.methods.base import Need, UnitView, order_by
from autoprune.methods.scores import summed


@final
class L1:
    """Channels with the smallest sum of |weight| go first (arXiv:1608.08710, section 3.1).

    In a coupled group each producer's norms are divided by their mean over the channels, then summed.
    """

    __slots__ = ()

    name: str = "l1"
    version: int = 1
    needs: frozenset[Need] = frozenset()

    def removal_order(self, view: UnitView, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """A permutation of the channels (width,): the smallest l1 norm goes first."""
        return order_by(summed((weight.abs().sum(dim=1) for weight in view.producers), view.width))
