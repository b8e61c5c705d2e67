"""Groups of coupled channels, from Torch-Pruning's dependency graph. The only file that imports torch_pruning.

Knows which positions of which layers go together with each channel of a root layer. Torch-Pruning is asked for index
maps alone: it never prunes here, and what it says is tested by the caller (`discover`), because it treats operations
that it does not know as if they left channels where they are.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

import torch
import torch_pruning
from torch import Tensor, nn

from autoprune.errors import ModelError
from autoprune.model.observe import calls

Axis = Literal["out", "in", "both", "norm"]
"""Which side of a layer: `out` its outputs, `in` its inputs, `both` a depthwise layer's, `norm` a norm's channels."""

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
CUTTABLE = (*CONVOLUTIONS, nn.Linear, *NORMS)


@dataclass(frozen=True, slots=True)
class Member:
    """One side of one layer: `positions` (width, each) are the indices along that side that belong to each channel."""

    layer: str
    axis: Axis
    positions: Tensor


@dataclass(frozen=True, slots=True)
class Group:
    """Channels that can only go together. A channel of a grouped convolution is one from each of its groups."""

    root: str
    width: int
    members: tuple[Member, ...]

    def on(self, *axes: Axis) -> tuple[Member, ...]:
        """The members on the given sides."""
        return tuple(member for member in self.members if member.axis in axes)


@dataclass(frozen=True, slots=True)
class Refused:
    """A group that must stay as it is, and why."""

    root: str
    reason: str


def is_depthwise(layer: nn.Module) -> bool:
    """Whether every output of a convolution reads exactly one input of its own."""
    return isinstance(layer, CONVOLUTIONS) and layer.groups == layer.in_channels == layer.out_channels > 1


def is_matrix(layer: nn.Module) -> TypeGuard[nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear]:
    """Whether a layer's weights are one matrix: a linear layer, or a convolution without groups."""
    return isinstance(layer, nn.Linear) or (isinstance(layer, CONVOLUTIONS) and layer.groups == 1)


def coupled_groups(model: nn.Module, example: Tensor) -> tuple[tuple[Group, ...], tuple[Refused, ...]]:
    """All groups of coupled channels of `model`, each named by its first root layer in execution order.

    `example` is a batch the model accepts. Parameters need gradients while the graph is traced; their flags are put
    back. Raises ModelError when the model cannot be traced at all.
    """
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            make: Any = torch_pruning.DependencyGraph
            graph = make()
            graph.build_dependency(model, example_inputs=example, verbose=False)
            raw = list(graph.get_all_groups(root_module_types=(*CONVOLUTIONS, nn.Linear)))
    except Exception as error:  # whatever a foreign tracer raises on a foreign model
        raise ModelError(
            f"the model cannot be traced for coupled channels ({type(error).__name__}: {error}); "
            "use `space: blocks` to search over blocks alone, or protect the part that fails by a glob"
        ) from error
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags[name])
    names = {module: name for name, module in model.named_modules()}
    order = {call.name: place for place, call in enumerate(calls(model, example))}
    modules = dict(model.named_modules())
    read = [_read(items, names) for items in raw]
    entries = [_named(entry, modules, order) if isinstance(entry, Group) else entry for entry in read]
    groups = sorted((e for e in entries if isinstance(e, Group)), key=lambda group: order[group.root])
    return tuple(groups), tuple(entry for entry in entries if isinstance(entry, Refused))


def _read(items: Any, names: dict[nn.Module, str]) -> Group | Refused:
    """One of Torch-Pruning's groups as ours, or the reason why it cannot be cut."""
    root = names[items[0].dep.target.module]
    width = len(items[0].idxs)
    members: list[tuple[str, Axis, list[int], list[int]]] = []
    strides = [1]
    for item in items:
        module, handler = item.dep.target.module, item.dep.handler.__name__
        if isinstance(module, nn.Parameter):
            return Refused(root, "a parameter outside any layer reads or makes its channels")
        if type(module).__module__.startswith("torch_pruning"):
            if type(module).__name__ == "_OutputOp":
                return Refused(root, "it makes the model's output")
            continue
        if not isinstance(module, CUTTABLE):
            if any(True for _ in module.parameters(recurse=False)):
                return Refused(root, f"{names[module]} ({type(module).__name__}) cannot be cut")
            continue
        axis = _axis(module, handler)
        if axis in ("out", "in") and isinstance(module, CONVOLUTIONS):
            strides.append(module.groups)
        members.append((names[module], axis, list(item.idxs), list(item.root_idxs)))
    if not any(axis == "in" for _, axis, _, _ in members):
        return Refused(root, "no layer reads its channels: it makes the model's output")
    return _coupled(root, width, math.lcm(*strides), members)


def _coupled(
    root: str, width: int, groups: int, members: Iterable[tuple[str, Axis, list[int], list[int]]]
) -> Group | Refused:
    """Join channel j of every convolution group into one, so that grouped convolutions keep equal groups."""
    if width % groups:
        return Refused(root, f"{width} channels do not divide into the {groups} groups of its convolutions")
    classes = width // groups
    built: list[Member] = []
    for layer, axis, positions, roots in members:
        lists: list[list[int]] = [[] for _ in range(classes)]
        for position, channel in zip(positions, roots, strict=True):
            lists[channel % classes].append(position)
        if len({len(entries) for entries in lists}) != 1:
            return Refused(root, f"its channels reach {layer} unevenly")
        built.append(Member(layer, axis, torch.tensor(lists, dtype=torch.int64)))
    return Group(root, classes, tuple(built)) if classes > 1 else Refused(root, "it has one channel alone")


def _named(group: Group, modules: Mapping[str, nn.Module], order: Mapping[str, int]) -> Group | Refused:
    """The group by the name, and in the channel order, of the first layer that makes its channels."""
    for member in group.members:
        if not _is_even(member, modules[member.layer]):
            return Refused(group.root, f"its channels are not spread evenly over the groups of {member.layer}")
    makers = group.on("out") or group.on("both")
    root = min(makers, key=lambda member: order[member.layer])
    ascending = root.positions[:, 0].argsort()
    return Group(root.layer, group.width, tuple(Member(m.layer, m.axis, m.positions[ascending]) for m in group.members))


def _is_even(member: Member, layer: nn.Module) -> bool:
    """Whether each channel has the same places in every group of a grouped convolution, so that groups stay equal."""
    if not isinstance(layer, CONVOLUTIONS) or layer.groups == 1 or member.axis not in ("in", "out"):
        return True
    size = (layer.in_channels if member.axis == "in" else layer.out_channels) // layer.groups
    for positions in member.positions.tolist():
        places = [sorted(p % size for p in positions if p // size == group) for group in range(layer.groups)]
        if any(place != places[0] for place in places):
            return False
    return True


def _axis(module: nn.Module, handler: str) -> Axis:
    if isinstance(module, NORMS):
        return "norm"
    if is_depthwise(module):
        return "both"
    return "in" if "in_channels" in handler else "out"
