"""The loop: ask for choices as lanes are idle, have them evaluated, tell the results. Baselines and priors first, then
interrupted trials again, then what the sampler says.

Knows nothing of models, nor of where and how choices are evaluated. With one lane it asks, waits and tells in turns.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from autoprune.core.space import Choice
from autoprune.engines.base import Best, Ended, Job, Lanes, Score
from autoprune.errors import AutopruneError, RunError
from autoprune.progress import Progress, Silent, TrialSeen
from autoprune.searching.problem import Problem
from autoprune.searching.sampler import prior_starts
from autoprune.searching.study import INTERRUPTED, WITHDRAWN, Asked, StudyRecord, is_result
from autoprune.searching.tally import BASELINE, Tally

ASKS_A_TRIAL = 5
"""How many proposals a sampler may make for each evaluation: those that do not fit are not evaluated."""
RETRIES = 3
"""How often a trial that was interrupted is begun again."""

_HOPELESS = 5  # failures from the very beginning, after which the evaluation itself is taken to be broken
_POLL_S = 1.0
"""How long one wait for an answer is: after it others that share the study are looked after."""
_LOOK_S = 0.2
"""How long to sleep where there is nothing to wait for."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A trial that was evaluated to the end and fits."""

    number: int
    origin: str
    choice: Choice
    value: float
    costs: Mapping[str, float]
    attrs: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Effort:
    """How much a search may do: evaluated trials, seconds, and how often an interrupted trial is begun again."""

    trials: int
    seconds: float | None = None
    retries: int = RETRIES


