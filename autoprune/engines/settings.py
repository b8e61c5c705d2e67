"""How an engine is set up: values, without what they set up."""

from __future__ import annotations

from dataclasses import dataclass, field

TARGET = "autoprune_target"
"""The custom resource of a Ray node whose device is the target of a search."""
START_TARGET = f"start Ray on the target with `ray start --address=HEAD:6379 --resources='{{\"{TARGET}\": 1}}'`"
"""What to do where no node is."""


@dataclass(frozen=True, slots=True)
class RaySettings:
    """What a search asks of Ray."""

    address: str | None = None
    """Of a cluster, or `auto`; None: the cluster whose job this is, or a new one on this machine."""
    cpus: float = 1
    """Of each evaluation."""
    gpus: float = 0
    """Of each evaluation; a share lets several use one GPU."""
    target_wait_s: float = 600.0
    """How long a measurement waits for a node that is the target."""
    asha: bool = False
    """Whether recovered trials run under Ray Tune and ASHA, which stops those that fall behind."""
    population: int = 0
    """How many copies of the chosen candidate population-based training recovers; 0: it is recovered once."""
    callbacks: tuple[object, ...] = ()
    """Callbacks of Ray Tune (`ray.tune.Callback`) that hear of every trial."""


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Which engine, with how many workers. `workers` None: one process, or as many as the cluster has room for."""

    name: str = "optuna"
    workers: int | None = None
    retries: int = 3
    """How often an evaluation is begun again whose process or node died."""
    ray: RaySettings = field(default_factory=RaySettings)
