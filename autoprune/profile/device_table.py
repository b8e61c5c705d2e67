"""Times of a device that cannot be reached, laid over a model's units: what a search may then try, and what it takes.

Nothing is interpolated or guessed: units that the table does not name stay whole and are part of its base, the others
take the table's levels alone. Knows units and spaces; how files of times are written is the importers' to know.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from autoprune.core.pattern import parse_pattern, percent
from autoprune.core.space import Space, UnitOptions
from autoprune.core.unit import Form, Option, Unit
from autoprune.errors import ConfigError, PolicyError, listed, near_miss
from autoprune.files import read_limited
from autoprune.importers.reading import MOST_TOLD
from autoprune.importers.tables import Level, UnitTimes, read_times
from autoprune.model.fingerprint import of_text
from autoprune.profile.unit_latency import UnitLatency
from autoprune.spaces import Narrowing, SpaceSpec, WeightChoice, resolve

_FORMS: tuple[Form, ...] = tuple(form for form in get_args(Form) if form != "integer")
"""A table says what is kept, and not in what arithmetic: its times are those of floats."""
_LONGEST = 200
_MOST = 1 - 1e-8
"""The largest share of zeros that can be written as a pattern."""
_SPARSIFIER = "add {method: sparsegpt, patterns: [50%]} to its weights"
_ADVICE = (
    "a unit that is not to change has no rows: what it takes whole is part of `base`; `autoprune units` lists the units"
)


@dataclass(frozen=True, slots=True)
class DeviceTable:
    """A table of times and the name of its file."""

    file: str
    times: UnitTimes

    @property
    def name(self) -> str:
        """For people: `table device.csv`."""
        return f"table {self.file}"

    @property
    def digest(self) -> str:
        """Of its numbers: another order of rows is the same table."""
        units = sorted((unit, sorted(levels.items())) for unit, levels in self.times.times.items())
        return of_text(self.times.base_ms, units)


def read_table(path: Path) -> DeviceTable:
    """The table in a file: CSV rows `unit,keep,ms` with a row `base,,ms`, or SPDY's timings. Raises ConfigError."""
    try:
        content = read_limited(path, error=PolicyError)
        return DeviceTable(path.name, read_times(content, name=str(path)))
    except PolicyError as damaged:
        raise ConfigError(f"latency table: {damaged}") from damaged


def laid(table: DeviceTable, units: Sequence[Unit], spec: SpaceSpec) -> tuple[Space, UnitLatency]:
    """The space whose units take the table's levels alone (widths of channels, sparsities of SPDY's layers: in place of
    those of `spec`; all else: those options of `spec` that it names), and the latency of its choices.

    Raises ConfigError with all units and levels of the table that are not there.
    """
    whole = resolve(units, spec, forms=_FORMS)
    laying = _Laying(spec)
    given = _by_unit(table.times, whole, laying)
    entries = []
    for entry in whole.entries:
        levels = given.get(entry.unit.name)
        entries.append(UnitOptions(entry.unit, entry.options[:1]) if levels is None else laying.entry(entry, levels))
    if laying.problems:
        told = laying.problems[:MOST_TOLD]
        lines = listed([*told, "and more"] if len(laying.problems) > MOST_TOLD else told)
        raise ConfigError(f"latency {table.name} does not fit this model and space:\n{lines}\n{_ADVICE}")
    space = Space(tuple(entries))
    latency = UnitLatency(table.name, table.times.base_ms, laying.times, space)
    if not latency.dense_s > 0:
        raise ConfigError(f"latency {table.name}: the dense model takes 0 ms by it; give times above zero")
    return space, latency


def _by_unit(times: UnitTimes, space: Space, laying: _Laying) -> dict[str, Mapping[Level, float]]:
    """The table's levels by unit. What SPDY calls a layer is here the unit of the layer's weights."""
    found: dict[str, Mapping[Level, float]] = {}
    weights = {unit.name for unit in space.units if unit.kind == "weights"}
    everything = set(space.names)
    for name, levels in times.times.items():
        unit, known = (f"{name}.weight", weights) if _is_sparsity(levels) else (name, everything)
        if unit in known:
            found[unit] = levels
        elif laying.listens:
            laying.wrong(unit, f"is no unit of this model in this space; {_nearest(unit, known)}")
    return found


def _is_sparsity(levels: Iterable[Level]) -> bool:
    """Whether levels are shares of zeros, as SPDY has them, and not numbers of what stays."""
    return any(isinstance(level, float) for level in levels)


