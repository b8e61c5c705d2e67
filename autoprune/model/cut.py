"""Really cutting a model: smaller layers in a copy, dropped blocks replaced. The user's model is never written.

Knows index sets and mended weights. Does not know methods, options or where the indices come from.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from autoprune.model.blocks import Block, is_within, outermost, put
from autoprune.model.coupling import CONVOLUTIONS, NORMS, Group, is_depthwise
from autoprune.model.resolution import Size, resize_input
from autoprune.rebuilding import cropped, set_number, shrink

INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


@dataclass(frozen=True, slots=True)
class Mended:
    """New weights of a layer whose inputs or kernel were cut, (outputs before any cut, kept inputs, kept kernel), and
    its new bias.
    """

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True, slots=True)
class Kept:
    """Which positions of a layer's two sides stay, ascending, and how large a middle of its kernel; None: all of it."""

    inputs: Tensor | None = None
    outputs: Tensor | None = None
    kernel: int | None = None

    @property
    def reads_all(self) -> bool:
        """Whether the layer still reads all that it did."""
        return self.inputs is None and self.kernel is None


@dataclass(frozen=True, slots=True)
class CutPlan:
    """For every layer that changes: what stays; and the blocks that go. Layers of dropped blocks are not named."""

    layers: Mapping[str, Kept]
    dropped: tuple[Block, ...] = ()
    units: Mapping[str, Tensor] = field(default_factory=dict)
    """The kept channels of each narrowed unit, ascending."""
    slabs: Mapping[tuple[str, int], Tensor] = field(default_factory=dict)
    """Parameter and dimension -> the positions that stay, ascending."""
    numbers: Mapping[tuple[str, str], int] = field(default_factory=dict)
    """Module and attribute -> the integer it holds afterwards."""
    size: Size | None = None
    """To what the model is to resize its input; None where it reads it as it is."""


def plan_cut(
    widths: Mapping[str, int], groups: Collection[Group], *, kept: Mapping[str, Tensor], dropped: Collection[Block],
    kernels: Mapping[str, int] | None = None, size: Size | None = None,
) -> CutPlan:  # fmt: skip
    """What `kept` (group root -> kept channels) and `kernels` (layer -> side that stays) mean for each layer.

    `widths` are the dense sizes of every side, keyed `layer/in` and `layer/out`. What lies in a dropped block goes
    with it, whatever else is said of it.
    """
    dropped = outermost(dropped)
    gone = {layer for block in dropped for layer in block.layers}
    replaced = [each.name for block in dropped for each in block.stand_ins]
    named = {member.layer for group in groups for member in group.members}  # norms without parameters among them
    gone |= {layer for layer in named if any(is_within(layer, name) for name in replaced)}
    masks: dict[str, Tensor] = {}
    numbers: dict[tuple[str, str], int] = {}
    for group in groups:
        if group.root not in kept:
            continue
        numbers |= {
            (n.module, n.attribute): n.each * len(kept[group.root])
            for n in group.numbers
            if not any(is_within(n.module, name) for name in replaced)
        }
        removed = torch.ones(group.width, dtype=torch.bool)
        removed[kept[group.root]] = False
        for member in group.members:
            if member.layer in gone:
                continue
            side = f"{member.layer}/{'in' if member.axis == 'in' else 'out'}"
            mask = masks.setdefault(side, torch.ones(widths[side], dtype=torch.bool))
            mask[member.positions[removed].flatten()] = False
    layers: dict[str, Kept] = {}
    for side, mask in masks.items():
        layer, end = side.rsplit("/", 1)
        indices, before = mask.nonzero().flatten(), layers.get(layer, Kept())
        inputs, outputs = (indices, before.outputs) if end == "in" else (before.inputs, indices)
        layers[layer] = Kept(inputs, outputs)
    for layer, kernel in (kernels or {}).items():
        if layer not in gone:
            layers[layer] = replace(layers.get(layer, Kept()), kernel=kernel)
    return CutPlan(layers, dropped, dict(kept), _kept_slabs(groups, kept, gone), numbers, size)


def _kept_slabs(
    groups: Collection[Group], kept: Mapping[str, Tensor], gone: Collection[str]
) -> dict[tuple[str, int], Tensor]:
    """What stays of the parameters outside layers, by parameter and dimension."""
    masks: dict[tuple[str, int], Tensor] = {}
    for group in groups:
        for slab in group.slabs if group.root in kept else ():
            if slab.module not in gone:
                mask = masks.setdefault((slab.parameter, slab.dim), torch.ones(slab.size, dtype=torch.bool))
                removed = torch.ones(group.width, dtype=torch.bool)
                removed[kept[group.root]] = False
                mask[slab.positions[removed].flatten()] = False
    return {place: mask.nonzero().flatten() for place, mask in masks.items()}


def side_widths(model: nn.Module) -> dict[str, int]:
    """The sizes of both sides of every layer that can be cut, keyed `layer/in` and `layer/out`."""
    widths: dict[str, int] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, CONVOLUTIONS):
            widths |= {f"{name}/in": layer.in_channels, f"{name}/out": layer.out_channels}
        elif isinstance(layer, nn.Linear):
            widths |= {f"{name}/in": layer.in_features, f"{name}/out": layer.out_features}
        elif isinstance(layer, NORMS):
            widths[f"{name}/out"] = layer.num_features
    return widths


