"""What a search must beat at the same budget: uniform pruning, and global magnitude pruning.

Both for channels, and for zeros inside layers where a space has them (all other units are kept then).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from autoprune.core.pattern import parse_pattern
from autoprune.core.space import Choice
from autoprune.core.unit import NARROWED, Compensate, Option
from autoprune.searching.problem import Floats, Ints, Problem, as_choice

_SLACK = 1e-9  # of rounding in a fraction times a width


def uniform(
    problem: Problem, *, method: str, compensate: Compensate = "none", integers: bool = False
) -> Choice | None:  # fmt: skip
    """The largest common kept fraction of all channel units that fits; blocks are kept.

    Each unit takes its widest option of this method at most that wide (its narrowest, when none is so narrow), or
    stays whole. With `integers` all layers that can compute in integers do. None when even the narrowest does not fit.
    """
    menu = _narrower(problem, method, compensate)
    fractions = np.unique(np.concatenate([[1.0], *(keeps / keeps[0] for keeps, _ in menu.values())]))[::-1]
    choices = np.array([_by_unit(problem, menu, _shares(menu, float(ratio))) for ratio in fractions])
    if integers:
        for unit, (_, indices) in _menu(problem, ("weights",), _is_dense_integer).items():
            choices[:, unit] = indices[0]
    return _first_that_fits(problem, choices)


def global_magnitude(
    problem: Problem, scores: Mapping[str, Sequence[float]], *, method: str = "l2", compensate: Compensate = "none"
) -> Choice | None:
    """One threshold for all channels: those whose score, over its unit's mean score, is above it stay.

    `scores` has one non-negative number a channel for each channel unit, by unit name; units without are kept. The
    lowest threshold that fits is found by bisection, taking costs to fall as it rises. Blocks are kept, and a unit
    takes its widest option of this method with at most the channels that stay. None when nothing fits.
    """
    menu = {
        unit: entry for unit, entry in _narrower(problem, method, compensate).items() if _name(problem, unit) in scores
    }
    normal = {unit: np.sort(_normalised(scores[_name(problem, unit)])) for unit in menu}
    levels = np.unique(np.concatenate([[-1.0], *normal.values()]))

    def at(position: int) -> Ints:
        staying = {unit: float((values > levels[position]).sum()) for unit, values in normal.items()}
        return _by_unit(problem, menu, staying)

    def fits(position: int) -> bool:
        return problem.fits(as_choice(at(position)))

    low, high = 0, len(levels) - 1
    if not fits(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return as_choice(at(high))


def uniform_sparsity(problem: Problem, *, method: str, bits: int) -> Choice | None:
    """The least common sparsity inside all layers that fits, by one sparsifier; None when nothing fits."""
    menu = _sparser(problem, method, bits)
    if not menu:
        return None
    patterns = {option.pattern for entry in problem.space.entries for option in entry.options if option.pattern}
    fractions = sorted({1.0, *(1 - parse_pattern(text).sparsity for text in patterns)}, reverse=True)
    rounding = 0.5
    shares = [{unit: ratio * float(keeps[0]) + rounding for unit, (keeps, _) in menu.items()} for ratio in fractions]
    choices = np.array([_by_unit(problem, menu, staying) for staying in shares])
    return _first_that_fits(problem, choices)


def uniform_ranks(problem: Problem) -> Choice | None:
    """All layers in two by the largest common share of their weights that fits; None when nothing fits."""
    menu = _menu(problem, ("weights",), lambda option: bool(option.rank) or option.method == "keep")
    shares = sorted({keep / keeps[0] for keeps, _ in menu.values() for keep in keeps}, reverse=True)
    if len(shares) < 2:
        return None
    return _first_that_fits(problem, np.array([_by_unit(problem, menu, _shares(menu, share)) for share in shares]))


def global_sparsity(
    problem: Problem, weights: Mapping[str, Floats], *, method: str = "magnitude", bits: int
) -> Choice | None:
    """One threshold on absolute values for the weights of all layers, the lowest that fits.

    `weights` holds the absolute values of each `weights` unit. A unit takes its densest option of this method with at
    most the weights that stay. None when nothing fits.
    """
    menu = {u: entry for u, entry in _sparser(problem, method, bits).items() if _name(problem, u) in weights}
    if not menu:
        return None
    ordered = {unit: np.sort(weights[_name(problem, unit)]) for unit in menu}
    levels = np.quantile(np.concatenate(list(ordered.values())), np.linspace(0, 1, _THRESHOLDS))

    def at(level: float) -> Ints:
        staying = {unit: float(len(v) - np.searchsorted(v, level, side="right")) for unit, v in ordered.items()}
        return _by_unit(problem, menu, staying)

    choices = np.array([at(level) for level in [-1.0, *levels.tolist()]])
    return _first_that_fits(problem, choices)


def _first_that_fits(problem: Problem, choices: Ints) -> Choice | None:
    fitting = np.flatnonzero(problem.fits_each(choices))
    return as_choice(choices[fitting[0]]) if len(fitting) else None


_THRESHOLDS = 1001
_Menu = dict[int, tuple[Ints, Ints]]
"""For a unit: (widths or weights kept, option indices), most first; the first is the unit left whole."""


def _menu(problem: Problem, kinds: Collection[str], allowed: Callable[[Option], bool]) -> _Menu:
    """Of each unit of these kinds the options that are `allowed`; units without any are left out."""
    menu: _Menu = {}
    for unit, entry in enumerate(problem.space.entries):
        if entry.unit.kind not in kinds:
            continue
        indices = [index for index, option in enumerate(entry.options) if allowed(option)]
        if indices:
            keeps = [entry.options[index].keep for index in indices]
            menu[unit] = (np.array(keeps, dtype=np.int64), np.array(indices, dtype=np.int64))
    return menu


def _is_dense_integer(option: Option) -> bool:
    return option.form == "integer" and not option.pattern


def _narrower(problem: Problem, method: str, compensate: Compensate) -> _Menu:
    """Widths by one method, the full one first."""

    def allowed(option: Option) -> bool:
        return option.method == "keep" or (option.method == method and option.compensate == compensate)

    return _menu(problem, NARROWED, allowed)


def _sparser(problem: Problem, method: str, bits: int) -> _Menu:
    """Options inside layers in `bits`: all weights, then fewer by `method`."""

    def allowed(option: Option) -> bool:
        return option.bits == bits and option.method in (method, "dense", "keep")

    return _menu(problem, ("weights",), allowed)


def _shares(menu: _Menu, ratio: float) -> dict[int, float]:
    return {unit: ratio * float(keeps[0]) for unit, (keeps, _) in menu.items()}


def _by_unit(problem: Problem, menu: _Menu, staying: Mapping[int, float]) -> Ints:
    """(units,): for each unit its widest option with at most `staying` channels, else its narrowest."""
    row = np.zeros(len(problem.space.entries), dtype=np.int64)
    for unit, (keeps, indices) in menu.items():
        narrow = np.flatnonzero(keeps <= staying[unit] + _SLACK)
        row[unit] = indices[narrow[0]] if len(narrow) else indices[-1]
    return row


def _normalised(scores: Sequence[float]) -> Floats:
    values = np.asarray(scores, dtype=np.float64)
    mean = float(values.mean())
    return values / mean if mean > 0 else values


def _name(problem: Problem, unit: int) -> str:
    return problem.space.names[unit]
