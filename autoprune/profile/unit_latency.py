"""Latency of any choice by times of units that somebody else measured: a sum, with nothing interpolated.

Knows options and their times. Does not know where the times are from, and measures nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import numpy as np
from numpy.typing import NDArray

from autoprune.core.space import Choice, Space
from autoprune.core.unit import DROP, Option
from autoprune.profile.widths import Array, Choices

_DIGITS = 9
"""Of milliseconds: sums of a table's numbers are those that a person would write, not 0.3 and a hair."""


@final
class UnitLatency:
    """Seconds of the choices of one space: a base, and what each unit takes at its option. Immutable.

    `times` are milliseconds of the options of units by name; a unit that is not there takes no time of its own.
    """

    def __init__(self, name: str, base_ms: float, times: Mapping[str, Mapping[Option, float]], space: Space) -> None:
        self.name = name
        self._base_ms = base_ms
        self._times = times
        self._space = space
        self._table = np.zeros((len(space.entries), max(space.sizes, default=1)))  # (U, O), 0 where padded
        for row, entry in enumerate(space.entries):
            own = times.get(entry.unit.name)
            if own is not None:
                self._table[row, : len(entry.options)] = [own[option] for option in entry.options]

    def on(self, space: Space) -> UnitLatency:
        """The same for a space with fewer options. Raises KeyError for one that has no time."""
        return UnitLatency(self.name, self._base_ms, self._times, space)

    @property
    def dense_s(self) -> float:
        """What the dense model takes."""
        return float(_seconds(self._base_ms + self._table[:, 0].sum()))

    def evaluate(self, choices: Choices, moot: NDArray[np.bool_]) -> Array:
        """Seconds (P,) of choices (P, U); what is `moot` (P, U), inside a dropped block, takes none."""
        each = self._table[np.arange(len(self._table)), np.asarray(choices, dtype=np.int64)]
        return _seconds(self._base_ms + np.where(moot, 0.0, each).sum(axis=1))

    def cheapest(self) -> Choice:
        """The choice that takes least, exactly: of each unit the best option with the best inside of what it holds."""
        choice = [0] * len(self._table)
        parents = self._space.parents()

        def least(unit: int) -> float:
            inside = sum(least(child) for child, parent in enumerate(parents) if parent == unit)
            options = self._space.entries[unit].options
            held = np.asarray([0.0 if option == DROP else inside for option in options])
            totals = held + self._table[unit, : len(options)]
            choice[unit] = int(totals.argmin())
            return float(totals.min())

        for unit, parent in enumerate(parents):
            if parent is None:
                least(unit)
        return self._space.normal(tuple(choice))


def _seconds(ms: Array) -> Array:
    seconds: Array = 1e-3 * np.round(ms, _DIGITS)
    return seconds