def _nearest(name: str, known: Iterable[str]) -> str:
    text = near_miss(name, known)
    return text if len(text) <= _LONGEST else "none is called alike"


@dataclass(slots=True)
class _Laying:
    """Levels become options; what cannot is collected."""

    spec: SpaceSpec
    times: dict[str, dict[Option, float]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def listens(self) -> bool:
        """Whether one more problem would be told: a file may have a million."""
        return len(self.problems) <= MOST_TOLD

    def wrong(self, unit: str, text: str) -> None:
        """Something that the table names is not there."""
        self.problems.append(f"{unit}: {text}")

    def entry(self, whole: UnitOptions, levels: Mapping[Level, float]) -> UnitOptions:
        """A unit with the options that have a time."""
        unit = whole.unit
        if _is_sparsity(levels):
            return self._sparse(whole, levels)
        if unit.width not in levels:
            self.wrong(unit.name, f"has no time for all that it has; add a row `{unit.name},{unit.width},MS`")
        if unit.narrows:
            whole = self._narrowed(unit, levels)
        options = tuple(option for option in whole.options if option.keep in levels)
        self._check(whole, levels)
        self.times[unit.name] = {option: levels[option.keep] for option in options}
        return whole if unit.width not in levels else UnitOptions(unit, options)

    def _narrowed(self, unit: Unit, levels: Iterable[Level]) -> UnitOptions:
        """Every method at each of the table's widths."""
        widths = tuple(sorted(int(level) for level in levels if 0 < level < unit.width))
        if not widths:
            return resolve([unit], self.spec.model_copy(update={unit.kind: None})).entries[0]
        return resolve([unit], self._with({unit.kind: Narrowing(widths=widths, align=1)})).entries[0]

    def _sparse(self, whole: UnitOptions, levels: Mapping[Level, float]) -> UnitOptions:
        """Every sparsifier of single zeros at each of the table's sparsities, and dense weights as they are stored."""
        unit = whole.unit
        patterns = {percent(level): ms for level, ms in levels.items() if 0 < level < _MOST}
        dense = [choice for choice in self.spec.weights if choice.method == "dense"]
        sparse = [
            choice for choice in self.spec.weights if 32 in choice.inputs and any(map(_is_single, choice.patterns))
        ]
        if 0 not in levels:
            self.wrong(unit.name, "has no time for all of its weights; add a line `SECONDS 0.0`")
        if any(level >= _MOST for level in levels):
            self.wrong(unit.name, "a sparsity leaves none of its weights; leave that line out")
        if patterns and not sparse:
            self.wrong(unit.name, f"its zeros may not be anywhere in this space; {_SPARSIFIER}")
        if 0 not in levels or not sparse:
            self.times[unit.name] = dict.fromkeys(whole.options[:1], levels.get(0, 0.0))
            return UnitOptions(unit, whole.options[:1])
        laid_on = [choice.model_copy(update={"patterns": tuple(patterns)}) for choice in sparse if patterns]
        entry = resolve([unit], self._with({"weights": (*dense, *laid_on)}), forms=_FORMS).entries[0]
        self.times[unit.name] = {option: patterns.get(option.pattern, levels[0]) for option in entry.options}
        return entry

    def _check(self, whole: UnitOptions, levels: Iterable[Level]) -> None:
        """Every level is that of some option; of a layer's weights, that of one pattern or rank."""
        unit = whole.unit
        kinds: dict[Level, set[str]] = {}
        for option in whole.options:
            kinds.setdefault(option.keep, set()).add(option.pattern or f"rank {option.rank}")
        allowed = f"1 to {unit.width}" if unit.narrows else ", ".join(map(str, sorted(kinds, reverse=True)))
        for level in levels:
            if not self.listens:
                return
            if level not in kinds:
                self.wrong(unit.name, f"keep is given as {level}, allowed in this space: {allowed}")
            elif unit.kind == "weights" and len(kinds[level]) > 1:
                told = " and ".join(sorted(kinds[level]))
                self.wrong(unit.name, f"keep {level} is {told}, which a table cannot tell apart; have one in the space")

    def _with(self, changes: Mapping[str, Narrowing | tuple[WeightChoice, ...]]) -> SpaceSpec:
        return self.spec.model_copy(update=dict(changes))


def _is_single(pattern: str) -> bool:
    """Whether zeros may be anywhere."""
    return bool(pattern) and parse_pattern(pattern).kind == "unstructured"
