"""A worker process: evaluates the jobs that come in and answers, until nobody asks any more."""

from __future__ import annotations

import os
import pickle
import signal
import sys
from multiprocessing.connection import Client
from pathlib import Path

import torch

from autoprune.engines import freight
from autoprune.engines.base import Evaluate, Job, Score
from autoprune.memory import keep_freed_memory


def main() -> None:
    """`python -m autoprune.engines.worker SOCKET CARGO THREADS`, started by `processes`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Control-C is for who started us
    address, cargo, threads = sys.argv[1:]
    keep_freed_memory()
    torch.set_num_threads(int(threads))
    evaluate: Evaluate = freight.unpack(freight.read(Path(cargo)))
    connection = Client(address, "AF_UNIX", authkey=bytes.fromhex(os.environ["AUTOPRUNE_WORKER_KEY"]))
    connection.send(os.getpid())
    try:
        while True:
            job: Job = connection.recv()
            connection.send(answer(evaluate, job))
    except (EOFError, OSError):
        return


def answer(evaluate: Evaluate, job: Job) -> tuple[Score | None, Exception | None]:
    """The score, or the error in a form that surely arrives."""
    try:
        return evaluate(job.choice, job.best), None
    except Exception as error:  # noqa: BLE001  (who asked decides what an error means)
        return None, sendable(error)


def sendable(error: Exception) -> Exception:
    """`error` itself where it can be sent, else its text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001  (an exception's class may do anything when it is pickled)
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


if __name__ == "__main__":
    main()
