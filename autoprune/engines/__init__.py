"""Engines: where the work of a search runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from autoprune.engines.base import Engine
from autoprune.engines.local import Local
from autoprune.engines.settings import EngineSettings
from autoprune.errors import ConfigError, near_miss
from autoprune.plugins import optional
from autoprune.progress import Progress


def open_engine(settings: EngineSettings, folder: Path, progress: Progress) -> Engine:
    """The engine, connected; `folder` is the run's. Raises ConfigError for an unknown one or a missing package, and
    RunError without a cluster.
    """
    if settings.name not in ENGINES:
        raise ConfigError(f"engine: there is no {settings.name!r}; {near_miss(settings.name, ENGINES)}")
    return ENGINES[settings.name](settings, folder, progress)


def _local(settings: EngineSettings, folder: Path, progress: Progress) -> Engine:  # noqa: ARG001
    return Local(settings.workers or 1, retries=settings.retries)


def _ray(settings: EngineSettings, folder: Path, progress: Progress) -> Engine:
    optional("ray", needed_by="engine: 'ray'", extra="ray")
    module: Any = optional("autoprune.engines.ray.engine", needed_by="engine: 'ray'", extra="ray")
    engine: Engine = module.RayEngine(settings, folder, progress)
    return engine


ENGINES: Mapping[str, Callable[[EngineSettings, Path, Progress], Engine]] = {"optuna": _local, "ray": _ray}
