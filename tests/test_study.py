from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from search_problems import divergence, toy_problem, toy_space

from autoprune.engines.base import Score
from autoprune.engines.local import Here
from autoprune.errors import DataError, RunError
from autoprune.searching.journal import mend_tail
from autoprune.searching.loop import Effort, run_search
from autoprune.searching.samplers import SAMPLERS, sampler_by_name
from autoprune.searching.study import INTERRUPTED, open_study


@pytest.fixture(scope="module")
def case():
    return toy_problem(toy_space((2, 1), 4), seed=1, coupling=0.5)


def opened(problem, path, name="budget", **more):
    return open_study(path, problem, sampler=sampler_by_name(name, problem), **more)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_line_when_asked_and_one_append_when_told(case, tmp_path, monkeypatch):
    problem, truth = case
    path = tmp_path / "study.journal"
    record = opened(problem, path)
    appends = []
    original = JournalFileBackend.append_logs
    monkeypatch.setattr(
        JournalFileBackend, "append_logs", lambda self, logs: (appends.append(len(logs)), original(self, logs))
    )
    for _ in range(5):
        before = len(lines(path))
        asked = record.ask()
        assert len(lines(path)) == before + 1
        record.tell(asked, divergence(problem, truth, asked.choice), attrs={"samples": 8, "accuracy": 0.5})
        assert len(lines(path)) == before + 1 + 3
    assert appends == [1, 3] * 5


def test_a_trial_knows_its_costs_constraints_and_origin(case, tmp_path):
    problem, _ = case
    record = opened(problem, tmp_path / "a.journal")
    asked = record.ask()
    record.tell(asked, 0.25)
    trial = record.best()
    assert trial is not None
    assert trial.user_attrs["origin"] == "prior:prior0"
    assert trial.user_attrs["cost.macs"] == pytest.approx(problem.costs_of(asked.choice)["macs"])
    assert set(trial.constraints) == {"budget.macs"}
    assert trial.constraints["budget.macs"] <= 0
    assert record.choice_of(trial) == asked.choice


def test_plain_optuna_reads_the_same(case, tmp_path):
    problem, truth = case
    path = tmp_path / "study.journal"
    record = opened(problem, path)
    run_search(problem, record, Here(lambda choice, best: Score(divergence(problem, truth, choice), 8)), Effort(12))
    asked = record.ask()
    record.tell(asked, 9.0, state="pruned", step=16)
    record.tell(record.ask(), None, state="fail", reason="why not")
    study = optuna.load_study(study_name="search", storage=JournalStorage(JournalFileBackend(str(path))))
    assert study.trials == record.trials()
    best = record.best()
    assert best is not None
    assert study.best_trial == best
    assert study.trials[-2].state == TrialState.PRUNED
    assert study.trials[-2].intermediate_values == {16: 9.0}
    assert study.trials[-2].value == 9.0
    assert study.trials[-1].user_attrs["reason"] == "why not"


def test_resume_repeats_nothing(case, tmp_path):
    problem, truth = case
    path = tmp_path / "study.journal"
    seen = []

    def evaluate(choice, best):
        seen.append(choice)
        return Score(divergence(problem, truth, choice), 8)

    baselines = {"uniform": (1, 0, 4, 4, 0, 4)}
    first = run_search(problem, opened(problem, path), Here(evaluate), Effort(6), baselines=baselines)
    second = run_search(problem, opened(problem, path), Here(evaluate), Effort(15), baselines=baselines)
    assert len(seen) == len(set(seen)) == 15
    assert second[0].value <= first[0].value
    assert len(second) == 15
    assert {"baseline:uniform"} <= {result.origin for result in second}


def test_a_reader_writes_nothing_and_needs_a_study(case, tmp_path):
    problem, _ = case
    path = tmp_path / "study.journal"
    with pytest.raises(RunError, match="no study 'search'"):
        opened(problem, path, claim=False)
    assert not path.exists()
    opened(problem, path)
    before = path.read_bytes()
    opened(problem, path, claim=False)
    opened(problem, path)
    assert path.read_bytes() == before


def test_another_space_is_refused(case, tmp_path):
    problem, _ = case
    path = tmp_path / "study.journal"
    opened(problem, path)
    other, _ = toy_problem(toy_space((1,), 4))
    with pytest.raises(RunError, match="another space"):
        opened(other, path)


def test_a_damaged_file_is_refused_with_its_name(case, tmp_path):
    path = tmp_path / "study.journal"
    path.write_text("this is no journal\nat all\n")
    with pytest.raises(RunError, match=r"study\.journal"):
        opened(case[0], path)


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from search_problems import divergence, toy_problem, toy_space
from autoprune.searching.samplers import sampler_by_name
from autoprune.searching.study import open_study

