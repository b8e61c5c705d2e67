"""Lanes in Ray actors. A call of an actor takes under a millisecond, so candidates of any length are worth one.

An actor, node or object that is lost is replaced and the job done again, `retries` times at most. Actors that have no
place yet (a cluster that grows, a node that is gone) are no lanes until they have one.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, final

import ray
import torch
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from autoprune import __version__
from autoprune.engines import freight
from autoprune.engines.base import Ended, Evaluate, Job, Score, WorkerLostError
from autoprune.engines.freight import Freight
from autoprune.engines.settings import EngineSettings
from autoprune.engines.worker import answer
from autoprune.errors import RunError
from autoprune.memory import keep_freed_memory
from autoprune.progress import Progress

STARTS, STARTS_S = 5, 30.0
"""How often in a row, and for how long, actors may fail to start: what a dead node takes with it comes in a burst."""
_WAIT_NOTE_S = 20.0
"""After so long without any actor the user is told."""


class Evaluator:
    """One lane: unpacked once, then a stream of jobs."""

    def __init__(self, cargo: Freight, threads: int) -> None:
        keep_freed_memory()
        torch.set_num_threads(threads)
        self._evaluate: Evaluate = freight.unpack(cargo)

    def versions(self) -> str:
        """What scores depend on."""
        return versions()

    def score(self, job: Job) -> tuple[Score | None, Exception | None]:
        """The answer."""
        return answer(self._evaluate, job)


def versions() -> str:
    """Of the packages that must be the same everywhere."""
    return f"autoprune {__version__}, torch {torch.__version__.partition('+')[0]}"


@dataclass(slots=True, eq=False)
class _Lane:
    actor: Any
    hello: Any
    """Answered once it has a place and is unpacked; None from then on, unless it is doubted."""
    cargo: Any
    """What it was to unpack."""
    met: bool = False
    """Whether it has answered once."""
    job: Job | None = None
    answer: Any = None
    lost: int = 0


@final
class ActorLanes:
    """`workers` actors with the CPUs and GPUs that the settings give to each."""

    def __init__(self, evaluate: Evaluate, settings: EngineSettings, *, workers: int, progress: Progress) -> None:
        self._evaluate = evaluate
        self._settings = settings
        self._progress = progress
        # One lane computes with as many threads as this process would: the same sums in the same order.
        self._threads = torch.get_num_threads() if workers == 1 else max(1, int(settings.ray.cpus))
        self._cargo = ray.put(freight.pack(evaluate))
        self._again: deque[tuple[Job, int]] = deque()
        self._ended: deque[Ended] = deque()
        self._failures = 0
        self._failing_since = 0.0
        self._since = time.monotonic()
        self._told = False
        self._lanes = [self._started() for _ in range(workers)]

    def idle(self) -> int:
        """Actors that are there and have no job, less jobs that wait to be done again. RunError once closed."""
        if not self._lanes:
            raise RunError("ray: these lanes are closed; ask the engine for new ones")
        with _reached():
            self._greet(0.0)
        return sum(lane.hello is None and lane.job is None for lane in self._lanes) - len(self._again)

    def start(self, job: Job) -> None:
        """Send it to an actor that is idle."""
        self._again.append((job, 0))
        with _reached():
            self._hand_out()

    def wait(self, seconds: float) -> Ended | None:
        """The next answer; None when an actor came instead, or none did for so long."""
        if not self._ended:
            with _reached():
                self._wait(seconds)
        return self._ended.popleft() if self._ended else None

    def cancel(self) -> None:
        """Replace the actors that have a job: it may be long."""
        self._again.clear()
        self._ended.clear()
        with suppress(RayError):  # the cluster may be what is gone
            for lane in [lane for lane in self._lanes if lane.job is not None]:
                self._replace(lane)

    def close(self) -> None:
        """End the actors."""
        for lane in self._lanes:
            _kill(lane.actor)
        self._lanes = []

    def _wait(self, seconds: float) -> None:
        busy = {lane.answer: lane for lane in self._lanes if lane.job is not None}
        new = {lane.hello: lane for lane in self._lanes if lane.hello is not None}
        waited_for = [*busy, *new]
        ready, _ = ray.wait(waited_for, num_returns=1, timeout=seconds)
        if ready:  # all that are, at once: looking through thousands of answers takes its time
            ready, _ = ray.wait(waited_for, num_returns=len(waited_for), timeout=0)
        for reference in ready:
            if reference in busy:
                self._hear(busy[reference])
        self._greet(0.0)
        self._hand_out()
        self._tell_of_waiting()

    def _started(self) -> _Lane:
        asked = self._settings.ray
        kind = ray.remote(num_cpus=asked.cpus, num_gpus=asked.gpus, max_restarts=0, max_task_retries=0)(Evaluator)
        actor = kind.remote(self._cargo, self._threads)
        return _Lane(actor, actor.versions.remote(), self._cargo)

    def _greet(self, seconds: float) -> None:
        """Take in the actors that have a place now."""
        new = {lane.hello: lane for lane in self._lanes if lane.hello is not None}
        ready, _ = ray.wait(list(new), num_returns=len(new), timeout=seconds) if new else ([], [])
        for reference in ready:
            lane = new[reference]
            try:
                there = ray.get(reference)
            except RayError as error:
                self._start_failed(lane, error)
                continue
            if there != versions():
                raise RunError(f"ray: a node has {there}, this process {versions()}; install the same on all nodes")
            lane.hello, lane.met, self._failures = None, True, 0

    def _start_failed(self, lane: _Lane, error: RayError) -> None:
        if lane.cargo is self._cargo and not lane.met:  # else others failed with the same before, and that is mended
            self._failing_since = time.monotonic() if self._failures == 0 else self._failing_since
            self._failures += 1
            if self._failures >= STARTS and time.monotonic() - self._failing_since > STARTS_S:
                how = f"workers do not start ({_last_line(error)})"
                raise RunError(f"ray: {how}; nothing that was told is lost") from error
            with suppress(RayError):
                self._cargo = ray.put(freight.pack(self._evaluate))  # what they unpack may be what is lost
        self._replace(lane)

    def _hear(self, lane: _Lane) -> None:
        job = lane.job
        assert job is not None
        try:
            score, error = ray.get(lane.answer)
        except (RayActorError, ObjectLostError, OutOfMemoryError, WorkerCrashedError, NodeDiedError) as gone:
            lost = lane.lost + 1
            self._replace(lane)
            self._doubt()
            if lost > self._settings.retries:
                how = f"{lost} workers were lost at it, the last with: {_last_line(gone)}"
                self._ended.append(Ended(job.number, None, WorkerLostError(how), lost))
            else:
                self._again.append((job, lost))
            return
        except RayTaskError as failed:  # not the evaluation, which `answer` guards: the score cannot be sent
            score, error = None, RuntimeError(_last_line(failed))
        self._ended.append(Ended(job.number, score, error, lane.lost))
        lane.job, lane.answer = None, None

    def _doubt(self) -> None:
        """Greet idle actors again after one was lost: theirs may be the same node, and each would cost a retry."""
        for lane in self._lanes:
            if lane.hello is None and lane.job is None:
                lane.hello = lane.actor.versions.remote()

    def _replace(self, lane: _Lane) -> None:
        _kill(lane.actor)
        self._lanes[self._lanes.index(lane)] = self._started()

    def _hand_out(self) -> None:
        for lane in self._lanes:
            if lane.hello is None and lane.job is None and self._again:
                lane.job, lane.lost = self._again.popleft()
                lane.answer = lane.actor.score.remote(lane.job)

    def _tell_of_waiting(self) -> None:
        if any(lane.hello is None for lane in self._lanes):
            self._since, self._told = time.monotonic(), False
        elif not self._told and time.monotonic() - self._since > _WAIT_NOTE_S:
            self._told = True
            asked = self._settings.ray
            self._progress.note(
                f"ray: no worker has a place yet (each needs {asked.cpus:g} CPUs and {asked.gpus:g} GPUs); waiting"
            )


@contextmanager
def _reached() -> Iterator[None]:
    """Say what it means where the cluster itself is gone, or is another one at the same address."""
    try:
        yield
    except RayError as error:
        raise RunError(
            f"ray: the cluster is gone ({_last_line(error)}); nothing that was told is lost: start a cluster and "
            "resume the search"
        ) from error


def _kill(actor: Any) -> None:
    with suppress(RayError, ValueError):
        ray.kill(actor)


def _last_line(error: BaseException) -> str:
    return next(reversed(str(error).strip().splitlines()), type(error).__name__)
