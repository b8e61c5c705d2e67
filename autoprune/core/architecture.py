"""A model's layers as the cost table sees them: shapes, and which units set their widths. No weights, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from autoprune.core.unit import Form

LayerKind = Literal["conv", "depthwise", "linear", "norm", "product", "other"]
"""`product` is a product of no such layer (attention, bare parameters): it has MACs and no parameters. `other` is one
parameter or buffer outside layers: it has no MACs."""


@dataclass(frozen=True, slots=True)
class Width:
    """How wide one side of a layer is: `fixed` channels plus, for each unit, `times` the channels it keeps."""

    fixed: int
    terms: tuple[tuple[str, float], ...] = ()  # (unit name, times)


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer, product or parameter: what sets its cost.

    MACs are `positions * kernel * inputs * outputs / groups` for one sample, where `positions` is the number of output
    positions and `kernel` the kernel's area; a depthwise layer has one input for each output. `weights` and `extra`
    count parameters: `weights` of them go with inputs times outputs (outputs alone when depthwise or norm), `extra`
    with outputs. `buffers` likewise counts bytes of buffers. `block` is the unit whose removal removes the layer. A
    layer that is there in several forms is listed once for each: it is there when the option of `unit` says `form`.
    """

    name: str
    kind: LayerKind
    signature: str
    inputs: Width
    outputs: Width
    kernel: int
    groups: int
    positions: int
    bias_like: int
    """Parameters for each output besides the weights: bias (1), norm scale and shift (2), ..."""
    buffer_bytes_each: int
    """Bytes of buffers for each output (running statistics)."""
    buffer_bytes_fixed: int
    """Bytes of buffers whatever the width (a batch counter)."""
    block: str | None = None
    unit: str | None = None
    form: Form = "float"
    owned: bool = True
    """Whether its weights are parameters of its own: not where layers share them, or where they are computed."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """All layers of a model in execution order, then products and parameters outside them, and the number of
    parameters and bytes of buffers that no unit can change.
    """

    layers: tuple[Layer, ...]
    other_params: int = 0
    other_bytes: int = 0
