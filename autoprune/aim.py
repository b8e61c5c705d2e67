"""Predictions near a budget: limits for them that reality will keep, and tables fitted again where a search goes.

Knows the cost table and the clock. Does not search.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from autoprune.bank.stitch import shape_only
from autoprune.core.budget import Metric
from autoprune.core.cost import LatencyTable, SharesTable
from autoprune.core.space import Choice
from autoprune.model.fingerprint import of_text
from autoprune.profile.cost_model import CostModel
from autoprune.profile.latency import refitted
from autoprune.progress import Progress
from autoprune.run import Kept
from autoprune.searching.problem import Problem
from autoprune.searching.sampler import prior_starts
from autoprune.storage import Weights
from autoprune.workbench import Workbench

_MOST_MARGIN = 0.03
_ROUNDS = 20


def with_margin(bench: Workbench, limits: Mapping[Metric, float], *, finalists: int) -> dict[Metric, float]:
    """Limits for predictions: latency and memory are aimed at a little below, by what the tables' checks say.

    The more finalists are timed, the closer one may aim: one of them has to keep the budget.
    """
    checks = {"latency": bench.table and bench.table.check, "memory": bench.costs.memory and bench.costs.memory.check}
    errors = {
        metric: min(1.5 * check.median_error / math.sqrt(finalists), _MOST_MARGIN)
        for metric, check in checks.items() if check
    }  # fmt: skip
    return {metric: limit * (1 - errors.get(metric, 0.0)) for metric, limit in limits.items()}


def aimed(bench: Workbench, limits: Mapping[Metric, float], progress: Progress) -> Workbench:
    """The workbench, its table fitted again with models near the budget: the priors' own solutions.

    The table is fitted to all widths alike; a search goes where it errs in the search's favour.
    """
    if "latency" not in limits or bench.table is None:
        return bench
    choices = list(dict.fromkeys(prior_starts(Problem(bench.space, bench.costs, limits, bench.priors)).values()))
    if not choices:
        return bench
    near = bench.stages.timed("aim", lambda: _timed_near(bench, choices, progress))
    progress.note(f"near the budget latency is {_off(bench, near):.3f} x the prediction; the table is fitted again")
    return corrected(bench, near)


def _timed_near(bench: Workbench, choices: Sequence[Choice], progress: Progress) -> list[tuple[Choice, float]]:
    """`choices` with what share of the dense latency each takes: measured, or what was measured of the same choices
    before, so that a search that is resumed, or shared, believes the same costs.
    """
    assert bench.table is not None
    subject, run = bench.subject, bench.run

    def measured() -> SharesTable:
        progress.phase("aim", len(choices))
        stitcher = bench.stitcher
        models = [
            shape_only(subject.model, subject.anatomy, bench.space.options_of(choice), norms=stitcher.norms,
                       arithmetic=stitcher.arithmetic)
            for choice in choices
        ]  # fmt: skip
        _, timings = replace(bench.stopwatch, rounds=_ROUNDS).compare(models)
        progress.step(len(choices))
        return SharesTable(key=key, shares=tuple(timing.ratio for timing in timings))

    key = of_text(bench.table.key, bench.space, choices, "near 1")
    found, _ = Kept("near", key, SharesTable).found_or_made(run, measured, note=progress.note)
    return list(zip(choices, found.shares, strict=True))


def _off(bench: Workbench, near: Sequence[tuple[Choice, float]]) -> float:
    """Measured shares over predicted ones, the median of some choices."""
    dense = bench.costs.dense["latency"]
    return float(np.median([share * dense / bench.costs.cost("latency", choice) for choice, share in near]))


def sized(bench: Workbench, limits: Mapping[Metric, float]) -> dict[Metric, float]:
    """Limits for predictions, size a little lower where files near the budget come out larger than predicted."""
    allowed = dict(limits)
    if "size" not in allowed:
        return allowed
    off = [1.0]
    for choice in dict.fromkeys(prior_starts(Problem(bench.space, bench.costs, limits, bench.priors)).values()):
        candidate = bench.stitcher.build(bench.space.options_of(choice), recalibrate=False)
        actual = bench.files.size(candidate.model, Weights.of(candidate))
        off.append(actual / bench.costs.cost("size", choice))
    allowed["size"] /= max(off)
    return allowed


def corrected(bench: Workbench, near: Sequence[tuple[Choice, float]], *, least: float | None = None) -> Workbench:
    """The same workbench, its table fitted again with models that were timed near the budget, and scaled by what is
    then left of their error; by `least` at least.
    """
    assert bench.table is not None
    before = bench.costs
    table = refitted(bench.table, bench.space, before.architecture, near, seed=bench.subject.task.seed)

    def with_table(table: LatencyTable) -> Workbench:
        costs = CostModel(before.architecture, bench.space, table, storage=before.storage, memory=before.memory)
        return replace(bench, table=table, costs=costs)

    off = _off(with_table(table), near)
    correction = off if least is None else max(off, least)
    return with_table(table.model_copy(update={"correction": correction}))
