"""The sampler of this search: a portfolio of moves, each of which proposes choices that fit the budget.

An Optuna sampler like any other: it works in `study.optimize`, too. It learns from the study's finished trials and
draws from (seed, trial number), so the same study and seed always give the same next trial. Trials that still run are
taken to turn out as the harm model expects: what they promise is built upon at once, and nothing is proposed twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from heapq import nsmallest
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from autoprune.core.space import Choice
from autoprune.errors import BudgetError
from autoprune.searching.fit import Tables, solve_fit
from autoprune.searching.harm_model import HarmModel, fit_harm_model
from autoprune.searching.history import BEFORE, ELITES, History, Seen
from autoprune.searching.problem import Floats, Problem, as_choice
from autoprune.searching.proposals import perturb, swap
from autoprune.searching.study import distributions_of

MOVES = ("perturb", "swap", "model", "guided")
_ATTEMPTS = 16
_MODEL_FROM = 8  # trials before the harm model has a say
_REFIT = 4  # new trials before it is fitted again
_RECENT = 400  # trials it is fitted to at most: the best and the newest
_BUCKETS = 2000  # coarser than for the priors: what rounding loses is filled up afterwards
_TEMPERATURE = 0.5  # of posterior draws: one wrong draw of many weights spoils a candidate
_CANDIDATES = 20  # neighbours among which `guided` picks
_BLIND = 3.0  # how much farther weights move beside trials of which none has ended: they are to teach the model first


@dataclass(frozen=True, slots=True)
class Proposal:
    """A choice, which move made it, from which trial; with the weights when it was solved on a weighted prior.

    `before` is the value to beat, known when other trials ran beside it and some had ended.
    """

    choice: Choice
    origin: str
    parent: int | None = None
    prior: str | None = None
    weights: Floats | None = None
    beside: bool = False
    before: float | None = None


@dataclass(slots=True)
class _State:
    """What belongs to one study: its lessons, and the harm model fitted to them last."""

    history: History
    model: HarmModel | None = None
    fitted: int = 0
    best: list[Seen] = field(default_factory=list)  # of those that it was fitted to
    believed: dict[int, float] = field(default_factory=dict)  # what it predicts of running trials, by number


@dataclass(slots=True)
class _Context:
    """What a move works with."""

    state: _State
    rng: np.random.Generator
    number: int
    attempt: int = 0


def harms_of(problem: Problem) -> dict[str, Floats]:
    """Each prior as (units, options); a problem without priors gets `width`: the square of the removed share."""
    structure = problem.structure
    if problem.priors:
        return {name: structure.padded(harm, 0.0) for name, harm in problem.priors.items()}
    return {"width": np.where(structure.valid, (1.0 - structure.keeps / structure.keeps[:, :1]) ** 2, 0.0)}


def prior_starts(problem: Problem, tables: Tables | None = None) -> dict[str, Choice]:
    """Each prior's own best choice within the budget, by `prior:<name>`; without those that nothing fits."""
    known = tables or Tables(problem)
    solved = {name: solve_fit(problem, harm, tables=known, exact=True) for name, harm in harms_of(problem).items()}
    return {f"prior:{name}": choice for name, choice in solved.items() if choice is not None}


