"""A search on a real Ray on this machine: the same lanes, the same trials, measurements where they belong."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lane_evaluations import Heavy, Scripted, all_done, assert_cancel_is_quick, assert_the_contract
from networks import IMAGE, Residual, data_of, randomised, workbench_of
from search_problems import divergence, toy_problem, toy_space
from test_finetune import badly_pruned, lesson_of

from autoprune import api
from autoprune.core.target import Target
from autoprune.engines import open_engine
from autoprune.engines.base import Score
from autoprune.engines.local import Here, this_machine
from autoprune.engines.settings import TARGET, EngineSettings, RaySettings
from autoprune.errors import DataError, RunError, TargetError
from autoprune.goal import Plan, Recover
from autoprune.progress import Silent
from autoprune.recover.course import Course
from autoprune.recover.course import divergence as divergence_of
from autoprune.recover.finetune import Schedule
from autoprune.run import JOURNAL
from autoprune.searching.loop import Effort, run_search
from autoprune.searching.samplers import sampler_by_name
from autoprune.searching.study import open_study
from autoprune.verify import Stopwatch

ray = pytest.importorskip("ray", reason="needs ray: pip install 'autoprune[ray]'")

SETTINGS = EngineSettings("ray", workers=2, retries=2)


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """One small Ray for the whole file; engines use it and leave it running."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(address="local", num_cpus=2, resources={TARGET: 1}, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def engine(tmp_path):
    engine = open_engine(SETTINGS, tmp_path, Silent())
    yield engine
    engine.close()


class Told(Silent):
    def __init__(self):
        self.lines = []

    def phase(self, name, steps=None):
        self.lines.append(("phase", name, steps))

    def step(self, done=1):
        self.lines.append(("step", done))

    def note(self, text):
        self.lines.append(("note", text))


# ---- the engine ------------------------------------------------------------------------------------------------------


def test_actors_keep_the_contract_of_lanes(engine, tmp_path):
    lanes = engine.lanes(Scripted(tmp_path))
    assert_the_contract(lanes, workers=2)
    assert_cancel_is_quick(lanes)


def test_lanes_of_a_function_are_started_once_and_end_with_the_engine(tmp_path):
    engine = open_engine(SETTINGS, tmp_path, Silent())
    evaluate = Scripted(tmp_path, sleep_s=0.05)
    lanes = engine.lanes(evaluate)
    pids = {one.score.attrs["pid"] for one in all_done(lanes, [(0, n) for n in range(8)]).values()}
    assert engine.lanes(evaluate) is lanes
    assert os.getpid() not in pids
    engine.close()
    until = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < until, "actors outlive the engine"
        time.sleep(0.1)


def test_closed_lanes_say_so(engine, tmp_path):
    lanes = engine.lanes(Scripted(tmp_path))
    engine.lanes(Scripted(tmp_path / "other"))
    with pytest.raises(RunError, match="closed"):
        lanes.idle()


def scaled(tensor, item):
    return tensor * item


def test_independent_work_comes_back_in_order_and_its_errors_too(engine):
    found = list(engine.each(scaled, torch.arange(3.0), list(range(20))))
    assert [each.tolist() for each in found] == [[0.0, n, 2.0 * n] for n in range(20)]
    with pytest.raises(TypeError):
        list(engine.each(scaled, torch.arange(3.0), ["no", None]))


def measured(factor, *, progress=None):
    if progress is not None:
        progress.phase("there", 2)
        progress.step()
        progress.note("still there")
    if factor is None:
        raise DataError("this is the user's")
    until = time.monotonic() + 10  # what is free is told a moment late
    while (free := ray.available_resources().get("CPU", 0.0)) and time.monotonic() < until:
        time.sleep(0.1)
    return factor * os.getpid(), free


