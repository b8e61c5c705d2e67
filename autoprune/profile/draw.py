"""Draws whole-model choices that show a latency fit everything it must see. Pure; randomness comes in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from autoprune.core.space import Choice, Space, UnitOptions
from autoprune.core.unit import DROP

WIDEST_DROP_SHARE = 0.6
_ATTEMPTS = 4
_Kind = Literal["spread", "levelled"]


def draw(space: Space, count: int, rng: np.random.Generator) -> list[Choice]:
    """At most `count` distinct choices, none of them dense; fewer when the space is that small.

    Half spread every unit's widths evenly over the models (a Latin hypercube); half keep to one level a model, from
    very narrow to nearly dense. The share of blocks dropped varies from none to 0.6, and each block is dropped once.
    """
    found: dict[Choice, None] = {}
    for attempt in range(_ATTEMPTS):
        missing = count - len(found)
        if missing <= 0:
            break
        half = (missing + 1) // 2
        batch = [*_batch(space, half, rng, kind="spread"), *_batch(space, missing - half, rng, kind="levelled")]
        if attempt == 0:
            _drop_each_block_once(space, batch, rng)
        found |= dict.fromkeys(space.normal(tuple(choice)) for choice in batch)
        found.pop(space.dense, None)
    choices = list(found)
    return [choices[index] for index in rng.permutation(len(choices))]


def _batch(space: Space, count: int, rng: np.random.Generator, *, kind: _Kind) -> list[list[int]]:
    """Option indices (count, U). A block's last option is its drop, when it has one."""
    if count == 0:
        return []
    levels = _strata(count, rng)
    drop_shares = WIDEST_DROP_SHARE * _strata(count, rng) * (rng.random(count) < 0.75)
    shaped = _runs_of_forms(space, count, rng)
    columns = []
    for entry in space.entries:
        quantiles = _strata(count, rng)
        if entry.unit.kind == "block":
            last = len(entry.options) - 1
            columns.append((last * (quantiles < drop_shares)).tolist())
            continue
        if entry.unit.kind == "weights":
            columns.append(_forms(entry, shaped=next(shaped), rng=rng))
            continue
        if kind == "levelled":
            quantiles = rng.beta(0.5 + 5 * levels, 0.5 + 5 * (1 - levels))
        firsts = _first_of_each_width([option.keep for option in entry.options])
        places = np.minimum(len(firsts) * quantiles, len(firsts) - 1).astype(np.intp)
        columns.append([firsts[place] for place in places])
    return [list(row) for row in zip(*columns, strict=True)]


def _runs_of_forms(space: Space, count: int, rng: np.random.Generator) -> Iterator[NDArray[np.bool_]]:
    """For each `weights` unit in turn, (count,): whether it has another form. Neighbours are alike in some models and
    differ in others: each has its own share of such units, and its own chance to change from one unit to the next.
    """
    if not any(option.form != "float" for entry in space.entries for option in entry.options):
        while True:
            yield np.zeros(count, dtype=np.bool_)
    # A third have all such units, where searches for latency end, and some have none.
    shares = np.clip(1.7 * _strata(count, rng) - 0.2, 0.0, 1.0)
    restless = rng.choice([0.05, 0.2, 1.0], count)
    now = rng.random(count) < shares
    while True:
        yield now
        now = np.where(rng.random(count) < restless, rng.random(count) < shares, now)


def _forms(entry: UnitOptions, *, shaped: NDArray[np.bool_], rng: np.random.Generator) -> list[int]:
    """Option indices: where `shaped`, any that gives the layer another form. Zeros and stored integers cost no time."""
    others = [index for index, option in enumerate(entry.options) if option.form != "float"]
    if not others:
        return [0] * len(shaped)
    drawn = rng.choice(others, len(shaped))
    return [int(index) if changes else 0 for index, changes in zip(drawn, shaped, strict=True)]


def _drop_each_block_once(space: Space, batch: list[list[int]], rng: np.random.Generator) -> None:
    """Each alone, too: with the blocks around it kept."""
    parents = space.parents()
    for unit, entry in enumerate(space.entries):
        if DROP not in entry.options or not batch:
            continue
        drop = entry.options.index(DROP)
        if all(space.normal(tuple(choice))[unit] != drop for choice in batch):
            choice = batch[int(rng.integers(len(batch)))]
            choice[unit] = drop
            around = parents[unit]
            while around is not None:
                choice[around] = 0
                around = parents[around]


def _strata(count: int, rng: np.random.Generator) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """One number from each of `count` equal parts of [0, 1), shuffled."""
    return (rng.permutation(count) + rng.random(count)) / count


def _first_of_each_width(keeps: Sequence[int]) -> list[int]:
    """Index of the first option of every distinct width, narrowest first: methods do not change a latency."""
    return sorted({keep: keeps.index(keep) for keep in keeps}.values(), reverse=True)