def run_search(
    problem: Problem,
    record: StudyRecord,
    lanes: Lanes,
    effort: Effort,
    *,
    baselines: Mapping[str, Choice] | None = None,
    known: MutableMapping[Choice, Score] | None = None,
    progress: Progress | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[Finished, ...]:
    """Search until the study holds `effort.trials` evaluated trials, or its seconds have passed; results, best first.

    `baselines` (by name) and each prior's own solution are evaluated first, whatever the sampler; on a resumed study
    those that have a result are not repeated. Choices that `known` has full scores of are not evaluated again; new ones
    are added. A choice that does not fit is recorded and not evaluated. A trial that raises is recorded as failed and
    the search goes on; an AutopruneError, and a failure of all of the first trials (RunError), ends it. Control-C stops
    the search and keeps what is finished. However it ends, trials that were running are recorded as interrupted.
    """
    starts = {f"{BASELINE}{name}": choice for name, choice in (baselines or {}).items()} | prior_starts(problem)
    run = _Run(
        problem, record, lanes, effort, progress or Silent(), Tally(record), {} if known is None else known,
        waiting=deque(starts.items()), deadline=None if effort.seconds is None else clock() + effort.seconds,
    )  # fmt: skip
    with record.working():
        try:
            while not run.over(clock()):
                run.turn(clock())
        except KeyboardInterrupt:
            run.progress.note(
                f"stopped by the user: {run.tally.done} of {effort.trials} trials; finishing with the best so far "
                "(Ctrl-C again to quit)"
            )
        finally:
            run.interrupt()
    return ranked(record)


def ranked(record: StudyRecord) -> tuple[Finished, ...]:
    """The study's results, best first, each choice once. Of equal values the order of choices decides, so that the same
    results are ranked alike in whatever order they came.
    """
    finished: dict[Choice, Finished] = {}
    for trial in record.trials():
        choice = record.choice_of(trial) if is_result(trial) and trial.user_attrs.get("evaluated", True) else None
        if choice is not None and trial.value is not None:
            known = finished.get(choice)
            if known is None or trial.value < known.value:
                finished[choice] = _finished(trial, choice, trial.value)
    return tuple(sorted(finished.values(), key=lambda one: (one.value, one.choice)))


@dataclass(slots=True)
class _Run:
    problem: Problem
    record: StudyRecord
    lanes: Lanes
    effort: Effort
    progress: Progress
    tally: Tally
    known: MutableMapping[Choice, Score]
    waiting: deque[tuple[str, Choice]]
    deadline: float | None
    best: Best | None = None
    """The best that was scored to the end in this search: what others are compared with, sample by sample."""
    pending: dict[int, Asked] = field(default_factory=dict)

    def over(self, now: float) -> bool:
        """Whether nothing is left to ask for or to wait for."""
        self.tally.read()
        if self.pending:
            return False
        if self.deadline is not None and now >= self.deadline:
            if self.tally.done < self.effort.trials:
                done = f"{self.tally.done} of {self.effort.trials} trials"
                self.progress.note(f"stopped after {self.effort.seconds:.0f} s: {done}")
            return True
        return self.tally.done >= self.effort.trials or self.tally.asked >= self.effort.trials * ASKS_A_TRIAL

    def turn(self, now: float) -> None:
        """Ask for one more trial, or hear of one that ended."""
        running = len(self.tally.running)
        enough = self.tally.done + running >= self.effort.trials
        late = self.deadline is not None and now >= self.deadline
        most = self.tally.asked + running >= self.effort.trials * ASKS_A_TRIAL
        if not (enough or late or most) and self.lanes.idle() > 0:
            self._begin()
            return
        ended = self.lanes.wait(_POLL_S)
        if ended is not None:
            self._end(self.pending.pop(ended.number), ended)
        elif not self.pending:
            time.sleep(_LOOK_S)  # others evaluate the last trials, or workers are not there yet
        if others := self.tally.running - self.pending.keys():
            self.record.release_dead(sorted(others))

    def interrupt(self) -> None:
        """Record what is still running as interrupted."""
        try:
            if self.pending:
                self.lanes.cancel()
        finally:
            for asked in self.pending.values():
                self.record.tell(asked, None, state="fail", reason=INTERRUPTED)
            self.pending.clear()

    def _begin(self) -> None:
        """Ask, and have the choice evaluated if it fits."""
        since = self.tally.read_up_to
        origin, choice = self._next_start()
        retry = 0 if choice is None else self.tally.interruptions(choice)
        asked = self.record.ask(origin, choice, attrs={"retry": retry} if retry else None)
        self.tally.read()
        if self.tally.superfluous(asked.number, asked.choice, total=self.effort.trials, since=since):
            self.record.tell(asked, None, state="fail", reason=WITHDRAWN)
        elif not asked.fits:
            self._decline(asked)
        elif self.tally.given_up(asked.choice, self.effort.retries):
            times = self.tally.interruptions(asked.choice)
            self._failed(asked, f"was interrupted {times} times", lost=0)
        elif asked.choice in self.known:
            self._end(asked, Ended(asked.number, self.known[asked.choice]))
        else:
            reported = asked.origin.startswith(BASELINE)  # is evaluated to the end, however bad
            self.pending[asked.number] = asked
            best = None if reported else self.best
            self.lanes.start(Job(asked.number, asked.choice, best, whole=reported))

    def _next_start(self) -> tuple[str | None, Choice | None]:
        """What has to be evaluated whatever the sampler says; nothing when that is done."""
        for choice, origin in self.tally.unfinished(self.effort.retries).items():
            return origin, choice
        while self.waiting:
            origin, choice = self.waiting.popleft()
            if self.problem.space.normal(choice) not in self.tally.tried:
                return origin, choice
        return None, None

    def _end(self, asked: Asked, ended: Ended) -> None:
        """Tell how a trial ended. An AutopruneError is the user's to mend and ends the search."""
        score = ended.score
        if isinstance(ended.error, AutopruneError):
            self.record.tell(asked, None, state="fail", reason=str(ended.error))
            raise ended.error
        if score is None:
            self._failed(asked, f"{type(ended.error).__name__}: {ended.error}", lost=ended.lost)
            return
        attrs = {"samples": score.samples, **score.attrs, **({"lost_workers": ended.lost} if ended.lost else {})}
        state = self.record.tell(
            asked, score.value, state="pruned" if score.pruned else "complete", attrs=attrs, step=score.step
        )
        if state == TrialState.FAIL:
            self._failed_already(asked, f"the value is {score.value}")
            return
        if state == TrialState.COMPLETE:
            self.known[asked.choice] = score
            if score.seen is not None and (self.best is None or score.value < self.best.value):
                self.best = Best(score.value, score.seen)
        self._show(asked, score.value if state == TrialState.COMPLETE else None)

    def _decline(self, asked: Asked) -> None:
        """Tell a proposal that misses the budget without evaluating it: the worst value seen, plus by how much it
        misses.

        Deb's rule (2000, "An efficient constraint handling method for genetic algorithms", section 3): what fits
        is better than what does not, and a smaller miss is better than a larger. TPE, NSGA-II and GP read the named
        constraints; CMA-ES knows values alone, and finds its way back by these.
        """
        missed = sum(max(0.0, amount) for amount in asked.constraints.values())
        self.record.tell(asked, (self.tally.worst or 0.0) + missed, attrs={"evaluated": False})

    def _failed(self, asked: Asked, reason: str, *, lost: int) -> None:
        self.record.tell(asked, None, state="fail", reason=reason, attrs={"lost_workers": lost} if lost else None)
        self._failed_already(asked, reason)

    def _failed_already(self, asked: Asked, reason: str) -> None:
        self.progress.note(f"trial {asked.number} failed: {reason}")
        self._show(asked, None)
        if self.tally.failures >= _HOPELESS and self.tally.worst is None:
            raise RunError(f"the first {self.tally.failures} trials all failed, the last with: {reason}")

    def _show(self, asked: Asked, value: float | None) -> None:
        self.tally.read()
        best = math.inf if self.tally.best is None else self.tally.best
        seen = TrialSeen(
            asked.number, self.tally.done, self.effort.trials, asked.origin, value, best, self.tally.best_baseline
        )
        self.progress.trial(seen)


def _finished(trial: FrozenTrial, choice: Choice, value: float) -> Finished:
    costs = {key.removeprefix("cost."): cost for key, cost in trial.user_attrs.items() if key.startswith("cost.")}
    return Finished(trial.number, str(trial.user_attrs.get("origin", "")), choice, value, costs, dict(trial.user_attrs))
