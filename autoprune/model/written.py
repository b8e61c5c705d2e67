"""Widths written down in modules: integer attributes that a forward pass needs to match the channels that are left.

`self.heads` in a `view(n, t, self.heads, -1)` is one, `self.config.heads` another. They are found by trying, not by
name: an attribute counts when with it the cut model does what the masked one does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import combinations
from types import FunctionType, MethodType
from typing import TypeGuard

from torch import Tensor, nn

from autoprune.model.coupling import CUTTABLE, Candidate, Group, Number

MOST = 6
"""Attributes tried at once: all their combinations are."""


def with_numbers(model: nn.Module, candidate: Candidate, is_sound: Callable[[Group], bool]) -> Group | None:
    """The group with the attributes that its cut needs, the fewest that do; None when there are none that do.

    What is called the same in many modules is tried as one first: a stream's width is written down in every block.
    """
    possible = list(_possible(model, candidate))
    alike: dict[tuple[str, int], list[Number]] = {}
    for number in possible:
        alike.setdefault((number.attribute, number.each), []).append(number)
    each = [[number] for number in possible]
    for parts in (list(alike.values()), each) if len(alike) < len(each) else (each,):
        for count in range(min(len(parts), MOST) + 1):
            for chosen in combinations(parts[:MOST], count):
                group = replace(candidate.group, numbers=tuple(number for part in chosen for number in part))
                if is_sound(group):
                    return group
    return None


def _possible(model: nn.Module, candidate: Candidate) -> Iterator[Number]:
    """Integers of the reshaping modules that may count these channels: their own first, then those in what they hold;
    of each, the width first, then multiples of it.

    A multiple is possible where so many positions make up, or divide, a channel on some side of a layer.
    """
    width = candidate.group.width
    per_channel = {member.positions.shape[1] for member in candidate.group.members}
    found: dict[tuple[bool, bool], list[Number]] = {}
    for name in candidate.shapers:
        module = model.get_submodule(name)
        if isinstance(module, CUTTABLE):
            continue
        for path, value in _integers(module):
            each, rest = divmod(value, width)
            if value > 0 and not rest and (each == 1 or any(positions % each == 0 for positions in per_channel)):
                found.setdefault(("." in path, each > 1), []).append(Number(name, path, each))
    for key in sorted(found):
        yield from found[key]


def _integers(module: nn.Module) -> Iterator[tuple[str, int]]:
    """Integer attributes, and those one step inside tuples, lists, dicts and plain objects such as configurations."""
    for attribute, held in vars(module).items():
        if _is_integer(held):
            yield attribute, held
        elif not attribute.startswith("_"):
            for key, value in _items(held):
                if _is_integer(value):
                    yield f"{attribute}.{key}", value


def _items(held: object) -> Iterable[tuple[object, object]]:
    """What an attribute holds, by the keys that `rebuilding.set_number` takes."""
    if type(held) in (tuple, list):
        return enumerate(held)  # type: ignore[arg-type]
    if isinstance(held, dict):
        return [(key, value) for key, value in held.items() if isinstance(key, str) and "." not in key]
    if isinstance(held, (nn.Module, Tensor, type, FunctionType, MethodType)) or not hasattr(held, "__dict__"):
        return ()
    return list(vars(held).items())


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