def test_measurements_have_the_target_to_themselves(engine, tmp_path):
    """No lane beside them, all CPUs of the node; progress and errors arrive."""
    all_done(engine.lanes(Scripted(tmp_path)), [(0, 1)])
    told = Told()
    pid, free = engine.measure(measured, 1, progress=told)
    assert pid != os.getpid()
    assert free == 0.0
    assert told.lines == [("phase", "there", 2), ("step", 1), ("note", "still there")]
    with pytest.raises(DataError, match="this is the user's"):
        engine.measure(measured, None)
    assert engine.where() == this_machine()


def test_a_small_task_beside_a_measurement_has_to_wait(engine):
    started = time.time()
    slow = ray.remote(num_cpus=1)(lambda: (time.sleep(2), time.time())[1]).remote()
    time.sleep(0.7)  # it has its CPU
    begun = engine.measure(time.time)
    assert begun >= ray.get(slow) > started


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="memory is told by /proc alone")
def test_what_is_evaluated_with_is_in_memory_once(tmp_path):
    """A quarter of a gigabyte for three actors on a node."""
    ballast = torch.ones(1 << 26)
    settings = dataclasses.replace(SETTINGS, workers=3, ray=RaySettings(cpus=0.5))
    engine = open_engine(settings, tmp_path, Silent())
    ended = all_done(engine.lanes(Heavy(ballast)), [(0, n) for n in range(12)])
    engine.close()
    assert max(one.score.attrs["own_bytes"] for one in ended.values()) < 200e6
    assert {one.score.value for one in ended.values()} == {float(ballast.numel() >> 12)}


def test_no_cluster_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    settings = EngineSettings("ray", ray=RaySettings(address="127.0.0.1:1"))
    monkeypatch.setattr(ray, "init", lambda **_: (_ for _ in ()).throw(ConnectionError("no node at 127.0.0.1:1\nmore")))
    with pytest.raises(RunError, match=r"cannot connect to a cluster at '127.0.0.1:1' \(ConnectionError: no node"):
        open_engine(settings, tmp_path, Silent())


# ---- the search ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Toy:
    problem: Any
    truth: Any

    def __call__(self, choice, best):
        value = divergence(self.problem, self.truth, choice)
        return Score(value, 8, seen=np.full(8, value))


@pytest.fixture(scope="module")
def case():
    return toy_problem(toy_space((2, 2), 4), seed=1, coupling=0.5)


def trials_of(case, path, lanes, count, seed=0):
    problem, _ = case
    record = open_study(path, problem, sampler=sampler_by_name("budget", problem, seed=seed))
    run_search(problem, record, lanes, Effort(count))
    return [(record.choice_of(trial), trial.value, trial.state) for trial in record.trials()]


def test_one_worker_and_a_seed_give_the_same_trials_on_either_engine_and_on_both(case, tmp_path):
    engine = open_engine(dataclasses.replace(SETTINGS, workers=1), tmp_path, Silent())
    toy = Toy(*case)
    lanes = engine.lanes(toy)
    here = trials_of(case, tmp_path / "here", Here(toy), 40)
    assert trials_of(case, tmp_path / "ray", lanes, 40) == here
    for first, second in ((Here(toy), lanes), (lanes, Here(toy))):
        path = tmp_path / f"both{type(first).__name__}"
        trials_of(case, path, first, 15)
        assert trials_of(case, path, second, 40) == here, "begun with one, continued with the other"
    engine.close()


@pytest.fixture
def _short_timing(monkeypatch):
    made = Stopwatch.of
    monkeypatch.setattr(
        Stopwatch, "of", lambda *args, **kwargs: dataclasses.replace(made(*args, **kwargs), seconds_each=0.05, rounds=5)
    )


def searched(folder, **plan):
    model = randomised(Residual())
    calibration, validation = data_of(model, IMAGE)
    return api.search(
        model, calibration=calibration, validation=validation, budget=plan.pop("budget", "50%macs"),
        target=Target(plan.pop("runtime", "torch")), run=folder, plan=Plan(finalists=2, **plan),
    )  # fmt: skip


