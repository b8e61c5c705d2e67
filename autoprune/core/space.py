"""The space of a search: for every unit, its options. A choice is one option index a unit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from autoprune.core.unit import DROP, Option, Unit, keep_all

Choice = tuple[int, ...]
"""One option index for every unit, in the space's order."""


@dataclass(frozen=True, slots=True)
class UnitOptions:
    """One unit and its options, widest first; `options[0]` leaves it as it is."""

    unit: Unit
    options: tuple[Option, ...]

    def __post_init__(self) -> None:
        if not self.options or self.options[0] != keep_all(self.unit):
            raise ValueError(f"{self.unit.name}: the first option must keep the unit as it is")
        keeps = [option.keep for option in self.options]
        if keeps != sorted(keeps, reverse=True) or len(set(self.options)) != len(self.options):
            raise ValueError(f"{self.unit.name}: options must be distinct and sorted by width, widest first")
        if self.unit.narrows and keeps[-1] < 1:
            raise ValueError(f"{self.unit.name}: at least one channel must stay")


@dataclass(frozen=True, slots=True)
class Space:
    """All units of a search with their options. A unit's parent, when it has one, is in the space too."""

    entries: tuple[UnitOptions, ...]

    def __post_init__(self) -> None:
        names = [entry.unit.name for entry in self.entries]
        if len(set(names)) != len(names):
            raise ValueError("unit names must be distinct")

    @property
    def units(self) -> tuple[Unit, ...]:
        """The units, in order."""
        return tuple(entry.unit for entry in self.entries)

    @property
    def names(self) -> tuple[str, ...]:
        """The units' names, in order."""
        return tuple(entry.unit.name for entry in self.entries)

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many options each unit has."""
        return tuple(len(entry.options) for entry in self.entries)

    @property
    def dense(self) -> Choice:
        """The choice that keeps everything."""
        return (0,) * len(self.entries)

    def parents(self) -> tuple[int | None, ...]:
        """For each unit the index of the block unit that contains it, if that is in the space."""
        index = {name: position for position, name in enumerate(self.names)}
        return tuple(index.get(unit.parent) if unit.parent is not None else None for unit in self.units)

    def options_of(self, choice: Choice) -> dict[str, Option]:
        """What a choice decides: unit name to option, without units that stay and what a dropped block holds."""
        parents = self.parents()
        chosen = [entry.options[index] for entry, index in zip(self.entries, choice, strict=True)]
        decided: dict[str, Option] = {}
        for position, (entry, option) in enumerate(zip(self.entries, chosen, strict=True)):
            parent = parents[position]
            moot = parent is not None and chosen[parent] == DROP
            if option != entry.options[0] and not moot:
                decided[entry.unit.name] = option
        return decided

    def choice_of(self, options: Mapping[str, Option]) -> Choice:
        """The inverse of `options_of`. Raises KeyError for a unit or an option that the space does not have."""
        unknown = set(options) - set(self.names)
        if unknown:
            raise KeyError(f"units not in the space: {', '.join(sorted(unknown))}")
        choice = []
        for entry in self.entries:
            option = options.get(entry.unit.name, entry.options[0])
            if option not in entry.options:
                raise KeyError(f"{entry.unit.name}: option {option.label} is not in the space")
            choice.append(entry.options.index(option))
        return tuple(choice)

    def normal(self, choice: Choice) -> Choice:
        """The same decision with everything inside a dropped block set to keep, so that equal decisions are equal."""
        return self.choice_of(self.options_of(choice))
