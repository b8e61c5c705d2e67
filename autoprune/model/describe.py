"""The architecture of a model as the cost table needs it: one description a layer, with what sets its widths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from autoprune.core.architecture import Architecture, Layer, LayerKind, Width
from autoprune.errors import ModelError
from autoprune.model.blocks import Block, home_of
from autoprune.model.coupling import CONVOLUTIONS, NORMS, Group, is_depthwise
from autoprune.model.observe import calls


def describe(model: nn.Module, example: Tensor, *, groups: Sequence[Group], blocks: Sequence[Block]) -> Architecture:
    """Every layer with parameters that `model` runs on `example`, in execution order."""
    modules = dict(model.named_modules())
    block_of = {layer: home_of(blocks, (layer,)) for block in blocks for layer in block.layers}
    sides = _sides(groups)
    layers: list[Layer] = []
    counted: set[str] = set()
    seen = calls(model, example)
    repeated = {name for name, times in Counter(call.name for call in seen).items() if times > 1}
    for call in seen:
        layer = modules[call.name]
        if call.name in counted or not isinstance(layer, (*CONVOLUTIONS, nn.Linear, *NORMS)):
            continue
        if call.name in repeated and any(call.name in (m.layer for m in g.members) for g in groups):
            raise ModelError(
                f"{call.name} is run more than once in a forward pass; protect it: --protect {call.name!r}"
            )
        counted.add(call.name)
        layers.append(_layer(call.name, layer, call.inputs, call.output, sides=sides, block=block_of.get(call.name)))
    inside = {id(p) for name in counted for p in modules[name].parameters(recurse=False)}
    other = sum(p.numel() for p in model.parameters() if id(p) not in inside)
    held = {id(b) for name in counted for b in modules[name].buffers(recurse=False)}
    other_bytes = sum(b.numel() * b.element_size() for b in model.buffers() if id(b) not in held)
    return Architecture(tuple(layers), other, other_bytes)


def macs_of(model: nn.Module, sample: Tensor) -> int:
    """Multiply-adds of convolutions and linear layers on `sample` (1, ...), counted on the model as it is."""
    layers = describe(model, sample, groups=(), blocks=()).layers
    return sum(
        layer.positions * layer.kernel * layer.outputs.fixed
        * (1 if layer.kind == "depthwise" else layer.inputs.fixed // layer.groups)
        for layer in layers if layer.kind in ("conv", "depthwise", "linear")
    )  # fmt: skip


def _sides(groups: Sequence[Group]) -> dict[str, list[tuple[str, int, int]]]:
    """`layer/in` and `layer/out` -> (unit, positions a channel, unit width) of every unit on that side."""
    sides: dict[str, list[tuple[str, int, int]]] = {}
    for group in groups:
        for member in group.members:
            ends = ("in", "out") if member.axis in ("both", "norm") else (member.axis,)
            for end in ends:
                sides.setdefault(f"{member.layer}/{end}", []).append(
                    (group.root, member.positions.shape[1], group.width)
                )
    return sides


def _width(total: int, entries: Sequence[tuple[str, int, int]]) -> Width:
    variable = sum(times * width for _, times, width in entries)
    return Width(total - variable, tuple((unit, times) for unit, times, _ in entries))


def _layer(
    name: str, layer: nn.Module, inputs: Tensor, output: Tensor, *, sides: dict[str, list[tuple[str, int, int]]],
    block: str | None,
) -> Layer:  # fmt: skip
    kind: LayerKind
    kernel = groups = positions = 1
    if isinstance(layer, CONVOLUTIONS):
        kind = "depthwise" if is_depthwise(layer) else "conv"
        kernel = int(torch.tensor(layer.kernel_size).prod())
        ins, outs, groups = layer.in_channels, layer.out_channels, layer.groups
        positions = output[0, 0].numel()
        stride = "x".join(str(s) for s in layer.stride)
        shape = "x".join(str(s) for s in output.shape[2:])
        window = "x".join(str(k) for k in layer.kernel_size)
        signature = f"{kind} {window}/{stride} g{groups if kind == 'conv' else 'c'} {ins}->{outs} @{shape}"
    elif isinstance(layer, nn.Linear):
        kind, ins, outs = "linear", layer.in_features, layer.out_features
        positions = output[0].numel() // outs
        signature = f"linear {ins}->{outs} @{positions}"
    else:
        assert isinstance(layer, NORMS)
        kind, ins, outs = "norm", layer.num_features, layer.num_features
        signature = f"norm {outs} @{inputs[0, 0].numel()}"
    own = [parameter for key, parameter in layer.named_parameters(recurse=False)]
    buffers = [buffer for _, buffer in layer.named_buffers(recurse=False)]
    bias_like = sum(1 for p in own if p.ndim == 1)
    each = sum(b.element_size() for b in buffers if b.ndim == 1)
    fixed = sum(b.numel() * b.element_size() for b in buffers if b.ndim != 1)
    return Layer(
        name=name, kind=kind, signature=signature, inputs=_width(ins, sides.get(f"{name}/in", ())),
        outputs=_width(outs, sides.get(f"{name}/out", ())), kernel=kernel, groups=groups, positions=positions,
        bias_like=bias_like, buffer_bytes_each=each, buffer_bytes_fixed=fixed, block=block,
    )  # fmt: skip
