"""From what a file asks of layers to what a policy says of units. What does not fit is told, and nothing is guessed.

Knows the model's units and which positions of which layers belong to them. Does not know any tool's format.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, final

import torch
from torch import Tensor, nn

from autoprune.core.pattern import parse_pattern
from autoprune.core.policy import UnitDecision
from autoprune.core.unit import DROP, NARROWED, Unit
from autoprune.errors import near_miss
from autoprune.importers.base import Count, Dropped, Exactly, Found, Share, Side, Wanted, Zeros
from autoprune.model.discover import Anatomy
from autoprune.replay import Place, Replay
from autoprune.subject import Subject

MAGNITUDE: Final = "magnitude"
NEAR_MISSES: Final = 20
"""Unknown names that are compared with all known ones; comparing takes time."""
MOST_KNOWN: Final = 5000

_ENDS: Final[Mapping[Side, str]] = {"outputs": "out", "inputs": "in"}


@dataclass(frozen=True, slots=True)
class Mapped:
    """Decisions by unit in the model's order, exact channels where they are known, and what could not be mapped."""

    units: Mapping[str, UnitDecision]
    kept: Mapping[str, Tensor]
    """Unit -> the channels that stay, ascending, int64; for those whose channels the file names."""
    unmapped: tuple[str, ...]
    notes: tuple[str, ...]


def mapped(found: Found, subject: Subject, *, method: str) -> Mapped:
    """What `found` means for the subject's units; channels that it does not name are left to `method`.

    A unit of which layers ask different things is left alone, and all of them are listed.
    """
    laid = _Laid(subject.anatomy, dict(subject.model.named_modules()))
    for wanted in found.wanted:
        laid.add(wanted)
    laid.replayed()
    units, kept = laid.decisions(method)
    return Mapped(units, kept, (*found.unmapped, *laid.unmapped), (*found.notes, *laid.notes))


@dataclass(frozen=True, slots=True)
class _Ask:
    """What one wish means for its unit."""

    decision: tuple[int, str]
    """How many channels, weights or blocks stay, and in which pattern."""
    wanted: Wanted


