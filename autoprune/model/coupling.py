"""Groups of coupled channels, from the axes that a run of the model shows.

Knows which positions of which layers go together with each channel of a root layer, and why the other channels must
stay. What it says is tested by the caller (`discover`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeGuard

import torch
from torch import Tensor, nn

from autoprune.errors import ModelError
from autoprune.model.axes.expressions import Axes, Expr
from autoprune.model.axes.operation import HEAD_WIDTH, HEADS, NORMALISED, PARTS
from autoprune.model.axes.trace import Traced, trace

Axis = Literal["out", "in", "both", "norm"]
"""Which side of a layer: `out` its outputs, `in` its inputs, `both` a depthwise layer's, `norm` a norm's channels."""

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
CUTTABLE = (*CONVOLUTIONS, nn.Linear, *NORMS)


_SCALED = f"it is {NORMALISED}"


@dataclass(frozen=True, slots=True)
class Member:
    """One side of one layer: `positions` (width, each) are the indices along that side that belong to each channel."""

    layer: str
    axis: Axis
    positions: Tensor


@dataclass(frozen=True, slots=True)
class Slab:
    """One dimension of a parameter outside the layers above: an embedding, a slope, a bare parameter of any module."""

    parameter: str
    dim: int
    size: int
    positions: Tensor
    reads: bool = False
    """Whether the parameter multiplies the channels and sums over them there, as a layer does with its inputs."""

    @property
    def module(self) -> str:
        """The module that holds the parameter."""
        return self.parameter.rpartition(".")[0]


@dataclass(frozen=True, slots=True)
class Number:
    """An integer attribute of a module that the forward pass needs to be `each` times the channels that are left."""

    module: str
    attribute: str
    """Its name; with a dot, one step inside it: `config.heads`, `sizes.1`."""
    each: int


@dataclass(frozen=True, slots=True)
class Group:
    """Channels that can only go together. A channel of a grouped convolution is one from each of its groups.

    `heads` says that the channels are attention heads: each has all positions of its width. `norms` are the modules
    that scale each channel by all of them: without some, the others are scaled by those that are left.
    """

    root: str
    width: int
    members: tuple[Member, ...]
    slabs: tuple[Slab, ...] = ()
    numbers: tuple[Number, ...] = ()
    heads: bool = False
    norms: tuple[str, ...] = ()

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers with members, and the modules that hold parameters with slabs."""
        return tuple(dict.fromkeys((*(m.layer for m in self.members), *(s.module for s in self.slabs if s.module))))

    def on(self, *axes: Axis) -> tuple[Member, ...]:
        """The members on the given sides."""
        return tuple(member for member in self.members if member.axis in axes)


Spared = Literal["model", "protect", "only", "space", "hidden"]
"""Who says that a group must stay: the model's own operations, or a part of the search space (`hidden`: that streams
which norms scale are left)."""


@dataclass(frozen=True, slots=True)
class Refused:
    """A group that must stay as it is, and why."""

    root: str
    reason: str
    layers: tuple[str, ...] = ()
    """All layers that have these channels on a side."""
    by: Spared = "model"


def is_depthwise(layer: nn.Module) -> bool:
    """Whether every output of a convolution reads exactly one input of its own."""
    return isinstance(layer, CONVOLUTIONS) and layer.groups == layer.in_channels == layer.out_channels > 1


