"""How often what a search evaluates with is in memory: a bank of a gigabyte, and eight workers on one machine.

Ray's actors read it from the object store, local processes map a file. Prints the store, each worker's own memory, what
all of them take together (shared pages once), and how long they take to start; with a bank of nothing beside it, as a
worker that has imported torch is not small either.

    python benchmarks/ray_memory.py
    python benchmarks/ray_memory.py --gigabytes 0.5 --workers 4 --store-folder /tmp   # where /dev/shm is small
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ray
import torch
from ray._private.internal_api import node_stats
from torch import Tensor

from autoprune.core.space import Choice
from autoprune.engines.base import Best, Job, Lanes, Score
from autoprune.engines.processes import ProcessLanes
from autoprune.engines.ray.lanes import ActorLanes
from autoprune.engines.settings import EngineSettings
from autoprune.progress import Silent

LAYERS = 128
SHARED_MEMORY = Path("/dev/shm")
KINDS = {"own": ("Private_Clean", "Private_Dirty"), "part": ("Pss",)}
"""Of memory, as Linux calls it: what no other process has, and a process's part of all that it has."""


@dataclass(frozen=True)
class Bank:
    """Reads every page of its tensors; the score says which process did."""

    layers: dict[str, Tensor]

    def __call__(self, choice: Choice, best: Best | None) -> Score:  # noqa: ARG002
        total = sum(float(layer[:: 1 << 9].sum()) for layer in self.layers.values())  # 512 float64 are a page
        time.sleep(0.5)  # so that every worker has a turn
        return Score(total, 1, attrs={"pid": os.getpid()})


def memory(pid: int, kind: str) -> int:
    """Bytes of a process of one of `KINDS`."""
    lines = Path("/proc", str(pid), "smaps_rollup").read_text(encoding="ascii").splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.partition(":")[0] in KINDS[kind])


def stored() -> int:
    """Bytes in the object store."""
    (node,) = ray.nodes()
    stats: Any = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], include_memory_info=False)
    return int(stats.store_stats.object_store_bytes_used)


class Found(NamedTuple):
    name: str
    bank: int
    start_s: float
    store: int | None
    own: list[int]
    together: int


def found(name: str, bank: Bank, workers: int, make: Callable[[Bank], Lanes]) -> Found:
    """Start the lanes, have every worker read the bank, look."""
    start = time.perf_counter()
    lanes = make(bank)
    while lanes.idle() < workers:
        lanes.wait(0.1)
    start_s = time.perf_counter() - start
    pids: set[int] = set()
    number = 0
    while len(pids) < workers:
        while lanes.idle() > 0:
            lanes.start(Job(number, (number,), None))
            number += 1
        ended = lanes.wait(1.0)
        if ended is not None:
            assert ended.score is not None, ended.error
            pids.add(ended.score.attrs["pid"])
    own = [memory(pid, "own") for pid in pids]
    together = sum(memory(pid, "part") for pid in pids)
    size = sum(layer.nbytes for layer in bank.layers.values())
    result = Found(name, size, start_s, stored() if ray.is_initialized() else None, own, together)
    lanes.close()
    return result


def with_ray(bank: Bank, workers: int, store_folder: str | None) -> Found:
    size = sum(layer.nbytes for layer in bank.layers.values())
    options = {} if store_folder is None else {"_plasma_directory": store_folder}
    ray.init(
        address="local", num_cpus=workers, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False,
        object_store_memory=int(1.3 * size) + (200 << 20), **options,
    )  # fmt: skip
    settings = EngineSettings("ray", workers)
    try:
        return found(
            f"{workers} Ray actors", bank, workers,
            lambda bank: ActorLanes(bank, settings, workers=workers, progress=Silent()),
        )  # fmt: skip
    finally:
        ray.shutdown()


def with_processes(bank: Bank, workers: int) -> Found:
    return found(f"{workers} processes", bank, workers, lambda bank: ProcessLanes(bank, workers=workers, retries=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--store-folder", help="where Ray's object store is kept; /dev/shm where it has the room")
    given = parser.parse_args()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    each = int(given.gigabytes * (1 << 30)) // 8 // LAYERS
    full = Bank({f"layer{index}": torch.rand(each, dtype=torch.float64) for index in range(LAYERS)})
    empty = Bank({"layer": torch.rand(1 << 14, dtype=torch.float64)})
    store_folder: str | None = given.store_folder
    room = shutil.disk_usage(SHARED_MEMORY).free
    print(f"store in {store_folder or SHARED_MEMORY}; {SHARED_MEMORY} has {room / 1e9:.1f} GB free")
    results = [
        run(bank)
        for bank in (empty, full)
        for run in (
            lambda bank: with_processes(bank, given.workers),
            lambda bank: with_ray(bank, given.workers, store_folder),
        )
    ]
    own = "own memory of a worker"
    print(f"{'':14} {'bank':>8} {'store':>8}   {own:26} {'all own':>8} {'together':>9} {'start':>8}")
    for result in results:
        store = "-" if result.store is None else megabytes(result.store)
        own = (
            f"{megabytes(statistics.median(result.own))} ({megabytes(min(result.own))} to {megabytes(max(result.own))})"
        )
        print(
            f"{result.name:14} {megabytes(result.bank):>8} {store:>8}   {own:26} {megabytes(sum(result.own)):>8} "
            f"{megabytes(result.together):>9} {result.start_s:6.1f} s"
        )


def megabytes(size: float) -> str:
    return f"{size / 1e6:.0f} MB"


if __name__ == "__main__":
    main()
