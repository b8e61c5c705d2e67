"""What a trial costs beside its evaluation: proposing, storing, opening. Synthetic divergence; prints JSON.

python benchmarks/search_overhead.py                                                    # a search, and a journal
python benchmarks/search_overhead.py --told 1000 10000 --samplers budget tpe --next 60  # after so many trials
python benchmarks/search_overhead.py --told 1000 --batches 1 32 256                     # asks without a tell
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study._constrained_optimization import _CONSTRAINTS_KEY
from optuna.trial import TrialState, create_trial

from autoprune.core.budget import Metric
from autoprune.core.space import Choice, Space, UnitOptions
from autoprune.core.unit import DROP, Option, Unit
from autoprune.searching.fit import Tables, repair
from autoprune.searching.problem import Problem, as_row
from autoprune.searching.sampler import MOVES
from autoprune.searching.samplers import SAMPLERS, sampler_by_name
from autoprune.searching.study import StudyRecord, distributions_of, open_study


class CoupledCosts:
    """Layers in a chain: each costs inputs times outputs, and nothing inside a dropped block."""

    def __init__(self, space: Space, weights: NDArray[np.float64]) -> None:
        self.space, self.weights = space, weights
        width = max(space.sizes)
        self.kept = np.ones((len(space.entries), width))
        for row, entry in enumerate(space.entries):
            self.kept[row, : len(entry.options)] = [option.keep / entry.unit.width for option in entry.options]
        self.parent = np.array([-1 if parent is None else parent for parent in space.parents()])

    def evaluate(self, metric: Metric, choices: NDArray[np.int64]) -> NDArray[np.float64]:  # noqa: ARG002
        kept = self.kept[np.arange(choices.shape[1]), choices]
        kept = kept * np.where(self.parent >= 0, kept[:, self.parent], 1.0)
        channels = np.where(self.parent >= 0, kept, 0.2 * kept)
        inputs = np.concatenate([np.ones((len(kept), 1)), channels[:, :-1]], axis=1)
        result: NDArray[np.float64] = (channels * (0.5 + 0.5 * inputs) * self.weights).sum(axis=1)
        return result

    def linearise(self, metric: Metric, incumbent: Choice) -> list[NDArray[np.float64]]:
        base = as_row(incumbent)
        rows = np.repeat(base, sum(self.space.sizes), axis=0)
        start = 0
        for unit, size in enumerate(self.space.sizes):
            rows[start : start + size, unit] = np.arange(size)
            start += size
        change = self.evaluate(metric, rows) - self.evaluate(metric, base)
        return np.split(change, np.cumsum(self.space.sizes)[:-1])

    def is_additive(self, metric: Metric) -> bool:  # noqa: ARG002
        return False


def synthetic_space(units: int, options: int) -> Space:
    """Every third unit is a block that holds the two after it."""
    entries = []
    methods = ("l2", "obs")
    for index in range(units):
        if index % 3 == 0:
            block = Unit(f"layer{index // 3}", "block", 1, ())
            entries.append(UnitOptions(block, (Option("keep", 1), DROP)))
            continue
        levels = (options - 1) // 2
        unit = Unit(f"layer{index // 3}.conv{index % 3}", "channels", 64, (), parent=f"layer{index // 3}")
        widths = [64 - (level + 1) * 60 // levels for level in range(levels)]
        narrowed = [Option(method, keep) for keep in widths for method in methods]
        entries.append(UnitOptions(unit, (Option("keep", 64), *narrowed)))
    return Space(tuple(entries))


def synthetic_problem(units: int, options: int, seed: int) -> tuple[Problem, NDArray[np.float64]]:
    """A problem at half of the dense cost, and its true harm (units, options)."""
    rng = np.random.default_rng(seed)
    space = synthetic_space(units, options)
    costs = CoupledCosts(space, np.exp(0.5 * rng.standard_normal(units)))
    truth = [np.array([(1 - o.keep / entry.unit.width) ** 2 for o in entry.options]) for entry in space.entries]
    truth = [row * np.exp(rng.standard_normal() + 0.1 * rng.standard_normal(len(row))) for row in truth]
    priors = {
        name: [row * np.exp(0.7 * rng.standard_normal() + 0.1 * rng.standard_normal(len(row))) for row in truth]
        for name in ("error", "taylor")
    }
    dense = float(costs.evaluate("macs", as_row(space.dense))[0])
    problem = Problem(space, costs, {"macs": dense / 2}, priors)
    return problem, problem.structure.padded(truth, 0.0)


def divergence(problem: Problem, truth: NDArray[np.float64], choice: Choice) -> float:
    """True harm, with neighbours that make each other worse."""
    row = np.asarray(choice)
    picked = truth[np.arange(len(row)), row] * ~problem.structure.moot(row[None])[0]
    return float(0.02 * picked.sum() + 0.02 * (picked[1:] * picked[:-1]).sum())


def timed_trials(record: StudyRecord, problem: Problem, truth: NDArray[np.float64], *, trials: int) -> dict[str, float]:
    """Milliseconds a trial."""
    asks, tells = [], []
    for _ in range(trials):
        start = time.perf_counter()
        asked = record.ask()
        middle = time.perf_counter()
        value = divergence(problem, truth, asked.choice)
        scored = time.perf_counter()
        record.tell(asked, value, attrs={"samples": 256, "accuracy": 0.5})
        asks.append(1e3 * (middle - start))
        tells.append(1e3 * (time.perf_counter() - scored))
    best = record.best()
    return {
        "ask_ms": statistics.mean(asks),
        "ask_p90_ms": float(np.quantile(asks, 0.9)),
        "tell_ms": statistics.mean(tells),
        "total_ms": statistics.mean(asks) + statistics.mean(tells),
        "best": float("nan") if best is None or best.value is None else best.value,
    }


def storage_alone(folder: Path, problem: Problem, *, trials: int) -> dict[str, float]:
    """Milliseconds a trial of asking for a given choice and telling; seconds to open a journal of many."""
    path = folder / "many.journal"
    record = open_study(path, problem, sampler=sampler_by_name("random", problem))
    rng = np.random.default_rng(0)
    choices = rng.integers(0, problem.structure.sizes, size=(trials, len(problem.space.entries)))
    start = time.perf_counter()
    for row in choices:
        asked = record.ask("given", tuple(row.tolist()))
        record.tell(asked, float(rng.random()), attrs={"samples": 256, "accuracy": 0.5})
    stored = time.perf_counter()
    opened = open_study(path, problem, sampler=sampler_by_name("random", problem))
    reopened = time.perf_counter()
    plain = JournalStorage(JournalFileBackend(str(path)))
    plainly = time.perf_counter()
    assert len(opened.trials()) == len(plain.get_all_trials(0, deepcopy=False)) == trials
    return {
        "storage_ms": 1e3 * (stored - start) / trials,
        "kilobytes_a_trial": path.stat().st_size / trials / 1e3,
        "open_s": reopened - stored,
        "open_plain_optuna_s": plainly - reopened,
    }


def told(path: Path, problem: Problem, truth: NDArray[np.float64], *, trials: int) -> None:
    """A journal of finished trials that fit and have values, as if every move had made its share of them."""
    study = open_study(path, problem, sampler=sampler_by_name("random", problem)).study
    rng, tables, distributions = np.random.default_rng(0), Tables(problem), distributions_of(problem)
    for number in range(trials):
        row = tuple(rng.integers(0, problem.structure.sizes).tolist())
        choice = repair(problem, truth, row, tables=tables, anchor=problem.space.dense) or problem.space.dense
        attrs = {"autoprune:prior": "error", "autoprune:weights": rng.normal(0, 30, len(row)).astype(int).tolist()}
        move = MOVES[number % len(MOVES)]
        trial = create_trial(
            state=TrialState.COMPLETE,
            value=divergence(problem, truth, choice),
            params=dict(zip(problem.space.names, choice, strict=True)),
            distributions=dict(distributions),
            user_attrs={"origin": move, "samples": 256, "accuracy": 0.5},
            system_attrs=attrs if move == "perturb" else {},
        )
        trial.datetime_start = trial.datetime_complete = datetime.now()
        for name, amount in problem.violations(problem.costs_of(choice)).items():
            trial.system_attrs[f"{_CONSTRAINTS_KEY}:{name}"] = amount
        study.add_trial(trial)


def after(
    journal: Path, problem: Problem, truth: NDArray[np.float64], *, sampler: str, trials: int, batches: Sequence[int]
) -> dict[str, object]:
    """Milliseconds of the next asks and tells on a copy of `journal`; and of asks without a tell between, by count.

    `given` is the same for choices that are given: storing alone. The very first ask reads all trials.
    """
    path = journal.with_suffix(".copy")
    shutil.copy(journal, path)
    record = open_study(path, problem, sampler=sampler_by_name(sampler, problem, seed=0))
    start = time.perf_counter()
    found: dict[str, object] = {"sampler": sampler, "told": len(record.trials())}
    record.tell(record.ask(), 1.0)
    found["first_ms"] = 1e3 * (time.perf_counter() - start)
    if trials:
        found |= timed_trials(record, problem, truth, trials=trials)
    rng = np.random.default_rng(1)
    for count in batches:
        start = time.perf_counter()
        asked = [record.ask() for _ in range(count)]
        middle = time.perf_counter()
        choices = rng.integers(0, problem.structure.sizes, size=(count, len(problem.space.entries)))
        begun = time.perf_counter()
        asked += [record.ask("given", tuple(row.tolist())) for row in choices]
        found[f"ask_{count}_ms"] = 1e3 * (middle - start) / count
        found[f"given_{count}_ms"] = 1e3 * (time.perf_counter() - begun) / count
        for one in asked:
            record.tell(one, divergence(problem, truth, one.choice))
    path.unlink()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--units", type=int, default=60)
    parser.add_argument("--options", type=int, default=27)
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--journal-trials", type=int, default=10_000, help="0: skip")
    parser.add_argument("--sampler", default="budget", choices=sorted(SAMPLERS))
    parser.add_argument("--told", type=int, nargs="+", default=[], help="time what follows so many told trials")
    parser.add_argument("--samplers", nargs="+", default=["budget"], choices=sorted(SAMPLERS), help="with --told")
    parser.add_argument("--next", type=int, default=60, help="with --told: trials to time, at most")
    parser.add_argument("--batches", type=int, nargs="+", default=[], help="with --told: asks without a tell")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    problem, truth = synthetic_problem(given.units, given.options, given.seed)
    results: dict[str, object] = {"arguments": vars(given)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for count in given.told:
            told(folder / "told.journal", problem, truth, trials=count)
            for each in given.samplers:
                found = after(
                    folder / "told.journal",
                    problem,
                    truth,
                    sampler=each,
                    trials=given.next,
                    batches=given.batches,
                )
                print(json.dumps(found), flush=True)
            (folder / "told.journal").unlink()
        if given.told:
            return
        sampler = sampler_by_name(given.sampler, problem, seed=given.seed)
        record = open_study(folder / "study.journal", problem, sampler=sampler)
        results["search"] = timed_trials(record, problem, truth, trials=given.trials)
        if given.journal_trials:
            results["journal"] = storage_alone(folder, problem, trials=given.journal_trials)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
