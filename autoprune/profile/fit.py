"""Fits latency shares of whole models by non-negative coefficients on layer features.

A feature's coefficient is one for all layers of a kind, in proportion to their work, plus a correction for each layer
shape that is held small: a few dozen models say little about every shape alone, and much about all together.
Knows numbers alone: widths of models and their measured latency over the dense model's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from autoprune.core.architecture import Layer
from autoprune.profile.features import FEATURES
from autoprune.profile.widths import Array, Widths

BLOCKS = (1, 4, 8, 16, 32)
INTEGER_BLOCKS = (4, 16, 64)
RIDGE = 1e-3
"""Weight of the squares of what is common, against one model's squared relative error; common columns are shares."""
OWN_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)
"""The same for each shape's own correction: one of these, by cross-validation."""
DENSE_WEIGHT = 10.0
_FOLDS = 5

Shape = tuple[str, str]  # (signature, feature)
SEAM: Shape = ("", "seam")
"""The column of what belongs to no layer."""


@dataclass(frozen=True, slots=True, eq=False)
class Design:
    """What the fit sees at one block size: one column a (kind or signature, feature) that varies.

    `rows` is (P, C) and `dense` (C,): the share of that work, of all layers' work of its extent, that each model does.
    `loads` are, for each (signature, feature), the share of one dense layer of that shape.
    """

    block: int
    integer_block: int
    columns: tuple[Shape, ...]
    rows: Array
    dense: Array
    own: NDArray[np.bool_]
    """(C,) which columns are one shape's own."""
    loads: Mapping[Shape, float]
    kinds: Mapping[str, str]
    """Signature -> kind of layer."""


@dataclass(frozen=True, slots=True)
class Fit:
    """Latency share = `base` + sum of coefficients times features, each relative to its dense extent.

    The dense model's share is 1 exactly.
    """

    block: int
    base: float
    coefficients: Mapping[Shape, float]
    integer_block: int = 1
    seam: float = 0.0
    """Share of each seam."""


def design(
    widths: Widths, dense: Widths, layers: Sequence[Layer | None], block: int, *, integer_block: int = 1,
    seams: Array | None = None,
) -> Design:  # fmt: skip
    """The design of P models over L layers; a layer None is left out. `dense` holds the one dense model, `seams` (P,)
    how many seams each model has. Layers in integers go by blocks of their own.
    """
    timed = [(index, layer) for index, layer in enumerate(layers) if layer is not None]
    places = [index for index, _ in timed]
    inputs, outputs, present = (values[:, places] for values in (widths.inputs, widths.outputs, widths.present))
    full_in, full_out = dense.inputs[:, places], dense.outputs[:, places]
    steps = steps_of([layer for _, layer in timed], block, integer_block)
    kinds = {layer.signature: _kind(layer) for _, layer in timed}
    common = [(kind, [_kind(layer) == kind for _, layer in timed]) for kind in sorted(set(kinds.values()))]
    shapes = [(name, [layer.signature == name for _, layer in timed]) for name in sorted(kinds)]
    columns, rows, fulls = [], [], []
    loads: dict[Shape, float] = {}
    for name, feature in FEATURES.items():
        work = np.asarray(
            [feature.load(layer, full_in[0, place], full_out[0, place]) for place, (_, layer) in enumerate(timed)]
        )
        work /= max(work.sum(), 1e-30)
        loads |= {(layer.signature, name): float(share) for (_, layer), share in zip(timed, work, strict=True)}
        scale = work / feature.full(full_in, full_out)  # (1, L)
        shares = present * feature.of(inputs, outputs, steps) * scale  # (P, L)
        whole = feature.of(full_in, full_out, steps) * scale * dense.present[:, places]
        for group, members in (*common, *shapes):
            column, total = shares[:, members].sum(axis=1), float(whole[0, members].sum())
            if not np.allclose(column, total):
                columns.append((group, name))
                rows.append(column)
                fulls.append(total)
    if seams is not None and seams.any():
        columns.append(SEAM)
        rows.append(seams / seams.max())
        fulls.append(0.0)
        loads[SEAM] = 1 / float(seams.max())
    matrix = np.reshape(rows, (len(columns), -1)).T
    own = np.asarray([group in kinds for group, _ in columns], dtype=np.bool_)
    return Design(block, integer_block, tuple(columns), matrix, np.asarray(fulls), own, loads, kinds)


def steps_of(layers: Sequence[Layer], block: int, integer_block: int) -> Array:
    """(L,) the block that each layer's kernels work on."""
    return np.asarray([integer_block if layer.form == "integer" else block for layer in layers], dtype=np.float64)


def _kind(layer: Layer) -> str:
    """What layers have kernels in common."""
    return f"{layer.kind} {layer.form}" if layer.form in ("integer", "2:4") else layer.kind


def fit(designs: Sequence[Design], shares: Array, *, seed: int = 0, weights: Array | None = None) -> Fit:
    """The best fit to measured `shares` (P,): block size and ridge by cross-validation over the models, then all.

    `weights` (P,): how much each model's relative error counts; alike when not given.
    """
    trust = np.ones(len(shares)) if weights is None else weights
    tried = [(design, ridge) for design in designs for ridge in OWN_RIDGES]
    best, ridge = min(tried, key=lambda one: _validation_error(one[0], one[1], shares, trust, seed))
    solution = _solve(best, ridge, best.rows, shares, trust)
    found = dict(zip(best.columns, solution[1:].tolist(), strict=True))
    coefficients = {}
    loads = dict(best.loads)
    seam = found.get(SEAM, 0.0) * loads.pop(SEAM, 0.0)
    for (signature, feature), load in loads.items():
        common, own = found.get((best.kinds[signature], feature), 0.0), found.get((signature, feature), 0.0)
        coefficients[signature, feature] = load * (common + own)
    return Fit(best.block, float(solution[0]), coefficients, best.integer_block, seam)


def _solve(design: Design, own_ridge: float, rows: Array, shares: Array, trust: Array) -> Array:
    """(1 + C,) base and coefficients >= 0 with least squared relative error, scaled so that the dense model is 1."""
    models = np.vstack([rows, design.dense])  # (P + 1, C)
    weights = np.concatenate([trust / shares, [DENSE_WEIGHT]])
    columns = np.column_stack([np.ones(len(models)), models])  # (P + 1, 1 + C)
    ridge = np.diag(np.sqrt(np.concatenate([[RIDGE], np.where(design.own, own_ridge, RIDGE)])))
    target = np.concatenate([trust, [DENSE_WEIGHT], np.zeros(len(ridge))])
    solution: NDArray[np.float64] = nnls(np.vstack([columns * weights[:, None], ridge]), target)[0]
    return solution / float(columns[-1] @ solution)


def _validation_error(design: Design, own_ridge: float, shares: Array, trust: Array, seed: int) -> float:
    folds = np.random.default_rng(seed).permutation(len(shares)) % _FOLDS
    errors = []
    for fold in range(_FOLDS):
        held = folds == fold
        if held.all() or not held.any():
            continue
        solution = _solve(design, own_ridge, design.rows[~held], shares[~held], trust[~held])
        predicted = solution[0] + design.rows[held] @ solution[1:]
        errors.extend((trust[held] * np.abs(predicted / shares[held] - 1.0)).tolist())
    return float(np.mean(errors)) if errors else 0.0
