"""The architecture of a model as the cost table needs it: what it computes and holds, and what sets its widths.

Layers come first; products that no layer is for (attention, bare parameters) and parameters outside layers follow.
All is counted on one sample.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from autoprune.core.architecture import Architecture, Layer, LayerKind, Width
from autoprune.errors import ModelError
from autoprune.model.axes.products import Product
from autoprune.model.axes.trace import Traced, trace
from autoprune.model.blocks import Block, is_within
from autoprune.model.coupling import CONVOLUTIONS, NORMS, Group, is_depthwise
from autoprune.model.dimensions import Dimensions, two_sided, width_of
from autoprune.model.observe import Call, calls

Sides = Mapping[str, Sequence[tuple[str, int, int]]]
"""`layer/in` and `layer/out` -> (unit, positions a channel, unit width) of every unit on that side."""


def describe(model: nn.Module, example: Tensor, *, groups: Sequence[Group], blocks: Sequence[Block]) -> Architecture:
    """Everything that `model` computes with and holds when it runs on the first sample of `example`.

    Of a model that runs but cannot be watched, products outside layers are not known.
    """
    seen = calls(model, example[:1])
    layers = _layers(model, seen, groups=groups, blocks=blocks)
    try:
        traced = trace(model, example[:1])
    except Exception:  # noqa: BLE001 (whatever a foreign model raises when it is watched; discovery tells it)
        traced = None
    dims = Dimensions.of(traced, groups) if traced is not None else None
    products = _products(model, traced, dims, layers, blocks) if traced is not None and dims is not None else ()
    others, params, size = _others(model, layers, dims, blocks)
    return Architecture((*layers, *products, *others), params, size)


def macs_of(model: nn.Module, sample: Tensor) -> int:
    """Multiply-adds of all layers and products on `sample` (1, ...), counted on the model as it is."""
    layers = describe(model, sample, groups=(), blocks=()).layers
    return sum(
        layer.positions * layer.kernel * layer.outputs.fixed
        * (1 if layer.kind == "depthwise" else layer.inputs.fixed // layer.groups)
        for layer in layers if layer.kind in ("conv", "depthwise", "linear", "product")
    )  # fmt: skip


# ---- layers --------------------------------------------------------------------------------------------------------


def _layers(
    model: nn.Module, seen: Sequence[Call], *, groups: Sequence[Group], blocks: Sequence[Block]
) -> tuple[Layer, ...]:
    """Every convolution, linear layer and batch norm that runs, in execution order."""
    modules = dict(model.named_modules())
    sides = _sides(groups)
    shared = {id(entry.tensor) for entry in _parameters(model) if len(entry.names) > 1}
    repeated = {name for name, times in Counter(call.name for call in seen).items() if times > 1}
    layers: dict[str, Layer] = {}
    for call in seen:
        layer = modules[call.name]
        if call.name in layers or not isinstance(layer, (*CONVOLUTIONS, nn.Linear, *NORMS)):
            continue
        if call.name in repeated and any(call.name in (m.layer for m in g.members) for g in groups):
            raise ModelError(
                f"{call.name} is run more than once in a forward pass; protect it: --protect {call.name!r}"
            )
        described = _layer(call, layer, sides=sides, is_shared=lambda tensor: id(tensor) in shared)
        layers[call.name] = replace(described, block=_block_of(call.name, blocks))
    return tuple(layers.values())


def _sides(groups: Sequence[Group]) -> Sides:
    sides: dict[str, list[tuple[str, int, int]]] = {}
    for group in groups:
        for member in group.members:
            ends = ("in", "out") if member.axis in ("both", "norm") else (member.axis,)
            for end in ends:
                sides.setdefault(f"{member.layer}/{end}", []).append(
                    (group.root, member.positions.shape[1], group.width)
                )
    return sides


def _layer(call: Call, layer: nn.Module, *, sides: Sides, is_shared: Callable[[Tensor], bool]) -> Layer:
    kind: LayerKind
    kernel = groups = positions = 1
    if isinstance(layer, CONVOLUTIONS):
        kind = "depthwise" if is_depthwise(layer) else "conv"
        kernel = math.prod(layer.kernel_size)
        ins, outs, groups = layer.in_channels, layer.out_channels, layer.groups
        positions = call.output.numel() // outs
        stride = "x".join(str(s) for s in layer.stride)
        shape = "x".join(str(s) for s in call.output.shape[2:])
        window = "x".join(str(k) for k in layer.kernel_size)
        signature = f"{kind} {window}/{stride} g{groups if kind == 'conv' else 'c'} {ins}->{outs} @{shape}"
    elif isinstance(layer, nn.Linear):
        kind, ins, outs = "linear", layer.in_features, layer.out_features
        positions = call.output.numel() // outs
        signature = f"linear {ins}->{outs} @{positions}"
    else:
        assert isinstance(layer, NORMS)
        kind, ins, outs = "norm", layer.num_features, layer.num_features
        signature = f"norm {outs} @{call.inputs.numel() // outs}"
    own = {key: parameter for key, parameter in layer.named_parameters(recurse=False) if not is_shared(parameter)}
    buffers = [buffer for _, buffer in layer.named_buffers(recurse=False)]
    each = sum(b.element_size() for b in buffers if b.ndim == 1)
    fixed = sum(b.numel() * b.element_size() for b in buffers if b.ndim != 1)
    return Layer(
        name=call.name, kind=kind, signature=signature, inputs=width_of(ins, sides.get(f"{call.name}/in", ())),
        outputs=width_of(outs, sides.get(f"{call.name}/out", ())), kernel=kernel, groups=groups, positions=positions,
        bias_like=sum(1 for parameter in own.values() if parameter.shape == (outs,)), buffer_bytes_each=each,
        buffer_bytes_fixed=fixed, owned="weight" in own,
    )  # fmt: skip


def _block_of(name: str, blocks: Sequence[Block]) -> str | None:
    """The innermost block that a module or parameter goes with."""
    around = [block for block in blocks if any(is_within(name, each.name) for each in block.stand_ins)]
    return min(around, key=lambda block: len(block.layers)).name if around else None


# ---- products ------------------------------------------------------------------------------------------------------


def _products(
    model: nn.Module, traced: Traced, dims: Dimensions, layers: Sequence[Layer], blocks: Sequence[Block]
) -> Iterator[Layer]:
    """The products that are none of `layers`'; those of one module that are alike, together."""
    size = traced.axes.size
    alike: dict[Layer, int] = {}
    for product in _outside(model, traced, {layer.name for layer in layers}):
        exprs = (product.over, product.made, *product.rest)
        sizes = [size(expr) for expr in exprs]
        inputs, outputs, rows = two_sided(sizes, [dims.width(expr) for expr in exprs])
        found = Layer(
            name=f"{product.module}:{product.name}", kind="product",
            signature=f"product {product.name} {'x'.join(map(str, sizes))}", inputs=inputs, outputs=outputs,
            kernel=product.kernel, groups=1, positions=rows * product.times, bias_like=0, buffer_bytes_each=0,
            buffer_bytes_fixed=0, block=_block_of(product.module, blocks), owned=False,
        )  # fmt: skip
        alike[found] = alike.get(found, 0) + 1
    for number, (layer, times) in enumerate(alike.items()):
        signature = f"{layer.signature} @{layer.positions * times}"
        yield replace(layer, name=f"{layer.name}:{number}", positions=layer.positions * times, signature=signature)


