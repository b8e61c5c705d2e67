"""Small problems that can be solved by trying every choice; shared by the search's tests."""

from __future__ import annotations

from itertools import product

import numpy as np
from numpy.typing import NDArray

from autoprune.core.budget import Metric
from autoprune.core.space import Choice, Space, UnitOptions
from autoprune.core.unit import DROP, Option, Unit
from autoprune.searching.problem import Problem, as_row


class ToyCosts:
    """Each unit costs its kept share times a weight; with `coupling`, also times the kept share of the unit before."""

    def __init__(self, space: Space, weights: dict[Metric, NDArray[np.float64]], coupling: float) -> None:
        self.space, self.weights, self.coupling = space, weights, coupling
        width = max(space.sizes)
        self.kept = np.ones((len(space.entries), width))
        for row, entry in enumerate(space.entries):
            self.kept[row, : len(entry.options)] = [option.keep / entry.unit.width for option in entry.options]
        self.parents = space.parents()
        self.drops = [entry.options.index(DROP) if DROP in entry.options else None for entry in space.entries]

    def evaluate(self, metric: Metric, choices: NDArray[np.int64]) -> NDArray[np.float64]:
        kept = self.kept[np.arange(choices.shape[1]), choices]
        absent = np.zeros(choices.shape, dtype=bool)
        for unit, parent in enumerate(self.parents):
            if parent is not None and self.drops[parent] is not None:
                absent[:, unit] = choices[:, parent] == self.drops[parent]
        kept = np.where(absent, 0.0, kept)
        before = np.concatenate([np.ones((len(kept), 1)), kept[:, :-1]], axis=1)
        return (kept * (1 - self.coupling + self.coupling * before) * self.weights[metric]).sum(axis=1)

    def linearise(self, metric: Metric, incumbent: Choice) -> list[NDArray[np.float64]]:
        base = self.evaluate(metric, as_row(incumbent))[0]
        differences = []
        for unit, size in enumerate(self.space.sizes):
            rows = np.repeat(as_row(incumbent), size, axis=0)
            rows[:, unit] = np.arange(size)
            differences.append(self.evaluate(metric, rows) - base)
        return differences

    def is_additive(self, metric: Metric) -> bool:
        return self.coupling == 0


def toy_space(children: tuple[int, ...], levels: int, alone: int = 1, methods: tuple[str, ...] = ("l2",)) -> Space:
    """`alone` channel units, then for each number a droppable block with so many channel units inside."""

    def channels(name: str, parent: str | None = None) -> UnitOptions:
        width = 4 * (levels + 1)
        narrowed = [Option(method, width - 4 * step) for step in range(1, levels + 1) for method in methods]
        return UnitOptions(Unit(name, "channels", width, (), parent), (Option("keep", width), *narrowed))

    entries = [channels(f"alone{index}") for index in range(alone)]
    for index, count in enumerate(children):
        block = f"block{index}"
        entries.append(UnitOptions(Unit(block, "block", 1, ()), (Option("keep", 1), DROP)))
        entries += [channels(f"{block}.conv{child}", block) for child in range(count)]
    return Space(tuple(entries))


def toy_problem(
    space: Space,
    *,
    seed: int = 0,
    share: float = 0.5,
    coupling: float = 0.0,
    metrics: tuple[Metric, ...] = ("macs",),
    priors: int = 2,
) -> tuple[Problem, NDArray[np.float64]]:
    """A problem with limits at `share` of the dense cost, and its true harm (units, options)."""
    rng = np.random.default_rng(seed)
    weights = {metric: rng.uniform(0.5, 2.0, len(space.entries)) for metric in metrics}
    for unit, entry in enumerate(space.entries):
        if entry.unit.kind == "block":
            for metric in metrics:
                weights[metric][unit] *= 0.2
    costs = ToyCosts(space, weights, coupling)
    truth = []
    for entry in space.entries:
        lost = np.array([1 - option.keep / entry.unit.width for option in entry.options])
        truth.append(lost**2 * np.exp(rng.normal()) * np.exp(0.2 * rng.normal(size=len(lost))) * (1 + lost))
    beliefs = {
        f"prior{index}": [row * np.exp(0.8 * rng.normal()) * np.exp(0.2 * rng.normal(size=len(row))) for row in truth]
        for index in range(priors)
    }
    dense = {metric: float(costs.evaluate(metric, as_row(space.dense))[0]) for metric in metrics}
    problem = Problem(space, costs, {metric: share * dense[metric] for metric in metrics}, beliefs)
    return problem, problem.structure.padded(truth, 0.0)


def every_choice(space: Space) -> NDArray[np.int64]:
    """(choices, units): all of them."""
    return np.array(list(product(*(range(size) for size in space.sizes))), dtype=np.int64)


def divergences(problem: Problem, truth: NDArray[np.float64], choices: NDArray[np.int64]) -> NDArray[np.float64]:
    """True harm with interactions: neighbours make each other worse, and the whole is not linear."""
    picked = truth[np.arange(choices.shape[1]), choices] * ~problem.structure.moot(choices)
    total = picked.sum(axis=1) + 0.7 * np.sqrt(picked[:, 1:] * picked[:, :-1]).sum(axis=1)
    return 0.05 * total**1.2


def divergence(problem: Problem, truth: NDArray[np.float64], choice: Choice) -> float:
    """The same for one choice."""
    return float(divergences(problem, truth, as_row(choice))[0])
