"""What the trials so far say about harm: Bayesian linear regression of divergence on the priors' harms.

The prior of the regression is the prior of the search: every unit's harm counts alike, on a scale fitted to the
divergences seen. Data then moves single units and whole methods away from it, as far as it is sure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.linalg import cholesky, solve_triangular

from autoprune.searching.problem import Floats, Ints, Problem

_UNIT_SPREAD = 0.35
"""How far, in shares of the common scale, one unit's weight may be from it before data say so."""

_OTHER_SPREAD = 0.15
_METHOD_SPREAD = 0.1
_FLOOR = 1e-3
_BLOCK = 16


@dataclass(frozen=True, slots=True, eq=False)
class HarmModel:
    """The posterior of the weights, normal. Made by `fit_harm_model`."""

    problem: Problem
    harms: tuple[Floats, ...]  # (units, options) each, the leading prior first
    mean: Floats  # (features,)
    factor: Floats  # (features, features), upper Cholesky factor of the posterior precision

    def expected(self) -> Floats:
        """Expected harm (units, options)."""
        return self._harm(self.mean)

    def sample(self, rng: np.random.Generator, *, temperature: float = 1.0) -> Floats:
        """Harm (units, options) under weights drawn from the posterior (Thompson sampling), spread by `temperature`."""
        drawn = solve_triangular(self.factor, rng.standard_normal(len(self.mean)), lower=False)
        return self._harm(self.mean + temperature * drawn)

    def predict(self, choices: Ints) -> Floats:
        """Expected divergence of (choices, units): (choices,)."""
        result: Floats = features(self.problem, self.harms, choices) @ self.mean
        return result

    def _harm(self, weights: Floats) -> Floats:
        """Never negative; a floor under each unit's weight keeps narrower from looking better than whole."""
        units = len(self.problem.structure.sizes)
        methods = len(self.problem.structure.method_names)
        leading = self.harms[0]
        floor = _FLOOR * abs(float(self.mean[1 : 1 + units].mean())) * leading
        total = weights[1 : 1 + units, None] * leading
        for position, other in enumerate(self.harms[1:], start=1):
            start = 1 + position * units
            total = total + weights[start : start + units, None] * other
        of_method = weights[len(weights) - methods :]
        total = total + of_method[np.maximum(self.problem.structure.methods, 0)] * leading
        result: Floats = np.maximum(total, floor)
        result[:, 0] = 0.0
        return result


def features(problem: Problem, harms: Sequence[Floats], choices: Ints) -> Floats:
    """(choices, features): 1, each prior's harm at every unit's option, the leading prior's harm by method."""
    structure = problem.structure
    rows = np.arange(choices.shape[1])
    active = ~structure.moot(choices)
    columns = [np.ones((len(choices), 1))]
    columns += [harm[rows, choices] * active for harm in harms]
    leading = columns[1]
    method = structure.methods[rows, choices]  # (choices, units)
    for index in range(len(structure.method_names)):
        columns.append((leading * (method == index)).sum(axis=1, keepdims=True))
    return np.concatenate(columns, axis=1)


def fit_harm_model(
    problem: Problem, harms: Sequence[Floats], choices: Ints, *, values: Floats, trust: Floats | None = None
) -> HarmModel:
    """Fit to `choices` (trials, units) and their divergences `values` (trials,), all finite.

    `harms` are one or two priors (units, options), the leading one first. `trust` (trials,) in (0, 1] is lower for a
    trial scored on few samples. Trials near the best count most: the search needs to be right there, and divergence
    is not linear over its whole range.
    """
    design = features(problem, harms, choices)
    units = len(problem.structure.sizes)
    lowest, middle = float(values.min()), float(np.median(values))
    spread = max(middle - lowest, 0.05 * abs(middle), 1e-12)
    counts = 1.0 / (1.0 + ((values - lowest) / (2 * spread)) ** 2)
    if trust is not None:
        counts = counts * trust
    center, width = _weights_before(design, values, counts, units=units, priors=len(harms))
    width[0] = max(abs(middle), 1e-12)
    residual = values - design @ center
    noise = max(float(np.average(residual**2, weights=counts)) * 0.05, (0.01 * abs(middle)) ** 2, 1e-24)
    gram = _gram(design * np.sqrt(counts)[:, None])
    pull = design.T @ (counts * residual)
    for _ in range(2):
        factor = cholesky(gram / noise + np.diag(1.0 / width**2), lower=False)
        half = solve_triangular(factor, pull / noise, trans="T", lower=False)
        mean = center + solve_triangular(factor, half, lower=False)
        left = values - design @ mean
        noise = max(float(np.average(left**2, weights=counts)), (0.005 * abs(middle)) ** 2, 1e-24)
    return HarmModel(problem, tuple(harms), mean, factor)


def _gram(rows: Floats) -> Floats:
    """`rows.T @ rows`, in blocks so small that BLAS starts no threads for them.

    Threads that wait for each other on a busy machine cost more than they save: 400 rows of 123 features took 24 ms
    at once and 0.9 ms in blocks, on two busy cores.
    """
    missing = -len(rows) % _BLOCK
    blocks = np.concatenate([rows, np.zeros((missing, rows.shape[1]))]).reshape(-1, _BLOCK, rows.shape[1])
    total: Floats = np.matmul(blocks.transpose(0, 2, 1).copy(), blocks).sum(axis=0)
    return total


def _weights_before(
    design: Floats, values: Floats, counts: Floats, *, units: int, priors: int
) -> tuple[Floats, Floats]:
    """Mean and standard deviation of every weight before the data: the leading prior times one scale."""
    center = np.zeros(design.shape[1])
    width = np.zeros(design.shape[1])
    level = float(np.average(values, weights=counts))
    scales = []
    for position in range(priors):
        total = float(
            np.average(design[:, 1 + position * units : 1 + (position + 1) * units].sum(axis=1), weights=counts)
        )
        scales.append(max(abs(level), 1e-12) / max(total, 1e-12))
    center[1 : 1 + units] = scales[0]
    width[1 : 1 + units] = _UNIT_SPREAD * scales[0]
    for position in range(1, priors):
        width[1 + position * units : 1 + (position + 1) * units] = _OTHER_SPREAD * scales[position]
    width[1 + priors * units :] = _METHOD_SPREAD * scales[0]
    return center, np.maximum(width, 1e-12)
