"""Distiller's schedules: pruners, each with its sparsity and the weights that it prunes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, final

from autoprune.importers.base import Found, Share, Side
from autoprune.importers.reading import Reading
from autoprune.importers.texts import data_of
from autoprune.problems import given, shown

FILE = "a schedule: `pruners: {NAME: {class: ..., group_type: Filters, desired_sparsity: 0.42, weights: [...]}}`"
FINE: Final = "AutomatedGradualPruner"
LEVELS: Final = "SparsityLevelParameterPruner"
RANKED: Final = (
    "L1RankedStructureParameterPruner", "L2RankedStructureParameterPruner", "ActivationAPoZRankedFilterPruner",
    "ActivationMeanRankedFilterPruner", "RandomRankedFilterPruner", "GradientRankedFilterPruner",
    "FMReconstructionChannelPruner", "StructuredAutomatedGradualPruner",
)  # fmt: skip
"""Each also with `_AGP`: the same, reached step by step."""
SIDES: Final[Mapping[str, Side]] = {"Filters": "outputs", "3D": "outputs", "Channels": "inputs", "Rows": "inputs"}
"""Groups that are channels; rows are those of the matrix that a linear layer's inputs are multiplied by."""


@final
class Distiller:
    """A scheduler's YAML: of every pruner that a policy runs, the sparsity that it ends with.

    Pruners with thresholds (`SensitivityPruner` and others) say nothing of how much goes, and are told.
    """

    __slots__ = ()

    name: str = "distiller"
    about: str = "schedules (YAML): pruners with desired_sparsity, final_sparsity or levels"

    def read(self, content: bytes, *, name: str) -> Found:
        """The sparsity of every weight. Raises PolicyError."""
        reading = Reading(name)
        data = reading.mapping(data_of(content, name=name), "the file", FILE)
        pruners = reading.mapping(data.get("pruners"), "pruners", FILE) if data else {}
        run = _run(data.get("policies"), reading) if "policies" in data else None
        for instance, value in pruners.items():
            where = f"pruners.{shown(instance)}"
            pruner = reading.mapping(value, where, "a mapping with a class, a sparsity and weights")
            if run is not None and instance not in run:
                reading.leave(where, "no policy of the schedule runs it")
            elif pruner:
                _pruner(pruner, where, reading)
        return reading.found()


def _run(policies: object, reading: Reading) -> set[str]:
    """The pruners that policies run."""
    if not isinstance(policies, list):
        reading.wrong("policies", policies, "a list of policies")
        return set()
    found = (policy.get("pruner") for policy in policies if isinstance(policy, dict))
    names = (pruner.get("instance_name") for pruner in found if isinstance(pruner, dict))
    return {name for name in names if isinstance(name, str)}


def _pruner(pruner: Mapping[str, object], where: str, reading: Reading) -> None:
    kind = pruner.get("class")
    if kind == LEVELS:
        _levels(reading.mapping(pruner.get("levels"), f"{where}.levels", "a mapping of weights to shares"), where,
                reading)  # fmt: skip
        return
    bare = kind.removesuffix("_AGP") if isinstance(kind, str) else ""
    if bare not in (FINE, *RANKED):
        reading.leave(where, f"{given(kind)} does not say how much goes")
        return
    key = "final_sparsity" if kind == FINE or bare != kind or "final_sparsity" in pruner else "desired_sparsity"
    share = reading.share(pruner.get(key), f"{where}.{key}")
    weights = pruner.get("weights")
    names = reading.layers([weights] if isinstance(weights, str) else weights, f"{where}.weights")
    if share is not None:
        group = "Element" if kind == FINE else pruner.get("group_type")
        _groups(pruner, group, share, names, where=where, reading=reading)


def _groups(
    pruner: Mapping[str, object], group: object, share: float, names: tuple[str, ...], *, where: str, reading: Reading
) -> None:  # fmt: skip
    """What goes in groups of one type. Distiller rounds how many go down."""
    if isinstance(group, str) and group in SIDES:
        for name in names:
            reading.want(name, Share(share, down=True), where, side=SIDES[group])
        return
    block, dims = None, None
    if group == "Blocks":
        block, dims = _shape(pruner.get("kwargs"), f"{where}.kwargs.block_shape", reading), 4
        if block is None:
            return
    elif group != "Element":
        reading.leave(
            where, f"groups of the type {given(group)}; what can be read: {', '.join(SIDES)}, Blocks, Element"
        )
        return
    zeros = reading.zeros(share, where, block=block)
    if zeros is not None:
        for name in names:
            reading.want(name, zeros, where, dims=dims)


def _shape(arguments: object, where: str, reading: Reading) -> tuple[int, int] | None:
    """Outputs and inputs of a block."""
    shape = arguments.get("block_shape") if isinstance(arguments, dict) else None
    if not isinstance(shape, list) or len(shape) != 4 or not all(type(s) is int and 0 < s <= 4096 for s in shape):
        reading.wrong(where, shape, "four sides, such as [1, 8, 1, 1]")
    elif min(shape[:2]) > 1 or shape[2:] != [1, 1]:
        reading.leave(where, f"blocks of {shape} lie across a weight as no pattern here does")
    else:
        return shape[0], shape[1]
    return None


def _levels(levels: Mapping[str, object], where: str, reading: Reading) -> None:
    """Zeros by weight."""
    for key, value in levels.items():
        at = f"{where}.levels.{shown(key)}"
        if key == "*":
            reading.leave(at, "is for all other weights: name them")
            continue
        name, share = reading.layer(key, at), reading.share(value, at)
        zeros = None if share is None else reading.zeros(share, at)
        if name is not None and zeros is not None:
            reading.want(name, zeros, at)