@final
@dataclass(slots=True)
class _Laid:
    """Wishes laid over a model so far."""

    anatomy: Anatomy
    modules: Mapping[str, nn.Module]
    unmapped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _asks: dict[str, list[_Ask]] = field(default_factory=dict)
    _kept: dict[str, Tensor] = field(default_factory=dict)
    _units: dict[str, Unit] = field(init=False)
    _sides: dict[tuple[str, Side], list[Place]] = field(init=False)
    _replay: Replay = field(default_factory=Replay)
    _missed: int = 0

    def __post_init__(self) -> None:
        self._units = {unit.name: unit for unit in self.anatomy.units}
        self._sides = _sides(self.anatomy)

    def add(self, wanted: Wanted) -> None:
        """Map one wish, or tell why that cannot be."""
        name = next((each for each in wanted.names if self._is_known(each)), None)
        if name is None:
            known = [each for each in self.modules if each]
            self._leave(wanted, f"the model has no such layer{self._near(wanted.names[-1], known)}")
            return
        layer = name if name in self.modules else name.rpartition(".")[0]
        kind = type(self.modules[layer]).__name__
        weight = dict(self.modules[layer].named_parameters(recurse=False)).get("weight")
        if wanted.types and kind not in wanted.types:
            self.notes.append(
                f"{wanted.said}: passed over: it is a {kind}, and only {', '.join(wanted.types)} is meant"
            )
        elif wanted.dims is not None and (weight is None or weight.ndim != wanted.dims):
            self._leave(wanted, f"what is asked is meant for weights of {wanted.dims} dimensions, and this is a {kind}")
        elif name not in (layer, f"{layer}.weight"):
            self._leave(wanted, "is a tensor, and not a layer's weight")
        elif isinstance(wanted.amount, Dropped):
            self._drop(wanted, layer)
        elif isinstance(wanted.amount, Zeros):
            self._zeros(wanted, layer, wanted.amount)
        else:
            self._narrow(wanted, layer)

    def replayed(self) -> None:
        """The end of all exact wishes."""
        for unit, steps in self._replay.failed.items():
            self.unmapped += [f"{wanted.said}: {why} (unit {unit}, left as it is)" for wanted, why in steps]
        for unit, (mask, wanted) in self._replay.kept.items():
            self._kept[unit] = mask.nonzero().flatten()
            self._ask(unit, int(mask.sum()), wanted)

    def decisions(self, method: str) -> tuple[dict[str, UnitDecision], dict[str, Tensor]]:
        """Those that all wishes agree on and that change something."""
        agreed: dict[str, UnitDecision] = {}
        whole: list[str] = []
        for name, unit in self._units.items():
            asks = self._asks.get(name, [])
            if len({ask.decision for ask in asks}) > 1:
                self._conflict(unit, asks)
            elif asks:
                keep, pattern = asks[0].decision
                how = {"block": DROP.method, "weights": MAGNITUDE}.get(unit.kind, method)
                agreed[name] = UnitDecision(kind=unit.kind, method=how, keep=keep, of=unit.width, pattern=pattern)
                whole += [name] if keep == unit.width else []
        if whole:
            self.notes.append(f"the file leaves whole: {_some(whole)}")
        moot = [name for name in agreed if name not in whole and self._is_moot(name, agreed)]
        if moot:
            self.notes.append(f"in dropped blocks, and gone with them: {_some(moot)}")
        left = {name: decision for name, decision in agreed.items() if name not in (*whole, *moot)}
        return left, {name: indices for name, indices in self._kept.items() if name in left}

    def _is_known(self, name: str) -> bool:
        """Whether it is a module, or a tensor of one."""
        layer, _, tensor = name.rpartition(".")
        module = self.modules.get(layer)
        return bool(name) and (name in self.modules or (module is not None and tensor in _tensors(module)))

    def _near(self, name: str, known: Sequence[str]) -> str:
        """What may have been meant, for the first names that are unknown."""
        self._missed += 1
        if self._missed > NEAR_MISSES or len(known) > MOST_KNOWN:
            return ""
        return f"; {near_miss(name.removesuffix('.weight'), known)}"

    def _leave(self, wanted: Wanted, why: str) -> None:
        self.unmapped.append(f"{wanted.said}: {why}")

    def _ask(self, unit: str, keep: int, wanted: Wanted, pattern: str = "") -> None:
        self._asks.setdefault(unit, []).append(_Ask((keep, pattern), wanted))

    def _drop(self, wanted: Wanted, layer: str) -> None:
        blocks = [unit.name for unit in self._units.values() if unit.kind == "block"]
        if layer in blocks:
            self._ask(layer, DROP.keep, wanted)
        else:
            self._leave(wanted, f"is no block that can be dropped{self._near(layer, blocks)}")

    def _zeros(self, wanted: Wanted, layer: str, zeros: Zeros) -> None:
        unit = self._units.get(f"{layer}.weight")
        if unit is None or unit.kind != "weights":
            self._leave(wanted, self._refusal(f"{layer}.weight", "zeros inside it are not possible: no single matrix"))
            return
        pattern = zeros.pattern if zeros.parts is None else self._grouped(unit, zeros.pattern, zeros.parts)
        if pattern is None:
            self._leave(wanted, f"{zeros.pattern} in each of {zeros.parts} parts is no pattern such as 2:4 here")
            return
        keep = unit.width - round(parse_pattern(pattern).sparsity * unit.width)
        self._ask(unit.name, keep, wanted, "" if keep == unit.width else pattern)

    def _grouped(self, unit: Unit, pattern: str, parts: int) -> str | None:
        """A share of each of a weight's parts as N:M, where a part is M inputs in a row."""
        weight = self.modules[unit.layers[0]].get_parameter("weight")
        of = unit.width // parts
        keep = round(of * (1 - parse_pattern(pattern).sparsity))
        rows = all(side == 1 for side in weight.shape[2:]) and weight.shape[1] % max(of, 1) == 0
        same = abs(keep - of * (1 - parse_pattern(pattern).sparsity)) < 1e-4
        return f"{keep}:{of}" if rows and same and unit.width % parts == 0 and 0 < keep < of else None

    def _narrow(self, wanted: Wanted, layer: str) -> None:
        places = self._sides.get((layer, wanted.side), [])
        full = self.anatomy.widths.get(f"{layer}/{_ENDS[wanted.side]}", 0)
        if not places or not full:
            self._leave(wanted, self._refusal(layer, f"no unit narrows its {wanted.side}", wanted.side))
        elif isinstance(wanted.amount, Exactly):
            self._replay.step(wanted, layer, places, full)
        elif len(places) > 1:
            names = ", ".join(place.unit for place in places)
            self._leave(wanted, f"its {wanted.side} belong to several units ({names}), and which is meant is not said")
        elif places[0].positions.numel() < full:
            can = places[0].positions.numel()
            self._leave(wanted, f"only {can} of its {full} {wanted.side} can go, and how many of those is not said")
        elif isinstance(wanted.amount, Share):
            self._width(wanted, places[0], wanted.amount.stays(full))
        elif isinstance(wanted.amount, Count) and wanted.amount.of == full:
            self._width(wanted, places[0], wanted.amount.keep)
        elif isinstance(wanted.amount, Count):
            amount = f"{wanted.amount.keep} of {wanted.amount.of}"
            self._leave(wanted, f"the file keeps {amount} {wanted.side}, and it has {full}")

    def _width(self, wanted: Wanted, place: Place, stays: float) -> None:
        """How many channels of a unit stay where so many positions along a side of a layer should."""
        width, each = place.positions.shape
        keep = max(1, round(stays / each))
        if abs(keep * each - stays) > 0.5 + 1e-6:
            what = f"{keep} of {width} {self._units[place.unit].kind} stay ({keep * each} {wanted.side})"
            self.notes.append(f"{wanted.said}: {what} where {stays:.4g} are asked for")
        self._ask(place.unit, keep, wanted)

    def _refusal(self, name: str, otherwise: str, side: Side = "outputs") -> str:
        """Why nothing of one side of a layer goes, as discovery found it: channels are named by what makes them."""
        refused = self.anatomy.refused
        entry = next((each for each in refused if each.root == name), None) if side == "outputs" else None
        entry = entry or next((each for each in refused if name in each.layers and each.root != name), None)
        return f"it stays as it is: {entry.reason}" if entry is not None else otherwise

    def _conflict(self, unit: Unit, asks: Sequence[_Ask]) -> None:
        first = {ask.decision: ask.wanted.said for ask in reversed(asks)}
        what = [f"{said} wants {pattern or f'{keep} of {unit.width}'}" for (keep, pattern), said in first.items()]
        told = "; ".join(reversed(what[-4:]))
        self.unmapped.append(f"{unit.name}: its layers go together and are asked for different things: {told}")

    def _is_moot(self, name: str, agreed: Mapping[str, UnitDecision]) -> bool:
        """Whether a block around a unit is dropped."""
        around = self._units[name].parent
        while around is not None and around not in agreed:
            around = self._units[around].parent
        return around is not None


def _sides(anatomy: Anatomy) -> dict[tuple[str, Side], list[Place]]:
    """Which units the positions of each side of each layer belong to; a norm's are outputs."""
    narrowed = {unit.name for unit in anatomy.units if unit.kind in NARROWED}
    found: dict[tuple[str, Side], list[Place]] = {}
    for group in anatomy.groups:
        for member in group.members if group.root in narrowed else ():
            if member.axis != "in":
                found.setdefault((member.layer, "outputs"), []).append(Place(group.root, member.positions))
            if member.axis in ("in", "both"):
                found.setdefault((member.layer, "inputs"), []).append(Place(group.root, member.positions))
    return {key: [*_joined(places)] for key, places in found.items()}


def _joined(places: Sequence[Place]) -> Iterator[Place]:
    """One place for each unit, with all positions of each of its channels."""
    by_unit: dict[str, list[Tensor]] = {}
    for place in places:
        by_unit.setdefault(place.unit, []).append(place.positions)
    for unit, positions in by_unit.items():
        yield Place(unit, torch.cat(positions, dim=1))


def _tensors(module: nn.Module) -> set[str]:
    return {name for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))}


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
