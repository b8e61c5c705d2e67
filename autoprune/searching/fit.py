"""From harm to a choice that truly fits: solve on linearised costs, check the prediction, mend and fill.

A convolution costs inputs times outputs, so costs of neighbouring units do not add up. Here they are linearised
round an incumbent, solved as a knapsack, and the *predicted* cost of the result is what counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from autoprune.core.budget import Metric
from autoprune.core.space import Choice
from autoprune.searching.knapsack import solve
from autoprune.searching.milp import solve_many
from autoprune.searching.problem import Bools, Floats, Ints, Problem, as_choice, as_row

ROUNDS = 6
"""How often `solve_fit` linearises again before it narrows units one by one."""

_REPAIRS = 12
_REMEMBERED = 16
_NOTHING = 1e-12


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """Costs round an incumbent: a choice costs `offset` plus `table[u][option]` summed over active units."""

    offset: float
    table: Floats  # (units, options)


@dataclass(slots=True)
class Tables:
    """Linearised costs of a problem, remembered for the incumbents used last."""

    problem: Problem
    _known: dict[tuple[Metric, Choice], Linear] = field(default_factory=dict)
    _additive: dict[Metric, bool] = field(default_factory=dict)

    def at(self, metric: Metric, incumbent: Choice) -> Linear:
        """One metric's costs round `incumbent`; everywhere the same when costs of this metric simply add up."""
        problem = self.problem
        if metric not in self._additive:
            self._additive[metric] = problem.costs.is_additive(metric)
        center = problem.space.dense if self._additive[metric] else incumbent
        key = (metric, center)
        if key in self._known:
            self._known[key] = self._known.pop(key)
            return self._known[key]
        linear = linearised(problem, metric, center)
        self._known[key] = linear
        while len(self._known) > _REMEMBERED:
            del self._known[next(iter(self._known))]
        return linear

    def near(self, incumbent: Choice) -> dict[Metric, Linear]:
        """Every limited metric's costs round `incumbent`."""
        return {metric: self.at(metric, incumbent) for metric in self.problem.limits}


def linearised(problem: Problem, metric: Metric, incumbent: Choice) -> Linear:
    """One metric's costs round `incumbent`.

    Differences for units inside a block that the incumbent drops say nothing (they are moot there); those are taken
    with the block put back, so that putting it back costs its dense inside plus what its units then save.
    """
    structure = problem.structure
    table = structure.padded(problem.costs.linearise(metric, incumbent), 0.0)
    row = as_row(incumbent)
    moot = structure.moot(row)[0]
    if moot.any():
        restored = np.where(row == structure.drop_index, 0, row)
        back = structure.padded(problem.costs.linearise(metric, as_choice(restored[0])), 0.0)
        table[moot] = back[moot]
    return Linear(float(problem.costs.evaluate(metric, row)[0]), table)


def solve_fit(
    problem: Problem,
    harm: Floats,
    *,
    incumbent: Choice | None = None,
    tables: Tables | None = None,
    rounds: int = ROUNDS,
    buckets: int = 4000,
    exact: bool = False,
) -> Choice | None:
    """A choice of little total `harm` (units, options) whose predicted cost meets every limit, or None.

    Each round linearises round the last solution and solves; a limit that is still missed is tightened by what was
    missed. After `rounds` at most, what misses is narrowed unit by unit (`repair`), and what room is left is used
    (`fill`). With one additive metric the first round's knapsack is the answer. Several metrics are folded into
    one weighted cost for the knapsack, or with `exact` solved by MILP. With a single round everything is linearised
    round `incumbent` alone, which costs nothing when `tables` remembers it.
    """
    known = tables or Tables(problem)
    current = incumbent or problem.space.dense
    tightening = dict.fromkeys(problem.limits, 0.0)
    weights = dict.fromkeys(problem.limits, 1.0)
    best: tuple[float, Choice] | None = None
    for _ in range(rounds):
        linears = known.near(current)
        room = {metric: problem.limits[metric] - linears[metric].offset - tightening[metric] for metric in linears}
        found = _solve(problem, harm, linears, room=room, weights=weights, buckets=0 if exact else buckets)
        if found is None:
            break
        excess = {metric: cost - problem.limits[metric] for metric, cost in problem.costs_of(found).items()}
        if all(value <= 0 for value in excess.values()):
            total = total_harm(problem, harm, found)
            improved = best is None or total < best[0] - _NOTHING
            best = (total, found) if improved else best
            if not improved or found == current or _settled(problem):
                break
        for metric, value in excess.items():
            tightening[metric] += max(0.0, value)
            weights[metric] *= 1.0 + min(1.0, max(0.0, 20 * value / problem.limits[metric]))
        current = found
    start = best[1] if best is not None else current
    anchor = (incumbent or problem.space.dense) if rounds == 1 else None
    fitting = repair(problem, harm, start, tables=known, anchor=anchor)
    return None if fitting is None else fill(problem, harm, fitting, tables=known, anchor=anchor)


