"""What the finished trials of a study teach a sampler: what was tried, what was best, which moves paid.

Everything here follows from the trials alone, so a search that is resumed goes on as it would have.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from optuna.trial import FrozenTrial, TrialState

from autoprune.core.space import Choice
from autoprune.searching.problem import Floats, Problem, as_choice, as_row

STEP_FIRST = 0.15
STEP_BOUNDS = (0.03, 0.6)
_STEP_UP = 1.3
_STEP_DOWN = 0.93  # about one success in five keeps the step (Rechenberg's rule)
_FORGET = 0.97
ELITES = 6


@dataclass(frozen=True, slots=True)
class Seen:
    """A trial with a value. `full` when it was scored to the end and fits."""

    number: int
    choice: Choice
    value: float
    origin: str
    full: bool
    weights: tuple[float, ...] | None
    prior: str | None


@dataclass(slots=True)
class Credit:
    """How often a move was tried and paid, older trials counting less."""

    tries: float = 0.0
    wins: float = 0.0

    def add(self, won: bool) -> None:
        """One more outcome."""
        self.tries = self.tries * _FORGET + 1
        self.wins = self.wins * _FORGET + won


@dataclass(slots=True)
class History:
    """The lessons so far. `sign` is -1 when larger values are better; all values here are minimised."""

    problem: Problem
    sign: float = 1.0
    step: float = STEP_FIRST
    results: list[Seen] = field(default_factory=list)
    elites: list[Seen] = field(default_factory=list)
    credits: dict[str, Credit] = field(default_factory=dict)
    tried: set[Choice] = field(default_factory=set)
    origins: dict[str, Seen] = field(default_factory=dict)
    _read: set[int] = field(default_factory=set)

    def read(self, trials: Iterable[FrozenTrial]) -> None:
        """Take in the trials that were not read yet. Running ones are only remembered as tried."""
        for trial in trials:
            if trial.number not in self._read:
                self._take(trial)

    def _take(self, trial: FrozenTrial) -> None:
        if trial.state.is_finished():
            self._read.add(trial.number)
        names = self.problem.space.names
        if any(name not in trial.params for name in names):
            return
        row = as_row(tuple(trial.params[name] for name in names))
        choice = as_choice(self.problem.structure.normal(row)[0])
        if trial.user_attrs.get("reason") != "interrupted":
            self.tried.add(choice)
        value = trial.value if trial.state in (TrialState.COMPLETE, TrialState.PRUNED) else None
        if value is None:
            return
        fits = all(amount <= 0 for amount in trial.constraints.values())
        seen = _seen(trial, choice, value=self.sign * value, full=fits and trial.state == TrialState.COMPLETE)
        if fits and trial.user_attrs.get("evaluated", True):
            self._learn(seen)

    def _learn(self, seen: Seen) -> None:
        kind = seen.origin.split(":")[0]
        won = seen.full and bool(self.elites) and seen.value < self.elites[0].value
        if kind not in ("prior", "baseline", "given"):
            self.credits.setdefault(kind, Credit()).add(won)
        if kind == "perturb":
            grown = self.step * (_STEP_UP if won else _STEP_DOWN)
            self.step = min(max(grown, STEP_BOUNDS[0]), STEP_BOUNDS[1])
        self.results.append(seen)
        self.origins.setdefault(seen.origin, seen)
        if seen.full:
            self.elites = sorted([*self.elites, seen], key=lambda other: (other.value, other.number))[:ELITES]

    def prior_values(self) -> Mapping[str, float]:
        """The value of each prior's own solution, for those that were scored."""
        starts = {origin: seen for origin, seen in self.origins.items() if origin.startswith("prior:")}
        return {origin.removeprefix("prior:"): seen.value for origin, seen in starts.items()}

    def best_weights(self, prior: str) -> Floats:
        """The weights that gave the best trial solved on `prior` (units,); zeros when that was the prior itself."""
        solved = [seen for seen in self.results if seen.full and seen.prior == prior and seen.weights is not None]
        best = min(solved, key=lambda seen: (seen.value, seen.number), default=None)
        start = self.origins.get(f"prior:{prior}")
        if best is None or best.weights is None or (start is not None and start.value <= best.value):
            return np.zeros(len(self.problem.structure.sizes))
        return np.array(best.weights)


def _seen(trial: FrozenTrial, choice: Choice, *, value: float, full: bool) -> Seen:
    attrs = trial.user_attrs
    stored = trial.system_attrs.get("autoprune:weights")
    weights = None if stored is None else tuple(weight / 100 for weight in stored)
    prior = trial.system_attrs.get("autoprune:prior")
    return Seen(trial.number, choice, value, str(attrs.get("origin", "given")), full, weights, prior)
