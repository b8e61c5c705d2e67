"""The engine of one machine: this process, or several processes of this machine that evaluate candidates."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import final

from torch import Tensor

from autoprune.engines.base import (
    Climb,
    Course,
    Ended,
    Evaluate,
    Item,
    Job,
    Lanes,
    Parameters,
    Result,
    Shared,
    one_by_one,
    train_here,
)
from autoprune.engines.processes import ProcessLanes


def this_machine() -> str:
    """The name of this machine and its processor."""
    return f"{platform.node()}, {platform.processor() or platform.machine()}"


@final
class Here:
    """One lane: this process. A job is evaluated when it is waited for."""

    def __init__(self, evaluate: Evaluate) -> None:
        self._evaluate = evaluate
        self._job: Job | None = None

    def idle(self) -> int:
        """One, until a job was started."""
        return int(self._job is None)

    def start(self, job: Job) -> None:
        """Remember the job."""
        self._job = job

    def wait(self, seconds: float) -> Ended | None:  # noqa: ARG002
        """Evaluate it, however long that takes. What is no ordinary error (Control-C) passes through."""
        job, self._job = self._job, None
        if job is None:
            return None
        try:
            return Ended(job.number, self._evaluate(job.choice, job.best))
        except Exception as error:  # noqa: BLE001  (who asked decides what an error means)
            return Ended(job.number, None, error)

    def cancel(self) -> None:
        """Forget the job."""
        self._job = None

    def close(self) -> None:
        """Nothing is held."""


@final
class Local:
    """This machine. With several workers candidates are evaluated in processes of their own."""

    name = "optuna"

    def __init__(self, workers: int = 1, *, retries: int = 3) -> None:
        self._workers = workers
        self._retries = retries
        self._made: tuple[Evaluate, ProcessLanes] | None = None

    def where(self) -> str:
        """This machine."""
        return this_machine()

    def where_to_measure(self) -> str:
        """This machine."""
        return this_machine()

    def lanes(self, evaluate: Evaluate) -> Lanes:
        """This process, or the worker processes, which are started once for a function."""
        if self._workers == 1:
            return Here(evaluate)
        if self._made is None or self._made[0] is not evaluate:
            self.close()
            self._made = (evaluate, ProcessLanes(evaluate, workers=self._workers, retries=self._retries))
        return self._made[1]

    def climbs(self, climb: Climb) -> Lanes:
        """The same lanes; every climb goes to its end."""
        return self.lanes(climb)

    def train(self, course: Course) -> Mapping[str, Tensor] | None:
        """Here, once."""
        return train_here(course)

    def each(self, work: Callable[[Shared, Item], Result], shared: Shared, items: Sequence[Item]) -> Iterator[Result]:
        """One after the other, here."""
        return one_by_one(work, shared, items)

    def measure(
        self, work: Callable[Parameters, Result], *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> Result:
        """Here: worker processes have no job while something is measured."""
        return work(*args, **kwargs)

    def close(self) -> None:
        """End the worker processes."""
        if self._made is not None:
            self._made[1].close()
            self._made = None
