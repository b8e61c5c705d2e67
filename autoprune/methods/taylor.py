"""First-order estimate of what the loss loses with a channel."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from autoprune.methods.base import Need, UnitView, order_by
from autoprune.methods.scores import needed


@final
class Taylor:
    """Channels whose activation times gradient is smallest go first (arXiv:1906.10771, section 3).

    The score is the squared change of the loss when a gate on the channel closes, to first order, over samples.
    """

    __slots__ = ()

    name: str = "taylor"
    version: int = 1
    needs: frozenset[Need] = frozenset({"gradients"})

    def removal_order(self, view: UnitView, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """A permutation of the channels (width,): the smallest estimated change goes first. DataError without it."""
        return order_by(needed(view.taylor, "gradients", view))
