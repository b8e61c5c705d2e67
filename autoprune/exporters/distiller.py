"""Distiller: a YAML schedule of pruners, by weight (`module.layer1.0.conv1.weight`), run before the first epoch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final, final

from autoprune.core.pattern import parse_pattern
from autoprune.errors import PolicyError
from autoprune.exporters.base import EXACT, Aspect, Exported, Grade, Resolved, UnitCut, approximated, dropped
from autoprune.exporters.dense_shape import zeros_of
from autoprune.exporters.texts import comment, yaml_bytes

Pruner = Mapping[str, object]
PREFIX: Final = "module."
"""Distiller wraps the model in DataParallel."""
LEVELS: Final = "sparsity_levels"
OWN_CHOICE: Final = dropped("Distiller ranks them itself")


@final
class Distiller:
    """`schedule.yaml`, as `distiller.file_config(model, optimizer, "schedule.yaml")` reads it.

    Channels by `L1RankedStructureParameterPruner` (L2 where the policy ranked so), one a unit, the layers of a group
    led by its first; zeros by `SparsityLevelParameterPruner`; blocks by a structure pruner. Masks alone: its
    `FilterRemover`, which needs the name of one of Distiller's own models, takes filters away. From
    https://github.com/IntelLabs/distiller (commit d859fc8).
    """

    __slots__ = ()

    name: str = "distiller"
    tested: tuple[str, ...] = ("distiller d859fc8",)

    def export(self, resolved: Resolved) -> Exported:
        """Channels and zeros by share. Raises PolicyError where the policy has neither."""
        filters = {unit.name: pruner for unit in resolved.units if (pruner := _filters(resolved, unit)) is not None}
        taken = {layer for unit in resolved.units if unit.name in filters for layer in unit.producers or {}}
        sparse = [unit for unit in resolved.units if unit.decision.pattern and unit.layers[0] not in taken]
        blocks = {unit.name: pruner for unit in sparse if (pruner := _blocks(resolved, unit)) is not None}
        levels = {f"{PREFIX}{unit.name}": _share(resolved, unit) for unit in sparse if unit.name not in blocks}
        pruners: dict[str, Pruner] = {_named(name): pruner for name, pruner in (filters | blocks).items()}
        if levels:
            pruners[LEVELS] = {"class": "SparsityLevelParameterPruner", "levels": levels}
        if not pruners:
            raise PolicyError(f"{resolved.title}: Distiller prunes filters and weights; this has neither")
        policies = [{"pruner": {"instance_name": name}, "epochs": [0]} for name in pruners]
        content = {"version": 1, "pruners": pruners, "policies": policies}
        units = {unit.name: _width(unit.name in filters) for unit in resolved.units if unit.narrows}
        units |= {unit.name: _sparse(resolved, unit, taken, blocks) for unit in resolved.units if unit.decision.pattern}
        grades: dict[Aspect, Grade] = {"weights": dropped("Distiller trains them again")}
        files = {"schedule.yaml": yaml_bytes(content, head=comment(resolved, self.tested))}
        return Exported(files, resolved.graded(grades, units=units))


def _named(unit: str) -> str:
    return unit.replace(".", "_")


def _filters(resolved: Resolved, unit: UnitCut) -> Pruner | None:
    """The pruner of a narrowed unit, if only whole outputs of convolutions make it."""
    made = [resolved.layers[name] for name in unit.producers or {}]
    if not unit.narrows or any(len(cut.shape) != 4 or cut.shape[0] != unit.decision.of for cut in made):
        return None
    norm = "L2" if unit.decision.method == "l2" else "L1"
    coupled = {"group_dependency": "Leader"} if len(made) > 1 else {}
    return {
        "class": f"{norm}RankedStructureParameterPruner",
        "group_type": "Filters",
        "desired_sparsity": _fraction(unit.decision.of - unit.decision.keep, unit.decision.of),
        **coupled,
        "weights": [f"{PREFIX}{cut.weight}" for cut in made],
    }


def _fraction(gone: int, of: int) -> float:
    """A short share of which Distiller, which rounds down, makes `gone` of `of`; so does who rounds to the nearest."""
    digits = 4
    while True:
        least = math.floor(gone / of * 10**digits)
        for step in (least, least + 1):
            share = float(step / 10**digits)
            if math.floor(share * of) == round(share * of) == gone:
                return share
        digits += 1


def _blocks(resolved: Resolved, unit: UnitCut) -> Pruner | None:
    """The pruner of a weight of blocks, where Distiller takes them: of a convolution that they divide."""
    if not unit.decision.pattern:
        return None
    cut, pattern = resolved.layers[unit.layers[0]], parse_pattern(unit.decision.pattern)
    if pattern.kind != "block" or cut.is_cut or len(cut.shape) != 4:
        return None
    if pattern.columns > 1 or cut.shape[0] % pattern.rows:
        return None
    size = pattern.rows * pattern.columns
    return {
        "class": "L1RankedStructureParameterPruner",
        "group_type": "Blocks",
        "desired_sparsity": _fraction(zeros_of(resolved, cut.name) // size, math.prod(cut.shape) // size),
        "weights": [f"{PREFIX}{cut.weight}"],
        "kwargs": {"block_shape": [pattern.rows, pattern.columns, 1, 1]},
    }


def _share(resolved: Resolved, unit: UnitCut) -> float:
    """Of the zeros of a layer, with what is cut off it."""
    layer = unit.layers[0]
    return _fraction(zeros_of(resolved, layer), math.prod(resolved.layers[layer].shape))


def _width(said: bool) -> dict[Aspect, Grade]:
    as_zeros = approximated("as zeros, until its FilterRemover takes them away")
    nothing = dropped("Distiller ranks whole outputs of convolutions alone")
    return {"width": as_zeros if said else nothing, "channels": OWN_CHOICE}


def _sparse(resolved: Resolved, unit: UnitCut, taken: set[str], blocks: Mapping[str, Pruner]) -> dict[Aspect, Grade]:
    cut = resolved.layers[unit.layers[0]]
    if cut.name in taken:
        return {"sparsity": dropped("a weight has one pruner: its filters'"), "mask": OWN_CHOICE}
    if cut.is_cut:
        return {"sparsity": approximated("one share, with what is cut off the layer"), "mask": OWN_CHOICE}
    exact = unit.name in blocks or parse_pattern(unit.decision.pattern).kind == "unstructured"
    return {"sparsity": EXACT if exact else approximated("the share alone, anywhere"), "mask": OWN_CHOICE}