def repair(
    problem: Problem,
    harm: Floats,
    choice: Choice,
    *,
    tables: Tables,
    anchor: Choice | None = None,
    frozen: Bools | None = None,
    noise: Floats | None = None,
) -> Choice | None:
    """`choice` narrowed, where it costs least harm for what it saves, until it fits; None when nothing is left.

    `frozen` (units,) are left alone; `noise` (units, options) multiplies the price of a move, for variety. Moves are
    ranked by costs linearised round `anchor` (in the first round, later round what was reached), and every result is
    checked by the true prediction. In the second half of the rounds what saves most goes first, whatever its harm.
    """
    current = as_row(choice)
    for attempt in range(_REPAIRS):
        reached = as_choice(current[0])
        missed = {metric: cost - problem.limits[metric] for metric, cost in problem.costs_of(reached).items()}
        missed = {metric: value for metric, value in missed.items() if value > 0}
        if not missed:
            return reached
        center = anchor if anchor is not None and attempt == 0 else reached
        saving, harmed = _moves(problem, harm, current[0], tables.near(center), shortfall=missed)
        if attempt >= _REPAIRS // 2:
            harmed = np.ones_like(harmed)
        price = np.maximum(harmed, _NOTHING) / np.maximum(saving, _NOTHING)
        price = np.where(saving > _NOTHING, price if noise is None else price * noise, np.inf)
        if frozen is not None:
            price[frozen] = np.inf
        steps = _cumulative(problem, current[0], _best_each(price))
        if not len(steps):
            return None
        fits = problem.fits_each(steps)
        current = steps[int(fits.argmax()) if fits.any() else -1][None]
    return as_choice(current[0]) if problem.fits(as_choice(current[0])) else None


def fill(
    problem: Problem,
    harm: Floats,
    choice: Choice,
    *,
    tables: Tables,
    anchor: Choice | None = None,
    frozen: Bools | None = None,
    rounds: int = 2,
) -> Choice:
    """A fitting `choice` widened with the room left, most harm saved for its cost first; still fits."""
    current = np.asarray(choice, dtype=np.int64)
    for _ in range(rounds):
        linears = tables.near(anchor or as_choice(current))
        costs = problem.costs_of(as_choice(current))
        slack = {metric: problem.limits[metric] - cost for metric, cost in costs.items()}
        added, gain = _additions(problem, harm, current, linears)
        affordable = gain > _NOTHING
        for metric, cost in added.items():
            affordable &= cost <= slack[metric]
        if frozen is not None:
            affordable[frozen] = False
        if not affordable.any():
            break
        price = np.zeros(harm.shape)
        for metric, cost in added.items():
            price += np.maximum(cost, 0.0) / problem.limits[metric]
        worth = np.where(affordable, gain / np.maximum(price, _NOTHING), -np.inf)
        steps = _cumulative(problem, current, _within(worth, added, slack))
        fits = problem.fits_each(steps)
        if not fits.any():
            break
        current = steps[int(np.flatnonzero(fits)[-1])]
    return as_choice(current)


def total_harm(problem: Problem, harm: Floats, choice: Choice) -> float:
    """Harm (units, options) summed over active units."""
    row = as_row(choice)
    picked = harm[np.arange(row.shape[1]), row[0]]
    return float(picked[~problem.structure.moot(row)[0]].sum())


def _settled(problem: Problem) -> bool:
    return len(problem.limits) == 1 and all(problem.costs.is_additive(metric) for metric in problem.limits)


