"""Lanes in processes of this machine. What they evaluate with is mapped from one file, so it is in memory once.

A worker that dies is replaced and its job done again, `retries` times at most. Workers end with the process that
started them, however that ends.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, Listener, wait
from pathlib import Path
from typing import Any, final

from autoprune.engines import freight
from autoprune.engines.base import Ended, Evaluate, Job, WorkerLostError
from autoprune.errors import RunError

START_S = 120.0
"""How long a new worker may take to say hello: it imports torch, on a machine that may be busy."""


@dataclass(slots=True, eq=False)
class _Worker:
    process: subprocess.Popen[bytes]
    connection: Connection
    job: Job | None = None
    lost: int = 0
    """Workers that died at its job before it."""


@dataclass(slots=True)
class _Retry:
    job: Job
    lost: int


@final
class ProcessLanes:
    """`workers` processes, each with its share of the machine's cores."""

    def __init__(self, evaluate: Evaluate, *, workers: int, retries: int) -> None:
        self._retries = retries
        self._folder = tempfile.TemporaryDirectory(prefix="autoprune-workers-")
        self._cargo = Path(self._folder.name, "cargo")
        freight.write(freight.pack(evaluate), self._cargo)
        self._key = os.urandom(32)
        self._listener = Listener(str(Path(self._folder.name, "socket")), "AF_UNIX", authkey=self._key)
        self._threads = max(1, (os.cpu_count() or 1) // workers)
        self._again: deque[_Retry] = deque()
        self._ended: deque[Ended] = deque()
        self._workers: list[_Worker] = []
        try:
            started = [self._start() for _ in range(workers)]  # all of them import torch at the same time
            self._workers = list(self._met(started))
        except BaseException:
            self.close()
            raise

    def idle(self) -> int:
        """Workers without a job, less jobs that wait to be done again. RunError once closed."""
        if not self._workers:
            raise RunError("these worker processes have ended; ask the engine for new ones")
        return sum(worker.job is None for worker in self._workers) - len(self._again)

    def start(self, job: Job) -> None:
        """Hand it to an idle worker."""
        self._again.append(_Retry(job, 0))
        self._hand_out()

    def wait(self, seconds: float) -> Ended | None:
        """The next answer, or the news that a worker died."""
        until = time.monotonic() + seconds
        while not self._ended:
            busy = [worker for worker in self._workers if worker.job is not None]
            ready = wait([worker.connection for worker in busy], max(0.0, until - time.monotonic())) if busy else []
            if not ready:
                return None
            for worker in busy:
                if worker.connection in ready:
                    self._hear(worker)
            self._hand_out()
        return self._ended.popleft()

    def cancel(self) -> None:
        """Replace the workers that have a job: it may be long."""
        self._again.clear()
        self._ended.clear()
        busy = [worker for worker in self._workers if worker.job is not None]
        for worker in busy:
            self._replace(worker)

    def close(self) -> None:
        """End all workers."""
        for worker in self._workers:
            worker.connection.close()  # which ends one that is idle
            worker.process.kill()
        for worker in self._workers:
            worker.process.wait()
        self._workers = []
        self._listener.close()
        self._folder.cleanup()

    def _start(self) -> subprocess.Popen[bytes]:
        arguments = [str(self._listener.address), str(self._cargo), str(self._threads)]
        environment = os.environ | {"AUTOPRUNE_WORKER_KEY": self._key.hex(), "OMP_NUM_THREADS": str(self._threads)}
        places = os.pathsep.join(entry for entry in sys.path if entry)
        return subprocess.Popen(
            [sys.executable, "-m", "autoprune.engines.worker", *arguments], stdin=subprocess.DEVNULL,
            env=environment | {"PYTHONPATH": places},
        )  # fmt: skip

    def _met(self, processes: list[subprocess.Popen[bytes]]) -> Iterator[_Worker]:
        """Workers as they say hello."""
        waiting = {process.pid: process for process in processes}
        while waiting:
            connection = self._accepted(waiting)
            process = waiting.pop(connection.recv())
            yield _Worker(process, connection)

    def _accepted(self, waiting: dict[int, subprocess.Popen[bytes]]) -> Connection:
        """The next worker that connects. Raises RunError where one of `waiting` ended instead."""
        socket: Any = self._listener._listener._socket  # type: ignore[attr-defined]
        until = time.monotonic() + START_S
        while not wait([socket], 0.2):
            ended = next((process for process in waiting.values() if process.poll() is not None), None)
            if ended is not None or time.monotonic() > until:
                how = "did not start" if ended is None else f"ended at once (exit status {ended.returncode})"
                for process in waiting.values():
                    process.kill()
                raise RunError(f"workers: a worker process {how}; its own message is above; try --workers 1")
        return self._listener.accept()

    def _hear(self, worker: _Worker) -> None:
        job = worker.job
        assert job is not None
        try:
            score, error = worker.connection.recv()
        except (EOFError, OSError):
            lost = worker.lost + 1
            self._replace(worker)
            if lost > self._retries:
                how = f"{lost} workers died at it; is there enough memory for --workers {len(self._workers)}?"
                self._ended.append(Ended(job.number, None, WorkerLostError(how), lost))
            else:
                self._again.append(_Retry(job, lost))
            return
        self._ended.append(Ended(job.number, score, error, worker.lost))
        worker.job = None

    def _replace(self, worker: _Worker) -> None:
        worker.connection.close()
        worker.process.kill()
        worker.process.wait()
        self._workers.remove(worker)
        self._workers += self._met([self._start()])

    def _hand_out(self) -> None:
        for worker in self._workers:
            if worker.job is None and self._again:
                retry = self._again.popleft()
                worker.job, worker.lost = retry.job, retry.lost
                with suppress(OSError):  # it is dead, which `_hear` finds
                    worker.connection.send(retry.job)
