"""Layers in other states: what a layer becomes when an option replaces it by something that costs differently to run.

Resolutions first, which change all layers at once, then kernels, then forms: a layer that is split in two has its
kernel in the first half.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from typing import get_args

from autoprune.core.architecture import Architecture, Condition, Layer, Width
from autoprune.core.space import Space, UnitOptions
from autoprune.core.unit import Form, Unit

_Variants = Callable[[Layer], list[Layer]]
"""What one unit's options make of a layer that it decides about."""


def with_forms(architecture: Architecture, space: Space, forms: Collection[Form] = get_args(Form)) -> Architecture:
    """`architecture` with each layer once for every combination of what the options of `space` make of it: the size of
    the model's input, that of its kernel, and forms, of those among `forms`.
    """
    deciding: dict[str, list[_Variants]] = {}
    for entry in sorted(space.entries, key=lambda entry: entry.unit.kind != "kernel"):
        if entry.unit.kind == "kernel" and len(entry.options) > 1:
            deciding.setdefault(entry.unit.layers[0], []).append(_kernels(entry))
        elif entry.unit.kind == "weights":
            deciding.setdefault(entry.unit.layers[0], []).append(_forms(entry, forms))
    layers: list[Layer] = []
    for layer in _at_resolutions(architecture, space):
        parts = [layer]
        for variants in deciding.get(layer.name, ()):
            parts = [variant for part in parts for variant in variants(part)]
        layers += parts
    return replace(architecture, layers=tuple(layers))


def _at_resolutions(architecture: Architecture, space: Space) -> tuple[Layer, ...]:
    """The layers once for each size of the input that `space` allows; those that are the same at all sizes, once."""
    entry = next((entry for entry in space.entries if entry.unit.kind == "resolution" and len(entry.options) > 1), None)
    if entry is None:
        return architecture.layers
    at = {entry.unit.width: architecture.layers, **dict(architecture.smaller)}
    sides = [option.keep for option in entry.options]
    always = set(architecture.layers).intersection(*(at[side] for side in sides))
    there: dict[Layer, None] = {}
    for side in sides:
        condition = Condition(entry.unit.name, side)
        there |= {
            layer if layer in always else replace(layer, when=(*layer.when, condition)): None for layer in at[side]
        }
    return tuple(there)


def _kernels(entry: UnitOptions) -> _Variants:
    """The layer with each size of its kernel."""
    unit = entry.unit

    def sized(layer: Layer, size: int) -> Layer:
        when = (*layer.when, Condition(unit.name, size))
        if size == unit.width:
            return replace(layer, when=when)
        dimensions = round(math.log(layer.kernel, unit.width))
        return replace(layer, signature=f"{layer.signature} kernel {size}", kernel=size**dimensions, when=when)

    sizes = dict.fromkeys(option.keep for option in entry.options)
    return lambda layer: [sized(layer, size) for size in sizes]


def _forms(entry: UnitOptions, forms: Collection[Form]) -> _Variants:
    """The layer in each of its forms."""

    def variants(layer: Layer) -> list[Layer]:
        given = {option.form for option in entry.options}
        told = given & {"float", *forms} - ({"2:4"} if layer.kind != "linear" else set())
        if told == {"float"}:
            return [layer]
        return [part for form in get_args(Form) if form in told for part in _formed(layer, entry.unit, form)]

    return variants


def _formed(layer: Layer, unit: Unit, form: Form) -> Iterable[Layer]:
    """What stands in the place of `layer`."""
    layer = replace(layer, form=form, when=(*layer.when, Condition(unit.name, form)))
    if form == "float":
        return [layer]
    if form in ("integer", "2:4"):
        return [replace(layer, signature=f"{layer.signature} {form}")]
    columns = unit.width // unit.outputs
    between = Width(0, ((unit.name, 1 / (unit.outputs + columns)),))  # its option keeps rank * (outputs + columns)
    first = replace(
        layer, name=f"{layer.name}.0", signature=f"{layer.signature} first", outputs=between, bias_like=0,
        buffer_bytes_each=0, buffer_bytes_fixed=0,
    )  # fmt: skip
    second = replace(
        layer, name=f"{layer.name}.1", signature=f"{layer.signature} second", inputs=between, kernel=1
    )  # fmt: skip
    return [first, second]