def _solve(
    problem: Problem,
    harm: Floats,
    linears: Mapping[Metric, Linear],
    *,
    room: Mapping[Metric, float],
    weights: Mapping[Metric, float],
    buckets: int,
) -> Choice | None:
    """The knapsack over all metrics folded into one; with `buckets` 0 and several metrics the MILP."""
    structure = problem.structure
    masked = np.where(structure.valid, harm, np.inf)
    parents, drops = structure.parents, structure.drops
    if not linears:
        return problem.space.dense
    if not buckets and len(linears) > 1:
        costs = {str(metric): list(linear.table) for metric, linear in linears.items()}
        limits = {str(metric): amount for metric, amount in room.items()}
        return solve_many(list(masked), costs, limits=limits, parents=parents, drop=drops, gap=1e-3)
    scale = {metric: weights[metric] / problem.limits[metric] for metric in linears}
    cost = sum((scale[metric] * linear.table for metric, linear in linears.items()), np.zeros_like(masked))
    limit = sum(scale[metric] * room[metric] for metric in linears)
    return solve(list(masked), list(cost), limit=limit, parents=parents, drop=drops, buckets=buckets or 4000)


def _moves(
    problem: Problem, harm: Floats, row: Ints, linears: Mapping[Metric, Linear], *, shortfall: Mapping[Metric, float]
) -> tuple[Floats, Floats]:
    """(units, options) each: what replacing one option saves of the shortfall, and the harm it adds."""
    saving = np.zeros(harm.shape)
    for metric, missing in shortfall.items():
        saving += np.clip(-_change(problem, linears[metric].table, row), 0.0, missing) / problem.limits[metric]
    return saving, _change(problem, harm, row)


def _additions(
    problem: Problem, harm: Floats, row: Ints, linears: Mapping[Metric, Linear]
) -> tuple[dict[Metric, Floats], Floats]:
    """(units, options) each: by metric what replacing one option adds to the cost, and the harm it saves."""
    added = {metric: _change(problem, linear.table, row) for metric, linear in linears.items()}
    return added, -_change(problem, harm, row)


def _change(problem: Problem, table: Floats, row: Ints) -> Floats:
    """(units, options): how the sum of `table` over active units changes when one option is replaced.

    Moot units and padding change nothing.
    """
    structure = problem.structure
    moot = structure.moot(row[None])[0]
    current = table[np.arange(len(row)), row]
    change = table - current[:, None]
    inside = np.zeros(len(row))
    child = (structure.parent_index >= 0) & ~moot
    for _ in range(structure.depth):  # what blocks inside blocks hold goes up one level each time
        total = np.zeros(len(row))
        np.add.at(total, structure.parent_index[child], (current + inside)[child])
        inside = total
    blocks = np.flatnonzero((structure.drop_index >= 0) & (row != structure.drop_index))
    change[blocks, structure.drop_index[blocks]] -= inside[blocks]
    change[moot] = 0.0
    return np.where(structure.valid, change, 0.0)


def _best_each(price: Floats) -> list[tuple[int, int]]:
    """The cheapest move of every unit that has one, cheapest unit first."""
    options = price.argmin(axis=1)
    prices = price[np.arange(len(price)), options]
    order = np.argsort(prices, kind="stable")
    return [(int(unit), int(options[unit])) for unit in order if np.isfinite(prices[unit])]


def _within(worth: Floats, added: Mapping[Metric, Floats], slack: Mapping[Metric, float]) -> list[tuple[int, int]]:
    """Moves by falling worth, one a unit, as long as their estimated costs fit the slack together."""
    left = dict(slack)
    moves: dict[int, int] = {}
    for flat in np.argsort(-worth, axis=None, kind="stable"):
        unit, option = divmod(int(flat), worth.shape[1])
        if not np.isfinite(worth[unit, option]):
            break
        cost = {metric: float(added[metric][unit, option]) for metric in left}
        if unit in moves or any(cost[metric] > left[metric] for metric in left):
            continue
        moves[unit] = option
        left = {metric: left[metric] - cost[metric] for metric in left}
    return list(moves.items())


def _cumulative(problem: Problem, row: Ints, moves: list[tuple[int, int]]) -> Ints:
    """(moves, units): the choice after the first move, the first two, and so on."""
    steps = np.repeat(row[None], len(moves), axis=0)
    for position, (unit, option) in enumerate(moves):
        steps[position:, unit] = option
    return problem.structure.normal(steps)
