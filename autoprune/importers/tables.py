"""Times that others measured: SPDY's files, and tables of devices that cannot be reached from here.

Knows texts and numbers. Does not know what the units of a model are, nor how a search uses the times.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from autoprune.errors import PolicyError
from autoprune.importers.reading import Reading, number_of
from autoprune.importers.texts import lines_of, rows_of

BASE = "base"
HEADER = "a first row `unit,keep,ms`"
MOST_MS = 1e9
MOST_KEEP = 10_000_000

Level = int | float
"""How many channels stay (a whole number), or the share of weights that are zero."""


@dataclass(frozen=True, slots=True)
class UnitTimes:
    """Milliseconds of each unit (or layer) at each of its levels, and of what no unit has a part in."""

    base_ms: float
    times: Mapping[str, Mapping[Level, float]]


def read_times(content: bytes, *, name: str) -> UnitTimes:
    """SPDY's timings where the first word is `base` alone, else a CSV table `unit,keep,ms`. Raises PolicyError."""
    _, words = next(lines_of(content, name=name), (1, []))
    return spdy_times(content, name=name) if words == [BASE] else table_times(content, name=name)


@dataclass(slots=True)
class _Times:
    """What was read so far."""

    reading: Reading
    times: dict[str, dict[Level, float]] = field(default_factory=dict)

    def milliseconds(self, value: object, where: str) -> float | None:
        """A time, or None where it is none."""
        number = number_of(value)
        if number is None or not 0 <= number < MOST_MS or str(value).strip().endswith("%"):
            self.reading.wrong(where, value, f"a time of 0 or more and below {MOST_MS:g}")
            return None
        return number

    def add(self, unit: str, level: Level, ms: float, where: str) -> None:
        """One time, of which there may be one."""
        own = self.times.setdefault(unit, {})
        if level in own:
            self.reading.wrong(where, f"{unit} at {level} again", "one time for each level")
        own[level] = ms


def table_times(content: bytes, *, name: str) -> UnitTimes:
    """A CSV table, `unit,keep,ms`; the row of the unit `base` gives what does not depend on any unit.

    Raises PolicyError with all that is wrong in it.
    """
    rows = rows_of(content, name=name)
    line, header = next(rows, (1, []))
    if [cell.lower() for cell in header] != ["unit", "keep", "ms"]:
        raise PolicyError(f"{name}, line {line}: given {','.join(header)[:80]!r}, allowed: {HEADER}")
    found, base = _Times(Reading(name)), None
    for number, cells in rows:
        where = f"line {number}"
        if len(cells) != 3:
            found.reading.wrong(where, ",".join(cells), "a unit, what it keeps, and milliseconds: `stem.0,24,1.83`")
            continue
        unit, ms = found.reading.layer(cells[0], where), found.milliseconds(cells[2], where)
        if unit == BASE:
            if base is not None or cells[1]:
                found.reading.wrong(where, ",".join(cells), "one row `base,,MS`")
            base = ms
            continue
        keep = int(cells[1]) if cells[1].isascii() and cells[1].isdigit() and len(cells[1]) <= 8 else -1
        if not 0 <= keep <= MOST_KEEP:
            found.reading.wrong(where, cells[1], "a whole number of what stays, 0 for a dropped block")
        elif unit is not None and ms is not None:
            found.add(unit, keep, ms, where)
    return _finished(found, base, missing="a row `base,,MS` with what does not depend on any unit")


def spdy_times(content: bytes, *, name: str) -> UnitTimes:
    """SPDY's timings: `base` and `prunable`, each with seconds on the next line, then layers, each with lines of
    seconds and sparsity. What is not prunable is the base here. Raises PolicyError with all that is wrong in it.
    """
    found, lines = _Times(Reading(name)), lines_of(content, name=name)
    head: dict[str, float] = {}
    for key in (BASE, "prunable"):
        number, words = next(lines, (1, []))
        if words != [key]:
            raise PolicyError(f"{name}, line {number}: given {' '.join(words)[:80]!r}, allowed: {key!r}")
        number, words = next(lines, (number, []))
        ms = found.milliseconds(" ".join(words), f"line {number}")
        head[key] = 0.0 if ms is None else 1e3 * ms
    layer: str | None = None
    for number, words in lines:
        where = f"line {number}"
        if len(words) == 1:
            layer = found.reading.layer(words[0], where)
            if layer in found.times:
                found.reading.wrong(where, layer, "every layer once")
        elif len(words) != 2 or layer is None:
            found.reading.wrong(where, " ".join(words), "a layer's name, or seconds and a sparsity below its name")
        else:
            ms, sparsity = found.milliseconds(words[0], where), found.reading.share(words[1], where)
            if ms is not None and sparsity is not None:
                found.add(layer, sparsity, 1e3 * ms, where)
    if head["prunable"] > head[BASE]:
        found.reading.wrong("prunable", head["prunable"] / 1e3, f"no more than the whole, {head[BASE] / 1e3:g}")
    return _finished(found, head[BASE] - head["prunable"], missing="")


def _finished(found: _Times, base_ms: float | None, *, missing: str) -> UnitTimes:
    """Raises PolicyError with all problems."""
    if base_ms is None:
        found.reading.wrong("the file", None, missing)
    if not found.times:
        found.reading.wrong("the file", None, "times of at least one unit")
    found.reading.found()
    assert base_ms is not None
    return UnitTimes(base_ms, found.times)
