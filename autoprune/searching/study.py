"""The record of a search: an Optuna study, in a journal file or a database, asked for trials and told their results.

Knows how a choice becomes a trial and back, and keeps the study consistent whatever happens to the process. Knows
nothing of how choices are proposed (samplers) or scored (evaluators).
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import optuna
from optuna.distributions import IntDistribution
from optuna.exceptions import DuplicatedStudyError, UpdateFinishedTrialError
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.study import Study
from optuna.study._constrained_optimization import _CONSTRAINTS_KEY
from optuna.trial import FrozenTrial, TrialState

from autoprune.core.budget import Metric
from autoprune.core.space import Choice
from autoprune.errors import RunError
from autoprune.searching.database import Database
from autoprune.searching.database_place import shown_url
from autoprune.searching.journal import DRAFT_ID, Draft, Ending, TrialJournal, blank_trial
from autoprune.searching.owners import Heartbeat, Owner, Watch, this_process
from autoprune.searching.patience import Patience
from autoprune.searching.problem import Problem, as_choice, as_row

INTERRUPTED = "interrupted"
"""The reason of a trial that was never finished: the process was killed or stopped."""
WITHDRAWN = "withdrawn"
"""The reason of a trial that was one too many: another process that shares the study was there before."""
OWNER = "owner"
"""The attribute that says which process runs a trial."""

_SPACE_KEY = "autoprune:space"


@dataclass(frozen=True, slots=True)
class Asked:
    """A trial that is running: what to evaluate, and whether it fits (`costs` are in each metric's own unit)."""

    number: int
    trial_id: int
    choice: Choice
    origin: str
    costs: Mapping[Metric, float]
    constraints: Mapping[str, float]

    @property
    def fits(self) -> bool:
        """Whether every limit holds."""
        return all(value <= 0 for value in self.constraints.values())


class Storage(Protocol):
    """What a study is kept in: Optuna's storage, and two doors by which a trial is written down at once."""

    def drafting(self) -> AbstractContextManager[Draft]:
        """While this holds, attributes that a sampler sets on the trial `DRAFT_ID` are collected, not written."""
        ...

    def end_trial(self, trial_id: int, ending: Ending) -> None:
        """Record all that is told of a trial when it ends."""
        ...

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """As Optuna's."""
        ...

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """As Optuna's."""
        ...


class StudyRecord:
    """Ask and tell on one study, with one append each. Made by `open_study`."""

    def __init__(self, study: Study, storage: Storage, problem: Problem, watch: Watch) -> None:
        self._study = study
        self._storage = storage
        self._problem = problem
        self._watch = watch
        self._owner = this_process().text
        self._distributions = distributions_of(problem)
        self._sign = 1.0 if study.direction == optuna.study.StudyDirection.MINIMIZE else -1.0
        self._best: FrozenTrial | None = None
        for trial in self.trials():
            self._consider(trial)

    @property
    def study(self) -> Study:
        """The Optuna study itself."""
        return self._study

    def ask(
        self, origin: str | None = None, choice: Choice | None = None, *, attrs: Mapping[str, Any] | None = None
    ) -> Asked:
        """The next trial, already recorded as running by this process: `choice` when given, else what the sampler
        proposes. `attrs` are recorded with it.

        Its predicted costs and constraints are recorded too, so Optuna's own samplers know what does not fit.
        """
        draft_trial = self._draft_trial()
        with self._storage.drafting() as draft:
            params = self._proposed(draft_trial) if choice is None else self._params(choice)
        named = self._normal(params)
        costs = self._problem.costs_of(named)
        constraints = self._problem.violations(costs)
        default = type(self._study.sampler).__name__ if choice is None else "given"
        known = {"origin": origin or default, **{f"cost.{metric}": cost for metric, cost in costs.items()}}
        draft_trial.params = params
        draft_trial.distributions = dict(self._distributions)
        draft_trial.user_attrs = {**known, **draft.user_attrs, OWNER: self._owner, **(attrs or {})}
        draft_trial.system_attrs = {**draft.system_attrs, **_constraint_attrs(constraints)}
        trial_id = self._storage.create_new_trial(self._study._study_id, draft_trial)
        number = self._storage.get_trial(trial_id).number
        found = str(draft_trial.user_attrs["origin"])
        return Asked(number, trial_id, named, found, costs, constraints)

    def tell(
        self,
        asked: Asked,
        value: float | None,
        *,
        state: Literal["complete", "pruned", "fail"] = "complete",
        attrs: Mapping[str, Any] | None = None,
        constraints: Mapping[str, float] | None = None,
        step: int = 0,
        reason: str | None = None,
    ) -> TrialState:
        """Record how a trial ended; the state it was given.

        A value that is missing or not finite makes it a failed trial, with the reason among its attributes. A pruned
        trial keeps its value as the intermediate value at `step` (the samples it was scored on). `constraints` are
        added to those known when it was asked for.
        """
        ended, why = _outcome(value, state, reason)
        values = None if ended == TrialState.FAIL or value is None else (float(value),)
        steps = {step: float(value)} if ended == TrialState.PRUNED and value is not None else {}
        user_attrs = {key: plain(item) for key, item in (attrs or {}).items()}
        if why is not None:
            user_attrs["reason"] = why
        system_attrs = _constraint_attrs(constraints or {})
        ending = Ending(ended, values, user_attrs, system_attrs, steps)
        self._study._thread_local.cached_all_trials = None
        before = self._storage.get_trial(asked.trial_id)
        try:
            with _without_cmaes_warning():
                self._study.sampler.after_trial(self._study, before, ended, None if values is None else list(values))
        finally:
            self._storage.end_trial(asked.trial_id, ending)
            self._consider(self._storage.get_trial(asked.trial_id))
        return ended

    def best(self) -> FrozenTrial | None:
        """The complete trial of best value among those that fit, or None."""
        return self._best

    def trials(self) -> list[FrozenTrial]:
        """All trials in order, not copied: do not write to them."""
        return self._study.get_trials(deepcopy=False)

    def choice_of(self, trial: FrozenTrial) -> Choice | None:
        """The decision of a trial, with units inside dropped blocks at option 0; None without all parameters."""
        if any(name not in trial.params for name in self._distributions):
            return None
        return self._normal(trial.params)

    def working(self) -> AbstractContextManager[object]:
        """While this holds, others that share the study can see that this process is alive."""
        return Heartbeat(self._study) if isinstance(self._storage, Database) else nullcontext()

    def release_dead(self, numbers: Iterable[int] | None = None) -> int:
        """Record trials (of these numbers; else all) as interrupted that processes which are gone were running; how
        many there were.
        """
        trials = self.trials()
        looked_at = trials if numbers is None else [trials[number] for number in numbers]
        dead = [trial for trial in looked_at if not (trial.state.is_finished() or self._is_alive(trial))]
        for trial in dead:
            with suppress(UpdateFinishedTrialError):  # another process saw it, too
                self._storage.end_trial(trial._trial_id, Ending(TrialState.FAIL, None, {"reason": INTERRUPTED}))
        return len(dead)

    def _is_alive(self, trial: FrozenTrial) -> bool:
        owner = Owner.parse(str(trial.user_attrs.get(OWNER, "")))
        return owner is not None and self._watch.alive(owner)

    def _consider(self, trial: FrozenTrial) -> None:
        if not is_result(trial):
            return
        if self._best is None or self._sign * _value(trial) < self._sign * _value(self._best):
            self._best = trial

    def _draft_trial(self) -> FrozenTrial:
        self._study._thread_local.cached_all_trials = None
        return blank_trial(len(self.trials()), DRAFT_ID)

    def _proposed(self, draft: FrozenTrial) -> dict[str, Any]:
        """All parameters by the sampler, in the order in which `optuna.Trial` asks for them."""
        study, sampler = self._study, self._study.sampler
        sampler.before_trial(study, draft)
        space = sampler.infer_relative_search_space(study, draft)
        with _without_cmaes_warning():
            params = dict(sampler.sample_relative(study, draft, space))
        for name, distribution in self._distributions.items():
            if distribution.single():
                params[name] = distribution.low
            elif name not in params:
                params[name] = sampler.sample_independent(study, draft, name, distribution)
        return {name: int(params[name]) for name in self._distributions}

    def _params(self, choice: Choice) -> dict[str, Any]:
        return dict(zip(self._problem.space.names, choice, strict=True))

    def _normal(self, params: Mapping[str, Any]) -> Choice:
        row = as_row(tuple(params[name] for name in self._problem.space.names))
        return as_choice(self._problem.structure.normal(row)[0])


def open_study(
    place: Path | str,
    problem: Problem,
    *,
    sampler: BaseSampler,
    name: str = "search",
    direction: Literal["minimize", "maximize"] = "minimize",
    claim: bool = True,
    note: Callable[[str], None] | None = None,
) -> StudyRecord:
    """The study `name` in `place`, made or resumed: a journal file, or the URL of a database that others may share.

    With `claim` this process takes part in it: a half-written last line of a journal is cut off and trials that a dead
    process left running are recorded as interrupted. Without, it only reads. `note` is told when the storage is waited
    for. Raises RunError when the study cannot be read, was made for another space, or there is none to read.
    """
    logging.getLogger("optuna").setLevel(logging.WARNING)
    if isinstance(place, Path) and not claim and not place.exists():
        raise RunError(f"{place}: there is no study {name!r} in it yet; start the search first")
    shown = place if isinstance(place, Path) else shown_url(place)
    try:
        storage = _storage(place, claim=claim, note=note)
        study = _load(storage, name, sampler=sampler)
        if study is None and claim:
            study = _made(storage, name, direction=direction, sampler=sampler)
    except (OSError, ValueError, KeyError) as error:
        raise RunError(f"{shown}: cannot read this study ({error}); move it away to start a new one") from error
    if study is None:
        raise RunError(f"{shown}: there is no study {name!r} in it yet; start the search first")
    sizes = dict(zip(problem.space.names, problem.space.sizes, strict=True))
    known = study.user_attrs.get(_SPACE_KEY)
    if known is None and claim:
        study.set_user_attr(_SPACE_KEY, sizes)
    elif known is not None and known != sizes:
        raise RunError(f"{shown}: study {name!r} searched another space; use another run folder, or move it away")
    record = StudyRecord(study, storage, problem, Watch(study))
    if claim:
        record.release_dead()
    if record.trials():
        sampler.reseed_rng()  # the same seed once more would propose the same trials once more
    return record


def _storage(place: Path | str, *, claim: bool, note: Callable[[str], None] | None) -> TrialJournal | Database:
    if isinstance(place, Path):
        return TrialJournal(place, mend=claim, patience=Patience(note=note))
    return Database(place, note=note, create=claim)


def _load(storage: BaseStorage, name: str, *, sampler: BaseSampler) -> Study | None:
    """The study that is there. (`create_study(load_if_exists=True)` would write a line each time.)"""
    if all(known.study_name != name for known in storage.get_all_studies()):
        return None
    return optuna.load_study(study_name=name, storage=storage, sampler=sampler)


def _made(
    storage: BaseStorage, name: str, *, direction: Literal["minimize", "maximize"], sampler: BaseSampler
) -> Study:
    """A new study; the one of another process that was quicker."""
    try:
        return optuna.create_study(storage=storage, study_name=name, direction=direction, sampler=sampler)
    except DuplicatedStudyError:
        return optuna.load_study(study_name=name, storage=storage, sampler=sampler)


def distributions_of(problem: Problem) -> dict[str, IntDistribution]:
    """One integer parameter a unit, named by the unit: the index of its option."""
    space = problem.space
    return {name: IntDistribution(0, size - 1) for name, size in zip(space.names, space.sizes, strict=True)}


def is_result(trial: FrozenTrial) -> bool:
    """Whether a trial was evaluated to the end and fits every limit."""
    return trial.state == TrialState.COMPLETE and all(value <= 0 for value in trial.constraints.values())


def plain(item: Any) -> Any:
    """A value as JSON can hold it: numpy scalars and arrays become numbers and lists, paths become text."""
    if isinstance(item, Mapping):
        return {str(key): plain(value) for key, value in item.items()}
    if isinstance(item, (list, tuple, set, frozenset)):
        return [plain(value) for value in item]
    if hasattr(item, "tolist"):
        return plain(item.tolist())
    if item is None or isinstance(item, (bool, int, float, str)):
        return item
    return str(item)


@contextmanager
def _without_cmaes_warning() -> Iterator[None]:
    """CMA-ES says at every trial that it ignores constraints; it learns them from values, as `engine` explains."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Constraints have been set, but CmaEsSampler")
        yield


def _outcome(value: float | None, state: str, reason: str | None) -> tuple[TrialState, str | None]:
    if state == "fail":
        return TrialState.FAIL, reason or "failed"
    if value is None:
        return TrialState.FAIL, reason or "no value"
    if not math.isfinite(value):
        return TrialState.FAIL, f"the value is {value}"
    return (TrialState.PRUNED if state == "pruned" else TrialState.COMPLETE), reason


def _constraint_attrs(constraints: Mapping[str, float]) -> dict[str, float]:
    """As `optuna.Trial.set_constraint` stores them."""
    return {f"{_CONSTRAINTS_KEY}:{name}": float(value) for name, value in constraints.items()}


def _value(trial: FrozenTrial) -> float:
    value = trial.value
    if value is None:
        raise ValueError(f"trial {trial.number} has no value")
    return value
