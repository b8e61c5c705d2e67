"""Scale of the norm layers that a channel passes through."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from autoprune.methods.base import Need, UnitView, order_by
from autoprune.methods.l2 import l2_scores
from autoprune.methods.scores import summed


@final
class BNScale:
    """Channels with the smallest |gamma| go first (Network Slimming, arXiv:1708.06519, section 3).

    Several norm layers are each divided by their mean over the channels, then summed. A unit whose channels pass
    through no norm layer falls back to the order of `l2`.
    """

    __slots__ = ()

    name: str = "bn_scale"
    version: int = 1
    needs: frozenset[Need] = frozenset()

    def removal_order(self, view: UnitView, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """A permutation of the channels (width,): the smallest |gamma| goes first."""
        if not view.norm_scales:
            return order_by(l2_scores(view))
        return order_by(summed((scale.abs() for scale in view.norm_scales), view.width))
