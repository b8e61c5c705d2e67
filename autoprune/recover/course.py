"""The recovery of one candidate in rounds, scored after each on the selection data: what engines train.

Knows the fine-tuning and how candidates are scored. Does not know who decides about rounds and hyperparameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import final

from torch import Tensor, nn

from autoprune.bank.stitch import Candidate
from autoprune.recover.finetune import FineTune, Schedule
from autoprune.recover.lesson import Lesson
from autoprune.searching.scorer import Selection, divergences_of

ROUNDS = 8
"""How often a recovery is scored."""
RANGES: Mapping[str, tuple[float, float]] = {
    "learning_rate": (3e-5, 3e-3),
    "weight_decay": (1e-6, 1e-3),
    "temperature": (1.0, 8.0),
}
"""What a population varies, from least to most, drawn evenly in the logarithm."""


@dataclass(frozen=True, slots=True)
class Course:
    """Everything that a recovery of `candidate` needs, wherever it is done."""

    lesson: Lesson
    candidate: Candidate
    selection: Selection
    norms: Mapping[str, str]
    schedule: Schedule
    seed: int
    rounds: int = ROUNDS
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=lambda: dict(RANGES))

    @property
    def given(self) -> dict[str, float]:
        """The hyperparameters that it is begun with."""
        return {name: float(getattr(self.schedule, name)) for name in self.ranges}

    def begin(self) -> Recovery:
        """At its first round."""
        return Recovery(self, FineTune(self.lesson, self.candidate, schedule=self.schedule, seed=self.seed))

    def finished(self, state: Mapping[str, Tensor]) -> Candidate:
        """The candidate as a recovery left it that had this state."""
        training = self.begin().training
        training.load(state)
        return training.result()


@final
@dataclass(slots=True)
class Recovery:
    """A recovery that goes on."""

    course: Course
    training: FineTune

    @property
    def over(self) -> bool:
        """Whether no round is left, or no step can be made."""
        return self.training.done >= self.course.schedule.steps or self.training.stopped is not None

    def round(self) -> float:
        """Do one more round; the mean divergence on the selection data after it."""
        steps = -(-self.course.schedule.steps // self.course.rounds)
        self.training.advance(steps)
        return divergence(self.training.model, self.course.selection, self.course.norms)

    def retune(self, given: Mapping[str, float]) -> None:
        """Go on with other hyperparameters."""
        self.training.retune(**dict(given))

    def state(self) -> dict[str, Tensor]:
        """All that a round changes."""
        return self.training.state()

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from there."""
        self.training.load(state)


def divergence(model: nn.Module, selection: Selection, norms: Mapping[str, str]) -> float:
    """The mean divergence of a model in training, which stays as it is."""
    return float(divergences_of(model, selection, norms).mean())


def recovered(course: Course, candidate: Candidate) -> tuple[float, Candidate]:
    """`candidate` after all rounds of a course like `course`, as it was when its divergence was least; and that."""
    own = replace(course, candidate=candidate)
    recovery, best, least = own.begin(), candidate, divergence(candidate.model, course.selection, course.norms)
    while not recovery.over:
        value = recovery.round()
        if value < least:
            best, least = recovery.training.result(), value
    return least, best
