"""One budget: the least harm within a limit, as a multiple-choice knapsack with families, by dynamic programming.

After SPDY (arXiv:2201.13096, section 4), which discretises cost and solves layer by layer. Added here: a block and
the units inside it are one family, where dropping the block makes its units moot. Knows arrays of harm and cost
alone; where they come from is other files' business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from autoprune.core.space import Choice
from autoprune.searching.problem import Floats, Ints


@dataclass(slots=True)
class _Node:
    """One unit in the tree of families. `stay` are its options that leave its children alive, `leave` drops them."""

    unit: int
    children: list[_Node]
    cost: Floats  # (options,), lowered so that the cheapest way through this family costs 0
    harm: Floats  # (options,)
    leaves: int | None  # the DROP option, when there are children to drop
    highest: float = 0.0  # an upper bound of the family's cost
    stay: tuple[Ints, Ints, Floats] = field(init=False)  # option, weight, harm: useful ones only
    leave: tuple[Ints, Ints, Floats] | None = field(init=False, default=None)
    before: Floats = field(init=False)  # (capacity + 1,) least harm by weight, without this family
    chain: Floats = field(init=False)  # the same with this family kept


def solve(
    harm: Sequence[Floats],
    cost: Sequence[Floats],
    *,
    limit: float,
    parents: Sequence[int | None],
    drop: Sequence[int | None],
    buckets: int = 4000,
) -> Choice | None:
    """The choice of least total harm whose total cost is at most `limit`, or None when there is none.

    `harm[u]` and `cost[u]` are (options,). Totals run over *active* units: a unit is moot, and adds nothing, when
    the unit at `parents[u]` has its option `drop[parent]` chosen. So `cost[block][drop]` is the cost with the block
    absent, whatever is inside. Costs may be absolute, or differences from any incumbent (negative ones too): the
    zero of each unit is arbitrary as long as `limit` is counted from the same zero, and differences measured one
    unit at a time from an incumbent that keeps the block fulfil this as they are. Options of infinite harm are not
    chosen. Moot units get option 0.

    Exact when every cost is a whole number of buckets, a bucket being `limit`, counted from the cheapest choice,
    over `buckets`; else costs are rounded up, so that the result always fits, and its harm is at most that of the
    best choice which leaves one bucket a unit free.
    """
    roots = _tree(harm, cost, parents, drop)
    room = limit - sum(_floor(node) for node in roots)
    if not room >= 0:
        return None
    highest = sum(node.highest for node in roots)
    bucket, capacity = min(room, highest) / buckets, buckets
    if room >= highest:
        capacity += len(harm)  # everything fits: leave space for the rounding
    if bucket <= 0:
        bucket, capacity = 1.0, 0  # only what costs nothing fits
    for node in roots:
        _discretise(node, bucket, capacity)
    table = np.zeros(capacity + 1)
    for node in roots:
        table = _forward(node, table)
    if not np.isfinite(table[-1]):
        return None
    choice = [0] * len(harm)
    weight = capacity
    for node in reversed(roots):
        weight = _backward(node, weight, choice)
    return tuple(choice)


def _tree(
    harm: Sequence[Floats], cost: Sequence[Floats], parents: Sequence[int | None], drop: Sequence[int | None]
) -> list[_Node]:
    children: list[list[int]] = [[] for _ in harm]
    for unit, parent in enumerate(parents):
        if parent is not None:
            children[parent].append(unit)

    def node(unit: int) -> _Node:
        inside = [node(child) for child in children[unit]]
        leaves = drop[unit] if inside else None
        return _Node(unit, inside, np.array(cost[unit], dtype=np.float64), np.asarray(harm[unit]), leaves)

    return [node(unit) for unit, parent in enumerate(parents) if parent is None]


def _floor(node: _Node) -> float:
    """Lower a family's costs so that its cheapest way costs 0; the amount, which the limit must give way by."""
    base = sum(_floor(child) for child in node.children)
    staying = np.ones(len(node.cost), dtype=np.bool_)
    if node.leaves is not None:
        staying[node.leaves] = False
    node.cost[staying] += base
    allowed = np.isfinite(node.harm) & np.isfinite(node.cost)
    if not allowed.any():
        return np.inf
    floor = float(node.cost[allowed].min())
    node.cost -= floor
    inside = sum(child.highest for child in node.children)
    node.highest = float(np.where(staying, node.cost + inside, node.cost)[allowed].max())
    return floor


def _discretise(node: _Node, bucket: float, capacity: int) -> None:
    for child in node.children:
        _discretise(child, bucket, capacity)
    weight = np.ceil(np.minimum(node.cost / bucket, capacity + 1.0)).astype(np.int64)
    usable = np.isfinite(node.harm) & (weight <= capacity)
    options = np.flatnonzero(usable)
    if node.leaves is not None:
        left = options[options == node.leaves]
        node.leave = (left, weight[left], node.harm[left])
        options = options[options != node.leaves]
    options = options[np.lexsort((options, node.harm[options], weight[options]))]
    best_before = np.minimum.accumulate(np.concatenate(([np.inf], node.harm[options])))[:-1]
    options = options[node.harm[options] < best_before]  # neither dearer nor more harmful than another
    node.stay = (options, weight[options], node.harm[options])


def _forward(node: _Node, table: Floats) -> Floats:
    """Least harm by weight once this family is decided, from the same before it: (capacity + 1,) both."""
    node.before = table
    node.chain = _step(table, node.stay)
    for child in node.children:
        node.chain = _forward(child, node.chain)
    if node.leave is None:
        return node.chain
    return np.minimum(node.chain, _step(table, node.leave))


def _step(table: Floats, options: tuple[Ints, Ints, Floats]) -> Floats:
    _, weights, harms = options
    result = np.full_like(table, np.inf)
    added = np.empty_like(table)
    for weight, harm in zip(weights.tolist(), harms.tolist(), strict=True):
        size = len(table) - weight
        np.add(table[:size], harm, out=added[:size])
        np.minimum(result[weight:], added[:size], out=result[weight:])
    return result


def _backward(node: _Node, weight: int, choice: list[int]) -> int:
    """Write the family's decision at `weight` into `choice`; the weight that is left for what came before."""
    if node.leave is not None and _step_at(node.before, node.leave, weight)[1] < node.chain[weight]:
        picked, _ = _step_at(node.before, node.leave, weight)
        choice[node.unit] = int(node.leave[0][picked])
        return weight - int(node.leave[1][picked])
    for child in reversed(node.children):
        weight = _backward(child, weight, choice)
    picked, _ = _step_at(node.before, node.stay, weight)
    choice[node.unit] = int(node.stay[0][picked])
    return weight - int(node.stay[1][picked])


def _step_at(table: Floats, options: tuple[Ints, Ints, Floats], weight: int) -> tuple[int, float]:
    """Which of `options` gives the least harm at one weight, and that harm; the same sums as `_step` makes."""
    _, weights, harms = options
    reach = weight - weights
    totals = np.where(reach >= 0, table[np.maximum(reach, 0)] + harms, np.inf)
    if not len(totals):
        return 0, np.inf
    picked = int(totals.argmin())
    return picked, float(totals[picked])
