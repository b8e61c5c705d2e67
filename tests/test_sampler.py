from __future__ import annotations

import numpy as np
import optuna
import pytest
from search_problems import divergence, divergences, every_choice, toy_problem, toy_space

from autoprune.engines.base import Score
from autoprune.engines.local import Here
from autoprune.errors import BudgetError, ConfigError
from autoprune.searching.fit import Tables
from autoprune.searching.harm_model import features, fit_harm_model
from autoprune.searching.loop import Effort, run_search
from autoprune.searching.proposals import perturb, swap
from autoprune.searching.sampler import MOVES, BudgetSampler, prior_starts
from autoprune.searching.samplers import sampler_by_name
from autoprune.searching.study import open_study


def searched(problem, truth, folder, *, trials, name="budget", seed=0):
    """All choices that were evaluated, their origins, and the results best first."""
    record = open_study(folder / f"{name}{seed}.journal", problem, sampler=sampler_by_name(name, problem, seed=seed))
    seen = []

    def evaluate(choice, best):
        seen.append(choice)
        return Score(divergence(problem, truth, choice), 64)

    results = run_search(problem, record, Here(evaluate), Effort(trials))
    return seen, [trial.user_attrs["origin"] for trial in record.trials()], results


@pytest.fixture(scope="module")
def middling():
    return toy_problem(toy_space((2, 2, 1), 5, methods=("l2", "obs")), seed=4, coupling=0.6)


def test_every_proposal_fits_is_new_and_priors_come_first(middling, tmp_path):
    problem, truth = middling
    seen, origins, results = searched(problem, truth, tmp_path, trials=120)
    assert all(problem.fits(choice) for choice in seen)
    assert len(set(seen)) == len(seen) == 120
    assert seen[:2] == list(prior_starts(problem).values())
    assert origins[:2] == ["prior:prior0", "prior:prior1"]
    assert set(origins[2:]) >= set(MOVES)
    values = [result.value for result in results]
    assert values == sorted(values)
    assert values[0] < min(divergence(problem, truth, choice) for choice in seen[:2])


def test_same_seed_same_search_and_other_seed_other_search(middling, tmp_path):
    problem, truth = middling
    runs = []
    for number, seed in enumerate((0, 0, 1)):
        folder = tmp_path / str(number)
        folder.mkdir()
        runs.append(searched(problem, truth, folder, trials=40, seed=seed)[0])
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_a_resumed_search_goes_on_as_it_would_have(middling, tmp_path):
    problem, truth = middling
    whole = searched(problem, truth, tmp_path, trials=40, seed=5)[0]
    other = tmp_path / "other"
    other.mkdir()
    first = searched(problem, truth, other, trials=17, seed=5)[0]
    second = searched(problem, truth, other, trials=40, seed=5)[0]
    assert first + second == whole


def test_beats_random_search_and_comes_near_the_best_of_all(tmp_path):
    losses, wins = [], 0
    for seed in range(4):
        problem, truth = toy_problem(toy_space((2, 1), 5), seed=seed, coupling=0.5)
        everything = np.unique(problem.structure.normal(every_choice(problem.space)), axis=0)
        fitting = everything[problem.fits_each(everything)]
        values = divergences(problem, truth, fitting)
        found = searched(problem, truth, tmp_path, trials=60, seed=seed)[2][0].value
        rng = np.random.default_rng(seed)
        blind = values[rng.choice(len(fitting), size=60, replace=False)].min()
        losses.append(found / values.min() - 1)
        wins += found < blind
    assert wins == 4
    assert np.median(losses) < 0.02
    assert max(losses) < 0.10


def test_a_small_space_is_searched_to_its_end_without_repeats(tmp_path):
    problem, truth = toy_problem(toy_space((), 2, alone=3), share=0.7)
    everything = every_choice(problem.space)
    fitting = {tuple(row.tolist()) for row in everything[problem.fits_each(everything)]}
    trials = len(fitting) // 2
    seen, _, _ = searched(problem, truth, tmp_path, trials=trials)
    assert len(set(seen)) == trials
    assert set(seen) <= fitting


def test_works_in_a_plain_optuna_study(middling):
    problem, truth = middling
    study = optuna.create_study(sampler=BudgetSampler(problem, seed=3))

    def objective(trial):
        names = zip(problem.space.names, problem.space.sizes, strict=True)
        choice = tuple(trial.suggest_int(name, 0, size - 1) for name, size in names)
        assert problem.fits(choice)
        return divergence(problem, truth, choice)

    study.optimize(objective, n_trials=15)
    assert study.best_value <= study.trials[0].value
    assert study.trials[0].user_attrs["origin"] == "prior:prior0"


def test_nothing_fits_is_said_at_once(tmp_path):
    problem, _ = toy_problem(toy_space((), 3, alone=3), share=0.05)
    record = open_study(tmp_path / "a.journal", problem, sampler=BudgetSampler(problem))
    with pytest.raises(BudgetError, match="no choice of this space fits"):
        record.ask()


def test_names_of_samplers():
    problem, _ = toy_problem(toy_space((), 2))
    with pytest.raises(ConfigError, match="did you mean 'budget'"):
        sampler_by_name("budgett", problem)


def test_swaps_are_neighbours_that_fit(middling):
    problem, truth = middling
    rng = np.random.default_rng(0)
    start = next(iter(prior_starts(problem).values()))
    tables = Tables(problem)
    swapped = [swap(problem, start, harm=truth, tables=tables, rng=rng) for _ in range(60)]
    found = [choice for choice in swapped if choice is not None]
    assert len(found) > 40
    assert all(problem.fits(choice) and problem.space.normal(choice) == choice for choice in found)
    assert len(set(found)) > 20


def test_perturbed_harm_keeps_whole_units_harmless(middling):
    problem, truth = middling
    before = truth.copy()
    harm, weights = perturb(problem, truth, np.zeros(len(truth)), step=1.0, rng=np.random.default_rng(0))
    assert np.all(harm[:, 0] == 0)
    assert np.all(harm >= 0)
    assert weights.any()
    assert np.array_equal(truth, before)


def test_harm_model_learns_the_units_that_the_prior_is_wrong_about(middling):
    problem, truth = middling
    rng = np.random.default_rng(0)
    choices = problem.structure.normal(rng.integers(0, problem.structure.sizes, size=(150, len(truth))))
    wrong = truth * np.exp(rng.normal(size=(len(truth), 1)))
    values = features(problem, [truth], choices)[:, 1 : 1 + len(truth)].sum(axis=1)
    few = fit_harm_model(problem, [wrong], choices[:10], values=values[:10])
    many = fit_harm_model(problem, [wrong], choices, values=values)
    unseen = problem.structure.normal(rng.integers(0, problem.structure.sizes, size=(100, len(truth))))
    right = features(problem, [truth], unseen)[:, 1 : 1 + len(truth)].sum(axis=1)

    def error(model):
        return float(np.abs(model.predict(unseen) - right).mean() / right.mean())

    assert error(many) < 0.5 * error(few)
    sampled = np.array([many.sample(rng) for _ in range(20)])
    assert np.all(sampled >= 0)
    assert np.all(sampled[:, :, 0] == 0)
    assert sampled.std(axis=0).mean() < np.array([few.sample(rng) for _ in range(20)]).std(axis=0).mean()


def test_without_priors_the_search_starts_from_widths(tmp_path):
    problem, truth = toy_problem(toy_space((2, 1), 4), priors=0)
    seen, origins, results = searched(problem, truth, tmp_path, trials=20)
    assert origins[0] == "prior:width"
    assert all(problem.fits(choice) for choice in seen)
    assert results[0].number > 0
