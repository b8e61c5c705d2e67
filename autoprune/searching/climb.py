"""Scores choices by what they are worth once recovered, in rungs: few samples, all of them, then recovery step by step.

A long evaluation, made for schedulers that stop what falls behind (ASHA, arXiv:1810.05934). Whoever climbs to the last
rung gets the same score, whatever stopped others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from autoprune.core.space import Choice
from autoprune.engines.base import Best, Score
from autoprune.recover.finetune import FineTune, Schedule
from autoprune.recover.lesson import Lesson
from autoprune.searching.scorer import Scorer, Selection, divergences_of

FEW = 256
"""Samples on the first rung."""
SHARES = (0.125, 0.25, 0.5, 1.0)
"""Of the recovery's steps: the rungs after the first two."""


@dataclass(frozen=True, slots=True)
class Climber:
    """Climbs with one scorer and one lesson."""

    scorer: Scorer
    lesson: Lesson
    schedule: Schedule
    seed: int

    @property
    def height(self) -> int:
        """How many rungs there are."""
        return 2 + len(SHARES)

    def __call__(self, choice: Choice, best: Best | None) -> Score:  # noqa: ARG002
        """The score of the last rung."""
        *_, last = self.rungs(choice)
        return last

    def rungs(self, choice: Choice) -> Iterator[Score]:
        """The mean divergence (nats, or relative squared error) on every rung."""
        candidate = self.scorer.candidate(choice)
        selection = self.scorer.selection
        yield self._score(candidate.model, selection.beginning(FEW), steps=0)
        yield self._score(candidate.model, selection, steps=0)
        training = FineTune(self.lesson, candidate, schedule=self.schedule, seed=self.seed)
        for share in SHARES:
            training.advance(math.ceil(share * self.schedule.steps) - training.done)
            yield self._score(training.model, selection, steps=training.done)

    def _score(self, model: nn.Module, selection: Selection, *, steps: int) -> Score:
        seen = divergences_of(model, selection, self.scorer.norms)
        error = float(seen.std() / math.sqrt(len(seen)))
        return Score(float(seen.mean()), len(seen), attrs={"stderr": error, "recovery_steps": steps}, seen=seen.numpy())
