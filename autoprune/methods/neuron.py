"""Neurons that hardly fire, or that hardly anyone listens to."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from autoprune.methods.base import Need, UnitView, order_by
from autoprune.methods.scores import needed


@final
class Neuron:
    """Neurons whose root mean square activation times the norm of their outgoing weights is least go first.

    It is the score of single weights of arXiv:2306.11695, section 3, added up (as squares) over all weights that read
    the neuron: about how much of its consumers' outputs goes with it when nothing takes its place.
    """

    __slots__ = ()

    name: str = "neuron"
    version: int = 1
    needs: frozenset[Need] = frozenset({"activity"})

    def removal_order(self, view: UnitView, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """A permutation of the channels (width,): what hardly fires goes first. DataError without activity."""
        heard = torch.zeros(view.width, dtype=torch.float64)
        for consumer in view.consumers:
            heard += (consumer.weight * consumer.scale[:, None, None]).square().sum((0, 2))
        return order_by(needed(view.activity, "activity", view).mean_square * heard)
