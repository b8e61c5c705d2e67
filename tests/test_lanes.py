"""Lanes of this process and of processes on this machine: one contract. Those of Ray: test_ray.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from lane_evaluations import Heavy, Scripted, all_done, assert_cancel_is_quick, assert_the_contract
from search_problems import divergence, toy_problem, toy_space

from autoprune.engines.base import Job, Score
from autoprune.engines.local import Here, Local
from autoprune.engines.processes import ProcessLanes
from autoprune.errors import RunError
from autoprune.searching.loop import Effort, ranked, run_search
from autoprune.searching.samplers import sampler_by_name
from autoprune.searching.study import INTERRUPTED, open_study

GIGABYTE = 1 << 30


@pytest.fixture
def processes(tmp_path):
    lanes = ProcessLanes(Scripted(tmp_path), workers=2, retries=2)
    yield lanes
    lanes.close()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def test_this_process(tmp_path):
    assert_the_contract(Here(Scripted(tmp_path)), workers=1, dies=False)


def test_processes(processes):
    assert_the_contract(processes, workers=2)
    assert_cancel_is_quick(processes)


def test_workers_share_the_cores_and_are_not_this_process(processes):
    ended = all_done(processes, [(0, n) for n in range(8)])
    attrs = [one.score.attrs for one in ended.values()]
    assert os.getpid() not in {each["pid"] for each in attrs}
    assert {each["threads"] for each in attrs} == {max(1, (os.cpu_count() or 1) // 2)}


def test_closing_ends_the_processes(tmp_path):
    lanes = ProcessLanes(Scripted(tmp_path, sleep_s=0.05), workers=2, retries=0)
    pids = {one.score.attrs["pid"] for one in all_done(lanes, [(0, n) for n in range(6)]).values()}
    assert all(map(alive, pids))
    lanes.close()
    assert not any(map(alive, pids))


def test_lanes_are_started_once_for_a_function(tmp_path):
    engine = Local(2)
    evaluate = Scripted(tmp_path)
    lanes = engine.lanes(evaluate)
    assert engine.lanes(evaluate) is lanes
    engine.close()


def test_workers_die_with_who_started_them(tmp_path):
    """Even when that is killed."""
    code = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from lane_evaluations import Scripted, all_done
from autoprune.engines.processes import ProcessLanes
lanes = ProcessLanes(Scripted(Path({str(tmp_path)!r}), sleep_s=0.05), workers=2, retries=0)
print(*{{one.score.attrs["pid"] for one in all_done(lanes, [(0, n) for n in range(6)]).values()}}, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert pids
        process.kill()
        process.wait()
    until = time.monotonic() + 20
    while any(map(alive, pids)):
        assert time.monotonic() < until, "workers outlive the process that started them"
        time.sleep(0.1)


def test_what_cannot_be_unpacked_says_so(tmp_path, capfd):
    class Broken:
        def __reduce__(self):
            return (exec, ("raise SystemError('cannot be made here')",))

        def __call__(self, choice, best):
            raise AssertionError

    with pytest.raises(RunError, match="worker process ended at once"):
        ProcessLanes(Broken(), workers=1, retries=0)
    assert "cannot be made here" in capfd.readouterr().err


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="memory is told by /proc alone")
@pytest.mark.slow
def test_memory_of_what_is_sent_is_there_once():
    """Half a gigabyte for four processes: none has a copy of its own."""
    ballast = torch.ones(GIGABYTE // 8)
    lanes = ProcessLanes(Heavy(ballast), workers=4, retries=0)
    ended = all_done(lanes, [(0, n) for n in range(16)])
    lanes.close()
    assert len({one.score.attrs["pid"] for one in ended.values()}) > 1
    assert max(one.score.attrs["own_bytes"] for one in ended.values()) < 400e6
    assert {one.score.value for one in ended.values()} == {float(ballast.numel() >> 12)}


# ---- the loop over several lanes -------------------------------------------------------------------------------------


class Shuffled:
    """Lanes of a simulated machine: jobs end in an order drawn from a seed."""

    def __init__(self, evaluate, size, seed):
        self.evaluate, self.size = evaluate, size
        self.rng = np.random.default_rng(seed)
        self.jobs: list[Job] = []
        self.most = 0

    def idle(self):
        return self.size - len(self.jobs)

    def start(self, job):
        self.jobs.append(job)
        self.most = max(self.most, len(self.jobs))

    def wait(self, seconds):
        if not self.jobs:
            return None
        here = Here(self.evaluate)
        here.start(self.jobs.pop(int(self.rng.integers(len(self.jobs)))))
        return here.wait(seconds)

    def cancel(self):
        self.jobs.clear()


@pytest.fixture(scope="module")
def case():
    return toy_problem(toy_space((2, 2), 4), seed=1, coupling=0.5)


def opened(problem, path, seed=0):
    return open_study(path, problem, sampler=sampler_by_name("budget", problem, seed=seed))


def scored(problem, truth):
    def evaluate(choice, best):
        value = divergence(problem, truth, choice)
        return Score(value, 8, seen=np.full(8, value))

    return evaluate


@pytest.mark.parametrize("size", [2, 7, 32])
def test_exactly_so_many_trials_each_choice_once(case, tmp_path, size):
    problem, truth = case
    record = opened(problem, tmp_path / "a.journal")
    lanes = Shuffled(scored(problem, truth), size, seed=3)
    baselines = {"uniform": (3, 0, 3, 3, 0, 3, 3)}
    assert problem.fits(baselines["uniform"])
    results = run_search(problem, record, lanes, Effort(60), baselines=baselines)
    choices = [record.choice_of(trial) for trial in record.trials()]
    assert len(choices) == len(set(choices)) == 60
    assert lanes.most == size, "all lanes were busy"
    assert all(trial.state.is_finished() for trial in record.trials())
    assert {"baseline:uniform", "prior:prior0", "prior:prior1"} <= {one.origin for one in results}


def test_the_same_policies_give_the_same_winner_in_whatever_order(case, tmp_path):
    """Values in steps, so that many are equal: the winner must not depend on who came first."""
    problem, truth = case
    seen = set()
    for seed in range(6):
        record = opened(problem, tmp_path / f"{seed}.journal")
        rng = np.random.default_rng(seed)
        choices = [choice for choice in [(1, 0, a, b, 1, c, d) for a in (2, 3, 4) for b in (2, 3, 4) for c in (0, 3)
                                         for d in (2, 4)] if problem.fits(choice)]  # fmt: skip
        for index in rng.permutation(len(choices)):
            asked = record.ask("given", choices[index])
            record.tell(asked, round(divergence(problem, truth, asked.choice), 1))
        best = ranked(record)[:5]
        seen.add(tuple((one.choice, one.value) for one in best))
    assert len(seen) == 1


def test_one_lane_of_any_kind_gives_the_same_trials(case, tmp_path):
    problem, truth = case
    told = []
    for name, lanes in (("here", Here(scored(problem, truth))), ("one", Shuffled(scored(problem, truth), 1, seed=0))):
        record = opened(problem, tmp_path / f"{name}.journal")
        run_search(problem, record, lanes, Effort(40))
        told.append([(record.choice_of(trial), trial.value) for trial in record.trials()])
    assert told[0] == told[1]


def test_lanes_are_compared_with_the_best_of_all_lanes(case, tmp_path):
    problem, truth = case
    bests = []

    def evaluate(choice, best):
        value = divergence(problem, truth, choice)
        bests.append((value, None if best is None else best.value, best is not None and best.seen is not None))
        return Score(value, 8, seen=np.full(8, value))

    run_search(problem, opened(problem, tmp_path / "a.journal"), Shuffled(evaluate, 4, seed=1), Effort(30))
    assert all(known for _, best, known in bests if best is not None)
    assert bests[-1][1] == min(value for value, _, _ in bests[:-4])


def test_what_is_known_is_told_without_a_lane(case, tmp_path):
    problem, truth = case
    known = {}
    first = run_search(problem, opened(problem, tmp_path / "a.journal"), Here(scored(problem, truth)), Effort(20),
                       known=known)  # fmt: skip
    assert len(known) == 20

    def never(choice, best):
        raise AssertionError("is known")

    record = opened(problem, tmp_path / "b.journal")
    second = run_search(problem, record, Here(never), Effort(20), known=known)
    assert [(one.choice, one.value) for one in first] == [(one.choice, one.value) for one in second]


def test_interrupted_trials_come_first_and_are_given_up_in_the_end(case, tmp_path):
    """As after a driver that was killed: what it was running is begun again, at most so often."""
    problem, truth = case
    path = tmp_path / "a.journal"
    run_search(problem, opened(problem, path), Here(scored(problem, truth)), Effort(10))
    record = opened(problem, path)
    pending = [record.ask() for _ in range(3)]
    for asked in pending:
        record.tell(asked, None, state="fail", reason=INTERRUPTED)
    seen = []

    def evaluate(choice, best):
        seen.append(choice)
        return scored(problem, truth)(choice, best)

    record = opened(problem, path)
    run_search(problem, record, Here(evaluate), Effort(20))
    assert seen[:3] == [asked.choice for asked in pending]
    again = [trial for trial in record.trials() if trial.user_attrs.get("retry")]
    assert [trial.user_attrs["retry"] for trial in again] == [1, 1, 1]
    told = [trial for trial in record.trials() if trial.user_attrs.get("reason") != INTERRUPTED]
    assert len(told) == 20
    assert len({record.choice_of(trial) for trial in told}) == 20
    asked = record.ask()
    for _ in range(3):
        record.tell(asked, None, state="fail", reason=INTERRUPTED)
        asked = record.ask("again", asked.choice)
    record.tell(asked, None, state="fail", reason=INTERRUPTED)
    seen.clear()
    run_search(problem, opened(problem, path), Here(evaluate), Effort(24, retries=2))
    assert asked.choice not in seen, "four times interrupted, three allowed"


def test_control_c_with_several_running_leaves_none_of_them(case, tmp_path):
    problem, truth = case
    record = opened(problem, tmp_path / "a.journal")
    count = []

    def evaluate(choice, best):
        count.append(choice)
        if len(count) == 9:
            raise KeyboardInterrupt
        return scored(problem, truth)(choice, best)

    results = run_search(problem, record, Shuffled(evaluate, 4, seed=0), Effort(30))
    assert len(results) == 8
    reasons = [trial.user_attrs.get("reason") for trial in record.trials()]
    assert reasons.count(INTERRUPTED) == 4
    assert all(trial.state.is_finished() for trial in record.trials())


def test_two_processes_share_one_journal(case, tmp_path):
    """Each asks, evaluates and tells by itself; together they do what was asked for, no choice twice."""
    path = tmp_path / "shared.journal"
    code = textwrap.dedent(f"""
        import sys, time
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        from search_problems import divergence, toy_problem, toy_space
        from autoprune.engines.base import Score
        from autoprune.engines.local import Here
        from autoprune.searching.loop import Effort, run_search
        from autoprune.searching.samplers import sampler_by_name
        from autoprune.searching.study import open_study
        problem, truth = toy_problem(toy_space((2, 2), 4), seed=1, coupling=0.5)
        record = open_study(Path({str(path)!r}), problem, sampler=sampler_by_name("budget", problem))
        mine = []
        def evaluate(choice, best):
            time.sleep(0.03)
            mine.append(choice)
            return Score(divergence(problem, truth, choice), 8)
        results = run_search(problem, record, Here(evaluate), Effort(50))
        print(len(mine), len(results), results[0].value)
    """)
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    found = [process.communicate(timeout=120) for process in processes]
    assert all(process.returncode == 0 for process in processes), found
    counts = [out.split() for out, _ in found]
    problem, _ = case
    record = open_study(path, problem, sampler=sampler_by_name("budget", problem), claim=False)
    evaluated = [trial for trial in record.trials() if trial.values is not None]
    assert len(evaluated) == 50 == sum(int(count[0]) for count in counts)
    assert len({record.choice_of(trial) for trial in evaluated}) == 50
    assert len({tuple(count[1:]) for count in counts}) == 1, "all have the same results in the end"
    assert sum(int(count[0]) > 0 for count in counts) > 1, "more than one had work"


def test_what_a_killed_process_was_running_is_done_by_another(case, tmp_path):
    path = tmp_path / "shared.journal"
    code = f"""
import sys, os, signal
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from search_problems import toy_problem, toy_space
from autoprune.searching.samplers import sampler_by_name
from autoprune.searching.study import open_study
problem, _ = toy_problem(toy_space((2, 2), 4), seed=1, coupling=0.5)
record = open_study(Path({str(path)!r}), problem, sampler=sampler_by_name("budget", problem))
record.tell(record.ask(), 0.5)
record.ask(); record.ask()
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    problem, truth = case
    record = opened(problem, path)
    assert [trial.user_attrs.get("reason") for trial in record.trials()] == [None, INTERRUPTED, INTERRUPTED]
    run_search(problem, record, Here(scored(problem, truth)), Effort(12))
    told = [trial for trial in record.trials() if trial.values is not None]
    assert len(told) == 12
    assert {record.choice_of(record.trials()[1]), record.choice_of(record.trials()[2])} <= set(
        map(record.choice_of, told)
    )