def is_matrix(layer: nn.Module) -> TypeGuard[nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear]:
    """Whether a layer's weights are one matrix: a linear layer, or a convolution without groups."""
    return isinstance(layer, nn.Linear) or (isinstance(layer, CONVOLUTIONS) and layer.groups == 1)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A group as the axes show it, and the modules in whose forward pass a number of its width may be written down."""

    group: Group
    shapers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Side:
    """One side of one layer, its dimension, and what speaks against cutting it."""

    layer: str
    axis: Axis
    expr: Expr
    times: int = 1
    """The side is this many copies of the dimension, end to end (the inputs of a grouped convolution)."""
    refusal: str | None = None
    parameter: tuple[str, int] | None = None
    """The parameter and its dimension, where the layer is none of those that have sides."""
    reads: frozenset[int] = frozenset()
    """The axes that such a parameter reads."""

    def has_read(self, axis: int) -> bool:
        """Whether the channels of an axis are inputs on this side."""
        return axis in self.reads if self.parameter is not None else self.axis == "in"


def coupled_groups(
    model: nn.Module, example: Tensor, *, hidden: bool = False
) -> tuple[tuple[Candidate, ...], tuple[Refused, ...]]:
    """All groups of coupled channels of `model`, each named by its first layer in execution order.

    `example` is a batch the model accepts. With `hidden`, also those that a norm scales by all of
    them, and weights that two layers share along one dimension. Raises ModelError when the model cannot be run under
    observation.
    """
    try:
        traced = trace(model, example)
    except Exception as error:  # whatever a foreign model raises when it is watched
        raise ModelError(
            f"the model cannot be traced for coupled channels ({type(error).__name__}: {error}); "
            "use `space: blocks` to search over blocks alone, or protect the part that fails by a glob"
        ) from error
    order = {name: place for place, name in enumerate(traced.runs)}
    sides = sorted(_sides(model, traced, hidden=hidden), key=lambda side: order.get(side.layer, len(order)))
    by_axis: dict[int, list[_Side]] = {}
    for side in sides:
        for axis in sorted(traced.axes.leaves(side.expr)):
            by_axis.setdefault(axis, []).append(side)
    candidates: list[Candidate] = []
    refused: list[tuple[Refused, _Side, int]] = []
    for axis, touched in by_axis.items():
        makers = [side for side in touched if _makes(side, axis) and side.layer and side.layer in order]
        if not makers or not any(side.parameter is None or side.has_read(axis) for side in touched):
            continue
        reason = _refusal(axis, touched, traced, norms=_norms(model, axis, touched, traced) if hidden else ())
        entry = Refused(makers[0].layer, reason) if reason else _group(axis, makers[0], touched, traced)
        if isinstance(entry, Refused):
            held = tuple(dict.fromkeys(side.layer for side in touched if side.layer))
            by: Spared = "hidden" if not hidden and entry.reason.startswith(_SCALED) else entry.by
            refused.append((replace(entry, layers=held, by=by), makers[0], axis))
        else:
            candidates.append(Candidate(entry, traced.shapers(axis)))
    chosen, overlapping = _apart(candidates)
    chosen.sort(key=lambda candidate: order[candidate.group.root])
    told = _told([candidate.group for candidate in chosen], refused, traced.axes)
    return tuple(chosen), (*told, *overlapping, *_computed(model, {layer for c in chosen for layer in c.group.layers}))


def _computed(model: nn.Module, touched: Collection[str]) -> Iterator[Refused]:
    """Layers that have no weight but compute one (spectral norm, and other parametrisations), where nothing is cut."""
    for name, module in model.named_modules():
        held = {key for key, _ in module.named_parameters(recurse=False)}
        if (
            isinstance(module, (*CONVOLUTIONS, nn.Linear))
            and "weight" not in held
            and not any(layer == name or layer.startswith(f"{name}.") for layer in touched)
        ):
            yield Refused(name, "its weight is computed in every forward pass from other parameters")


def _makes(side: _Side, axis: int) -> bool:
    return side.axis in ("out", "both") and not side.has_read(axis)


def _told(groups: Sequence[Group], refused: Sequence[tuple[Refused, _Side, int]], axes: Axes) -> Iterator[Refused]:
    """One refusal a layer, and none of what lies across a group: the heads' width where heads may go, say.

    That three projections are made in one, which is why their number stays, says nothing of the channels of each.
    """
    roots = {group.root for group in groups}
    taken = {(m.layer, m.axis, place) for g in groups for m in g.members for place in m.positions.flatten().tolist()}
    first: dict[str, Refused] = {}
    for entry, side, axis in refused:
        places = (place for part in axes.places(side.expr)[0][axis] for place in part)
        if entry.root in roots or any((side.layer, side.axis, place) in taken for place in places):
            continue
        if entry.root not in first or first[entry.root].reason.endswith(PARTS):
            first[entry.root] = entry
    return iter(first.values())


def _norms(model: nn.Module, axis: int, sides: Sequence[_Side], traced: Traced) -> tuple[str, ...]:
    """The modules that normalise an axis and can do so over fewer channels: those that scale each by a weight of its
    own, and by all the channels rather than by those of its group.
    """
    owned = {side.parameter[0] for side in sides if side.parameter is not None}
    return tuple(
        name for name in sorted(traced.normalised(axis))
        if f"{name}.weight" in owned and not isinstance(model.get_submodule(name), (nn.GroupNorm, *NORMS))
    )  # fmt: skip


def _sides(model: nn.Module, traced: Traced, *, hidden: bool) -> Iterator[_Side]:
    """Every side of everything that has parameters, with its dimension."""
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        own = {key: f"{name}.{key}" if name else key for key, _ in module.named_parameters(recurse=False)}
        refusal = None
        for key, path in own.items():
            first = owners.setdefault(id(getattr(module, key)), name)
            if first != name and not (hidden and _is_apart(traced, path)):
                refusal = f"{first} and {name} share their weights"
        if isinstance(module, nn.RNNBase) and module.proj_size > 0:
            refusal = f"{name} projects its state (proj_size)"
        if traced.runs[name] > 1:
            refusal = f"{name} is run more than once in a forward pass"
        elif isinstance(module, CUTTABLE) and not traced.runs[name]:
            refusal = f"{name} is not run itself: something else uses its weights"
        yield from _sides_of(name, module, own, traced, refusal)


def _is_apart(traced: Traced, parameter: str) -> bool:
    """Whether no axis lies along two dimensions of a parameter."""
    leaves = [traced.axes.leaves(expr) for expr in traced.dims[parameter]]
    return len(frozenset[int]().union(*leaves)) == sum(map(len, leaves))


def _sides_of(
    name: str, module: nn.Module, own: Mapping[str, str], traced: Traced, refusal: str | None
) -> Iterator[_Side]:
    if isinstance(module, NORMS):
        held = traced.dims.get(f"{name}.running_mean") or traced.dims.get(own.get("weight", ""))
        if held:
            yield _Side(name, "norm", held[0], refusal=refusal)
    elif isinstance(module, (*CONVOLUTIONS, nn.Linear)) and "weight" in own:
        weight = traced.dims[own["weight"]]  # (out, in / groups, ...)
        if is_depthwise(module):
            yield _Side(name, "both", weight[0], refusal=refusal)
            return
        groups = module.groups if isinstance(module, CONVOLUTIONS) else 1
        yield _Side(name, "out", weight[0], refusal=refusal)
        yield _Side(name, "in", weight[1], times=groups, refusal=refusal)
    else:
        for path in own.values():
            made: Axis = "out" if len(traced.dims[path]) > 1 else "norm"
            for dim, expr in enumerate(traced.dims[path]):
                yield _Side(name, made, expr, refusal=refusal, parameter=(path, dim), reads=traced.read_by(path, dim))


def _refusal(axis: int, sides: Sequence[_Side], traced: Traced, *, norms: Collection[str]) -> str | None:
    """Why no index of an axis may go, if so."""
    pinned = traced.axes.pin_of(axis)
    if pinned is not None:
        return pinned
    if HEAD_WIDTH in traced.axes.marks_of(axis):
        return "it is the width of attention heads, not a number of them"
    normalised = sorted(traced.normalised(axis) - set(norms))
    if normalised:
        more = f" and {len(normalised) - 1} more" if len(normalised) > 1 else ""
        return f"{_SCALED}{normalised[0]}{more}: without a channel the others are scaled differently"
    refusal = next((side.refusal for side in sides if side.refusal), None)
    if refusal is not None:
        return refusal
    if not any(side.has_read(axis) for side in sides):
        return "no layer reads its channels"
    return None


def _group(axis: int, root: _Side, sides: Sequence[_Side], traced: Traced) -> Group | Refused:
    """The group of an axis, or why its channels cannot be told apart."""
    axes = traced.axes
    members: list[Member] = []
    slabs: list[Slab] = []
    for side in sides:
        found, tangled = axes.places(side.expr)
        if axis in tangled:
            return Refused(root.layer, f"{side.layer} has its channels along and across one side")
        step = axes.size(side.expr)
        places = [[copy * step + place for copy in range(side.times) for place in part] for part in found[axis]]
        positions = torch.tensor(places, dtype=torch.int64)
        if side.parameter is None:
            members.append(Member(side.layer, side.axis, positions))
        else:
            slabs.append(Slab(*side.parameter, step, positions, side.has_read(axis)))
    heads, norms = HEADS in axes.marks_of(axis), tuple(sorted(traced.normalised(axis)))
    return Group(root.layer, axes.width(axis), tuple(members), tuple(slabs), heads=heads, norms=norms)


def _apart(candidates: Sequence[Candidate]) -> tuple[list[Candidate], list[Refused]]:
    """Candidates without two that share a position or a name: the wider stays."""
    chosen: list[Candidate] = []
    refused: dict[str, Refused] = {}
    taken: dict[tuple[str, str | int, int], str] = {}
    for candidate in sorted(candidates, key=lambda candidate: -candidate.group.width):
        group = candidate.group
        places: list[tuple[str, str | int, Tensor]] = [(m.layer, m.axis, m.positions) for m in group.members]
        places += [(slab.parameter, slab.dim, slab.positions) for slab in group.slabs]
        held = [(where, side, place) for where, side, at in places for place in at.flatten().tolist()]
        other = next((taken[key] for key in held if key in taken), None)
        if other is not None or any(group.root == before.group.root for before in chosen):
            reason = f"its channels cross or lie beside those of {other or group.root}"
            refused.setdefault(group.root, Refused(group.root, reason, group.layers))
            continue
        chosen.append(candidate)
        taken |= dict.fromkeys(held, group.root)
    roots = {candidate.group.root for candidate in chosen}
    return chosen, [entry for root, entry in refused.items() if root not in roots]