def cut(model: nn.Module, plan: CutPlan, mended: Mapping[str, Mended] | None = None) -> nn.Module:
    """A smaller copy of `model`. `mended` gives new input-side weights of layers that stay."""
    smaller = copy.deepcopy(model)
    if plan.size is not None:
        resize_input(smaller, plan.size)
    for (name, attribute), value in plan.numbers.items():
        set_number(smaller.get_submodule(name), attribute, value)
    for (parameter, dim), indices in plan.slabs.items():
        _narrow_parameter(smaller, parameter, dim, indices)
    put(smaller, [each for block in plan.dropped for each in block.stand_ins])
    modules = dict(smaller.named_modules())
    new = mended or {}
    for name in dict.fromkeys((*plan.layers, *new)):
        _narrow(modules[name], plan.layers.get(name, Kept()), new.get(name))
    _tie(model, smaller)
    return smaller


def _tie(model: nn.Module, smaller: nn.Module) -> None:
    """Parameters that are one in `model` are one again in our own copy, unless their numbers differ now."""
    shared: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shared.setdefault(parameter, []).append(name)
    left = dict(smaller.named_parameters(remove_duplicate=False))
    for names in shared.values():
        first, *others = [name for name in names if name in left] or [""]
        for other in others:
            if left[other] is not left[first] and torch.equal(left[other], left[first]):
                owner, _, key = other.rpartition(".")
                smaller.get_submodule(owner).register_parameter(key, left[first])


def _narrow_parameter(model: nn.Module, path: str, dim: int, indices: Tensor) -> None:
    """Shrink one parameter of our own copy, and what its module says of its shape."""
    name, _, key = path.rpartition(".")
    module, parameter = model.get_submodule(name), model.get_parameter(path)
    smaller = parameter.detach().index_select(dim, indices)
    module.register_parameter(key, nn.Parameter(smaller, requires_grad=parameter.requires_grad))
    if isinstance(module, nn.Embedding):
        module.embedding_dim = module.weight.shape[1]
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        module.normalized_shape = tuple(smaller.shape)
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = len(smaller)
    elif isinstance(module, INSTANCE_NORMS):
        module.num_features = len(smaller)
    elif isinstance(module, nn.RNNBase):
        read, own = module.get_parameter("weight_ih_l0"), module.get_parameter("weight_hh_l0")
        module.input_size, module.hidden_size = read.shape[1], own.shape[1]
        module._init_flat_weights()


def _narrow(layer: nn.Module, kept: Kept, mended: Mended | None) -> None:
    """Shrink one layer of our own copy in place."""
    if isinstance(layer, NORMS):
        _narrow_norm(layer, kept)
        return
    if not isinstance(layer, (*CONVOLUTIONS, nn.Linear)):
        raise TypeError(f"{type(layer).__name__} cannot be cut")
    weight, bias = _cut_inputs(layer, kept, mended)
    if kept.outputs is not None:
        weight, bias = weight[kept.outputs], bias[kept.outputs] if bias is not None else None
    _set_widths(layer, kept)
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone(), requires_grad=layer.weight.requires_grad)
    layer.weight = nn.Parameter(weight.clone(), requires_grad=layer.weight.requires_grad)


def _cut_inputs(layer: nn.Module, kept: Kept, mended: Mended | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a layer with the inputs and the kernel that stay, all outputs still there."""
    assert isinstance(layer.weight, Tensor)
    weight = layer.weight.detach()
    bias = layer.bias.detach() if isinstance(layer.bias, Tensor) else None
    if mended is not None:
        return mended.weight, mended.bias if mended.bias is not None else bias
    inputs = kept.inputs
    if inputs is not None and isinstance(layer, CONVOLUTIONS):
        inputs = inputs[: len(inputs) // layer.groups]  # each group keeps the same of its inputs
    weight = weight if inputs is None else weight[:, inputs]
    return weight if kept.kernel is None else cropped(weight, kept.kernel), bias


def _set_widths(layer: nn.Module, kept: Kept) -> None:
    if isinstance(layer, nn.Linear):
        layer.in_features = layer.in_features if kept.inputs is None else len(kept.inputs)
        layer.out_features = layer.out_features if kept.outputs is None else len(kept.outputs)
    elif isinstance(layer, CONVOLUTIONS):
        if kept.kernel is not None:
            shrink(layer, tuple(kept.kernel for _ in layer.kernel_size))
        if kept.outputs is not None and is_depthwise(layer):
            layer.groups = layer.in_channels = len(kept.outputs)
        layer.in_channels = layer.in_channels if kept.inputs is None else len(kept.inputs)
        layer.out_channels = layer.out_channels if kept.outputs is None else len(kept.outputs)


def _narrow_norm(layer: nn.Module, kept: Kept) -> None:
    if kept.outputs is None or not isinstance(layer, NORMS):
        return
    if layer.affine:
        layer.weight = nn.Parameter(layer.weight.detach()[kept.outputs].clone())
        layer.bias = nn.Parameter(layer.bias.detach()[kept.outputs].clone())
    if layer.running_mean is not None and layer.running_var is not None:
        layer.running_mean = layer.running_mean[kept.outputs].clone()
        layer.running_var = layer.running_var[kept.outputs].clone()
    layer.num_features = len(kept.outputs)
