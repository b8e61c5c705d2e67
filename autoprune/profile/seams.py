"""Seams: places in a model where layers that compute in integers meet layers that compute in floats.

A runtime changes type and memory layout there, so a layer's form has a price that its neighbours decide, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self, final

import numpy as np

from autoprune.core.architecture import Architecture
from autoprune.profile.widths import Array, Widths


@final
@dataclass(frozen=True, slots=True, eq=False)
class Seams:
    """Counts seams between layers that follow each other in execution."""

    places: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    """For each layer with weights, in order: where the architecture lists it, and where in integers."""

    @classmethod
    def of(cls, architecture: Architecture) -> Self:
        """Those of a model; none where no layer may compute in integers."""
        listed: dict[str, list[int]] = {}
        for index, layer in enumerate(architecture.layers):
            if layer.kind not in ("norm", "product", "other"):
                # Two layers of one rank share a place: their names are the layer's with a number.
                name = layer.name.rpartition(".")[0] if layer.form == "low_rank" else layer.name
                listed.setdefault(name, []).append(index)
        integer = {index for index, layer in enumerate(architecture.layers) if layer.form == "integer"}
        if not integer:
            return cls(())
        return cls(tuple((tuple(where), tuple(i for i in where if i in integer)) for where in listed.values()))

    def count(self, widths: Widths) -> Array:
        """How many there are in each of P models, (P,)."""
        models = len(widths.present)
        total, before, known = np.zeros(models), np.zeros(models, dtype=np.bool_), np.zeros(models, dtype=np.bool_)
        for where, integer in self.places:
            there = widths.present[:, where].any(axis=1)
            now = widths.present[:, integer].any(axis=1) if integer else np.zeros(models, dtype=np.bool_)
            total += there & known & (now != before)
            before, known = np.where(there, now, before), known | there
        return total
