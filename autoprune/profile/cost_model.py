"""What any choice costs, in every metric, without building it: MACs, parameters and bytes counted, latency predicted.

Every metric is a constant plus, for each layer that is there, non-negative coefficients times features of its widths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol, final

import numpy as np
from numpy.typing import NDArray

from autoprune.core.architecture import Architecture
from autoprune.core.budget import Metric
from autoprune.core.cost import LatencyTable, Storage, TableCheck
from autoprune.core.space import Choice, Space
from autoprune.core.unit import Unit
from autoprune.profile.prices import BYTES_PER_PARAMETER, LayerCosts, file_prices, price_lists, stored_otherwise
from autoprune.profile.seams import Seams
from autoprune.profile.unit_latency import UnitLatency
from autoprune.profile.widths import Array, Choices, WidthMap, Widths, as_array

_GAIN = 1e-9


@dataclass(frozen=True, slots=True, eq=False)
class _Neighbours:
    """Every (channel unit, option, touched layer) of the space, laid out flat: N entries, R rows (unit, option)."""

    row: NDArray[np.intp]
    unit: NDArray[np.intp]
    layer: NDArray[np.intp]
    keep: Array
    starts: NDArray[np.intp]
    """(U + 1,) first row of each unit."""


class PeakMemory(Protocol):
    """Predicts peak resident memory; see `profile.memory`."""

    dense_bytes: float
    check: TableCheck

    def evaluate(self, choices: Choices, weight_bytes: Array) -> Array:
        """Bytes (P,) of choices (P, U), whose weights take `weight_bytes` (P,) as floats."""
        ...

    def on(self, space: Space, architecture: Architecture) -> PeakMemory:
        """The same for a space with fewer options."""
        ...


@final
class CostModel:
    """Costs of the choices of one space on one target. Immutable. Without a table there is no latency.

    `storage` says what the file that models are shipped as takes; without, size is that of the tensors. Without
    `memory` that is not known. `latency` takes the place of a measured table.
    """

    def __init__(
        self, architecture: Architecture, space: Space, table: LatencyTable | None = None, *,
        storage: Storage | None = None, memory: PeakMemory | None = None, latency: UnitLatency | None = None,
    ) -> None:  # fmt: skip
        self.architecture = architecture
        self.space = space
        self.table = table
        self._map = WidthMap.of(architecture, space)
        self._costs = price_lists(architecture, self._map, table)
        self.storage = storage
        self._seams = Seams.of(architecture)
        self.memory = memory
        self.latency = latency
        self._tensors = self._costs["size"]
        self._stored = stored_otherwise(architecture, space, storage)
        if storage is not None:
            self._costs["size"] = file_prices(architecture, storage)
        self._shaped = self._map.shaped()
        blocks = (index for index, unit in enumerate(space.units) if unit.kind == "block")
        self._whole = tuple(sorted({*blocks, *self._shaped}))
        self._neighbours = _neighbours(space, self._map)
        if storage is not None:
            layers = self._costs["size"]
            constant = storage.dense_bytes - self.cost("size", space.dense)
            self._costs["size"] = LayerCosts(constant, layers.block, layers.terms)
        dense = {metric: self.cost(metric, space.dense) for metric in self._costs}
        if table is not None:
            dense["latency"] = table.dense_s  # measured, so free of the correction that predictions get
        if memory is not None:
            dense["memory"] = memory.dense_bytes
        if latency is not None:
            dense["latency"] = latency.dense_s
        self.dense: Mapping[Metric, float] = MappingProxyType(dense)

    def evaluate(self, metric: Metric, choices: Choices) -> Array:
        """Costs (P,) of choices (P, U), in the metric's own unit: seconds, MACs for one sample, parameters, bytes."""
        rows = np.asarray(choices, dtype=np.int64)
        if metric == "memory" and self.memory is not None:
            return self.memory.evaluate(rows, self._tensors.total(self._map.at(rows)))
        if metric == "latency" and self.latency is not None:
            return self.latency.evaluate(rows, self._map.moot(rows))
        return self._summed(metric, rows) + (self._seam_costs(rows) if metric == "latency" else 0.0)

    def _summed(self, metric: Metric, choices: Choices) -> Array:
        """Costs (P,) as far as they are sums over layers."""
        return self._list(metric, choices).total(self._map.at(choices))

    def _seam_costs(self, choices: Choices) -> Array:
        if self.table is None or not self._seams.places:
            return np.zeros(len(choices))
        return self.table.dense_s * self.table.correction * self.table.seam * self._seams.count(self._map.at(choices))

    def cost(self, metric: Metric, choice: Choice) -> float:
        """The cost of one choice."""
        return float(self.evaluate(metric, as_array(choice))[0])

    def by_layer(self, metric: Metric) -> Array:
        """What each layer takes of the dense model's cost, (L,); forms that are not there, nothing."""
        dense = as_array(self.space.dense)
        widths = self._map.at(dense)
        parts: Array = (self._list(metric, dense).at(widths.inputs, widths.outputs) * widths.present)[0]
        return parts

    def linearise(self, metric: Metric, incumbent: Choice) -> list[Array]:
        """For each unit (options,): how the cost changes when only this unit's option is replaced. Exact but for seams.

        Seams are left out: one layer changed alone makes two, and who saw that would never change the first of many.
        What is inside a block that `incumbent` drops changes nothing; a block's drop saves what its inside costs now.
        """
        raw = as_array(incumbent)
        if self._is_of_wholes(metric):
            return self._neighbours_of(metric, incumbent, range(len(incumbent)))
        costs, flat = self._list(metric, raw), self._neighbours
        normal = self._map.normal(raw)
        now = self._map.at(normal)
        live = now.present[0, flat.layer] * ~self._map.moot(raw)[0, flat.unit]
        step = flat.keep - self._map.keeps[flat.unit, normal[0, flat.unit]]
        inputs = now.inputs[0, flat.layer] + step * self._map.input_times[flat.unit, flat.layer]
        outputs = now.outputs[0, flat.layer] + step * self._map.output_times[flat.unit, flat.layer]
        before = costs.at(now.inputs, now.outputs)[0, flat.layer]
        change = (costs.at(inputs[None], outputs[None], flat.layer)[0] - before) * live
        rows: Array = np.bincount(flat.row, weights=change, minlength=int(flat.starts[-1])).astype(np.float64)
        changes = np.split(rows, flat.starts[1:-1])
        if metric == "size":
            self._restore(changes, raw, now)
        for unit, whole_changes in zip(self._whole, self._neighbours_of(metric, incumbent, self._whole), strict=True):
            changes[unit] = whole_changes
        return changes

    def _restore(self, changes: list[Array], incumbent: Choices, now: Widths) -> None:
        """Put in how bytes change when a layer's weights are stored otherwise."""
        weights = self._costs["size"].terms["macs"] / BYTES_PER_PARAMETER * (now.inputs * now.outputs)[0]
        counts = np.stack([weights, now.outputs[0], np.ones_like(weights)]) * now.present  # (3, L)
        for unit, layer, rates in zip(self._stored.unit, self._stored.layer, self._stored.rates, strict=True):
            changes[unit] = changes[unit] + (rates - rates[incumbent[0, unit]]) @ counts[:, layer]

    def cheapest_choice(self, metric: Metric) -> Choice:
        """The choice that costs least. Counted metrics: the narrowest option everywhere, exactly.

        A narrow ragged width can take longer than a wider aligned one, so latency descends from there, unit by unit.
        """
        if metric == "latency" and self.latency is not None:
            return self.latency.cheapest()
        choice = self.space.normal(tuple(size - 1 for size in self.space.sizes))
        self.evaluate(metric, as_array(choice))
        by_width = metric in ("macs", "params") or (metric == "size" and not len(self._stored.unit))
        if by_width and not self._shaped:
            return choice
        lower = self._descended(metric, choice)
        while self.cost(metric, lower) < self.cost(metric, choice) * (1 - _GAIN):
            choice, lower = lower, self._descended(metric, lower)
        return self.space.normal(choice)

    def range(self, metric: Metric) -> tuple[float, float]:
        """The reachable costs: least, and the dense model's."""
        return self.cost(metric, self.cheapest_choice(metric)), self.dense[metric]

    def aligned_widths(self, unit: Unit) -> tuple[int, ...]:
        """Widths at the edges of the runtime's steps, ascending: multiples of its block, and the full width.

        Where no step was found (or nothing was measured), all widths are alike, and only the full one is named.
        """
        step = self.table.channel_block if self.table is not None else 1
        edges = range(step, unit.width, step) if step > 1 else ()
        return (*edges, unit.width)

    def is_additive(self, metric: Metric) -> bool:
        """Whether one linearisation is exact everywhere: no two units share a layer, but for a block and its inside."""
        if metric == "latency" and self.latency is not None:
            return True
        if metric == "memory" or (metric == "latency" and self._seams.places):
            return False
        prices = self._list(metric, as_array(self.space.dense)).terms.values()
        priced = sum((terms.reshape(-1) for terms in prices), np.zeros(len(self.architecture.layers))) > 0
        touching = (self._map.input_times + self._map.output_times > 0) & priced  # (U, L)
        if metric == "size":
            touching[self._stored.unit, self._stored.layer] = True
        for unit in self._shaped:
            touching[unit] |= self._map.decided(unit) & priced
        return bool((touching.sum(axis=0) <= 1).all())

    def _descended(self, metric: Metric, choice: Choice) -> Choice:
        for unit in range(len(choice)):
            best = int(self.linearise(metric, choice)[unit].argmin())
            choice = (*choice[:unit], best, *choice[unit + 1 :])
        return choice

    def _neighbours_of(self, metric: Metric, incumbent: Choice, units: Sequence[int]) -> list[Array]:
        """For each of `units` the changes of its options, by evaluating each neighbour whole."""
        if not units:
            return []
        sizes = [self.space.sizes[unit] for unit in units]
        neighbours = np.repeat(as_array(incumbent), 1 + sum(sizes), axis=0)  # the first stays the incumbent
        columns = np.repeat(np.asarray(units), sizes)
        neighbours[np.arange(1, len(neighbours)), columns] = np.concatenate([np.arange(size) for size in sizes])
        costs = self.evaluate(metric, neighbours) if self._is_of_wholes(metric) else self._summed(metric, neighbours)
        return list(np.split(costs[1:] - costs[0], np.cumsum(sizes)[:-1]))

    def _is_of_wholes(self, metric: Metric) -> bool:
        """Whether a metric is no sum over layers."""
        return metric == "memory" or (metric == "latency" and self.latency is not None)

    def _list(self, metric: Metric, choices: Choices) -> LayerCosts:
        """The prices at `choices` (P, U); the same for all but of bytes."""
        if metric not in self._costs:
            raise ValueError(f"no {metric} without a measured table")
        costs = self._costs[metric]
        if metric != "size" or not len(self._stored.unit):
            return costs
        names = ("macs", "out", "present")
        macs, out, present = (np.repeat(costs.terms[name][None], len(choices), axis=0) for name in names)  # (P, L)
        rates, layers = self._stored.rates_at(choices), self._stored.layer
        macs[:, layers] *= rates[..., 0] / BYTES_PER_PARAMETER
        out[:, layers] += rates[..., 1]
        present[:, layers] += rates[..., 2]
        return LayerCosts(costs.constant, costs.block, {"macs": macs, "out": out, "present": present})


def _neighbours(space: Space, widths: WidthMap) -> _Neighbours:
    starts = np.concatenate([[0], np.cumsum(space.sizes)]).astype(np.intp)
    rows, units, layers = [], [], []
    for unit, entry in enumerate(space.entries):
        touched = widths.touched(unit) if entry.unit.narrows else np.zeros(0, dtype=np.intp)
        options = len(entry.options)
        rows.append(np.repeat(np.arange(starts[unit], starts[unit] + options), len(touched)))
        units.append(np.full(options * len(touched), unit, dtype=np.intp))
        layers.append(np.tile(touched, options))
    row, unit_of, layer = (np.concatenate([np.zeros(0, dtype=np.intp), *parts]) for parts in (rows, units, layers))
    return _Neighbours(row, unit_of, layer, widths.keeps[unit_of, row - starts[unit_of]], starts)
