"""What an engine is: where the work of a search runs, and who evaluates candidates, several at once.

Nothing about a policy depends on the engine. An engine knows no study and proposes nothing: it is handed choices and
gives scores back, and runs what it is told to where that belongs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ParamSpec, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from autoprune.core.space import Choice

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
Shared = TypeVar("Shared")
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Score:
    """What an evaluation found: a value to minimise, on how many samples; `pruned` when clearly no good on few."""

    value: float
    samples: int
    pruned: bool = False
    attrs: Mapping[str, Any] = field(default_factory=dict)
    seen: NDArray[np.float64] | None = None
    """The value of every sample, (samples,), of a choice that was scored to the end."""
    rung: int | None = None
    """How much was spent on it, for scores in rungs; others go by their samples."""

    @property
    def step(self) -> int:
        """Where the value stands among the intermediate values of its trial."""
        return self.samples if self.rung is None else self.rung


@dataclass(frozen=True, slots=True)
class Best:
    """The best choice so far, to stop early against: its value, and that of every sample, (samples,), if known."""

    value: float
    seen: NDArray[np.float64] | None = None


class Evaluate(Protocol):
    """Scores a choice. May be sent to other processes, and answers there what it answers here."""

    def __call__(self, choice: Choice, best: Best | None) -> Score:
        """The score of `choice`; with `best` None it is scored to the end, however bad."""
        ...


@dataclass(frozen=True, slots=True)
class Job:
    """A choice to evaluate, and the trial it belongs to."""

    number: int
    choice: Choice
    best: Best | None
    whole: bool = False
    """Whether it is to be scored to the end, however bad."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a job ended: with a score, or with an error. `lost` is how many workers died at it."""

    number: int
    score: Score | None
    error: Exception | None = None
    lost: int = 0


class WorkerLostError(Exception):
    """The error of a job that was given up: so many workers died at it, one after the other."""


class Lanes(Protocol):
    """Evaluates jobs, as many at once as there are lanes. Jobs end in any order, each exactly once."""

    def idle(self) -> int:
        """How many more jobs could be started right now."""
        ...

    def start(self, job: Job) -> None:
        """Begin a job; only where a lane is idle."""
        ...

    def wait(self, seconds: float) -> Ended | None:
        """A job that ended, waiting at most about so long for one. None when none did (a lane may be idle now)."""
        ...

    def cancel(self) -> None:
        """Give up every job that is running; the lanes stay."""
        ...

    def close(self) -> None:
        """Let go of all that the lanes hold."""
        ...


class Climb(Evaluate, Protocol):
    """Scores a choice in rungs, each at more expense and nearer to the truth; the last one is the score."""

    def rungs(self, choice: Choice) -> Iterator[Score]:
        """The score on every rung, from the cheapest."""
        ...

    @property
    def height(self) -> int:
        """How many rungs there are."""
        ...


class Recovery(Protocol):
    """A training that goes on round by round."""

    @property
    def over(self) -> bool:
        """Whether no round is left."""
        ...

    def round(self) -> float:
        """Do one more; the score after it, less is better."""
        ...

    def retune(self, given: Mapping[str, float]) -> None:
        """Go on with other hyperparameters."""
        ...

    def state(self) -> dict[str, Tensor]:
        """All that a round changes."""
        ...

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from there."""
        ...


class Course(Protocol):
    """A training that can be begun anywhere, and as often as one likes."""

    @property
    def rounds(self) -> int:
        """How many rounds it has."""
        ...

    @property
    def given(self) -> Mapping[str, float]:
        """The hyperparameters that it is begun with."""
        ...

    @property
    def ranges(self) -> Mapping[str, tuple[float, float]]:
        """From where to where each of them makes sense."""
        ...

    def begin(self) -> Recovery:
        """At its first round."""
        ...


class Each(Protocol):
    """Does many pieces of independent work."""

    def __call__(
        self, work: Callable[[Shared, Item], Result], shared: Shared, items: Sequence[Item]
    ) -> Iterator[Result]:
        """`work(shared, item)` of every item, in their order. `shared` is sent once to where it is needed."""
        ...


class EachTensor(Protocol):
    """The same for work whose results are tensors, which may be kept on disk."""

    def __call__(
        self, work: Callable[[Shared, Item], Tensor], shared: Shared, items: Sequence[Item]
    ) -> Iterator[Tensor]:
        """As `Each` says."""
        ...


def train_here(course: Course) -> Mapping[str, Tensor] | None:
    """Train in this process, with the hyperparameters given; the state of the best round, None where none is finite."""
    recovery, best, least = course.begin(), None, math.inf
    while not recovery.over:
        value = recovery.round()
        if value < least:
            best, least = recovery.state(), value
    return best


def one_by_one(work: Callable[[Shared, Item], Result], shared: Shared, items: Sequence[Item]) -> Iterator[Result]:
    """One piece after the other, here."""
    return (work(shared, item) for item in items)


class Engine(Protocol):
    """Where work runs. Closed when a search is over, whatever became of it."""

    @property
    def name(self) -> str:
        """As the configuration calls it."""
        ...

    def where(self) -> str | None:
        """What the machine is called that `measure` runs on, and its processor; None where there is none now."""
        ...

    def where_to_measure(self) -> str:
        """The same, waited for where it may still come. Raises TargetError when it does not."""
        ...

    def lanes(self, evaluate: Evaluate) -> Lanes:
        """Lanes that answer what `evaluate` does. The same ones again for the same function."""
        ...

    def climbs(self, climb: Climb) -> Lanes:
        """The same for long evaluations in rungs, of which those that fall behind may be stopped early."""
        ...

    def each(self, work: Callable[[Shared, Item], Result], shared: Shared, items: Sequence[Item]) -> Iterator[Result]:
        """As `Each` says."""
        ...

    def train(self, course: Course) -> Mapping[str, Tensor] | None:
        """Train, with a population where the engine has one; the state of the best score, None if none was good."""
        ...

    def measure(
        self, work: Callable[Parameters, Result], *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> Result:
        """Run `work` on the target, with nothing of ours beside it. What it raises is raised here; a keyword
        `progress` is told here what it is told there.
        """
        ...

    def close(self) -> None:
        """Let go of workers and connections."""
        ...
