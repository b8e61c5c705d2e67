"""How often, and how strongly, a channel is active."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from autoprune.methods.base import Need, UnitView, order_by
from autoprune.methods.scores import needed


@final
class Activation:
    """Channels with the largest share of zero activations go first (APoZ, arXiv:1607.03250, section 3).

    The score is the pair (1 - zero share, mean |activation|), compared like words: the share of zeros decides, and
    equal shares go by strength. After an activation that is never exactly zero (SiLU, GELU) all shares are equal
    and the order is that of mean |activation|.
    """

    __slots__ = ()

    name: str = "activation"
    version: int = 1
    needs: frozenset[Need] = frozenset({"activity"})

    def removal_order(self, view: UnitView, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """A permutation of the channels (width,): the most often silent goes first. DataError without activity."""
        activity = needed(view.activity, "activity", view)
        by_strength = order_by(activity.mean_abs)
        # The second sort is stable, so that equal shares stay in the order of strength.
        return by_strength[order_by(1.0 - activity.zero_share[by_strength])]
