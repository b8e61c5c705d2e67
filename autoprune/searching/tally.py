"""How far a search is, by its study alone: what counts, what was tried, what has to be done again.

Everything here follows from the trials, so that a search that is resumed, or shared by several processes, goes on as
if nothing had happened. Every trial is read once after it has ended.
"""

from __future__ import annotations

from optuna.trial import FrozenTrial

from autoprune.core.space import Choice
from autoprune.searching.study import INTERRUPTED, WITHDRAWN, StudyRecord, is_result

BASELINE = "baseline:"


class Tally:
    """Read with `read`. Counts are of trials of all processes that share the study."""

    def __init__(self, record: StudyRecord) -> None:
        self._record = record
        self._next = 0
        self._open: set[int] = set()
        self.done = 0
        """Trials that count: evaluated, or failed at it."""
        self.asked = 0
        """Trials that have ended, with proposals that did not fit and were not evaluated."""
        self.best: float | None = None
        self.worst: float | None = None
        self.best_baseline: float | None = None
        self.failures = 0
        self.tried: dict[Choice, int] = {}
        """The first trial of every choice that needs no other."""
        self._interrupted: dict[Choice, list[str]] = {}
        """The origins of the trials of a choice that were never finished."""

    def read(self) -> None:
        """Take in what is new."""
        trials = self._record.trials()
        for number in [*sorted(self._open), *range(self._next, len(trials))]:
            self._take(trials[number])
        self._next = len(trials)

    @property
    def running(self) -> frozenset[int]:
        """Numbers of the trials that are being evaluated, here or elsewhere."""
        return frozenset(self._open)

    def unfinished(self, retries: int) -> dict[Choice, str]:
        """Choices whose trials were all interrupted, with their origin, less those given up after `retries` more."""
        return {
            choice: origins[0]
            for choice, origins in self._interrupted.items()
            if choice not in self.tried and len(origins) <= retries
        }

    def given_up(self, choice: Choice, retries: int) -> bool:
        """Whether all trials of a choice were interrupted, and too many of them."""
        return choice not in self.tried and len(self._interrupted.get(choice, ())) > retries

    def interruptions(self, choice: Choice) -> int:
        """How many trials of a choice were never finished."""
        return len(self._interrupted.get(choice, ()))

    @property
    def read_up_to(self) -> int:
        """The number of the first trial that was not looked at yet."""
        return self._next

    def superfluous(self, number: int, choice: Choice, *, total: int, since: int) -> bool:
        """Whether a trial that was just asked for is one too many: another process that shares the study had the same
        choice in a trial between `since` and `number`, or began the last of `total` ones before. Numbers say who came
        first, alike for all.
        """
        before = since <= self.tried.get(choice, number) < number
        earlier = sum(other < number for other in self._open)
        return before or self.done + earlier >= total

    def _take(self, trial: FrozenTrial) -> None:
        choice = self._record.choice_of(trial)
        if not trial.state.is_finished():
            self._open.add(trial.number)
            if choice is not None:
                self.tried.setdefault(choice, trial.number)
            return
        self._open.discard(trial.number)
        reason = trial.user_attrs.get("reason")
        if reason in (INTERRUPTED, WITHDRAWN):
            if choice is not None and self.tried.get(choice) == trial.number:
                del self.tried[choice]
            if choice is not None and reason == INTERRUPTED:
                self._interrupted.setdefault(choice, []).append(str(trial.user_attrs.get("origin", "")))
            return
        self.asked += 1
        self.done += trial.user_attrs.get("evaluated", True)
        self.failures += trial.values is None
        if choice is not None:
            self.tried.setdefault(choice, trial.number)
        if is_result(trial) and trial.value is not None and trial.user_attrs.get("evaluated", True):
            self._remember(str(trial.user_attrs.get("origin", "")), trial.value)

    def _remember(self, origin: str, value: float) -> None:
        self.best = value if self.best is None else min(self.best, value)
        self.worst = value if self.worst is None else max(self.worst, value)
        if origin.startswith(BASELINE):
            self.best_baseline = value if self.best_baseline is None else min(self.best_baseline, value)
