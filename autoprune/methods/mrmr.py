"""Minimum redundancy, maximum relevance: keep channels that tell the class and do not repeat each other."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from autoprune.methods.base import Need, UnitView
from autoprune.methods.scores import needed

CONSTANT = 1e-20  # a channel whose variance is below this share of its mean square says nothing
BELOW_ALL = -2.0  # under every live score: relevance is at least 0, redundancy at most 1


@final
class MRMR:
    """Greedy forward selection of channels by relevance minus redundancy; the last selected goes first.

    Peng, Long, Ding 2005 (IEEE TPAMI 27(8)), equations 4 to 7, the difference form. Mutual information is replaced
    by its cheap counterparts for continuous features (Ding and Peng 2005): relevance is the correlation ratio
    eta^2 in [0, 1] of the channel's mean activation against the class (the share of its variance that lies between
    classes, a monotone function of the ANOVA F statistic); redundancy is the mean |Pearson correlation| with the
    channels selected so far. Channels that never vary go before all others.
    """

    __slots__ = ()

    name: str = "mrmr"
    version: int = 1
    needs: frozenset[Need] = frozenset({"activity"})

    def removal_order(self, view: UnitView, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """A permutation of the channels (width,): the last selected goes first. DataError without activity."""
        activity = needed(view.activity, "activity", view)
        features, varies = _standardised(activity.per_sample)
        relevance = torch.where(varies, correlation_ratio(features, activity.targets), BELOW_ALL)
        return select(relevance, (features.T @ features).abs()).flip(0)


def correlation_ratio(features: Tensor, targets: Tensor) -> Tensor:
    """eta^2 (width,) of centred `features` (samples, width) of unit energy against the classes `targets`."""
    classes, index, counts = torch.unique(targets, return_inverse=True, return_counts=True)
    sums = features.new_zeros(len(classes), features.shape[1]).index_add(0, index, features)
    between: Tensor = sums.square() / counts[:, None]
    return between.sum(dim=0)


def select(relevance: Tensor, redundancy: Tensor) -> Tensor:
    """The order (width,) in which greedy forward selection takes the channels; ties go to the lower index.

    `relevance` is (width,), `redundancy` (width, width) between pairs. O(width^2) in all.
    """
    available = torch.zeros_like(relevance)  # 0, or -inf once selected
    shared = torch.zeros_like(relevance)  # the sum of redundancies with the selected
    selected: list[int] = []
    for step in range(len(relevance)):
        best = int(torch.argmax(relevance - shared / max(step, 1) + available))
        selected.append(best)
        available[best] = -torch.inf
        shared += redundancy[best]
    return torch.tensor(selected, dtype=torch.int64)


def _standardised(per_sample: Tensor) -> tuple[Tensor, Tensor]:
    """Centred features of unit energy (samples, width), zeros for constant ones; and which are not constant."""
    centred = per_sample - per_sample.mean(dim=0)
    energy = centred.square().sum(dim=0)
    varies = energy > CONSTANT * per_sample.square().sum(dim=0)
    return torch.where(varies, centred / torch.where(varies, energy, 1.0).sqrt(), 0.0), varies
