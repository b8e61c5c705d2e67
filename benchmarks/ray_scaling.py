"""What Ray costs a search: throughput at four workers against one, the overhead of a trial, and Ray Tune beside it.

Four nodes of one CPU each on this machine; trials sleep nine tenths of their time and compute one tenth. Actors are
there before the clock starts. Configurations take turns, so that a busy machine is busy for all of them.

    python benchmarks/ray_scaling.py            # all of it, some minutes
    python benchmarks/ray_scaling.py --repeats 1 --no-tune
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray
from numpy.typing import NDArray
from ray import tune
from ray.cluster_utils import Cluster

from autoprune.core.budget import Metric
from autoprune.core.space import Choice, Space, UnitOptions
from autoprune.core.unit import Option, Unit
from autoprune.engines.base import Best, Lanes, Score
from autoprune.engines.local import Here
from autoprune.engines.ray.engine import RayEngine
from autoprune.engines.settings import EngineSettings, RaySettings
from autoprune.progress import Silent
from autoprune.searching.loop import Effort, run_search
from autoprune.searching.problem import Problem, as_row
from autoprune.searching.samplers import sampler_by_name
from autoprune.searching.study import StudyRecord, open_study

NODES = 4
COMPUTED = 0.1
"""The share of a trial in which it computes; in the rest it sleeps."""
TRIALS = {0.0: 200, 0.1: 80, 1.0: 16}
"""How many trials are timed at each length, with every number of workers."""
WARM_UP = 2
"""Trials of each worker before the clock starts."""


class SumOfCosts:
    """Each unit costs its kept share."""

    def __init__(self, kept: NDArray[np.float64]) -> None:
        self.kept = kept  # (units, options)

    def evaluate(self, metric: Metric, choices: NDArray[np.int64]) -> NDArray[np.float64]:  # noqa: ARG002
        costs: NDArray[np.float64] = self.kept[np.arange(choices.shape[1]), choices].sum(axis=1)
        return costs

    def linearise(self, metric: Metric, incumbent: Choice) -> list[NDArray[np.float64]]:  # noqa: ARG002
        return [row - row[option] for row, option in zip(self.kept, incumbent, strict=True)]

    def is_additive(self, metric: Metric) -> bool:  # noqa: ARG002
        return True


def problem(units: int = 20, options: int = 8) -> Problem:
    """A space of a small network; half of its cost is allowed."""
    entries = tuple(
        UnitOptions(
            Unit(f"conv{index}", "channels", options, ()),
            (Option("keep", options), *(Option("l2", options - step) for step in range(1, options))),
        )
        for index in range(units)
    )
    space = Space(entries)
    kept = np.array([[option.keep / options for option in entry.options] for entry in entries])
    costs = SumOfCosts(kept)
    dense = float(costs.evaluate("macs", as_row(space.dense))[0])
    return Problem(space, costs, {"macs": 0.5 * dense}, {"size": list((1 - kept) ** 2)})


@dataclass(frozen=True)
class Timed:
    """A trial of known length; the score says how long it really was."""

    seconds: float

    def __call__(self, choice: Choice, best: Best | None) -> Score:  # noqa: ARG002
        start = time.perf_counter()
        until = time.thread_time() + COMPUTED * self.seconds
        while time.thread_time() < until:
            np.linalg.norm(np.ones(1000))
        time.sleep(max(0.0, self.seconds - (time.perf_counter() - start)))
        value = float(sum((index + 1) * option for index, option in enumerate(choice)))
        return Score(value, 8, attrs={"took_s": time.perf_counter() - start})


class Result(NamedTuple):
    """One timed search: trials a second, and what a trial took beside its evaluation, of one worker's time."""

    rate: float
    overhead_s: float
    computed_s: float
    """How long an evaluation really was."""


def timed(lanes: Lanes, workers: int, trials: int, folder: Path) -> Result:
    """Search, and again to the end with the clock on."""
    given = problem()
    record = opened(given, Path(tempfile.mkdtemp(dir=folder), "study.journal"))
    while lanes.idle() < workers:
        lanes.wait(0.2)
    warm = WARM_UP * workers
    run_search(given, record, lanes, Effort(warm))
    start = time.perf_counter()
    run_search(given, record, lanes, Effort(warm + trials))
    wall_s = time.perf_counter() - start
    took_s = [float(trial.user_attrs["took_s"]) for trial in record.trials()[warm:]]
    assert len(took_s) == trials
    return Result(trials / wall_s, (wall_s * workers - sum(took_s)) / trials, statistics.median(took_s))


def opened(given: Problem, path: Path) -> StudyRecord:
    return open_study(path, given, sampler=sampler_by_name("budget", given, seed=0))


