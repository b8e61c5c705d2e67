"""Peak resident memory of any choice: measures whole models in fresh processes, fits, and checks on others.

A process peaks while it loads (the file, its parsed copy and what the runtime makes of it, in proportion to weights) or
while it runs (weights, and the activations of the fullest step: ONNX Runtime keeps them about twice, because it finds
out in a first run how to lay them out in the second).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, final

import numpy as np
from scipy.optimize import nnls

from autoprune.core.architecture import Architecture
from autoprune.core.cost import TableCheck
from autoprune.core.memory_table import MemoryTable
from autoprune.core.space import Choice, Space
from autoprune.profile.cost_model import CostModel
from autoprune.profile.draw import draw
from autoprune.profile.latency import Bench
from autoprune.profile.live_map import LiveMap, SizedMaps
from autoprune.profile.widths import Array, Choices, WidthMap
from autoprune.progress import Progress
from autoprune.runtimes.resident import REPEATS, Resident, resident

BLOCKS = (1, 8, 16)
"""Channels that a runtime may compute together."""
_BELIEVED = 0.9
"""A larger block is believed when it leaves no more than this of the error of a smaller one."""
_PLANS_NOTHING = "torch"
_LIVE_HINT, _HINT_WEIGHT = 2.0, 0.1
"""What a byte of activations costs where all models that were measured have about the same."""


@final
class MemoryModel:
    """Peak resident bytes, above the runtime's own, of the choices of one space on one target. Immutable."""

    def __init__(
        self, live_map: LiveMap | SizedMaps, table: MemoryTable, space: Space, architecture: Architecture
    ) -> None:
        self.table = table
        self.dense_bytes = table.dense_bytes
        self.check = table.check
        self._live_map = live_map
        self._widths = WidthMap.of(architecture, space)

    def on(self, space: Space, architecture: Architecture) -> MemoryModel:
        """The same for a space with fewer options, whose choices count them otherwise."""
        return MemoryModel(self._live_map, self.table, space, architecture)

    def evaluate(self, choices: Choices, weight_bytes: Array) -> Array:
        """Bytes (P,) of choices (P, U); `weight_bytes` (P,) is what their weights take in memory: the metric `size`
        where nothing is packed.
        """
        table, weights = self.table, np.asarray(weight_bytes, dtype=np.float64)
        live = _live(self._live_map, self._widths, np.asarray(choices, dtype=np.int64), table.channel_block)
        running = table.base_bytes + table.per_weight_byte * weights + table.per_live_byte * live
        loading = table.loading_base_bytes + table.loading_per_weight_byte * weights
        peak: Array = table.correction * np.maximum(running, loading)
        return peak


def live_map_of(space: Space, bench: Bench) -> LiveMap | SizedMaps:
    """The live map of the bench's models on its runtime; one for each size of the input."""
    sized = any(unit.kind == "resolution" for unit in space.units)
    kind: type[LiveMap] | type[SizedMaps] = SizedMaps if sized else LiveMap
    return kind.of(space, bench.build, bench.example, planned=bench.runtime.name != _PLANS_NOTHING)


