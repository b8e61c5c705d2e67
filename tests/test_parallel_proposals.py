"""Trials side by side: workers on a simulated clock, told in order of completion."""

from __future__ import annotations

import heapq

import numpy as np
import optuna
import pytest
from search_problems import divergence, toy_problem, toy_space

from autoprune.searching import owners
from autoprune.searching.history import BEFORE, STEP_FIRST, History
from autoprune.searching.sampler import BudgetSampler, prior_starts
from autoprune.searching.samplers import sampler_by_name
from autoprune.searching.study import open_study

SEEDS = 5
TRIALS = 100


@pytest.fixture(scope="module")
def middling():
    return toy_problem(toy_space((2, 2, 1), 5, methods=("l2", "obs")), seed=4, coupling=0.6)


def opened(problem, folder, *, name="budget", seed=0):
    path = folder / f"{name}{seed}.journal"
    return open_study(path, problem, sampler=sampler_by_name(name, problem, seed=seed))


def searched(problem, truth, folder, *, trials, workers, seed=0, name="budget"):
    """The values of `trials` trials in order of completion; asserts that what runs at a time differs and fits."""
    record = opened(problem, folder, name=name, seed=seed)
    durations = np.exp(0.5 * np.random.default_rng(seed).standard_normal(trials))
    running, values, clock = [], [], 0.0
    for number in range(trials + workers):
        if number >= workers and running:
            clock, _, done = heapq.heappop(running)
            values.append(divergence(problem, truth, done.choice))
            record.tell(done, values[-1])
        if number < trials:
            asked = record.ask()
            if name == "budget":
                assert asked.fits
                assert asked.choice not in {other.choice for _, _, other in running}
            heapq.heappush(running, (clock + durations[number], number, asked))
    assert len(values) == trials
    return record, values


def test_many_at_once_are_all_different_fit_and_priors_come_first(middling, tmp_path):
    problem, truth = middling
    record, _ = searched(problem, truth, tmp_path, trials=100, workers=32)
    choices = [record.choice_of(trial) for trial in record.trials()]
    assert choices[:2] == list(prior_starts(problem).values())
    assert len(set(choices)) == 100


def test_before_anything_is_known_weights_move_farther_than_one_by_one(middling, tmp_path):
    problem, truth = middling
    beside = opened(problem, tmp_path, seed=1)
    for _ in range(32):
        beside.ask()
    alone, _ = searched(problem, truth, tmp_path, trials=8, workers=1, seed=2)

    def moved(record):
        found = [trial.system_attrs.get("autoprune:weights", []) for trial in record.trials()]
        return np.std([weight / 100 for weights in found for weight in weights if weight])

    assert moved(beside) > 2 * STEP_FIRST > moved(alone)


def test_as_good_side_by_side_as_one_by_one(tmp_path):
    """Within what the seed alone does to one worker; `benchmarks/parallel_quality.py` asks more problems and seeds."""
    problem, truth = toy_problem(toy_space((2,) * 12, 8, methods=("l2", "obs")), seed=7, coupling=0.6)
    best = {}
    for workers in (1, 8, 32):
        folder = tmp_path / str(workers)
        folder.mkdir()
        runs = [searched(problem, truth, folder, trials=TRIALS, workers=workers, seed=seed) for seed in range(SEEDS)]
        best[workers] = np.array([min(values) for _, values in runs])
    low, high = best[1].min(), best[1].max()
    for workers in (8, 32):
        assert np.median(best[workers]) <= high
        assert best[workers].mean() - best[1].mean() < 0.5 * (high - low)


def test_trials_that_a_dead_process_was_running_are_given_up_and_the_search_goes_on(middling, tmp_path, monkeypatch):
    problem, truth = middling
    record = opened(problem, tmp_path)
    first = [record.ask() for _ in range(12)]
    for asked in first[:5]:
        record.tell(asked, divergence(problem, truth, asked.choice))
    with monkeypatch.context() as patched:
        patched.setattr(owners.Watch, "alive", lambda self, owner: False)
        resumed = opened(problem, tmp_path)
        resumed.release_dead()
    assert all(trial.state.is_finished() for trial in resumed.trials())
    seen = [asked.choice for asked in first[:5]]
    for _ in range(30):
        asked = resumed.ask()
        assert asked.choice not in seen
        seen.append(asked.choice)
        resumed.tell(asked, divergence(problem, truth, asked.choice))
    assert len(resumed.trials()) == 42


