"""Several budgets at once: the least harm within all limits, as a mixed-integer linear program (HiGHS).

The same problem and the same meaning of harm, cost and families as `knapsack.solve`, with any number of costs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from autoprune.core.space import Choice
from autoprune.searching.problem import Floats, Ints

_TIGHTENINGS = 4


def solve_many(
    harm: Sequence[Floats],
    costs: Mapping[str, Sequence[Floats]],
    *,
    limits: Mapping[str, float],
    parents: Sequence[int | None],
    drop: Sequence[int | None],
    gap: float = 1e-6,
    seconds: float = 10.0,
) -> Choice | None:
    """The choice of least total harm whose total cost is at most its limit in every metric, or None.

    `harm[u]` and `costs[metric][u]` are (options,), totalled over active units as in `knapsack.solve`. HiGHS stops
    within a relative `gap` of the optimum or after `seconds`. Its tolerance may miss a limit by a hair; then the
    limit is tightened by what was missed and the program solved again, so a returned choice truly fits.
    """
    sizes = [len(row) for row in harm]
    starts = np.concatenate(([0], np.cumsum(sizes)))
    objective = np.concatenate([np.asarray(row, dtype=np.float64) for row in harm])
    allowed = np.isfinite(objective)
    objective = np.where(allowed, objective, 0.0)
    one_each = _one_option_each(starts, parents, drop)
    rows = {
        metric: np.concatenate([np.asarray(row, dtype=np.float64) for row in cost]) for metric, cost in costs.items()
    }
    tight = {metric: float(limits[metric]) for metric in costs}
    for _ in range(_TIGHTENINGS):
        constraints = [one_each]
        for metric, row in rows.items():
            scale = float(np.abs(row).max()) or 1.0
            constraints.append(LinearConstraint(sparse.csr_array(row[None, :] / scale), -np.inf, tight[metric] / scale))
        solved = milp(
            objective / (float(objective.max()) or 1.0),
            integrality=np.ones(len(objective), dtype=np.int64),
            bounds=Bounds(0, allowed.astype(np.float64)),
            constraints=constraints,
            options={"mip_rel_gap": gap, "time_limit": seconds},
        )
        if solved.x is None:
            return None
        picked = np.round(solved.x)
        excess = {metric: float(row @ picked) - limits[metric] for metric, row in rows.items()}
        if all(value <= 0 for value in excess.values()):
            return tuple(_option(picked[start:stop]) for start, stop in pairwise(starts))
        for metric, value in excess.items():
            tight[metric] -= max(0.0, value) * 2
    return None


def _one_option_each(starts: Ints, parents: Sequence[int | None], drop: Sequence[int | None]) -> LinearConstraint:
    """Each unit has one option; a unit inside a block as many as the block has options that keep it: none or one."""
    matrix = sparse.lil_array((len(parents), int(starts[-1])))
    right = np.zeros(len(parents))
    for unit, parent in enumerate(parents):
        matrix[unit, int(starts[unit]) : int(starts[unit + 1])] = 1
        if parent is None:
            right[unit] = 1
            continue
        for option in range(int(starts[parent + 1] - starts[parent])):
            if option != drop[parent]:
                matrix[unit, int(starts[parent]) + option] = -1
    return LinearConstraint(sparse.csr_array(matrix), right, right)


def _option(picked: Floats) -> int:
    return int(picked.argmax()) if picked.any() else 0
