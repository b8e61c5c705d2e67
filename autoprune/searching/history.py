"""What the finished trials of a study teach a sampler: what was tried, what was best, which moves paid.

Everything here follows from the trials alone, learnt in the order in which they ended, so a search that is resumed
goes on as it would have. Reading costs what is new and what runs, not what was read before.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial, TrialState

from autoprune.core.space import Choice
from autoprune.searching.problem import Floats, Problem, as_choice, as_row
from autoprune.searching.study import INTERRUPTED, WITHDRAWN

BEFORE = "autoprune:before"
"""System attribute of a trial that was proposed while others ran: the value to beat then, None where there was none."""

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
    running: dict[int, Choice] = field(default_factory=dict)
    origins: dict[str, Seen] = field(default_factory=dict)
    _solved: dict[str, Seen] = field(default_factory=dict)  # by prior, the best trial with weights
    _held: Counter[Choice] = field(default_factory=Counter)  # what runs, by how many trials
    _unfinished: list[int] = field(default_factory=list)
    _next: int = 0  # the first trial that was never looked at

    def read(self, trials: Sequence[FrozenTrial]) -> None:
        """Take in what is new in all trials of the study, in order of number; running ones are only held."""
        looked_at = [trials[number] for number in self._unfinished]
        self._unfinished, ended = [], []
        for trial in chain(looked_at, islice(trials, self._next, None)):
            if trial.state.is_finished():
                ended.append(trial)
            else:
                self._unfinished.append(trial.number)
                self._hold(trial)
        self._next = len(trials)
        for trial in sorted(ended, key=_when):
            self._take(trial)

    def known(self, choice: Choice) -> bool:
        """Whether a choice was tried or is running."""
        return choice in self.tried or choice in self._held

    def _hold(self, trial: FrozenTrial) -> None:
        if trial.number in self.running:
            return
        choice = self._choice(trial)
        if choice is not None:
            self.running[trial.number] = choice
            self._held[choice] += 1

    def _release(self, number: int) -> None:
        choice = self.running.pop(number, None)
        if choice is not None:
            self._held[choice] -= 1
            if not self._held[choice]:
                del self._held[choice]

    def _choice(self, trial: FrozenTrial) -> Choice | None:
        names = self.problem.space.names
        if any(name not in trial.params for name in names):
            return None
        row = as_row(tuple(trial.params[name] for name in names))
        return as_choice(self.problem.structure.normal(row)[0])

    def _take(self, trial: FrozenTrial) -> None:
        choice = self.running.get(trial.number) or self._choice(trial)
        self._release(trial.number)
        if choice is None:
            return
        if trial.user_attrs.get("reason") not in (INTERRUPTED, WITHDRAWN):
            self.tried.add(choice)
        value = trial.value if trial.state in (TrialState.COMPLETE, TrialState.PRUNED) else None
        if value is None:
            return
        fits = all(amount <= 0 for amount in trial.constraints.values())
        seen = _seen(trial, choice, value=self.sign * value, full=fits and trial.state == TrialState.COMPLETE)
        if fits and trial.user_attrs.get("evaluated", True):
            self._learn(seen, self._won(seen, trial.system_attrs))

    def _won(self, seen: Seen, attrs: Mapping[str, Any]) -> bool | None:
        """Whether a trial beat the best known when it was proposed; None when it ran beside others before any was."""
        if BEFORE not in attrs:
            return seen.full and bool(self.elites) and seen.value < self.elites[0].value
        return None if attrs[BEFORE] is None else seen.full and seen.value < attrs[BEFORE]

    def _learn(self, seen: Seen, won: bool | None) -> None:
        kind = seen.origin.split(":")[0]
        if won is not None and kind not in ("prior", "baseline", "given"):
            self.credits.setdefault(kind, Credit()).add(won)
        if won is not None and kind == "perturb":
            grown = self.step * (_STEP_UP if won else _STEP_DOWN)
            self.step = min(max(grown, STEP_BOUNDS[0]), STEP_BOUNDS[1])
        self.results.append(seen)
        self.origins.setdefault(seen.origin, seen)
        if seen.full:
            if seen.prior is not None and seen.weights is not None:
                self._solved[seen.prior] = min(self._solved.get(seen.prior, seen), seen, key=_rank)
            self.elites = sorted([*self.elites, seen], key=_rank)[:ELITES]

    def prior_values(self) -> Mapping[str, float]:
        """The value of each prior's own solution, for those that were scored."""
        starts = {origin: seen for origin, seen in self.origins.items() if origin.startswith("prior:")}
        return {origin.removeprefix("prior:"): seen.value for origin, seen in starts.items()}

    def best_weights(self, prior: str) -> Floats:
        """The weights that gave the best trial solved on `prior` (units,); zeros when that was the prior itself."""
        best = self._solved.get(prior)
        start = self.origins.get(f"prior:{prior}")
        if best is None or best.weights is None or (start is not None and start.value <= best.value):
            return np.zeros(len(self.problem.structure.sizes))
        return np.array(best.weights)


def _rank(seen: Seen) -> tuple[float, int]:
    """Better ones first, of equal ones the earlier."""
    return seen.value, seen.number


def _when(trial: FrozenTrial) -> tuple[float, int]:
    """Earlier ended ones first."""
    return math.inf if trial.datetime_complete is None else trial.datetime_complete.timestamp(), trial.number


def _seen(trial: FrozenTrial, choice: Choice, *, value: float, full: bool) -> Seen:
    attrs = trial.user_attrs
    stored = trial.system_attrs.get("autoprune:weights")
    weights = None if stored is None else tuple(weight / 100 for weight in stored)
    prior = trial.system_attrs.get("autoprune:prior")
    return Seen(trial.number, choice, value, str(attrs.get("origin", "given")), full, weights, prior)
