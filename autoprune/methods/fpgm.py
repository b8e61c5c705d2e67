"""Distance of a channel's weights to those of all the others."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from autoprune.methods.base import Need, UnitView, order_by
from autoprune.methods.scores import summed


@final
class FPGM:
    """Channels nearest to the geometric median of all channels go first (arXiv:1811.00250, section 3).

    As there, nearness is the sum of Euclidean distances to all other channels of the layer: the smaller it is, the
    better the others can stand in. In a coupled group each producer's sums are divided by their mean, then summed.
    """

    __slots__ = ()

    name: str = "fpgm"
    version: int = 1
    needs: frozenset[Need] = frozenset()

    def removal_order(self, view: UnitView, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """A permutation of the channels (width,): the smallest sum of distances goes first."""
        return order_by(summed((torch.cdist(weight, weight).sum(dim=1) for weight in view.producers), view.width))
