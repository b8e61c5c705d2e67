"""A search goes on whatever dies: workers, nodes, its own process, the head. Kills are drawn from a seed."""

from __future__ import annotations

import copy
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from lane_evaluations import Scripted, all_done
from optuna.trial import TrialState
from search_problems import divergence

from autoprune.core.space import Choice
from autoprune.engines import freight
from autoprune.engines.base import Best, Score
from autoprune.progress import Silent
from autoprune.searching.study import INTERRUPTED, WITHDRAWN

ray = pytest.importorskip("ray", reason="needs ray: pip install 'autoprune[ray]'")
from ray_faults_driver import RETRIES, the_problem, the_study  # noqa: E402
from ray_heads import Head, Node, environment, head, node, psutil  # noqa: E402

from autoprune.engines.ray.engine import RayEngine  # noqa: E402
from autoprune.engines.settings import EngineSettings, RaySettings  # noqa: E402

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")

WORKERS, CPUS = 4, 2
GCS_S = 5
"""How long the processes of a cluster look for a head that is gone; 60 unless they are told."""
LIMIT_S = 300
"""Nothing that is waited for takes so long on a machine of any speed: the search hangs."""
_LOOK_S = 0.02


@dataclass(slots=True)
class Driver:
    """The process of the search."""

    folder: Path
    trials: int
    log: Path
    process: subprocess.Popen[bytes]

    @classmethod
    def started(cls, folder: Path, trials: int, *options: str, variables: dict[str, str] | None = None) -> Driver:
        log = folder / f"driver{len(list(folder.glob('driver*.log')))}.log"
        script = Path(__file__).with_name("ray_faults_driver.py")
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, str(script), str(folder), str(trials), *options], stdin=subprocess.DEVNULL,
                stdout=file, stderr=file, env=environment() | (variables or {}), start_new_session=True,
            )  # fmt: skip
        return cls(folder, trials, log, process)

    def ended(self) -> int:
        """Its exit code, when it has ended."""
        try:
            return self.process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"the driver hangs\n{self.said()}") from None

    def said(self) -> str:
        """The end of what it said."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-40:])


class Study:
    """What the journal holds, looked at again and again: what was told once stays as it is."""

    def __init__(self, folder: Path) -> None:
        self._record = the_study(folder / "study.journal", claim=False)
        self._told: dict[int, tuple[Any, ...]] = {}

    def told(self) -> dict[int, tuple[Any, ...]]:
        """Trials that count, by number: state, value, choice, the worker that scored it."""
        found = {
            trial.number: (trial.state, trial.value, self._record.choice_of(trial), trial.user_attrs.get("pid"))
            for trial in self._record.trials()
            if trial.state.is_finished() and trial.user_attrs.get("reason") not in (INTERRUPTED, WITHDRAWN)
            and trial.user_attrs.get("evaluated", True)
        }  # fmt: skip
        for number, seen in self._told.items():
            assert found.get(number) == seen, f"trial {number} was told, and is another now"
        self._told = found
        return found

    def trials(self) -> list[Any]:
        return self._record.trials()

    def choice_of(self, trial: Any) -> Choice:
        choice = self._record.choice_of(trial)
        assert choice is not None
        return choice


@dataclass(slots=True)
class Diary:
    """What evaluations wrote down, wherever they ran."""

    path: Path
    began: Counter[Choice] = field(default_factory=Counter)
    ended: Counter[Choice] = field(default_factory=Counter)

    def running(self) -> list[int]:
        """Ids of processes that are in the middle of an evaluation, or died in it."""
        self.began.clear()
        self.ended.clear()
        open_: dict[int, Choice] = {}
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            event, pid, text = line.split()
            choice = tuple(map(int, text.split(",")))
            if event == "began":
                self.began[choice] += 1
                open_[int(pid)] = choice
            else:
                self.ended[choice] += 1
                open_.pop(int(pid))
        return sorted(open_)


class Cluster:
    """A head that evaluates nothing, and nodes that do. Nodes start beside what else goes on."""

    def __init__(self, stack: ExitStack, nodes: int) -> None:
        self.head: Head = stack.enter_context(head(0, dashboard=False))
        self.nodes: list[Node] = []
        self._stack = stack
        self._pool = stack.enter_context(ThreadPoolExecutor(nodes))
        for started in [self._pool.submit(self._start) for _ in range(nodes)]:
            started.result()

    def replace(self, gone: Node) -> None:
        """Another node in place of one that is gone, when it is there."""
        self.nodes.remove(gone)
        self._pool.submit(self._start)

    def processes(self) -> list[Any]:
        """Those of the nodes."""
        return [process for each in list(self.nodes) for process in below(each.process.pid)]

    def kill(self) -> None:
        """All of it."""
        for each in [*self.nodes, self.head.node]:
            each.kill()

    def _start(self) -> None:
        self.nodes.append(self._stack.enter_context(node(self.head.address, CPUS)))


@contextmanager
def cluster(nodes: int) -> Iterator[Cluster]:
    with ExitStack() as stack:
        made = Cluster(stack, nodes)
        try:
            yield made
        finally:
            made.kill()  # which is quicker than to stop it


def below(pid: int) -> list[Any]:
    """A process and all that it started."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def waited_for(what: Callable[[], Any], why: str) -> Any:
    until = time.monotonic() + LIMIT_S
    while not (found := what()):
        assert time.monotonic() < until, why
        time.sleep(_LOOK_S)
    return found


