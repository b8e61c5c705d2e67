"""Layers in other forms: what a layer becomes when an option replaces it by something that costs differently to run."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import get_args

from autoprune.core.architecture import Architecture, Layer, Width
from autoprune.core.space import Space
from autoprune.core.unit import Form, Unit


def with_forms(architecture: Architecture, space: Space, forms: Collection[Form] = get_args(Form)) -> Architecture:
    """`architecture` with each layer once for every form that an option of `space` gives it, of those among `forms`."""
    deciding: dict[str, tuple[Unit, set[Form]]] = {
        entry.unit.layers[0]: (entry.unit, {option.form for option in entry.options})
        for entry in space.entries
        if entry.unit.kind == "weights"
    }
    layers: list[Layer] = []
    for layer in architecture.layers:
        if layer.name not in deciding or deciding[layer.name][1] == {"float"}:
            layers.append(layer)
            continue
        unit, given = deciding[layer.name]
        told = given & {"float", *forms} - ({"2:4"} if layer.kind != "linear" else set())
        if told == {"float"}:
            layers.append(layer)
            continue
        layers += [part for form in get_args(Form) if form in told for part in _formed(layer, unit, form)]
    return replace(architecture, layers=tuple(layers))


def _formed(layer: Layer, unit: Unit, form: Form) -> list[Layer]:
    """What stands in the place of `layer`."""
    if form == "float":
        return [replace(layer, unit=unit.name, form=form)]
    if form in ("integer", "2:4"):
        return [replace(layer, signature=f"{layer.signature} {form}", unit=unit.name, form=form)]
    columns = unit.width // unit.outputs
    between = Width(0, ((unit.name, 1 / (unit.outputs + columns)),))  # its option keeps rank * (outputs + columns)
    first = replace(
        layer, name=f"{layer.name}.0", signature=f"{layer.signature} first", outputs=between, bias_like=0,
        buffer_bytes_each=0, buffer_bytes_fixed=0, unit=unit.name, form=form,
    )  # fmt: skip
    second = replace(
        layer, name=f"{layer.name}.1", signature=f"{layer.signature} second", inputs=between, kernel=1,
        unit=unit.name, form=form,
    )  # fmt: skip
    return [first, second]
