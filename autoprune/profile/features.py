"""What a layer's cost may depend on: a few functions of its two widths. Every metric is a sum of these, none negative.

Runtimes work on blocks of channels: the cost of 44 channels can be that of 48. `block` is that step; 1 for what is
counted and not measured. The first features grow with width. The last charge widths that no kernel likes, which are
copied to another layout or done by a slower kernel (ResNet-56 on ONNX Runtime: 30 channels take 13 % longer than 32).
So cost never grows from one aligned width to a narrower aligned one, but it may from an aligned to a ragged one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Feature = Callable[[Array, Array, int], Array]


SMALL_BLOCK = 4
"""A vector register of 128 bits, in floats: the least that blocked kernels ask of a width that is not whole blocks."""


def _blocks(width: Array, block: int) -> Array:
    whole: Array = np.ceil(width / block)
    return whole


def _ragged(width: Array, block: int) -> Array:
    ragged: Array = np.where(width % block != 0, 1.0, 0.0)
    return ragged


FEATURES: Mapping[str, Feature] = MappingProxyType(
    {
        "present": lambda inputs, _outputs, _block: np.ones_like(inputs),
        "macs": lambda inputs, outputs, _block: inputs * outputs,
        "blocked": lambda inputs, outputs, block: _blocks(inputs, block) * _blocks(outputs, block),
        "out": lambda _inputs, outputs, block: _blocks(outputs, block),
        "in": lambda inputs, _outputs, block: _blocks(inputs, block),
        "ragged_out": lambda _inputs, outputs, block: _ragged(outputs, block),
        "ragged_in": lambda inputs, _outputs, block: _ragged(inputs, block),
        "odd_out": lambda _inputs, outputs, _block: _ragged(outputs, SMALL_BLOCK),
        "odd_in": lambda inputs, _outputs, _block: _ragged(inputs, SMALL_BLOCK),
    }
)
"""Name -> function of (input widths, output widths, block), elementwise over arrays of one shape."""
