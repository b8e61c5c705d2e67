"""Units and what can be done to them: the vocabulary of a decision. No weights, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["channels", "block"]
Compensate = Literal["none", "least_squares"]


@dataclass(frozen=True, slots=True)
class Unit:
    """The smallest thing a policy decides about.

    A `channels` unit is named by the root layer of a group of coupled channels and has `width` of them; a `block`
    unit is named by its module and has width 1. `layers` are all layers it touches; `parent` is the block unit whose
    removal makes this unit moot.
    """

    name: str
    kind: Kind
    width: int
    layers: tuple[str, ...]
    parent: str | None = None


@dataclass(frozen=True, slots=True)
class Option:
    """One thing done to one unit: `method` chooses which `keep` of its channels stay, `compensate` mends the rest.

    The method `keep` leaves the unit as it is; the method `drop` removes a block (keep 0).
    """

    method: str
    keep: int
    compensate: Compensate = "none"

    @property
    def label(self) -> str:
        """A short name, unique within a unit: `obs+least_squares:12`."""
        return f"{self.method}{'+' + self.compensate if self.compensate != 'none' else ''}:{self.keep}"


def keep_all(unit: Unit) -> Option:
    """The option that leaves `unit` as it is; every unit has it."""
    return Option("keep", unit.width)


DROP = Option("drop", 0)
