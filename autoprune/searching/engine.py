"""The loop: ask for a choice, evaluate it, tell the result. Baselines and priors first, then what the sampler says.

Knows nothing of models: `evaluate` scores a choice, and decides on how many samples.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from optuna.trial import FrozenTrial, TrialState

from autoprune.core.space import Choice
from autoprune.errors import AutopruneError, RunError
from autoprune.progress import Progress, Silent, TrialSeen
from autoprune.searching.problem import Problem
from autoprune.searching.sampler import prior_starts
from autoprune.searching.study import INTERRUPTED, Asked, StudyRecord, is_result

ASKS_A_TRIAL = 5
"""How many proposals a sampler may make for each evaluation: those that do not fit are not evaluated."""

_HOPELESS = 5  # failures from the very beginning, after which the evaluation itself is taken to be broken


@dataclass(frozen=True, slots=True)
class Score:
    """What an evaluation found: a value to minimise, on how many samples; `pruned` when clearly no good on few."""

    value: float
    samples: int
    pruned: bool = False
    attrs: Mapping[str, Any] = field(default_factory=dict)


class Evaluate(Protocol):
    """Scores a choice."""

    def __call__(self, choice: Choice, best: float | None) -> Score:
        """The score of `choice`; `best` is the best value so far, to stop early against."""
        ...


@dataclass(frozen=True, slots=True)
class Finished:
    """A trial that was evaluated to the end and fits."""

    number: int
    origin: str
    choice: Choice
    value: float
    costs: Mapping[str, float]
    attrs: Mapping[str, Any]


@dataclass(slots=True)
class _Run:
    problem: Problem
    record: StudyRecord
    evaluate: Evaluate
    total: int
    progress: Progress
    done: int = 0
    asked: int = 0
    failed_first: int = 0
    worst: float | None = None
    best_baseline: float | None = None


def run_search(
    problem: Problem,
    record: StudyRecord,
    evaluate: Evaluate,
    *,
    trials: int,
    baselines: Mapping[str, Choice] | None = None,
    seconds: float | None = None,
    progress: Progress | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[Finished, ...]:
    """Search until the study holds `trials` evaluated trials, or `seconds` have passed; the results, best first.

    `baselines` (by name) and each prior's own solution are evaluated first, whatever the sampler; on a resumed study
    those that have a result are not repeated. A choice that does not fit is recorded and not evaluated. A trial that
    raises is recorded as failed and the search goes on; an AutopruneError, and a failure of all of the first trials
    (RunError), ends it. Control-C stops the search and keeps what is finished.
    """
    run = _Run(problem, record, evaluate, trials, progress or Silent())
    _recall(run)
    deadline = None if seconds is None else clock() + seconds
    starts = {f"baseline:{name}": choice for name, choice in (baselines or {}).items()}
    waiting = [*starts.items(), *prior_starts(problem).items()]
    tried = {record.choice_of(trial) for trial in record.trials() if _says_something(trial)}
    try:
        while run.done < trials and run.asked < trials * ASKS_A_TRIAL:
            if deadline is not None and clock() >= deadline:
                run.progress.note(f"stopped after {seconds:.0f} s: {run.done} of {trials} trials")
                break
            origin, choice = waiting.pop(0) if waiting else (None, None)
            if choice is not None and problem.space.normal(choice) in tried:
                continue
            asked = record.ask(origin, choice)
            tried.add(asked.choice)
            _one_trial(run, asked)
    except KeyboardInterrupt:
        run.progress.note(
            f"stopped by the user: {run.done} of {trials} trials; finishing with the best so far (Ctrl-C again to quit)"
        )
    return ranked(record)


def ranked(record: StudyRecord) -> tuple[Finished, ...]:
    """The study's results, best first, each choice once."""
    finished: dict[Choice, Finished] = {}
    results = [trial for trial in record.trials() if is_result(trial) and trial.user_attrs.get("evaluated", True)]
    for trial in sorted(results, key=lambda trial: (trial.value, trial.number)):
        choice = record.choice_of(trial)
        if choice is not None and trial.value is not None:
            finished.setdefault(choice, _finished(trial, choice, trial.value))
    return tuple(finished.values())


