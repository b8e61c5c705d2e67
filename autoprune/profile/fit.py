"""Fits latency shares of whole models by non-negative coefficients on layer features, one set for each layer shape.

Knows numbers alone: widths of models and their measured latency over the dense model's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from autoprune.profile.features import FEATURES
from autoprune.profile.widths import Array, Widths

BLOCKS = (1, 4, 8, 16, 32)
RIDGE = 1e-3
"""Weight of the coefficients' squares against one model's squared relative error; columns are scaled to 1."""
DENSE_WEIGHT = 10.0
_FOLDS = 5

Shape = tuple[str, str]  # (signature, feature)


@dataclass(frozen=True, slots=True, eq=False)
class Design:
    """What the fit sees at one block size: one column a (signature, feature) that varies, relative to the dense model.

    `rows` is (P, C) and `dense` (C,): each layer adds its feature over its own dense feature, so a coefficient is the
    share of the dense latency that one full layer of that shape takes by that feature.
    """

    block: int
    columns: tuple[Shape, ...]
    rows: Array
    dense: Array


@dataclass(frozen=True, slots=True)
class Fit:
    """Latency share = `base` + sum of coefficients times features. The dense model's share is 1 exactly."""

    block: int
    base: float
    coefficients: Mapping[Shape, float]


def design(widths: Widths, dense: Widths, signatures: Sequence[str | None], block: int) -> Design:
    """The design of P models over L layers; a signature None leaves a layer out. `dense` holds the one dense model."""
    names = sorted({name for name in signatures if name is not None})
    columns, rows, fulls = [], [], []
    for feature, function in FEATURES.items():
        full = function(dense.inputs, dense.outputs, block)  # (1, L)
        unit = np.maximum(full, 1.0)
        relative = widths.present * function(widths.inputs, widths.outputs, block) / unit  # (P, L)
        for name in names:
            layers = np.flatnonzero([signature == name for signature in signatures])
            column = relative[:, layers].sum(axis=1)
            whole = float((full / unit)[0, layers].sum())
            if not np.allclose(column, whole):
                columns.append((name, feature))
                rows.append(column)
                fulls.append(whole)
    return Design(block, tuple(columns), np.reshape(rows, (len(columns), -1)).T, np.asarray(fulls))


def fit(designs: Sequence[Design], shares: Array, *, seed: int = 0) -> Fit:
    """The best fit to measured `shares` (P,): block size by cross-validation over the models, then all models."""
    best = min(designs, key=lambda candidate: _validation_error(candidate, shares, seed))
    solution = _solve(best.rows, shares, best.dense)
    return Fit(best.block, float(solution[0]), dict(zip(best.columns, solution[1:].tolist(), strict=True)))


def _solve(rows: Array, shares: Array, dense: Array) -> Array:
    """(1 + C,) base and coefficients >= 0 with least squared relative error, scaled so that the dense model is 1."""
    models = np.vstack([rows, dense])  # (P + 1, C)
    weights = np.concatenate([1.0 / shares, [DENSE_WEIGHT]])
    columns = np.column_stack([np.ones(len(models)), models])  # (P + 1, 1 + C)
    scales = columns.max(axis=0)
    matrix = columns / scales * weights[:, None]
    ridge = np.sqrt(RIDGE) * np.eye(len(scales))
    target = np.concatenate([np.ones(len(shares)), [DENSE_WEIGHT], np.zeros(len(scales))])
    scaled: NDArray[np.float64] = nnls(np.vstack([matrix, ridge]), target)[0]
    solution: Array = scaled / scales
    return solution / float(columns[-1] @ solution)


def _validation_error(design: Design, shares: Array, seed: int) -> float:
    folds = np.random.default_rng(seed).permutation(len(shares)) % _FOLDS
    errors = []
    for fold in range(_FOLDS):
        held = folds == fold
        if held.all() or not held.any():
            continue
        solution = _solve(design.rows[~held], shares[~held], design.dense)
        predicted = solution[0] + design.rows[held] @ solution[1:]
        errors.extend(np.abs(predicted / shares[held] - 1.0).tolist())
    return float(np.mean(errors)) if errors else 0.0