def _outside(model: nn.Module, traced: Traced, layers: set[str]) -> Iterator[Product]:
    """All products but one of each layer, which is its own."""
    size = traced.axes.size
    waiting: set[str] = set(layers)
    for product in traced.products:
        sides = (size(product.over), size(product.made))
        if product.module in waiting and sides == _matrix(model.get_submodule(product.module)):
            waiting.remove(product.module)
        else:
            yield product


def _matrix(layer: nn.Module) -> tuple[int, int] | None:
    """Inputs (of one group) and outputs of what a layer multiplies by; None of a norm."""
    if isinstance(layer, CONVOLUTIONS):
        return layer.in_channels // layer.groups, layer.out_channels
    return (layer.in_features, layer.out_features) if isinstance(layer, nn.Linear) else None


# ---- parameters outside layers -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A parameter or a buffer and all its names."""

    tensor: Tensor
    names: tuple[str, ...]


def _parameters(model: nn.Module) -> list[_Tensor]:
    names: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(tensor), []).append(name)
        tensors[id(tensor)] = tensor
    return [_Tensor(tensor, tuple(names[key])) for key, tensor in tensors.items()]


def _others(
    model: nn.Module, layers: Sequence[Layer], dims: Dimensions | None, blocks: Sequence[Block]
) -> tuple[list[Layer], int, int]:
    """What no layer owns: the parameters and buffers that a choice may change, how many parameters there are besides,
    and how many bytes of buffers. What several share goes with the block that holds all of them.
    """
    owners = {layer.name: layer for layer in layers}
    others: list[Layer] = []
    params = size = 0
    for entry in _parameters(model):
        if len(entry.names) == 1 and _is_owned(model, entry, owners):
            continue
        around = {_block_of(name, blocks) for name in entry.names}
        block = around.pop() if len(around) == 1 else None
        other = replace(_parameter(entry, dims), block=block)
        if block is None and not other.inputs.terms and not other.outputs.terms:
            params += entry.tensor.numel()
        else:
            others.append(other)
    stored = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name not in stored or name.rpartition(".")[0] in owners:
            continue
        held, block = buffer.numel() * buffer.element_size(), _block_of(name, blocks)
        if block is None:
            size += held
        else:
            others.append(replace(_other(name, Width(0), Width(0), 1), buffer_bytes_fixed=held, block=block))
    return others, params, size


def _is_owned(model: nn.Module, entry: _Tensor, owners: Mapping[str, Layer]) -> bool:
    """Whether a layer counts a parameter as its own: its weight, or one number for each output."""
    name, _, key = entry.names[0].rpartition(".")
    if name not in owners:
        return False
    return (key == "weight" and owners[name].owned) or entry.tensor.shape == (_outputs(model.get_submodule(name)),)


def _outputs(layer: nn.Module) -> int:
    if isinstance(layer, CONVOLUTIONS):
        return layer.out_channels
    if isinstance(layer, nn.Linear):
        return layer.out_features
    assert isinstance(layer, NORMS)
    return layer.num_features


def _parameter(entry: _Tensor, dims: Dimensions | None) -> Layer:
    """A parameter by its widest two sides."""
    shape = entry.tensor.shape
    exprs = None if dims is None else dims.traced.dims[entry.names[0]]
    widths = [Width(size) for size in shape] if dims is None or exprs is None else [dims.width(e) for e in exprs]
    if len(shape) < 2:
        return _other(entry.names[0], Width(1), widths[0] if widths else Width(1), 1)
    inputs, outputs, rest = two_sided(shape, widths)
    return _other(entry.names[0], inputs, outputs, rest)


def _other(name: str, inputs: Width, outputs: Width, area: int) -> Layer:
    return Layer(
        name=name, kind="other", signature="other", inputs=inputs, outputs=outputs, kernel=area, groups=1, positions=0,
        bias_like=0, buffer_bytes_each=0, buffer_bytes_fixed=0,
    )  # fmt: skip
