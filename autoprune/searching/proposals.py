"""Ways to propose a choice that fits: perturb the harm and solve, or swap options of a choice that is known.

Pure functions of their arguments and a numpy generator.
"""

from __future__ import annotations

import numpy as np

from autoprune.core.space import Choice
from autoprune.searching.fit import Tables, fill, repair
from autoprune.searching.problem import Bools, Floats, Ints, Problem, as_choice

_METHOD_SHARE = 0.4
"""How much a method's taste at a unit varies, beside the unit's own weight."""

_LEVELS = 2
"""A swap moves a unit at most this many widths."""

_BLOCK_SHARE = 0.3
"""How often a block changes, beside a unit of channels: a block is a large step."""

_NEAR = 3.0
"""A method comes in question for a swap up to this many times the harm of the best one at that width."""


def perturb(
    problem: Problem, harm: Floats, weights: Floats, *, step: float, rng: np.random.Generator
) -> tuple[Floats, Floats]:
    """Harm seen through changed weights, and these weights: `h[u][o] * exp(w[u]) * exp(v[u][method of o])`.

    `harm` is (units, options), `weights` (units,) are w so far. A random part of the units moves by `step` times a
    normal number, as in the local search of SPDY (arXiv:2201.13096, section 4); v is drawn anew each time.
    """
    units = len(weights)
    share = rng.choice([0.1, 0.3, 1.0])
    moved = rng.random(units) < max(share, 1.5 / units)
    new = np.clip(weights + step * moved * rng.standard_normal(units), -4.0, 4.0)
    taste = _METHOD_SHARE * step * rng.standard_normal((units, len(problem.structure.method_names)))
    each = np.take_along_axis(taste, np.maximum(problem.structure.methods, 0), axis=1)
    return harm * np.exp(new[:, None] + each), new


def swap(
    problem: Problem,
    choice: Choice,
    *,
    harm: Floats,
    tables: Tables,
    rng: np.random.Generator,
    size: int = 0,
    noise: float = 0.3,
) -> Choice | None:
    """A neighbour of a fitting `choice` that fits too, or None when this change cannot be paid for.

    One to three units (or `size`) change: some widths up or down, another method, a block dropped or put back. The
    others then pay for it, or share what it saved: the level switch of EvoPress (arXiv:2410.14649), with prices by
    `harm` (units, options) times random factors of spread `noise`.
    """
    row = np.asarray(choice, dtype=np.int64)
    alive = np.flatnonzero(~problem.structure.moot(row[None])[0] & (problem.structure.sizes > 1))
    if not len(alive):
        return None
    count = min(size or int(rng.choice([1, 2, 3], p=[0.6, 0.25, 0.15])), len(alive))
    often = np.where(problem.structure.drop_index[alive] >= 0, _BLOCK_SHARE, 1.0)
    changed = rng.choice(alive, size=count, replace=False, p=often / often.sum())
    for unit in changed:
        row[unit] = _other_option(problem, int(unit), int(row[unit]), harm=harm, rng=rng)
    row = problem.structure.normal(row[None])[0]
    frozen: Bools = np.zeros(len(row), dtype=np.bool_)
    frozen[changed] = True
    factors = np.exp(noise * rng.standard_normal(harm.shape))
    priced = harm * np.exp(noise * rng.standard_normal((len(row), 1)))
    fitting = repair(problem, priced, as_choice(row), tables=tables, anchor=choice, frozen=frozen, noise=factors)
    if fitting is None:
        return None
    return fill(problem, priced, fitting, tables=tables, anchor=choice, frozen=frozen)


def _other_option(problem: Problem, unit: int, option: int, *, harm: Floats, rng: np.random.Generator) -> int:
    structure = problem.structure
    size = int(structure.sizes[unit])
    if problem.space.units[unit].kind == "weights":  # patterns and bits have no width in common: by harm
        ranked = np.argsort(harm[unit, :size], kind="stable")
        return int(ranked[_step_from(int(np.flatnonzero(ranked == option)[0]), size, rng)])
    keeps: Ints = structure.keeps[unit, :size]
    same = np.flatnonzero((keeps == keeps[option]) & (np.arange(size) != option))
    widths = np.unique(keeps)
    same = same[harm[unit, same] <= _NEAR * harm[unit, option]]
    if len(same) and (len(widths) == 1 or rng.random() < 0.25):
        return int(rng.choice(same))
    position = int(np.searchsorted(widths, keeps[option]))
    target = _step_from(position, len(widths), rng)
    there = np.flatnonzero(keeps == widths[target])
    if rng.random() < 0.25:
        near = there[harm[unit, there] <= _NEAR * harm[unit, there].min()]
        return int(rng.choice(near))
    return int(there[harm[unit, there].argmin()])


def _step_from(position: int, count: int, rng: np.random.Generator) -> int:
    """Another place among `count` (two or more), at most a few steps away."""
    target = int(np.clip(position + rng.choice([-1, 1]) * rng.integers(1, _LEVELS + 1), 0, count - 1))
    if target != position:
        return target
    return position + 1 if position == 0 else position - 1
