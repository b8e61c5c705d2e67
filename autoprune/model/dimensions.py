"""Dimensions as widths: how many of a dimension's positions each unit sets, and products of several by two sides."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from autoprune.core.architecture import Width
from autoprune.model.axes.expressions import Expr
from autoprune.model.axes.trace import Traced
from autoprune.model.coupling import Group


def width_of(total: int, entries: Sequence[tuple[str, int, int]]) -> Width:
    """A side of `total` channels, of which `entries` (unit, positions a channel, unit width) vary."""
    variable = sum(times * width for _, times, width in entries)
    return Width(total - variable, tuple((unit, times) for unit, times, _ in entries))


@dataclass(frozen=True, slots=True)
class Dimensions:
    """Which axes of a run are units."""

    traced: Traced
    units: Mapping[int, tuple[str, int]]
    """Axis -> unit and its width."""

    @classmethod
    def of(cls, traced: Traced, groups: Sequence[Group]) -> Dimensions:
        """Axes of units are known by where they lie in parameters."""
        units: dict[int, tuple[str, int]] = {}
        for group in groups:
            for parameter, dim, positions in _places(group):
                dims = traced.dims.get(parameter)
                found = traced.axes.places(dims[dim])[0] if dims is not None else {}
                axis = next((axis for axis, places in found.items() if places == positions), None)
                if axis is not None:
                    units[axis] = group.root, group.width
        return cls(traced, units)

    def width(self, expr: Expr) -> Width:
        """A dimension as a width. Where two units multiply in it, the wider counts and the other stays: never too
        little.
        """
        axes, size = self.traced.axes, self.traced.axes.size(expr)
        inside = axes.leaves(expr) & self.units.keys()
        if not inside:
            return Width(size)
        places = axes.places(expr)[0]
        taken: set[int] = set()
        entries = []
        for axis in sorted(inside, key=lambda axis: -self.units[axis][1]):
            own = {place for part in places[axis] for place in part}
            if own.isdisjoint(taken):
                taken |= own
                entries.append((self.units[axis][0], len(places[axis][0]), self.units[axis][1]))
        return width_of(size, entries)


def _places(group: Group) -> Iterator[tuple[str, int, list[list[int]]]]:
    """Parameters and buffers in which a group's channels lie, as dimension and positions."""
    for member in group.members:
        if member.axis != "in":
            yield f"{member.layer}.weight", 0, member.positions.tolist()
            yield f"{member.layer}.running_mean", 0, member.positions.tolist()
    for slab in group.slabs:
        yield slab.parameter, slab.dim, slab.positions.tolist()


def two_sided(sizes: Sequence[int], widths: Sequence[Width]) -> tuple[Width, Width, int]:
    """Dimensions that multiply, as inputs, outputs and how often. Of more than two that units set, the widest two
    vary and the others count whole: a bound from above.
    """
    varying = sorted((i for i, width in enumerate(widths) if width.terms), key=lambda i: -sizes[i])
    first, second = sorted(list(dict.fromkeys((*varying, *range(len(widths)))))[:2])
    rest = math.prod(size for i, size in enumerate(sizes) if i not in (first, second))
    return widths[first], widths[second], rest