def measure_memory(
    space: Space,
    architecture: Architecture,
    *,
    bench: Bench,
    key: str,
    seed: int,
    progress: Progress,
    fit: int = 16,
    check: int = 8,
) -> MemoryTable:
    """The memory table of `space`: fitted to the dense model and `fit` random ones, checked on `check` others.

    Tells `progress` the phase `memory` and one step a model. In a space with few choices fewer models are used, a third
    of them for the check. Raises TargetError when a model cannot be run in a process of its own.
    """
    drawn = draw(space, fit + check, np.random.default_rng([seed, 2]))
    choices = (space.dense, *drawn)
    fitted = 1 + min(fit, len(drawn) - min(check, len(drawn) // 3))
    progress.phase("memory", len(choices))
    live_map = live_map_of(space, bench)
    measured = [
        _measure(choice, bench, progress, repeats=REPEATS if choice == space.dense else 1) for choice in choices
    ]
    rows = np.asarray(choices, dtype=np.int64)
    weights = CostModel(architecture, space).evaluate("size", rows)
    widths = WidthMap.of(architecture, space)
    lives = {block: _live(live_map, widths, rows[:fitted], block) for block in BLOCKS}
    table = _table(key, measured[:fitted], weights[:fitted], lives)
    predicted = MemoryModel(live_map, table, space, architecture).evaluate(rows[fitted:], weights[fitted:])
    return table.model_copy(update={"check": _check(predicted, measured[fitted:])})


def _measure(choice: Choice, bench: Bench, progress: Progress, *, repeats: int) -> Resident:
    """Once is enough for the fit: other models say more than the same one again."""
    model = bench.build(choice)
    found = resident(model, bench.example, runtime=bench.runtime, target=bench.target, repeats=repeats)
    progress.step()
    return found


def _live(live_map: LiveMap | SizedMaps, widths: WidthMap, choices: Choices, block: int) -> Array:
    """Bytes (P,) of activations of choices (P, U)."""
    kept = widths.keeps[np.arange(choices.shape[1]), widths.normal(choices)]
    return live_map.needs(kept, block=block)


@dataclass(frozen=True, slots=True)
class _Line:
    """A constant and prices, none negative, and the mean relative error that is left."""

    prices: tuple[float, ...]
    error: float

    @classmethod
    def through(cls, peaks: Array, *columns: Array, hint: float | None = None) -> Self:
        """The best fit of `peaks` (P,) to a constant and `columns` (P,), relative to each peak.

        `hint` is about what the last column's price is, where the peaks do not tell it from the constant.
        """
        rows = np.column_stack([np.ones(len(peaks)), *columns]) / np.maximum(peaks, 1.0)[:, None]
        scale = np.maximum(rows.max(axis=0), 1e-30)  # columns of bytes beside one of ones
        shares, ones = rows / scale, np.ones(len(peaks))
        if hint is None:
            solution, _ = nnls(shares, ones)
        else:
            told = np.zeros(len(scale))
            told[-1] = _HINT_WEIGHT * shares[:, -1].mean()
            solution, _ = nnls(np.vstack([shares, told]), np.append(ones, told[-1] * hint * scale[-1]))
        error = float(np.abs(shares @ solution - 1).mean())
        return cls(tuple((solution / scale).tolist()), error)


def _table(key: str, measured: Sequence[Resident], weights: Array, lives: dict[int, Array]) -> MemoryTable:
    """The fit; its first model is the dense one. `lives` are bytes of activations (P,) for each block that is tried."""
    running = np.asarray([one.running_bytes for one in measured], dtype=np.float64)
    loading = np.asarray([one.loading_bytes for one in measured], dtype=np.float64)
    lines = {block: _Line.through(running, weights, live, hint=_LIVE_HINT) for block, live in lives.items()}
    chosen = BLOCKS[0]
    for block in BLOCKS[1:]:
        if lines[block].error < _BELIEVED * lines[chosen].error:
            chosen = block
    base, per_weight, per_live = lines[chosen].prices
    loading_base, loading_per_weight = _Line.through(loading, weights).prices
    return MemoryTable(
        key=key,
        dense_bytes=measured[0].model_bytes,
        runtime_bytes=float(np.median([one.runtime_bytes for one in measured])),
        base_bytes=base,
        per_weight_byte=per_weight,
        per_live_byte=per_live,
        loading_base_bytes=loading_base,
        loading_per_weight_byte=loading_per_weight,
        channel_block=chosen,
        fitted_models=len(measured),
        check=TableCheck(models=0, median_error=0.0, worst_error=0.0),
    )


def _check(predicted: Array, measured: Sequence[Resident]) -> TableCheck:
    if not measured:
        return TableCheck(models=0, median_error=0.0, worst_error=0.0)
    errors = np.abs(predicted / np.asarray([one.model_bytes for one in measured], dtype=np.float64) - 1.0)
    return TableCheck(models=len(measured), median_error=float(np.median(errors)), worst_error=float(errors.max()))