class Faults:
    """Kills, one after the other, each when the search has come a bit further."""

    study: Study

    def __init__(self, folder: Path, trials: int, seed: int) -> None:
        self.folder, self.trials = folder, trials
        self.rng = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.diary = Diary(folder / "diary.txt")

    def started(self, cluster: Cluster, *, scale: float = 1.0) -> Driver:
        """The driver, with the one command; slower evaluations where asked for."""
        options = ["--address", cluster.head.address, "--workers", str(WORKERS), "--scale", str(scale)]
        return Driver.started(self.folder, self.trials, *options)

    def await_told(self, count: int, driver: Driver) -> None:
        """Until so many trials are told."""

        def enough() -> bool:
            told = len(self.study.told())
            assert told >= self.trials or driver.process.poll() is None, driver.said()
            return told >= count

        waited_for(enough, f"no more than {len(self.study.told())} trials\n{driver.said()}")

    def kill_worker(self, cluster: Cluster, driver: Driver) -> None:
        """One that is evaluating."""

        def victim() -> Any:
            assert driver.process.poll() is None, driver.said()
            running = set(self.diary.running())
            found = [each for each in cluster.processes() if each.pid in running]
            return self.rng.choice(found) if found else None

        waited_for(victim, "no worker evaluates anything").kill()

    def kill_raylet(self, cluster: Cluster, driver: Driver) -> None:
        """The process of a node that holds its workers; they are to find out by themselves."""
        gone = self._node(cluster)
        for each in below(gone.process.pid):
            if each.name() == "raylet":
                each.kill()
        cluster.replace(gone)

    def kill_node(self, cluster: Cluster, driver: Driver) -> None:
        """All of its processes at once."""
        gone = self._node(cluster)
        gone.kill()
        cluster.replace(gone)

    def _node(self, cluster: Cluster) -> Node:
        return self.rng.choice(waited_for(lambda: list(cluster.nodes), "no node starts"))

    def run(self, plan: dict[str, int], *, nodes: int) -> None:
        """So many kills of each kind; then the head dies under the driver, and a new cluster ends the search."""
        kinds = [kind for kind, times in plan.items() for _ in range(times)]
        self.rng.shuffle(kinds)
        last = self.trials * 3 // 5  # the rest is for the head
        with cluster(nodes) as first:
            driver = self.started(first)
            self.study = waited_for(self._study, "there is no study")
            for index, kind in enumerate(kinds):
                self.await_told(max(1, last * index // len(kinds)), driver)
                if kind == "driver":
                    driver.process.kill()
                    driver.ended()
                    driver = self.started(first)
                else:
                    {"worker": self.kill_worker, "raylet": self.kill_raylet, "node": self.kill_node}[kind](
                        first, driver
                    )
                self.counts[kind] += 1
                self.study.told()
            self._kill_head(first, driver)
        with cluster(nodes) as second:
            driver = self.started(second)
            assert driver.ended() == 0, driver.said()

    def _kill_head(self, cluster: Cluster, driver: Driver) -> None:
        """Under a driver that could not be through before it notices."""
        driver.process.kill()
        driver.ended()
        self.counts["driver"] += 1
        before = len(self.study.told())
        driver = self.started(cluster, scale=8.0)
        self.await_told(before + 2, driver)
        cluster.head.node.kill()
        self.counts["head"] += 1
        assert driver.ended() != 0, driver.said()
        assert len(self.study.told()) < self.trials

    def _study(self) -> Study | None:
        journal = self.folder / "study.journal"
        return Study(self.folder) if journal.exists() and journal.read_bytes().count(b"\n") > 2 else None


@pytest.fixture
def _quick_to_notice(monkeypatch):
    """That a node or the head is gone. How slow one that is there may be remains as it is."""
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", str(GCS_S))
    monkeypatch.setenv("RAY_health_check_period_ms", "1000")
    monkeypatch.setenv("RAY_health_check_failure_threshold", "3")


@pytest.mark.usefixtures("_quick_to_notice")
@pytest.mark.parametrize(
    ("trials", "nodes", "plan"),
    [
        pytest.param(60, 2, {"worker": 5, "raylet": 1, "node": 1, "driver": 1}, id="quick"),
        pytest.param(200, 3, {"worker": 30, "raylet": 5, "node": 5, "driver": 8}, id="full", marks=pytest.mark.slow),
    ],
)
def test_random_kills_lose_nothing_and_repeat_nothing(tmp_path, trials, nodes, plan):
    """With the driver that is slowed down and the head, ten kills or fifty."""
    faults = Faults(tmp_path, trials, seed=trials)
    faults.run(plan, nodes=nodes)
    assert faults.counts == Counter(plan | {"driver": plan["driver"] + 1, "head": 1})
    problem, truth = the_problem()
    told = faults.study.told()
    choices = [choice for _, _, choice, _ in told.values()]
    assert len(told) == len(set(choices)) == trials, "exactly so many, no choice twice"
    assert {state for state, *_ in told.values()} == {TrialState.COMPLETE}, "four in a row would be needed to fail"
    assert all(value == divergence(problem, truth, choice) for _, value, choice, _ in told.values())
    assert all(trial.state.is_finished() for trial in faults.study.trials())
    assert faults.diary.running() is not None
    assert all(faults.diary.ended[choice] for choice in choices), "all of them were evaluated"

    allowed: Counter[Choice] = Counter()
    for trial in faults.study.trials():
        attrs = trial.user_attrs
        if attrs.get("evaluated", True):
            assert attrs.get("retry", 0) <= RETRIES
            assert attrs.get("lost_workers", 0) <= RETRIES
            interrupted = attrs.get("reason") == INTERRUPTED
            allowed[faults.study.choice_of(trial)] += 1 + (RETRIES if interrupted else attrs.get("lost_workers", 0))
    assert not faults.diary.began - allowed, "begun again for a worker that was lost, and for nothing else"
    counts = faults.counts
    at_most = counts["worker"] + CPUS * (counts["raylet"] + counts["node"]) + WORKERS * (counts["driver"] + 2)
    again = faults.diary.began.total() - trials
    lost = sum(trial.user_attrs.get("lost_workers", 0) for trial in faults.study.trials())
    print(f"\nkills {dict(counts)}; begun again {again}, at most {at_most} by the kills; {lost} lost workers told")
    assert counts["worker"] - 1 <= again <= at_most


# ---- without a cluster of others -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Laden:
    """With so much to carry that it is in the object store."""

    inner: Scripted
    ballast: torch.Tensor

    def __call__(self, choice: Choice, best: Best | None) -> Score:
        return self.inner(choice, best)


@pytest.mark.usefixtures("_quick_to_notice")
@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 6], ids=["two", "more-than-may-fail-in-a-row"])
def test_lanes_start_again_when_what_they_unpack_is_lost_and_when_they_die_idle(tmp_path, workers):
    """The node that holds it dies, then all actors at their first job: it is put into the object store once more. Then
    all of them die while none has a job.
    """
    if ray.is_initialized():
        pytest.skip("another test's Ray is running here")
    evaluate = Laden(Scripted(tmp_path), torch.ones(1 << 18))
    with (
        head(0, dashboard=False) as first,
        node(first.address, workers) as second,
        node(first.address, 0, {"holder": 1}) as holder,
    ):
        settings = EngineSettings("ray", workers, RETRIES, RaySettings(address=first.address))
        engine = RayEngine(settings, tmp_path, Silent())
        try:
            lanes: Any = engine.lanes(evaluate)
            waited_for(lambda: lanes.wait(0.2) is None and lanes.idle() == workers, "actors do not start")
            there = ray.remote(num_cpus=0, resources={"holder": 1}, max_retries=0)(copy.copy)
            lanes._cargo = there.remote(freight.pack(evaluate))
            assert ray.wait([lanes._cargo], timeout=LIMIT_S, fetch_local=False)[0]
            holder.kill()
            choices = [(4, n) for n in range(workers)] + [(0, n) for n in range(workers)]
            ended = all_done(lanes, choices, limit_s=LIMIT_S)
            assert all(one.error is None for one in ended.values())
            assert [ended[n].lost for n in range(workers)] == [1] * workers

            waited_for(lambda: lanes.wait(0.2) is None and lanes.idle() == workers, "actors do not come back")
            actors = [each for each in below(second.process.pid) if "Evaluator" in " ".join(each.cmdline())]
            assert len(actors) == workers
            for each in actors:
                each.kill()
            (one,) = all_done(lanes, [(0, 50)], limit_s=LIMIT_S).values()
            assert (one.error, one.lost <= 1) == (None, True), "idle actors that die cost a job one retry at most"
        finally:
            engine.close()