def with_ray(workers: int, seconds: float, trials: int, folder: Path) -> Result:
    engine = RayEngine(EngineSettings("ray", workers, ray=RaySettings()), folder, Silent())
    try:
        return timed(engine.lanes(Timed(seconds)), workers, trials, folder)
    finally:
        engine.close()


class Nothing(tune.Trainable):
    """A trial of Ray Tune that does nothing."""

    def step(self) -> dict[str, Any]:
        return {"value": 0.0, "done": True}

    def reset_config(self, new_config: dict[str, Any]) -> bool:  # noqa: ARG002
        return True


class Ends(tune.Callback):
    """When trials ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_trial_complete(self, iteration: int, trials: Sequence[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        self.times.append(time.perf_counter())


def with_tune(workers: int, trials: int, folder: Path, *, reuse: bool) -> float:
    """Seconds of one worker for a trial that does nothing, once as many as there are workers have ended."""
    ends = Ends()
    tuner = tune.Tuner(
        tune.with_resources(Nothing, {"cpu": 1}),
        tune_config=tune.TuneConfig(num_samples=trials, max_concurrent_trials=workers, reuse_actors=reuse),
        run_config=tune.RunConfig(
            storage_path=str(folder / "tune"),
            verbose=0,
            callbacks=[ends],
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    )
    tuner.fit()
    return (ends.times[-1] - ends.times[workers - 1]) * workers / (trials - workers)


class Echo:
    def answer(self) -> int:
        return 0


def call_s(calls: int = 300) -> float:
    """Seconds of one call of an actor."""
    actor = ray.remote(num_cpus=1)(Echo).remote()
    ray.get(actor.answer.remote())
    start = time.perf_counter()
    for _ in range(calls):
        ray.get(actor.answer.remote())
    spent = time.perf_counter() - start
    ray.kill(actor)
    return spent / calls


def spread(values: Sequence[float], scale: float = 1.0) -> str:
    """Median, and from the least to the most."""
    return f"{scale * statistics.median(values):8.2f} ({scale * min(values):.2f} to {scale * max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tune-trials", type=int, default=12)
    parser.add_argument("--no-tune", action="store_true")
    given = parser.parse_args()
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1"}
    head = {"num_cpus": 1, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(NODES - 1):
            cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, logging_level=logging.ERROR, log_to_driver=False)
        with tempfile.TemporaryDirectory() as name:
            measure(given.repeats, 0 if given.no_tune else given.tune_trials, Path(name))
    finally:
        ray.shutdown()
        cluster.shutdown()


def measure(repeats: int, tune_trials: int, folder: Path) -> None:
    """All configurations in turns; prints the table."""
    found: dict[tuple[str, float], list[Result]] = defaultdict(list)
    tuned: dict[bool, list[float]] = defaultdict(list)
    calls: list[float] = []
    for _ in range(repeats):
        for seconds, trials in TRIALS.items():
            found["in process", seconds].append(timed(Here(Timed(seconds)), 1, trials, folder))
            for workers in (1, NODES):
                found[f"ray, {workers}", seconds].append(with_ray(workers, seconds, trials, folder))
        for reuse in (True, False) if tune_trials else ():
            tuned[reuse].append(with_tune(NODES, tune_trials, folder, reuse=reuse))
        calls.append(call_s())
    load = os.getloadavg()[0]
    print(f"{os.cpu_count()} cores, load {load:.1f}; {repeats} repeats: median (least to most)")
    print(f"{'engine, workers':16} {'trial s':>7}  {'was s':>6}  {'trials/s':26} {'overhead, ms of a worker':30}")
    for (name, seconds), results in sorted(found.items(), key=lambda item: (item[0][1], item[0][0])):
        was = statistics.median(result.computed_s for result in results)
        rate = spread([result.rate for result in results])
        overhead = spread([result.overhead_s for result in results], 1000)
        print(f"{name:16} {seconds:7.1f}  {was:6.3f}  {rate:26} {overhead}")
    for seconds in TRIALS:
        one, four = found["ray, 1", seconds], found[f"ray, {NODES}", seconds]
        ratios = [after.rate / before.rate for before, after in zip(one, four, strict=True)]
        here = [result.overhead_s for result in found["in process", seconds]]
        more = [result.overhead_s - alone for result, alone in zip(four, here, strict=True)]
        print(f"trials of {seconds:g} s: {NODES} workers / 1: {spread(ratios)}; Ray's part: {spread(more, 1000)} ms")
    for reuse, seconds_each in tuned.items():
        print(f"Ray Tune, a trial that does nothing, reuse_actors={reuse}: {spread(seconds_each)} s of a worker")
    print(f"one call of an actor: {spread(calls, 1000)} ms")


if __name__ == "__main__":
    main()