def _recall(run: _Run) -> None:
    """What a resumed study has already."""
    for trial in run.record.trials():
        if not _says_something(trial):
            continue
        run.asked += 1
        run.done += trial.user_attrs.get("evaluated", True)
        if is_result(trial) and trial.value is not None:
            _remember(run, str(trial.user_attrs.get("origin", "")), trial.value)


def _one_trial(run: _Run, asked: Asked) -> None:
    run.asked += 1
    if not asked.fits:
        _decline(run, asked)
        return
    best = run.record.best()
    try:
        reported = asked.origin.startswith("baseline:")  # is evaluated to the end, however bad
        score = run.evaluate(asked.choice, None if best is None or reported else best.value)
    except AutopruneError as error:
        run.record.tell(asked, None, state="fail", reason=str(error))
        raise
    except Exception as error:  # noqa: BLE001  (a search outlives one broken candidate)
        reason = f"{type(error).__name__}: {error}"
        run.record.tell(asked, None, state="fail", reason=reason)
        _failed(run, asked, reason)
        return
    except BaseException:
        run.record.tell(asked, None, state="fail", reason=INTERRUPTED)
        raise
    attrs = {"samples": score.samples, **score.attrs}
    state = run.record.tell(
        asked, score.value, state="pruned" if score.pruned else "complete", attrs=attrs, step=score.samples
    )
    if state == TrialState.FAIL:
        _failed(run, asked, f"the value is {score.value}")
        return
    run.done += 1
    if state == TrialState.COMPLETE:
        _remember(run, asked.origin, score.value)
    _show(run, asked, score.value if state == TrialState.COMPLETE else None)


def _decline(run: _Run, asked: Asked) -> None:
    """Tell a proposal that misses the budget without evaluating it: the worst value seen, plus by how much it misses.

    Deb's rule (2000, "An efficient constraint handling method for genetic algorithms", section 3): what fits
    is better than what does not, and a smaller miss is better than a larger. TPE, NSGA-II and GP read the named
    constraints; CMA-ES knows values alone, and finds its way back by these.
    """
    missed = sum(max(0.0, amount) for amount in asked.constraints.values())
    run.record.tell(asked, (run.worst or 0.0) + missed, attrs={"evaluated": False})


def _failed(run: _Run, asked: Asked, reason: str) -> None:
    run.done += 1
    run.failed_first += 1
    run.progress.note(f"trial {asked.number} failed: {reason}")
    _show(run, asked, None)
    if run.failed_first >= _HOPELESS and run.worst is None:
        raise RunError(f"the first {run.failed_first} trials all failed, the last with: {reason}")


def _remember(run: _Run, origin: str, value: float) -> None:
    run.worst = value if run.worst is None else max(run.worst, value)
    if origin.startswith("baseline:"):
        run.best_baseline = value if run.best_baseline is None else min(run.best_baseline, value)


def _show(run: _Run, asked: Asked, value: float | None) -> None:
    best = run.record.best()
    best_value = float("inf") if best is None or best.value is None else best.value
    run.progress.trial(TrialSeen(asked.number, run.total, asked.origin, value, best_value, run.best_baseline))


def _says_something(trial: FrozenTrial) -> bool:
    return trial.state.is_finished() and trial.user_attrs.get("reason") != INTERRUPTED


def _finished(trial: FrozenTrial, choice: Choice, value: float) -> Finished:
    costs = {key.removeprefix("cost."): cost for key, cost in trial.user_attrs.items() if key.startswith("cost.")}
    return Finished(trial.number, str(trial.user_attrs.get("origin", "")), choice, value, costs, dict(trial.user_attrs))
