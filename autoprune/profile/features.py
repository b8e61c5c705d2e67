"""What a layer's cost may depend on: a few functions of its two widths. Every metric is a sum of these, none negative.

Runtimes work on blocks of channels: the cost of 44 channels can be that of 48. `block` is that step; 1 for what is
counted and not measured. Which kernel runs is decided by the input's width, so each kernel has features of its own
that are zero elsewhere (ResNet-56 on ONNX Runtime: 30 channels take 13 % longer than 32, because that convolution and
the layouts around it are others): `thin` inputs are narrower than one block, `loose` ones are wider and no multiple of
4, all others are `whole`. So cost never grows from one aligned width to a narrower aligned one, but it may from an
aligned to a ragged one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from autoprune.core.architecture import Layer

Array = NDArray[np.float64]
Steps = Array | int
"""Channels of a block: of all layers, or of each."""

SMALL_BLOCK = 4
"""A vector register of 128 bits, in floats: the least that blocked kernels ask of a width that is not whole blocks."""

Extent = Literal["layer", "pairs", "inputs", "outputs"]
"""What a feature counts when all is well: nothing, (input, output) pairs, inputs or outputs."""


@dataclass(frozen=True, slots=True)
class Feature:
    """`of(inputs, outputs, block)`, elementwise over arrays of one shape, at most about its `extent`."""

    of: Callable[[Array, Array, Steps], Array]
    extent: Extent

    def full(self, inputs: Array, outputs: Array) -> Array:
        """The extent at these widths: what coefficients are relative to."""
        parts = {
            "layer": np.ones_like(inputs),
            "pairs": inputs * outputs,
            "inputs": inputs,
            "outputs": outputs,
        }
        full: Array = np.maximum(parts[self.extent], 1.0)
        return full

    def load(self, layer: Layer, inputs: float, outputs: float) -> float:
        """How much work of this extent one layer of these widths is, to compare layers with."""
        pairs = outputs if layer.kind == "depthwise" else inputs * outputs / layer.groups
        parts = {
            "layer": 1.0,
            "pairs": layer.positions * layer.kernel * pairs,
            "inputs": layer.positions * inputs,
            "outputs": layer.positions * outputs,
        }
        return parts[self.extent]


def _up(width: Array, block: Steps) -> Array:
    """Rounded up to whole blocks."""
    whole: Array = np.ceil(width / block) * block
    return whole


def _flag(condition: NDArray[np.bool_]) -> Array:
    return np.where(condition, 1.0, 0.0)


def _thin(inputs: Array, block: Steps) -> Array:
    return _flag(inputs < block)


def _loose(inputs: Array, block: Steps) -> Array:
    return _flag((inputs >= block) & (inputs % SMALL_BLOCK != 0))


def _whole(inputs: Array, block: Steps) -> Array:
    return _flag((inputs >= block) & (inputs % SMALL_BLOCK == 0))


FEATURES: Mapping[str, Feature] = MappingProxyType(
    {
        "present": Feature(lambda i, _o, _b: np.ones_like(i), "layer"),
        "macs": Feature(lambda i, o, _b: i * o, "pairs"),
        "blocked": Feature(lambda i, o, b: _up(i, b) * _up(o, b), "pairs"),
        "out": Feature(lambda _i, o, b: _up(o, b), "outputs"),
        "in": Feature(lambda i, _o, b: _up(i, b), "inputs"),
        "ragged_out": Feature(lambda _i, o, b: b * _flag(o % b != 0), "outputs"),
        "odd_out": Feature(lambda _i, o, _b: SMALL_BLOCK * _flag(o % SMALL_BLOCK != 0), "outputs"),
        "whole": Feature(lambda i, o, b: _whole(i, b) * _up(i, b) * _up(o, b), "pairs"),
        "thin": Feature(lambda i, o, b: _thin(i, b) * i * _up(o, b), "pairs"),
        "thin_in": Feature(lambda i, _o, b: _thin(i, b) * i, "inputs"),
        "loose": Feature(lambda i, o, b: _loose(i, b) * i * o, "pairs"),
        "loose_in": Feature(lambda i, _o, b: _loose(i, b) * i, "inputs"),
        "loose_out": Feature(lambda i, o, b: _loose(i, b) * o, "outputs"),
    }
)
"""Name -> feature. The first five are smooth, the next two are fees for widths that no kernel likes, the rest go by
the kernel that the input's width calls for."""
