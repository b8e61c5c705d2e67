"""Samplers by name: our own, and Optuna's on the same space under the same named constraints."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping

from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler

from autoprune.errors import ConfigError, near_miss
from autoprune.searching.problem import Problem
from autoprune.searching.sampler import BudgetSampler

_POPULATION = 20


def sampler_by_name(name: str, problem: Problem, *, seed: int = 0) -> BaseSampler:
    """The sampler called `name`. Raises ConfigError for an unknown name or a missing package, saying what to do."""
    check_sampler(name)
    return SAMPLERS[name](problem, seed)


def check_sampler(name: str) -> None:
    """Raises ConfigError where there is no sampler of that name, or its package is missing."""
    if name not in SAMPLERS:
        raise ConfigError(f"sampler: there is no {name!r}; {near_miss(name, SAMPLERS)}")
    if name == "cmaes" and importlib.util.find_spec("cmaes") is None:
        raise ConfigError("sampler: 'cmaes' needs the package cmaes; pip install 'autoprune[samplers]', or choose tpe")


def _budget(problem: Problem, seed: int) -> BaseSampler:
    return BudgetSampler(problem, seed=seed)


def _tpe(problem: Problem, seed: int) -> BaseSampler:  # noqa: ARG001
    return TPESampler(multivariate=True, seed=seed, constant_liar=True)  # of use to trials side by side alone


def _cmaes(problem: Problem, seed: int) -> BaseSampler:  # noqa: ARG001
    return CmaEsSampler(seed=seed, warn_independent_sampling=False)


def _nsga2(problem: Problem, seed: int) -> BaseSampler:  # noqa: ARG001
    return NSGAIISampler(seed=seed, population_size=_POPULATION)


def _gp(problem: Problem, seed: int) -> BaseSampler:  # noqa: ARG001
    return GPSampler(seed=seed)


def _random(problem: Problem, seed: int) -> BaseSampler:  # noqa: ARG001
    return RandomSampler(seed=seed)


SAMPLERS: Mapping[str, Callable[[Problem, int], BaseSampler]] = {
    "budget": _budget,
    "tpe": _tpe,
    "cmaes": _cmaes,
    "nsga2": _nsga2,
    "gp": _gp,
    "random": _random,
}
