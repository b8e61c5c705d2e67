"""Price lists: what each layer costs in each metric, by its widths; and what storing its weights otherwise changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autoprune.core.architecture import Architecture, Layer
from autoprune.core.budget import Metric
from autoprune.core.cost import LatencyTable, Storage
from autoprune.core.space import Space
from autoprune.profile.features import FEATURES, Steps
from autoprune.profile.fit import steps_of
from autoprune.profile.widths import Array, Choices, WidthMap, Widths

BYTES_PER_PARAMETER = 4


@dataclass(frozen=True, slots=True, eq=False)
class LayerCosts:
    """One metric's price list: `constant + sum over present layers, over features, of coefficient * feature`."""

    constant: float
    block: Steps
    terms: Mapping[str, Array]
    """Feature name -> coefficients >= 0, (L,), or (P, L) where they depend on the choice."""

    def at(self, inputs: Array, outputs: Array, layers: NDArray[np.intp] | slice = slice(None)) -> Array:
        """Each layer's cost when it is there, elementwise; `layers` says which layer each last-axis entry is."""
        total = np.zeros_like(inputs)
        block = self.block if isinstance(self.block, int) else self.block[layers]
        for name, coefficients in self.terms.items():
            total += coefficients[..., layers] * FEATURES[name].of(inputs, outputs, block)
        return total

    def total(self, widths: Widths) -> Array:
        """Whole-model costs (P,)."""
        total: Array = (self.at(widths.inputs, widths.outputs) * widths.present).sum(axis=1)
        return self.constant + total


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """The layers whose weights a unit of the space may store otherwise: W of them, one unit's in all their forms."""

    unit: NDArray[np.intp]
    layer: NDArray[np.intp]
    rates: tuple[Array, ...]
    """For each, by option of its unit (options, 3): bytes a weight, an output, and while it is there."""

    def rates_at(self, choices: Choices) -> Array:
        """Those of each for `choices` (P, U): (P, W, 3)."""
        columns = [rates[choices[:, unit]] for unit, rates in zip(self.unit, self.rates, strict=True)]
        return np.stack(columns, axis=1) if columns else np.zeros((len(choices), 0, 3))


def price_lists(architecture: Architecture, widths: WidthMap, table: LatencyTable | None) -> dict[Metric, LayerCosts]:
    """One for each metric that is known: counts, bytes of tensors, and seconds where there is a table."""
    layers = architecture.layers

    def counted(constant: float, counts: Callable[[Layer], tuple[float, float, float]]) -> LayerCosts:
        rows = np.asarray([counts(layer) for layer in layers], dtype=np.float64).reshape(len(layers), 3)
        return LayerCosts(constant, 1, dict(zip(("present", "macs", "out"), rows.T, strict=True)))

    lists: dict[Metric, LayerCosts] = {
        "macs": counted(0.0, _macs),
        "params": counted(architecture.other_params, _params),
        "size": counted(BYTES_PER_PARAMETER * architecture.other_params + architecture.other_bytes, _size),
    }
    if table is not None:
        lists["latency"] = _latency(layers, widths, table)
    return lists


def _each(layer: Layer) -> tuple[float, float]:
    """Factors of a layer for each (input, output) pair and for each output."""
    if layer.kind == "norm":
        return 0.0, 0.0
    return (0.0, float(layer.kernel)) if layer.kind == "depthwise" else (layer.kernel / layer.groups, 0.0)


def _weights(layer: Layer) -> tuple[float, float]:
    """Weights of a layer for each (input, output) pair and for each output."""
    return _each(layer) if layer.owned and layer.kind != "product" else (0.0, 0.0)


def _macs(layer: Layer) -> tuple[float, float, float]:
    """MACs of a layer whatever its width, for each (input, output) pair, and for each output."""
    pair, output = _each(layer) if layer.kind != "other" else (0.0, 0.0)
    return 0.0, layer.positions * pair, layer.positions * output


def _params(layer: Layer) -> tuple[float, float, float]:
    pair, output = _weights(layer)
    return 0.0, pair, output + layer.bias_like


def _size(layer: Layer) -> tuple[float, float, float]:
    _, pair, output = _params(layer)
    buffers = float(layer.buffer_bytes_fixed)
    return buffers, BYTES_PER_PARAMETER * pair, BYTES_PER_PARAMETER * output + layer.buffer_bytes_each


def _latency(layers: Sequence[Layer], widths: WidthMap, table: LatencyTable) -> LayerCosts:
    """Seconds. The table prices features relative to the dense layer's extent, so coefficients are divided by it."""
    dense = widths.at(np.zeros((1, len(widths.keeps)), dtype=np.int64))
    prices = {entry.signature: entry.coefficients for entry in table.signatures}
    scale = table.dense_s * table.correction
    terms = {}
    for name, feature in FEATURES.items():
        coefficients = [prices.get(layer.signature, {}).get(name, 0.0) for layer in layers]
        terms[name] = scale * np.asarray(coefficients) / feature.full(dense.inputs, dense.outputs)[0]
    steps = steps_of(layers, table.channel_block, table.integer_block)
    return LayerCosts(scale * table.base, steps, terms)


def file_prices(architecture: Architecture, storage: Storage) -> LayerCosts:
    """Bytes of a file but for what no choice changes."""
    weights = np.asarray([_weights(layer) for layer in architecture.layers]).reshape(-1, 2) * BYTES_PER_PARAMETER
    weights *= np.asarray([each.copies for each in storage.layers]).reshape(-1, 1)
    outputs = np.asarray([each.per_output for each in storage.layers], dtype=np.float64)
    present = np.asarray([each.present for each in storage.layers], dtype=np.float64)
    return LayerCosts(0.0, 1, {"present": present, "macs": weights[:, 0], "out": weights[:, 1] + outputs})


def stored_otherwise(architecture: Architecture, space: Space, storage: Storage | None) -> Stored:
    """The layers of `weights` units; none where no file is priced."""
    pairs = [
        (index, place)
        for index, unit in enumerate(space.units)
        if unit.kind == "weights" and storage is not None
        for place, layer in enumerate(architecture.layers)
        if unit.name == layer.unit or unit.layers == (layer.name,)
    ]
    return Stored(
        np.asarray([unit for unit, _ in pairs], dtype=np.intp),
        np.asarray([place for _, place in pairs], dtype=np.intp),
        tuple(_rates(storage, space.units[unit].name) for unit, _ in pairs),
    )


def _rates(storage: Storage | None, unit: str) -> Array:
    rates = storage.rates[unit] if storage is not None else ()
    return np.asarray([(rate.per_weight, rate.per_output, rate.present) for rate in rates], dtype=np.float64)
