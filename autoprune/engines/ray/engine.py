"""The engine of a cluster: evaluations in actors, independent work in tasks, measurements on the target alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, final

import ray
from torch import Tensor

from autoprune.engines import freight
from autoprune.engines.base import (
    Climb,
    Course,
    Evaluate,
    Item,
    Lanes,
    Parameters,
    Result,
    Shared,
    train_here,
)
from autoprune.engines.ray.callbacks import Heard
from autoprune.engines.ray.cluster import Cluster, connected
from autoprune.engines.ray.lanes import ActorLanes
from autoprune.engines.ray.target import Target
from autoprune.engines.ray.tune import TuneLanes, population
from autoprune.engines.settings import EngineSettings
from autoprune.progress import Progress


@final
class RayEngine:
    """One connection to a cluster, for one search."""

    name = "ray"

    def __init__(self, settings: EngineSettings, folder: Path, progress: Progress) -> None:
        self._settings = settings
        self._folder = folder
        self._progress = progress
        self._cluster: Cluster = connected(settings, progress)
        self._target = Target(settings, progress)
        self._made: tuple[Evaluate, Lanes] | None = None

    def where(self) -> str | None:
        """The machine that is the target, None where no node is."""
        return self._target.where()

    def where_to_measure(self) -> str:
        """The machine that is the target, waited for as long as the settings say."""
        return self._target.wait()

    def lanes(self, evaluate: Evaluate) -> Lanes:
        """Actors. What they evaluate with is put into the object store once, and is on each of their nodes once."""
        if self._made is None or self._made[0] is not evaluate:
            self._release()
            actors: Lanes = ActorLanes(evaluate, self._settings, workers=self._workers(), progress=self._progress)
            callbacks = self._settings.ray.callbacks
            self._made = (evaluate, Heard(actors, callbacks, self._folder) if callbacks else actors)
        return self._made[1]

    def climbs(self, climb: Climb) -> Lanes:
        """Trials of Ray Tune."""
        if self._made is None or self._made[0] is not climb:
            self._release()
            self._made = (climb, TuneLanes(climb, self._settings, workers=self._workers(), folder=self._folder))
        return self._made[1]

    def train(self, course: Course) -> Mapping[str, Tensor] | None:
        """A population under Ray Tune, or one task."""
        self._release()
        if self._settings.ray.population > 1:
            return population(course, self._settings, folder=self._folder)
        state: Mapping[str, Tensor] | None
        (state,) = self.each(_trained, course, [None])
        return state

    def _workers(self) -> int:
        return self._settings.workers or self._cluster.room(self._settings.ray)

    def each(self, work: Callable[[Shared, Item], Result], shared: Shared, items: Sequence[Item]) -> Iterator[Result]:
        """Tasks of one CPU, in the order of `items`; one whose worker dies is begun again by Ray."""
        if not items:
            return
        self._release()
        cargo = [ray.put(freight.pack((work, shared, list(items))))]  # in a list it arrives as a reference
        piece = ray.remote(num_cpus=1, max_retries=self._settings.retries)(_piece)
        yield from map(ray.get, [piece.remote(cargo, index) for index in range(len(items))])

    def measure(
        self, work: Callable[Parameters, Result], *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> Result:
        """On the node of the target, with all its CPUs, when nothing else runs there."""
        self._release()
        result: Result = self._target.measure(work, args, kwargs)
        return result

    def close(self) -> None:
        """Let the actors go, and the connection if it is ours."""
        self._release()
        self._cluster.close()

    def _release(self) -> None:
        """Let the actors go, whose CPUs others need now."""
        if self._made is not None:
            self._made[1].close()
            self._made = None


def _trained(course: Course, _nothing: None) -> Mapping[str, Tensor] | None:
    return train_here(course)


def _piece(cargo: Sequence[Any], index: int) -> Any:
    work, shared, items = _unpacked(cargo[0])
    return work(shared, items[index])


@lru_cache(maxsize=1)
def _unpacked(reference: Any) -> tuple[Callable[..., Any], Any, Sequence[Any]]:
    """Unpack once in a worker process, for all pieces of one work that it does."""
    found: tuple[Callable[..., Any], Any, Sequence[Any]] = freight.unpack(ray.get(reference))
    return found
