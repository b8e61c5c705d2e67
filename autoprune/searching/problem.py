"""What a search is given: the space, what choices cost, what they may cost, and priors of harm.

Knows how choices, families (a block and the units inside it) and limits relate. Knows nothing of how costs are
predicted, how harm was estimated, or how anything is searched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from autoprune.core.budget import Metric
from autoprune.core.space import Choice, Space
from autoprune.core.unit import DROP

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


class CostPredictor(Protocol):
    """Predicts what choices cost, in each metric's own unit (seconds, MACs, parameters, bytes)."""

    def evaluate(self, metric: Metric, choices: Ints) -> Floats:
        """Predicted cost of each choice: (choices, units) option indices -> (choices,)."""
        ...

    def linearise(self, metric: Metric, incumbent: Choice) -> Sequence[Floats]:
        """For each unit (options,): the exact cost difference from `incumbent` when that one option is replaced."""
        ...

    def is_additive(self, metric: Metric) -> bool:
        """Whether differences of several units simply add up, so that one linearisation holds everywhere."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Structure:
    """A space as arrays, padded to the largest number of options; `u` runs over units, `o` over options."""

    sizes: Ints  # (units,)
    parents: tuple[int | None, ...]
    drops: tuple[int | None, ...]  # index of the DROP option of each unit
    valid: Bools  # (units, options)
    keeps: Ints  # (units, options), -1 where padded
    methods: Ints  # (units, options), index into method_names, 0 where nothing is done, -1 where padded
    method_names: tuple[str, ...]
    parent_index: Ints  # (units,), -1 without a parent
    drop_index: Ints  # (units,), -1 without a DROP option
    depth: int

    def moot(self, choices: Ints) -> Bools:
        """(choices, units): whether a unit sits inside a dropped block, so that its own option means nothing."""
        gone = choices == self.drop_index
        moot = np.zeros(choices.shape, dtype=np.bool_)
        has_parent = self.parent_index >= 0
        for _ in range(self.depth):
            moot = (gone | moot)[:, self.parent_index] & has_parent
        return moot

    def normal(self, choices: Ints) -> Ints:
        """The same decisions, with option 0 for everything inside a dropped block: (choices, units)."""
        return np.where(self.moot(choices), 0, choices)

    def padded(self, rows: Sequence[Floats], fill: float) -> Floats:
        """(units, options) from one array a unit, with `fill` where a unit has fewer options."""
        matrix = np.full(self.valid.shape, fill)
        matrix[self.valid] = np.concatenate([np.asarray(row, dtype=np.float64) for row in rows])
        return matrix


def structure_of(space: Space) -> Structure:
    """The arrays of a space."""
    sizes = np.array(space.sizes, dtype=np.int64)
    width = int(sizes.max(initial=1))
    valid = np.arange(width) < sizes[:, None]
    labels: dict[str, int] = {"keep": 0}
    keeps = np.full(valid.shape, -1, dtype=np.int64)
    methods = np.full(valid.shape, -1, dtype=np.int64)
    for row, entry in enumerate(space.entries):
        for column, option in enumerate(entry.options):
            label = option.method if option.compensate == "none" else f"{option.method}+{option.compensate}"
            keeps[row, column] = option.keep
            methods[row, column] = labels.setdefault(label, len(labels))
    parents = space.parents()
    drops = tuple(entry.options.index(DROP) if DROP in entry.options else None for entry in space.entries)
    return Structure(
        sizes=sizes,
        parents=parents,
        drops=drops,
        valid=valid,
        keeps=keeps,
        methods=methods,
        method_names=tuple(labels),
        parent_index=np.array([-1 if parent is None else parent for parent in parents], dtype=np.int64),
        drop_index=np.array([-1 if drop is None else drop for drop in drops], dtype=np.int64),
        depth=max((_depth(unit, parents) for unit in range(len(parents))), default=0),
    )


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """A search: which choices there are, which limits they must meet, and what is believed about harm beforehand.

    `limits` are in each metric's own unit; `priors` are, by name, one (options,) array of harm >= 0 a unit, with
    harm 0 for option 0. Raises ValueError when a limit is not positive or a prior does not match the space.
    """

    space: Space
    costs: CostPredictor
    limits: Mapping[Metric, float]
    priors: Mapping[str, Sequence[Floats]]
    structure: Structure = field(init=False)

    def __post_init__(self) -> None:
        for metric, limit in self.limits.items():
            if not limit > 0:
                raise ValueError(f"the limit on {metric} must be above zero, not {limit}")
        for name, harm in self.priors.items():
            if tuple(len(row) for row in harm) != self.space.sizes:
                raise ValueError(f"prior {name!r} does not have one value for every option of every unit")
            if any(row[0] != 0 or not np.all(np.asarray(row) >= 0) for row in harm):
                raise ValueError(f"prior {name!r} must be at least 0 everywhere and 0 for keeping everything")
        object.__setattr__(self, "structure", structure_of(self.space))

    def predict(self, choices: Ints) -> dict[Metric, Floats]:
        """Predicted cost of (choices, units) in every limited metric: metric -> (choices,)."""
        return {metric: np.asarray(self.costs.evaluate(metric, choices), dtype=np.float64) for metric in self.limits}

    def fits_each(self, choices: Ints) -> Bools:
        """(choices,): whether every limit holds."""
        fitting = np.ones(len(choices), dtype=np.bool_)
        for metric, cost in self.predict(choices).items():
            fitting &= cost <= self.limits[metric]
        return fitting

    def fits(self, choice: Choice) -> bool:
        """Whether every limit holds for one choice."""
        return bool(self.fits_each(as_row(choice))[0])

    def costs_of(self, choice: Choice) -> dict[Metric, float]:
        """Predicted cost of one choice in every limited metric."""
        return {metric: float(cost[0]) for metric, cost in self.predict(as_row(choice)).items()}

    def violations(self, costs: Mapping[Metric, float]) -> dict[str, float]:
        """Named constraints as Optuna wants them, <= 0 is feasible: `budget.latency` is cost over limit, minus 1."""
        return {f"budget.{metric}": _violation(cost, self.limits[metric]) for metric, cost in costs.items()}


def as_row(choice: Choice) -> Ints:
    """One choice as (1, units)."""
    return np.asarray(choice, dtype=np.int64)[None, :]


def as_choice(row: Ints) -> Choice:
    """(units,) as a choice."""
    return tuple(int(option) for option in row)


def _violation(cost: float, limit: float) -> float:
    relative = cost / limit - 1
    if cost > limit:
        return max(relative, 1e-12)  # rounding must not turn a missed limit into a met one
    return min(relative, 0.0)


def _depth(unit: int, parents: Sequence[int | None]) -> int:
    depth, parent = 0, parents[unit]
    while parent is not None:
        depth, parent = depth + 1, parents[parent]
        if depth > len(parents):
            raise ValueError("a unit cannot contain itself")
    return depth
