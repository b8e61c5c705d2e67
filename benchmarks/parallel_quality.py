"""Whether a search finds as good a choice when many trials run at once: simulated workers, synthetic divergence.

    python benchmarks/parallel_quality.py --problems 6 --seeds 8 --samplers budget tpe

W trials always run: asked for, not told. They take log-normal times on a simulated clock and are told in order of
completion. Values are what the best of all trials has above the best known choice, in per cent of the latter. Prints
the median and the 10-90 % spread over problems and seeds for each W, each W against one worker, paired by problem and
seed, and the same trial by trial on the way; writes every run with `--json`.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import wilcoxon
from search_overhead import divergence, synthetic_problem

from autoprune.searching.fit import Tables, solve_fit
from autoprune.searching.problem import Problem
from autoprune.searching.proposals import swap
from autoprune.searching.samplers import SAMPLERS, sampler_by_name
from autoprune.searching.study import Asked, open_study

_SPREAD = 0.5  # standard deviation of a trial's log duration
_CLIMB = 3000  # swaps on the true harm that look for the best known choice


@dataclass(frozen=True, slots=True)
class Run:
    """One search. `best` (trials,) is the least value told so far, relative to the best known: 0 is as good."""

    sampler: str
    workers: int
    problem: int
    seed: int
    best: tuple[float, ...]


def simulated(folder: Path, sampler: str, problem: tuple[Problem, NDArray[np.float64]], **given: int) -> list[float]:
    """Values in the order in which `trials` trials end on `workers` workers."""
    known, truth = problem
    trials, workers, seed = given["trials"], given["workers"], given["seed"]
    durations = np.exp(_SPREAD * np.random.default_rng(seed).standard_normal(trials))
    record = open_study(folder / "study.journal", known, sampler=sampler_by_name(sampler, known, seed=seed))
    running: list[tuple[float, int, Asked]] = []
    values: list[float] = []
    clock = 0.0
    for number in range(trials + workers):
        if number >= workers and running:
            clock, _, done = heapq.heappop(running)
            value = divergence(known, truth, done.choice)
            record.tell(done, value)
            values.append(value if done.fits else math.inf)
        if number < trials:
            heapq.heappush(running, (clock + float(durations[number]), number, record.ask()))
    return values


@cache
def best_known(units: int, options: int, seed: int) -> float:
    """The value that a climb by swaps reaches when it is told the true harm: far more trials than a search has."""
    problem, truth = synthetic_problem(units, options, seed)
    tables, rng = Tables(problem), np.random.default_rng(seed)
    best = solve_fit(problem, truth, tables=tables, exact=True) or problem.space.dense
    lowest = divergence(problem, truth, best)
    for _ in range(_CLIMB):
        other = swap(problem, best, harm=truth, tables=tables, rng=rng)
        value = math.inf if other is None else divergence(problem, truth, other)
        if other is not None and value < lowest:
            best, lowest = other, value
    return lowest


def one(sampler: str, workers: int, number: int, seed: int, *, units: int, options: int, trials: int) -> Run:
    problem = synthetic_problem(units, options, number)
    fast = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=fast) as folder:
        values = simulated(Path(folder), sampler, problem, trials=trials, workers=workers, seed=seed)
    best = np.minimum.accumulate(values) / best_known(units, options, number) - 1
    return Run(sampler, workers, number, seed, tuple(best.tolist()))


def summary(runs: Sequence[Run], sampler: str, workers: int, *, trials: int, base: int) -> str:
    """One line: per cent above the best known after `trials`, and against `base` workers."""
    found = {(run.problem, run.seed): 100 * run.best[trials - 1] for run in runs if run.sampler == sampler and
             run.workers == workers}  # fmt: skip
    other = {(run.problem, run.seed): 100 * run.best[trials - 1] for run in runs if run.sampler == sampler and
             run.workers == base}  # fmt: skip
    finite = np.array([value for value in found.values() if math.isfinite(value)])
    low, middle, high = np.quantile(finite, [0.1, 0.5, 0.9])
    line = f"{sampler:>8} {workers:>5} {trials:>7} {middle:>8.2f} {low:>8.2f} {high:>8.2f}"
    pairs = np.array([(found[key], other[key]) for key in found if math.isfinite(found[key] + other[key])])
    if workers == base or not len(pairs):
        return line
    loss = pairs[:, 0] - pairs[:, 1]
    half = 1.96 * float(loss.std(ddof=1)) / math.sqrt(len(loss))
    spread = np.mean([_spread(other, problem) for problem in {key[0] for key in other}])
    within = np.mean([_inside(other, key, found[key]) for key in found])
    chance = wilcoxon(loss).pvalue if loss.any() else 1.0
    return (
        f"{line} {loss.mean():>+8.2f} ± {half:<5.2f} {np.mean(loss > 0):>7.0%} {chance:>9.3f} {spread:>8.2f}"
        f" {within:>7.0%}"
    )


def _spread(found: dict[tuple[int, int], float], problem: int) -> float:
    """10-90 % over the seeds of one problem."""
    values = [value for (number, _), value in found.items() if number == problem and math.isfinite(value)]
    return float(np.subtract(*np.quantile(values, [0.9, 0.1]))) if values else math.nan


def _inside(found: dict[tuple[int, int], float], key: tuple[int, int], value: float) -> bool:
    """Whether a value is no worse than the worst seed of one worker on the same problem."""
    return value <= max(other for (number, _), other in found.items() if number == key[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, default=60)
    parser.add_argument("--options", type=int, default=27)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 8, 32], help="the first is compared with")
    parser.add_argument("--problems", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--samplers", nargs="+", default=["budget", "tpe"], choices=sorted(SAMPLERS))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path, default=None, help="write every run there")
    given = parser.parse_args()
    sizes = {"units": given.units, "options": given.options, "trials": given.trials}
    jobs = list(product(given.samplers, given.workers, range(given.problems), range(given.seeds)))
    with ProcessPoolExecutor(given.processes) as pool:
        runs = [future.result() for future in [pool.submit(one, *job, **sizes) for job in jobs]]
    print("per cent above the best known; loss, paired: mean and 95 %, share lost, Wilcoxon p; spread: 10-90 % over")
    print("the seeds of one worker, mean over problems; within: no worse than the worst seed of one worker")
    print(" sampler  workers  trials   median     10 %     90 %     loss           lost         p   spread  within")
    marks = [mark for mark in (given.trials // 4, given.trials // 2, given.trials) if mark]
    for sampler, mark, workers in product(given.samplers, marks, given.workers):
        print(summary(runs, sampler, workers, trials=mark, base=given.workers[0]))
    if given.json is not None:
        given.json.write_text(json.dumps([[r.sampler, r.workers, r.problem, r.seed, *r.best] for r in runs]))


if __name__ == "__main__":
    main()