def test_control_c_leaves_nothing_running_and_either_engine_goes_on(tmp_path):
    """As a terminal sends it: to the whole group of processes."""
    driver = Driver.started(tmp_path, 40, "--workers", "2")
    study = waited_for(lambda: _begun(tmp_path, 6), f"no trials\n{driver.said()}")
    processes = below(driver.process.pid)
    assert len(processes) > 4, "a Ray of its own"
    os.killpg(driver.process.pid, signal.SIGINT)
    assert driver.ended() == 0, driver.said()
    assert "stopped by the user" in driver.said()
    waited_for(lambda: not any(each.is_running() for each in processes), "processes of Ray are left")
    told = study.told()
    assert 6 <= len(told) < 40
    trials = study.trials()
    assert all(trial.state.is_finished() for trial in trials)
    assert 1 <= sum(trial.user_attrs.get("reason") == INTERRUPTED for trial in trials) <= 2
    other = Driver.started(tmp_path, 48, "--engine", "here")
    assert other.ended() == 0, other.said()
    told = study.told()
    assert len({choice for _, _, choice, _ in told.values()}) == len(told) == 48
    assert any(trial.user_attrs.get("retry") == 1 for trial in study.trials()), "what was interrupted is done again"


@pytest.mark.slow
def test_a_search_of_this_process_is_continued_with_ray(tmp_path):
    first = Driver.started(tmp_path, 8, "--engine", "here")
    assert first.ended() == 0, first.said()
    study = Study(tmp_path)
    alone = {pid for *_, pid in study.told().values()}
    assert alone == {first.process.pid}
    second = Driver.started(tmp_path, 24, "--workers", "2")
    assert second.ended() == 0, second.said()
    told = study.told()
    assert len({choice for _, _, choice, _ in told.values()}) == len(told) == 24
    assert len({pid for *_, pid in told.values()} - alone) in (1, 2), "actors did the rest"


def _begun(folder: Path, trials: int) -> Study | None:
    """The study, when it holds so many told trials."""
    journal = folder / "study.journal"
    if not journal.exists() or journal.read_bytes().count(b"\n") < 3:
        return None
    study = Study(folder)
    return study if len(study.told()) >= trials else None
