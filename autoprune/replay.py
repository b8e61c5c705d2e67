"""A history of removed channels, done again: indices of each step count what is left after the steps before it.

Knows positions along sides of layers and the units that own them. Does not know what a model computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from autoprune.importers.base import Exactly, Wanted


@dataclass(frozen=True, slots=True)
class Place:
    """Where a unit lies along one side of a layer: `positions` (width, each) of each of its channels."""

    unit: str
    positions: Tensor


@final
@dataclass(slots=True)
class Replay:
    """What is left of units so far. A unit of which a step fails is given up: what later steps mean is unknown then."""

    failed: dict[str, list[tuple[Wanted, str]]] = field(default_factory=dict)
    _masks: dict[str, Tensor] = field(default_factory=dict)
    _last: dict[str, Wanted] = field(default_factory=dict)

    @property
    def kept(self) -> dict[str, tuple[Tensor, Wanted]]:
        """Unit -> which channels stay, bool, and the last step that took some; without those that were given up."""
        return {name: (mask, self._last[name]) for name, mask in self._masks.items()
                if name in self._last and name not in self.failed}  # fmt: skip

    def step(self, wanted: Wanted, layer: str, places: Sequence[Place], full: int) -> None:
        """Take away channels along one side of `layer`, of `full` positions, which `places` own some of."""
        assert isinstance(wanted.amount, Exactly)
        why = self._took(wanted, places, full, wanted.amount.removed)
        if why:
            for place in places:
                self.failed.setdefault(place.unit, []).append((wanted, f"{layer}: {why}"))

    def _took(self, wanted: Wanted, places: Sequence[Place], full: int, removed: Sequence[int]) -> str:
        """Do it; or the reason why not."""
        if any(place.unit in self.failed for place in places):
            return "a step before it could not be done"
        there = torch.ones(full, dtype=torch.bool)
        for place in places:
            mask = self._masks.setdefault(place.unit, torch.ones(len(place.positions), dtype=torch.bool))
            there[place.positions[~mask].flatten()] = False
        left = there.nonzero().flatten()
        if max(removed) >= len(left):
            return f"channel {max(removed)} is to go, and {len(left)} are left"
        gone = torch.zeros(full, dtype=torch.bool)
        gone[left[torch.tensor(removed, dtype=torch.int64)]] = True
        counts = [gone[place.positions].sum(1) for place in places]  # of each channel, how many of its positions go
        if sum(int(count.sum()) for count in counts) < len(removed):
            return "channels are to go that must stay"
        if any(bool(((count > 0) & (count < place.positions.shape[1])).any())
               for count, place in zip(counts, places, strict=True)):  # fmt: skip
            return "a part of what can only go as a whole (a head, or one channel of every group) is to go"
        masks = {
            place.unit: self._masks[place.unit] & (count == 0) for count, place in zip(counts, places, strict=True)
        }
        if not all(bool(mask.any()) for mask in masks.values()):
            return "none of its channels would stay"
        self._last |= {unit: wanted for unit, mask in masks.items() if not torch.equal(mask, self._masks[unit])}
        self._masks |= masks
        return ""