problem, truth = toy_problem(toy_space((2, 1), 4), seed=1, coupling=0.5)
record = open_study(Path(sys.argv[1]), problem, sampler=sampler_by_name("budget", problem))
for _ in range(4):
    asked = record.ask()
    record.tell(asked, divergence(problem, truth, asked.choice))
record.ask()
print("asked", flush=True)
time.sleep(60)
"""


def test_a_killed_process_loses_only_the_trial_it_was_at(case, tmp_path):
    problem, truth = case
    path = tmp_path / "study.journal"
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": str(tests.parent)}
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path), str(tests)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "asked"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()

    watching = opened(problem, path, claim=False)
    assert [trial.state for trial in watching.trials()] == [TrialState.COMPLETE] * 4 + [TrialState.RUNNING]
    record = opened(problem, path)
    last = record.trials()[-1]
    assert last.state == TrialState.FAIL
    assert last.user_attrs["reason"] == INTERRUPTED
    results = run_search(
        problem, record, Here(lambda choice, best: Score(divergence(problem, truth, choice), 8)), Effort(8)
    )
    assert len(results) == 8


def test_a_half_written_line_is_cut_off(case, tmp_path):
    problem, _ = case
    path = tmp_path / "study.journal"
    record = opened(problem, path)
    record.tell(record.ask(), 1.0)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"op_code": 4, "stu')
    assert mend_tail(path)
    assert path.read_bytes() == whole
    assert not mend_tail(path)
    path.write_bytes(whole + b"x" * 200_000)
    assert len(opened(problem, path, claim=False).trials()) == 1
    assert path.stat().st_size == len(whole) + 200_000
    again = opened(problem, path)
    again.tell(again.ask(), 2.0)
    assert [trial.value for trial in opened(problem, path).trials()] == [1.0, 2.0]
    assert not mend_tail(tmp_path / "missing")


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_a_value_that_is_no_number_fails_the_trial_and_says_so(case, tmp_path, value):
    problem, _ = case
    record = opened(problem, tmp_path / "a.journal")
    assert record.tell(record.ask(), value) == TrialState.FAIL
    trial = record.trials()[-1]
    assert trial.value is None
    assert ("no value" if value is None else str(value)) in trial.user_attrs["reason"]
    assert record.best() is None


def test_one_broken_trial_does_not_end_the_search(case, tmp_path):
    problem, truth = case
    record = opened(problem, tmp_path / "a.journal")
    calls = []

    def evaluate(choice, best):
        calls.append(choice)
        if len(calls) == 3:
            raise RuntimeError("shapes do not match")
        return Score(math.nan if len(calls) == 5 else divergence(problem, truth, choice), 8)

    results = run_search(problem, record, Here(evaluate), Effort(10))
    states = [trial.state for trial in record.trials()]
    assert len(results) == 8
    assert states.count(TrialState.FAIL) == 2
    assert record.trials()[2].user_attrs["reason"] == "RuntimeError: shapes do not match"


def test_an_evaluation_that_never_works_and_a_users_mistake_end_the_search(case, tmp_path):
    problem, _ = case

    def broken(choice, best):
        raise RuntimeError("out of memory")

    def mistaken(choice, best):
        raise DataError("no images in here")

    with pytest.raises(RunError, match=r"first 5 trials all failed.*out of memory"):
        run_search(problem, opened(problem, tmp_path / "a.journal"), Here(broken), Effort(50))
    with pytest.raises(DataError, match="no images"):
        run_search(problem, opened(problem, tmp_path / "b.journal"), Here(mistaken), Effort(50))


def test_control_c_stops_and_keeps_what_is_finished(case, tmp_path):
    problem, truth = case
    path = tmp_path / "a.journal"
    calls = []

    def evaluate(choice, best):
        calls.append(choice)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return Score(divergence(problem, truth, choice), 8)

    results = run_search(problem, opened(problem, path), Here(evaluate), Effort(50))
    assert len(results) == 3
    record = opened(problem, path)
    assert [trial.state.name for trial in record.trials()] == ["COMPLETE"] * 3 + ["FAIL"]


def test_time_is_up(case, tmp_path):
    problem, truth = case
    now = [0.0]

    def evaluate(choice, best):
        now[0] += 10
        return Score(divergence(problem, truth, choice), 8)

    record = opened(problem, tmp_path / "a.journal")
    results = run_search(problem, record, Here(evaluate), Effort(50, 35), clock=lambda: now[0])
    assert len(results) == 4


def test_pruned_trials_teach_but_do_not_win(case, tmp_path):
    problem, truth = case
    record = opened(problem, tmp_path / "a.journal")

    def evaluate(choice, best):
        value = divergence(problem, truth, choice)
        pruned = best is not None and value > 1.2 * best.value
        return Score(0.0 if pruned else value, 8, pruned=pruned, seen=None if pruned else np.full(8, value))

    results = run_search(problem, record, Here(evaluate), Effort(30))
    pruned = [trial for trial in record.trials() if trial.state == TrialState.PRUNED]
    assert pruned
    assert len(results) == 30 - len(pruned)
    assert results[0].value > 0


@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - {"budget"}))
def test_optunas_samplers_go_the_same_way_under_the_constraint(case, tmp_path, name):
    if name == "cmaes":
        pytest.importorskip("cmaes")
    if name == "gp":
        pytest.importorskip("torch")
    problem, truth = case
    path = tmp_path / "study.journal"
    record = opened(problem, path, name)
    evaluated = []

    def evaluate(choice, best):
        evaluated.append(choice)
        return Score(divergence(problem, truth, choice), 8)

    results = run_search(problem, record, Here(evaluate), Effort(14))
    assert all(problem.fits(choice) for choice in evaluated)
    assert all(problem.fits(result.choice) for result in results)
    declined = [trial for trial in record.trials() if trial.user_attrs.get("evaluated") is False]
    assert all(trial.constraints["budget.macs"] > 0 for trial in declined)
    scored = [record.choice_of(trial) for trial in record.trials() if trial not in declined]
    assert list(dict.fromkeys(scored)) == evaluated, "each choice once, however often it is proposed"
    creations = [line for line in lines(path) if line["op_code"] == 4]
    assert len(creations) == len(record.trials())
    assert not [line for line in lines(path) if line["op_code"] == 5]  # no parameter is written on its own


def test_tpe_learns_to_fit_from_the_constraint(tmp_path):
    problem, truth = toy_problem(toy_space((2, 1), 4), seed=1, share=0.35)

    def fitting_share(name):
        record = opened(problem, tmp_path / f"{name}.journal", name)
        run_search(problem, record, Here(lambda choice, best: Score(divergence(problem, truth, choice), 8)), Effort(60))
        late = [trial.constraints["budget.macs"] <= 0 for trial in record.trials()][30:]
        return sum(late) / len(late)

    assert fitting_share("tpe") > fitting_share("random") + 0.1


def test_many_trials_open_quickly_and_fast_replay_agrees_with_optunas(tmp_path):
    problem, _ = toy_problem(toy_space((4, 4, 4), 6, alone=10))
    path = tmp_path / "study.journal"
    record = opened(problem, path, "random")
    for number in range(300):
        record.tell(record.ask("given", (0,) * len(problem.space.names)), float(number))
    start = time.perf_counter()
    again = opened(problem, path, "random")
    assert time.perf_counter() - start < 2.0
    plain = JournalStorage(JournalFileBackend(str(path)))
    assert again.trials() == plain.get_all_trials(0)


def test_the_quick_list_of_trials_is_the_plain_one_at_every_step(case, tmp_path):
    """Two studies in one file, three handles that see each other's trials late, trials that end out of order."""
    problem, _ = case
    path, rng = tmp_path / "study.journal", np.random.default_rng(0)
    handles = [
        open_study(path, problem, sampler=sampler_by_name("random", problem), name=name) for name in ("a", "b", "a")
    ]
    running: list[tuple[int, object]] = []
    for _ in range(120):
        at = int(rng.integers(3))
        if running and rng.random() < 0.5:
            owner, asked = running.pop(int(rng.integers(len(running))))
            handles[owner].tell(asked, float(rng.random()), state=rng.choice(["complete", "pruned", "fail"]))
        else:
            running.append((at, handles[at].ask()))
        plain = JournalStorage(JournalFileBackend(str(path)))
        for record in handles:
            study = record.study
            expected = plain.get_all_trials(plain.get_study_id_from_name(study.study_name), deepcopy=False)
            study._thread_local.cached_all_trials = None
            assert record.trials() == expected


def test_values_that_are_never_numbers_end_the_search(case, tmp_path):
    problem, _ = case
    record = opened(problem, tmp_path / "a.journal")
    with pytest.raises(RunError, match="first 5 trials all failed, the last with: the value is nan"):
        run_search(problem, record, Here(lambda choice, best: Score(math.nan, 8)), Effort(50))