class BudgetSampler(BaseSampler):
    """Proposes choices that fit, never one that the study has seen as long as moves find others.

    First each prior's own solution; then perturbed priors, swaps on the best trials, solutions of a harm model drawn
    from its posterior (`model`), and the swap that it likes best (`guided`). Moves that paid are made more often.
    Raises BudgetError when the first proposal is asked for and nothing fits.
    """

    def __init__(self, problem: Problem, *, seed: int = 0) -> None:
        self._problem = problem
        self._seed = seed
        self._tables = Tables(problem)
        self._harms = harms_of(problem)
        self._starts: dict[str, Choice] | None = None
        self._states: dict[str, _State] = {}
        self._made: dict[str, Callable[[_Context], Proposal | None]] = {
            "perturb": self._perturb,
            "swap": self._swap,
            "model": self._thompson,
            "guided": self._guided,
        }

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:  # noqa: ARG002
        """One integer a unit: all of the problem's space, whatever the study holds."""
        return dict(distributions_of(self._problem))

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The next choice; which move made it is set on the trial (`origin`, `parent`)."""
        proposal = self.propose(study, trial.number)
        storage, trial_id = study._storage, trial._trial_id
        storage.set_trial_user_attr(trial_id, "origin", proposal.origin)
        if proposal.parent is not None:
            storage.set_trial_user_attr(trial_id, "parent", proposal.parent)
        if proposal.prior is not None and proposal.weights is not None:
            rounded = [round(100 * float(weight)) for weight in proposal.weights]
            storage.set_trial_system_attr(trial_id, "autoprune:prior", proposal.prior)
            storage.set_trial_system_attr(trial_id, "autoprune:weights", rounded)
        if proposal.beside:
            storage.set_trial_system_attr(trial_id, BEFORE, proposal.before)
        params = dict(zip(self._problem.space.names, proposal.choice, strict=True))
        return {name: params[name] for name in search_space}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """A parameter that is no unit of this problem: drawn at random."""
        seeded = optuna.samplers.RandomSampler(seed=self._seed + trial.number)
        return seeded.sample_independent(study, trial, param_name, param_distribution)

    def propose(self, study: Study, number: int) -> Proposal:
        """The proposal for trial `number`, given the trials that the study holds."""
        state = self._state(study)
        proposal = self._waiting_start(state.history) or self._moved(state, number)
        if not state.history.running:
            return proposal
        elites = state.history.elites
        return replace(proposal, beside=True, before=elites[0].value if elites else None)

    def _moved(self, state: _State, number: int) -> Proposal:
        """What a move proposes: one that paid more often than another, until one finds something new."""
        context = _Context(state, np.random.default_rng([self._seed, number]), number)
        last: Proposal | None = None
        for attempt in range(_ATTEMPTS):
            context.attempt = attempt
            proposal = self._made[self._move(context)](context)
            if proposal is None:
                continue
            if not state.history.known(proposal.choice):
                return proposal
            last = proposal
        return self._anything(context, last)

    def _state(self, study: Study) -> _State:
        key = f"{id(study._storage)}:{study.study_name}"
        if key not in self._states:
            minimise = study.direction == optuna.study.StudyDirection.MINIMIZE
            self._states[key] = _State(History(self._problem, sign=1.0 if minimise else -1.0))
        state = self._states[key]
        state.history.read(study.get_trials(deepcopy=False))
        return state

    def _waiting_start(self, history: History) -> Proposal | None:
        if self._starts is None:
            self._starts = prior_starts(self._problem, self._tables)
            if not self._starts and not self._problem.fits(self._problem.space.dense):
                raise BudgetError("no choice of this space fits the budget; raise the limit or allow narrower options")
        for origin, choice in self._starts.items():
            if not history.known(choice):
                return Proposal(choice, origin)
        return None

    def _move(self, context: _Context) -> str:
        """A move by its success so far (probability matching over decayed counts); later attempts vary more."""
        history = context.state.history
        allowed = [move for move in MOVES if self._possible(move, history)]
        chances = []
        for move in allowed:
            credit = history.credits.get(move)
            chances.append(1.0 if credit is None else (credit.wins + 1.0) / (credit.tries + 4.0) * 4.0)
        shares = np.array(chances) / sum(chances)
        shares = 0.8 * shares + 0.2 / len(allowed)
        return str(context.rng.choice(allowed, p=shares))

    def _possible(self, move: str, history: History) -> bool:
        if move == "perturb":
            return True
        if move == "swap":
            return bool(history.elites)
        return bool(history.elites) and len(history.results) >= _MODEL_FROM

    def _perturb(self, context: _Context) -> Proposal | None:
        history = context.state.history
        prior = self._pick_prior(context)
        step = history.step * (1 + 0.25 * context.attempt)
        if history.running and len(history.results) < _MODEL_FROM:
            step *= _BLIND
        harm, weights = perturb(
            self._problem, self._harms[prior], history.best_weights(prior), step=step, rng=context.rng
        )
        choice = self._solved(context, harm)
        return None if choice is None else Proposal(choice, "perturb", prior=prior, weights=weights)

    def _swap(self, context: _Context) -> Proposal | None:
        parent = self._pick_parent(context)
        harm = self._belief(context)
        size = 0 if context.attempt < 4 else context.attempt // 2
        choice = swap(self._problem, parent.choice, harm=harm, tables=self._tables, rng=context.rng, size=size)
        return None if choice is None else Proposal(choice, "swap", parent=parent.number)

    def _thompson(self, context: _Context) -> Proposal | None:
        model = self._model(context)
        choice = self._solved(context, model.sample(context.rng, temperature=_TEMPERATURE))
        return None if choice is None else Proposal(choice, "model")

    def _guided(self, context: _Context) -> Proposal | None:
        parent = self._pick_parent(context)
        model = self._model(context)
        harm = model.expected()
        history = context.state.history
        found = []
        for _ in range(_CANDIDATES):
            choice = swap(self._problem, parent.choice, harm=harm, tables=self._tables, rng=context.rng)
            if choice is not None and not history.known(choice):
                found.append(choice)
        if not found:
            return None
        scores = model.predict(np.array(found, dtype=np.int64))
        return Proposal(found[int(scores.argmin())], "guided", parent=parent.number)

    def _anything(self, context: _Context, last: Proposal | None) -> Proposal:
        """When moves find nothing new: large random changes; at the very end something that was seen before."""
        sizes, history = self._problem.structure.sizes, context.state.history
        for _ in range(_ATTEMPTS):
            harm = context.rng.random(self._problem.structure.valid.shape)
            harm[:, 0] = 0.0
            choice = self._solved(context, harm)
            if choice is not None and not history.known(choice):
                return Proposal(choice, "random")
            narrower = as_choice(context.rng.integers(0, sizes))
            if not history.known(narrower) and self._problem.fits(narrower):
                normal = self._problem.structure.normal(np.array([narrower], dtype=np.int64))[0]
                if not history.known(as_choice(normal)):
                    return Proposal(as_choice(normal), "random")
            if choice is not None and last is None:
                last = Proposal(choice, "random")
        if last is None:
            raise BudgetError("no choice of this space fits the budget; raise the limit or allow narrower options")
        return last

    def _pick_prior(self, context: _Context) -> str:
        """The prior whose solution was best most often, the next ones seldomer; unscored ones last."""
        values = context.state.history.prior_values()
        ranked = sorted(self._harms, key=lambda name: (values.get(name, np.inf), name))
        return ranked[min(int(context.rng.geometric(0.65)) - 1, len(ranked) - 1)]

    def _pick_parent(self, context: _Context) -> Seen:
        """One of the best trials, a running one among them if the model expects as much of it."""
        parents = self._parents(context)
        return parents[min(int(context.rng.geometric(0.5)) - 1, len(parents) - 1, ELITES - 1)]

    def _parents(self, context: _Context) -> list[Seen]:
        """The best trials. A running one counts with its prediction, plus what predictions of the best ones miss."""
        history = context.state.history
        if not history.running or not self._possible("model", history):
            return history.elites
        model, believed = self._model(context), context.state.believed
        new = [number for number in history.running if number not in believed]
        if new:
            rows = np.array([history.running[number] for number in new], dtype=np.int64)
            believed.update(zip(new, model.predict(rows).tolist(), strict=True))
        best = model.predict(np.array([seen.choice for seen in history.elites], dtype=np.int64))
        missed = float(np.mean([seen.value for seen in history.elites] - best))
        hopes = [
            Seen(number, choice, believed[number] + missed, "running", full=False, weights=None, prior=None)
            for number, choice in history.running.items()
            if believed[number] + missed < history.elites[-1].value
        ]
        return nsmallest(ELITES, [*history.elites, *hopes], key=lambda seen: (seen.value, seen.number))

    def _solved(self, context: _Context, harm: Floats) -> Choice | None:
        """The knapsack on `harm`, with costs linearised once round the best trial."""
        elites = context.state.history.elites
        center = elites[0].choice if elites else self._problem.space.dense
        return solve_fit(self._problem, harm, incumbent=center, tables=self._tables, rounds=1, buckets=_BUCKETS)

    def _belief(self, context: _Context) -> Floats:
        """The harm that prices swaps: the model's when there is one, else a good prior's."""
        if self._possible("model", context.state.history):
            return self._model(context).expected()
        return self._harms[self._pick_prior(context)]

    def _model(self, context: _Context) -> HarmModel:
        """Fitted to all but the newest trials: to a multiple of `_REFIT`, so that a resumed search has the same."""
        state = context.state
        count = len(state.history.results) // _REFIT * _REFIT
        if state.model is not None and state.fitted == count:
            return state.model
        added = state.history.results[state.fitted : count]
        state.best = sorted([*state.best, *added], key=lambda seen: (seen.value, seen.number))[: _RECENT // 2]
        if count > _RECENT:
            newest = state.history.results[count - _RECENT // 2 : count]
            results = list({seen.number: seen for seen in [*state.best, *newest]}.values())
        else:
            results = state.history.results[:count]
        values = state.history.prior_values()
        ranked = sorted(self._harms, key=lambda name: (values.get(name, np.inf), name))[:2]
        state.model = fit_harm_model(
            self._problem,
            [self._harms[name] for name in ranked],
            np.array([seen.choice for seen in results], dtype=np.int64),
            values=np.array([seen.value for seen in results]),
            trust=np.array([1.0 if seen.full else 0.3 for seen in results]),
        )
        state.fitted = count
        state.believed = {}
        return state.model