def test_what_trials_teach_depends_on_when_they_ended_not_on_when_it_is_read(middling, tmp_path):
    problem, truth = middling
    record = opened(problem, tmp_path)
    read_often = History(problem)
    rng = np.random.default_rng(0)
    running = []
    for _ in range(40):
        while len(running) < 6:
            running.append(record.ask())
        done = running.pop(int(rng.integers(6)))
        record.tell(done, divergence(problem, truth, done.choice))
        read_often.read(record.trials())
    read_once = History(problem)
    read_once.read(record.trials())
    assert [seen.number for seen in read_often.results] != sorted(seen.number for seen in read_often.results)
    assert read_once.results == read_often.results
    assert (read_once.step, read_once.credits) == (read_often.step, read_often.credits)
    assert read_once.running == read_often.running == {asked.number: asked.choice for asked in running}


def test_an_interrupted_trial_is_held_no_longer_and_may_be_proposed_again(middling, tmp_path):
    problem, _ = middling
    record = opened(problem, tmp_path)
    history = History(problem)
    asked = record.ask()
    history.read(record.trials())
    assert history.known(asked.choice)
    record.tell(asked, None, state="fail", reason="interrupted")
    history.read(record.trials())
    assert not history.known(asked.choice)
    assert not history.running
    assert record.ask().choice == asked.choice


def test_a_move_is_judged_by_the_best_known_when_it_was_proposed(middling, tmp_path):
    problem, _ = middling
    record = opened(problem, tmp_path)
    first, *blind = [record.ask() for _ in range(6)]
    record.tell(first, 1.0)
    informed = [record.ask() for _ in range(4)]
    history = History(problem)
    for asked in blind:
        record.tell(asked, 0.9)  # better than the first, which nobody knew: no lesson
    history.read(record.trials())
    assert not history.credits
    assert history.step == STEP_FIRST
    for asked in informed:
        record.tell(asked, 0.95)  # worse than the best now, better than the best then
    history.read(record.trials())
    assert sum(credit.wins for credit in history.credits.values()) == sum(c.tries for c in history.credits.values())
    assert history.step > STEP_FIRST
    trials = record.trials()
    assert [BEFORE in trial.system_attrs for trial in trials] == [False] + 9 * [True]
    assert [trial.system_attrs[BEFORE] for trial in trials[1:]] == 5 * [None] + 4 * [1.0]


def test_alone_nothing_is_recorded_of_others(middling, tmp_path):
    problem, truth = middling
    record, _ = searched(problem, truth, tmp_path, trials=12, workers=1)
    assert not any(BEFORE in trial.system_attrs for trial in record.trials())


def test_a_promising_trial_that_still_runs_is_built_upon(middling, tmp_path):
    problem, truth = middling
    record, _ = searched(problem, truth, tmp_path, trials=40, workers=1)
    running = [record.ask().number for _ in range(32)]
    parents = {trial.user_attrs.get("parent") for trial in record.trials()[40:]}
    assert parents & set(running)
    assert parents - set(running) - {None}


def test_tpe_lies_about_running_trials_and_alone_it_makes_no_difference(middling, tmp_path):
    problem, truth = middling
    assert sampler_by_name("tpe", problem)._constant_liar
    proposed = []
    for lies in (True, False):
        sampler = optuna.samplers.TPESampler(multivariate=True, seed=0, constant_liar=lies)
        record = open_study(tmp_path / f"{lies}.journal", problem, sampler=sampler)
        for _ in range(25):
            asked = record.ask()
            record.tell(asked, divergence(problem, truth, asked.choice))
        proposed.append([record.choice_of(trial) for trial in record.trials()])
    assert proposed[0] == proposed[1]


def test_studies_of_plain_optuna_with_threads(middling):
    problem, truth = middling
    study = optuna.create_study(sampler=BudgetSampler(problem, seed=3))

    def objective(trial):
        names = zip(problem.space.names, problem.space.sizes, strict=True)
        return divergence(problem, truth, tuple(trial.suggest_int(name, 0, size - 1) for name, size in names))

    study.optimize(objective, n_trials=24, n_jobs=4)
    assert len(study.trials) == 24
    assert study.best_value <= divergence(problem, truth, prior_starts(problem)["prior:prior0"])
