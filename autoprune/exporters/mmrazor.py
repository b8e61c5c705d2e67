"""MMRazor: `fix_subnet`, by unit how many of its channels stay: `{"backbone.layer1.0.conv1_(0, 64)_64": 28}`."""

from __future__ import annotations

from typing import Final, final

from autoprune.errors import PolicyError
from autoprune.exporters.base import EXACT, Aspect, Exported, Grade, Resolved, UnitCut, dropped
from autoprune.exporters.texts import json_bytes

MUTABLE: Final = ("Conv2d", "Linear")
"""Classes of layers whose outputs MMRazor can narrow."""


@final
class MMRazor:
    """`fix_subnet.json`, as `GroupFisherDeploySubModel(architecture, fix_subnet=..., divisor=1)` reads it.

    A unit is called after the first layer that makes its channels, in the order in which they run, then where they lie
    in its outputs and how many there are. The first ones stay. The JSON has no room for anything else.
    """

    __slots__ = ()

    name: str = "mmrazor"
    tested: tuple[str, ...] = ("mmrazor 1.0.0",)

    def export(self, resolved: Resolved) -> Exported:
        """Widths alone. Raises PolicyError where nothing is narrowed that MMRazor can narrow."""
        said = {unit.name: key for unit in resolved.units if (key := _key(resolved, unit)) is not None}
        if not said:
            raise PolicyError(f"{resolved.title}: narrows nothing that MMRazor can narrow, and it does nothing else")
        kept = {said[unit.name]: unit.decision.keep for unit in resolved.units if unit.name in said}
        grades: dict[Aspect, Grade] = {
            "width": EXACT,
            "channels": dropped("MMRazor keeps the first ones"),
            "weights": dropped("they fit the channels that stay"),
        }
        nothing: dict[Aspect, Grade] = {"width": dropped("MMRazor narrows whole outputs of Conv2d and Linear")}
        others = {unit.name: nothing for unit in resolved.units if unit.narrows and unit.name not in said}
        return Exported({"fix_subnet.json": json_bytes(kept)}, resolved.graded(grades, units=others))


def _key(resolved: Resolved, unit: UnitCut) -> str | None:
    """MMRazor's name of a unit, if its channels are all outputs of a layer that it can narrow."""
    if not unit.narrows or unit.decision.kind == "heads" or not unit.producers:
        return None
    width = unit.decision.of
    made = [resolved.layers[name] for name in resolved.layers if name in unit.producers]
    if not made or any(cut.kind not in MUTABLE or cut.shape[0] != width for cut in made):
        return None
    first = resolved.layers.get(unit.name, made[0])
    return f"{first.name}_(0, {width})_{width}"
