"""Measures a latency table: draws whole models, times them beside the dense one, fits, and checks on others.

Timing one changed layer at a time and adding up is far off on whole models (layout conversions, fusion, noise). So
random whole models are timed, and one set of coefficients for each shape of layer is fitted to all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from autoprune.core.architecture import Architecture, LayerKind
from autoprune.core.cost import LatencyTable, SignatureCost, TableCheck, TimedModel
from autoprune.core.space import Choice, Space
from autoprune.core.target import Target
from autoprune.profile.clock import beside_the_dense, interleave
from autoprune.profile.cost_model import CostModel
from autoprune.profile.draw import draw
from autoprune.profile.fit import BLOCKS, INTEGER_BLOCKS, Fit, design, fit
from autoprune.profile.seams import Seams
from autoprune.profile.widths import FORMS, Array, Choices, WidthMap
from autoprune.progress import Progress
from autoprune.runtimes.base import Runtime, Session

MODELS = 32
"""Random whole models that a table is fitted to: 52 predict unseen ones hardly better (1.1 against 1.2 %)."""
WITH_FORMS = 1.75
"""So many times as many where layers have several forms, or kernels of several sizes: there is more to tell apart."""
CHUNK = 5
"""Models timed together beside the dense one."""
_ROUNDS = 20
_SECONDS_A_CHUNK, _SECONDS = 2.0, 10.0
"""Timing at most, of a chunk and of all: a slow model is timed less often."""
_NEAR = 2.0
"""How much the error of a model near a budget counts, to one that was drawn."""
_FUSED: tuple[LayerKind, ...] = ("norm", "other")  # part of their neighbours' time


@dataclass(frozen=True, slots=True)
class Bench:
    """Where a choice becomes a time: `build` cuts a model (weights do not matter), `runtime` runs it on `target`."""

    build: Callable[[Choice], nn.Module]
    runtime: Runtime
    target: Target
    example: Tensor
    now: Callable[[], float] = time.perf_counter


@dataclass(frozen=True, slots=True, eq=False)
class _Measured:
    shares: Array  # (P,) latency over the dense model's
    dense_s: float


def measure_table(
    space: Space,
    architecture: Architecture,
    *,
    bench: Bench,
    key: str,
    seed: int,
    progress: Progress,
    models: int = MODELS,
    check: int = 20,
) -> LatencyTable:
    """The latency table of `space` on the bench's target, fitted to `models` random ones and checked on `check` others.

    Tells `progress` the phase `profile` and one step a model. `key` is kept in the table. In a space with few choices
    fewer models are used, a quarter of them for the check. Raises TargetError when a model cannot be run.
    """
    widths = WidthMap.of(architecture, space)
    decided = any(layer.when for layer in architecture.layers)
    fitted, checked = _draw(space, round(WITH_FORMS * models) if decided else models, check, seed)
    measured = _measure([*fitted, *checked], space.dense, bench, progress, seed)
    timed = _timed(fitted, measured.shares[: len(fitted)], widths)
    none = TableCheck(models=0, median_error=0, worst_error=0)
    unchecked = _table(_fitted(timed, space, architecture, seed), timed, key, measured.dense_s, none)
    result = _check(CostModel(architecture, space, unchecked), checked, measured.shares[len(fitted) :])
    return unchecked.model_copy(update={"check": result})


def _draw(space: Space, count: int, check: int, seed: int) -> tuple[list[Choice], list[Choice]]:
    """Choices to fit and other choices to check. Small spaces give what they have, a quarter of it for the check."""
    fitted = draw(space, count, np.random.default_rng([seed, 0]))
    others = draw(space, count + check, np.random.default_rng([seed, 1]))
    checked = [choice for choice in others if choice not in set(fitted)][:check]
    moved = max(0, min(check, (len(fitted) + len(checked)) // 4) - len(checked))
    split = len(fitted) - moved
    return [*_corners(space), *fitted[:split]], [*checked, *fitted[split:]]


def _corners(space: Space) -> list[Choice]:
    """The dense widths with every layer in integers that may be: where a search for latency begins, and far from what
    is drawn. Without it ResNet-56 in integers was predicted 17 % too slow, with it 1.3 % off.
    """
    forms = [[option.form for option in entry.options] for entry in space.entries]
    choice = tuple(row.index("integer") if "integer" in row else 0 for row in forms)
    return [choice] if any(choice) else []


def refitted(
    table: LatencyTable, space: Space, architecture: Architecture, near: Sequence[tuple[Choice, float]], *, seed: int
) -> LatencyTable:
    """The table fitted again with models that were timed near a budget, (choice, share of the dense latency), which
    count more than those that were drawn. Its check stays what it was; what it had learnt as one factor is dropped.
    """
    choices, shares = [choice for choice, _ in near], np.asarray([share for _, share in near])
    more = _timed(choices, shares, WidthMap.of(architecture, space), near=True)
    timed = (*table.timed, *more)
    found = _table(_fitted(timed, space, architecture, seed), timed, table.key, table.dense_s, table.check)
    return found.model_copy(update={"where": table.where})


def _timed(choices: Sequence[Choice], shares: Array, widths: WidthMap, *, near: bool = False) -> tuple[TimedModel, ...]:
    rows = widths.normal(_stack(choices)) if choices else np.zeros((0, len(widths.keeps)), dtype=np.int64)
    units = np.arange(len(widths.keeps))
    return tuple(
        TimedModel(
            keeps=tuple(int(keep) for keep in widths.keeps[units, row]),
            forms=tuple(FORMS[form] for form in widths.forms[units, row]), share=float(share), near=near,
        )
        for row, share in zip(rows, shares, strict=True)
    )  # fmt: skip


def _fitted(timed: Sequence[TimedModel], space: Space, architecture: Architecture, seed: int) -> Fit:
    if not timed:
        return Fit(block=1, base=1.0, coefficients={})
    widths = WidthMap.of(architecture, space)
    layers = [None if layer.kind in _FUSED else layer for layer in architecture.layers]
    kept = np.asarray([one.keeps for one in timed], dtype=np.float64)
    forms = np.asarray([[FORMS.index(form) for form in one.forms] for one in timed], dtype=np.intp)
    rows, dense = widths.of_kept(kept, forms), widths.at(_stack([space.dense]))
    seams = Seams.of(architecture).count(rows)
    integer = any(layer.form == "integer" for layer in architecture.layers)
    designs = [
        design(rows, dense, layers, block, integer_block=of_integers, seams=seams)
        for block in BLOCKS
        for of_integers in (INTEGER_BLOCKS if integer else (1,))
    ]
    trust = np.asarray([_NEAR if one.near else 1.0 for one in timed])
    return fit(designs, np.asarray([one.share for one in timed]), seed=seed, weights=trust)


def _measure(choices: Sequence[Choice], dense: Choice, bench: Bench, progress: Progress, seed: int) -> _Measured:
    """Time `choices` in chunks, the dense model in each. Only one chunk of models is in memory at a time."""
    progress.phase("profile", len(choices))
    reference = _load(dense, bench)
    shares: list[float] = []
    dense_s: list[float] = []
    together = beside_the_dense(_bytes(bench.build(dense)), CHUNK)
    starts = range(0, max(len(choices), 1), together)
    each = min(_SECONDS_A_CHUNK, _SECONDS / len(starts))
    for start in starts:
        chunk = choices[start : start + together]
        sessions = [reference, *(_load(choice, bench) for choice in chunk)]
        first, *others = interleave(sessions, rounds=_ROUNDS, seconds_budget=each, seed=seed + start, now=bench.now)
        dense_s.append(first.median)
        shares.extend(timing.ratio for timing in others)
        progress.step(len(chunk))
    return _Measured(np.asarray(shares), float(np.median(dense_s)))


def _bytes(model: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def _load(choice: Choice, bench: Bench) -> Session:
    return bench.runtime.load(bench.build(choice), bench.example, bench.target)


def _table(
    found: Fit, timed: tuple[TimedModel, ...], key: str, dense_s: float, check: TableCheck
) -> LatencyTable:  # fmt: skip
    prices: dict[str, dict[str, float]] = {}
    for (signature, feature), coefficient in found.coefficients.items():
        if coefficient > 0:
            prices.setdefault(signature, {})[feature] = coefficient
    return LatencyTable(
        key=key,
        dense_s=dense_s,
        base=found.base,
        channel_block=found.block,
        integer_block=found.integer_block,
        signatures=tuple(SignatureCost(signature=name, coefficients=prices[name]) for name in sorted(prices)),
        fitted_models=len(timed),
        check=check,
        seam=found.seam,
        timed=timed,
    )


def _check(model: CostModel, choices: Sequence[Choice], shares: Array) -> TableCheck:
    if not choices:
        return TableCheck(models=0, median_error=0.0, worst_error=0.0)
    predicted = model.evaluate("latency", _stack(choices)) / model.dense["latency"]
    errors = np.abs(predicted / shares - 1.0)
    return TableCheck(models=len(choices), median_error=float(np.median(errors)), worst_error=float(errors.max()))


def _stack(choices: Sequence[Choice]) -> Choices:
    return np.asarray(choices, dtype=np.int64)
