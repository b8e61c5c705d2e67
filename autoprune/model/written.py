"""Widths written down in modules: integer attributes that a forward pass needs to match the channels that are left.

`self.heads` in a `view(n, t, self.heads, -1)` is one. They are found by trying, not by name: an attribute counts when
with it the cut model does what the masked one does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations

from torch import nn

from autoprune.model.coupling import CUTTABLE, Candidate, Group, Number

MOST = 6
"""Attributes tried at once: all their combinations are."""


def with_numbers(model: nn.Module, candidate: Candidate, is_sound: Callable[[Group], bool]) -> Group | None:
    """The group with the attributes that its cut needs, the fewest that do; None when there are none that do."""
    possible = list(_possible(model, candidate))[:MOST]
    for count in range(len(possible) + 1):
        for chosen in combinations(possible, count):
            group = replace(candidate.group, numbers=chosen)
            if is_sound(group):
                return group
    return None


def _possible(model: nn.Module, candidate: Candidate) -> Iterator[Number]:
    """Integers of the reshaping modules that may count these channels: the width first, then multiples of it.

    A multiple is possible where so many positions make up, or divide, a channel on some side of a layer.
    """
    width = candidate.group.width
    per_channel = {member.positions.shape[1] for member in candidate.group.members}
    multiples: list[Number] = []
    for name in candidate.shapers:
        module = model.get_submodule(name)
        if isinstance(module, CUTTABLE):
            continue
        for attribute, value in vars(module).items():
            if not isinstance(value, int) or isinstance(value, bool) or value <= 0 or value % width:
                continue
            each = value // width
            if each == 1:
                yield Number(name, attribute, each)
            elif any(positions % each == 0 for positions in per_channel):
                multiples.append(Number(name, attribute, each))
    yield from multiples