@pytest.mark.usefixtures("_short_timing")
def test_a_search_gives_the_same_policy_on_either_engine(tmp_path):
    """Bank, priors, scores and measurements all through Ray; no number of the policy differs."""
    torch.set_num_threads(1)
    here = searched(tmp_path / "here", trials=14)
    there = searched(tmp_path / "ray", trials=14, engine=dataclasses.replace(SETTINGS, workers=1))
    assert there.policy.units == here.policy.units
    assert [(one.divergence, one.origin) for one in there.record.trials] == [
        (one.divergence, one.origin) for one in here.record.trials
    ]
    assert there.record.chosen.divergence == here.record.chosen.divergence
    lines = (tmp_path / "ray" / JOURNAL).read_text().count("\n")
    assert lines == (tmp_path / "here" / JOURNAL).read_text().count("\n")


@pytest.mark.usefixtures("_short_timing")
def test_trials_that_recover_run_under_tune_and_asha_stops_some(tmp_path):
    settings = dataclasses.replace(SETTINGS, ray=RaySettings(asha=True))
    outcome = searched(
        tmp_path, trials=16, engine=settings, recover=Recover(steps=8, batch=16, trials=True)
    )  # fmt: skip
    states = [one.state for one in outcome.record.trials]
    assert len(states) == 16
    pruned = [one for one in outcome.record.trials if one.state == "pruned"]
    assert pruned, "ASHA stopped none of 16"
    assert not any(one.origin.startswith("baseline:") for one in pruned), "baselines are scored to the end"
    assert list((tmp_path / "tune").iterdir()), "Tune wrote its own results there"


@pytest.mark.usefixtures("_short_timing")
def test_tunes_own_callbacks_hear_of_every_trial(tmp_path):
    """TensorBoard's, as a user adds it; for short trials, which Tune does not run, too."""
    from ray.tune.logger import TBXLoggerCallback  # noqa: PLC0415  (ray may be missing)

    settings = dataclasses.replace(SETTINGS, ray=RaySettings(callbacks=(TBXLoggerCallback(),)))
    outcome = searched(tmp_path, trials=8, engine=settings)
    events = sorted((tmp_path / "tune").rglob("events.out.tfevents.*"))
    assert len(events) == len(outcome.record.trials) == 8
    assert all(path.stat().st_size > 100 for path in events)


def test_a_population_goes_on_from_its_best(tmp_path):
    """Three copies under population-based training: the best of all rounds is at least what one alone has found."""
    bench = workbench_of(randomised(Residual()), IMAGE, tmp_path, calibration=256)
    course = Course(
        lesson_of(bench), badly_pruned(bench), bench.selection, bench.bank.norms, Schedule(40, 3e-3), seed=0, rounds=4
    )  # fmt: skip
    before = divergence_of(course.candidate.model, course.selection, course.norms)
    engine = open_engine(dataclasses.replace(SETTINGS, ray=RaySettings(population=3)), tmp_path, Silent())
    state = engine.train(course)
    engine.close()
    assert state is not None
    after = divergence_of(course.finished(state).model, course.selection, course.norms)
    assert after < 0.8 * before
    members = [path for path in (tmp_path / "tune").glob("tune-*/Studying_*") if path.is_dir()]
    assert len(members) == 3


# ---- placement -------------------------------------------------------------------------------------------------------


@pytest.fixture
def _no_target(monkeypatch):
    monkeypatch.setattr("autoprune.engines.ray.target.targets", list)


@pytest.mark.usefixtures("_no_target", "_short_timing")
def test_without_a_target_the_table_must_be_there(tmp_path):
    settings = dataclasses.replace(SETTINGS, ray=RaySettings(target_wait_s=0.5))
    with pytest.raises(TargetError, match=r"has no table of the target.*autoprune_target"):
        searched(tmp_path, trials=6, engine=settings, budget="70%")
    searched_here = tmp_path / "measured"
    searched(searched_here, trials=6, budget="70%")
    with pytest.raises(TargetError, match=r"nothing that was found is lost"):  # the search ran, verification waited
        searched(searched_here, trials=9, engine=settings, budget="70%")
