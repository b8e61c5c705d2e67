"""The connection to Ray: a cluster that is there, or one of our own on this machine."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

import ray

from autoprune.engines.settings import START_TARGET, TARGET, EngineSettings, RaySettings
from autoprune.errors import RunError
from autoprune.progress import Progress

_ADDRESS = "RAY_ADDRESS"
"""The variable that Ray sets where a job runs."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """A connection; `ours` where this search made it."""

    ours: bool

    def room(self, asked: RaySettings) -> int:
        """How many evaluations the cluster has room for at once, as it is now; one at least."""
        there = ray.cluster_resources()
        fits = [int(there.get("CPU", 0) // asked.cpus)] if asked.cpus else []
        fits += [int(there.get("GPU", 0) // asked.gpus)] if asked.gpus else []
        return max(1, min(fits, default=1))

    def close(self) -> None:
        """Disconnect; a cluster of our own ends."""
        if self.ours and ray.is_initialized():
            ray.shutdown()


def connected(settings: EngineSettings, progress: Progress) -> Cluster:
    """Connect. Raises RunError where there is no cluster at the address, or it has other versions than this process."""
    if ray.is_initialized():
        return Cluster(ours=False)
    address = settings.ray.address or os.environ.get(_ADDRESS)
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else Ray warns of what it will do one day
    try:
        if address is None:
            cpus = max(os.cpu_count() or 1, round((settings.workers or 1) * settings.ray.cpus))
            ray.init(address="local", num_cpus=cpus, resources={TARGET: 1}, include_dashboard=False, **quiet)
        else:
            ray.init(address=address, **quiet)
    except Exception as error:
        where = "on this machine" if address is None else f"at {address!r}"
        raise RunError(
            f"ray: cannot connect to a cluster {where} ({type(error).__name__}: {_line(error)}); start one with "
            "`ray start --head`, or leave --ray-address out to use this machine alone"
        ) from error
    nodes = [node for node in ray.nodes() if node["Alive"]]
    progress.note(f"ray {ray.__version__}: {len(nodes)} node{'s' * (len(nodes) > 1)}, {_summed()}")
    if not ray.cluster_resources().get(TARGET):
        progress.note(
            f"ray: no node is the target yet, and every search times its finalists in the end: {START_TARGET}"
        )
    return Cluster(ours=True)


def _summed() -> str:
    there = ray.cluster_resources()
    gpus = f", {there['GPU']:g} GPUs" if there.get("GPU") else ""
    return f"{there.get('CPU', 0):g} CPUs{gpus}, {there.get(TARGET, 0):g} x {TARGET}"


def _line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "no message")
