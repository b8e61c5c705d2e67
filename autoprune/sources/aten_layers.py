"""Exported graphs as modules: operations on parameters become the layers that they were written as.

`torch.export` leaves functions on tensors; pruning needs layers that hold their weights and modules that can be called
alone. Knows operations of aten. Does not open files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.unflatten import InterpreterModule, unflatten

from autoprune.sources.refusal import RefusedError
from autoprune.sources.reshape import Reshape, flexible

aten = torch.ops.aten
_CONVOLUTIONS: dict[int, Any] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
_NORMS: dict[int, Any] = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
_RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
_TRANSPOSES = (aten.t.default, aten.transpose.int, aten.permute.default)
_CHECKS = ("_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range")
_TRAINING = "it was exported in training mode; export it after model.eval()"


@dataclass(frozen=True, slots=True)
class _Call:
    """One operation of a graph: its arguments by the names of the schema."""

    node: fx.Node
    owner: nn.Module
    given: Mapping[str, Any]

    @classmethod
    def of(cls, node: fx.Node, owner: nn.Module) -> _Call:
        given: dict[str, Any] = {}
        for place, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
            if place < len(node.args):
                given[argument.name] = node.args[place]
            else:
                given[argument.name] = node.kwargs.get(argument.name, argument.default_value)
        return cls(node, owner, given)

    def tensor(self, name: str) -> Tensor | None:
        """The tensor of the model that an argument is; None where it is none."""
        return _stored(self.given[name], self.owner)

    @property
    def prefix(self) -> str:
        """What the weight's name begins with: `out_proj.weight` and `out_proj_weight` -> `out_proj`."""
        weight = next(
            (v for k, v in self.given.items() if k in ("weight", "mat2") and isinstance(v, fx.Node)), self.node
        )
        while weight.op == "call_function" and weight.target in _TRANSPOSES:
            weight = weight.args[0]  # type: ignore[assignment]
        name = str(weight.target) if weight.op == "get_attr" else self.node.name
        return name.removesuffix("weight").rstrip("._") or self.node.name


def as_layers(program: ExportedProgram) -> nn.Module:
    """The program as a tree of modules, by the names they had when exported; one tensor in, what it returns out.

    A tuple of one is returned as its tensor. Raises RefusedError.
    """
    if len(program.graph_signature.user_inputs) != 1:
        raise RefusedError(f"it takes {len(program.graph_signature.user_inputs)} inputs; export a module of one tensor")
    tree = unflatten(program)
    root = _module(tree, tree.graph, "Exported")
    for node in root.graph.nodes:
        result = node.args[0] if node.op == "output" else None
        if isinstance(result, tuple | list) and len(result) == 1:
            node.args = (result[0],)
    root.recompile()
    for parameter in root.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return root.eval()


def _module(owner: nn.Module, graph: fx.Graph, kind: str) -> fx.GraphModule:
    """`graph`, whose names are `owner`'s, as a module of its own, from the leaves up."""
    for node in graph.nodes:
        child = owner.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(child, InterpreterModule):
            name = str(child.type_name() or "Exported").rpartition(".")[2]
            owner.set_submodule(str(node.target), _leaf(_module(child, child.graph, name)))
    for node in list(graph.nodes):
        if node.op == "call_function":
            _rewrite(owner, graph, node)
    made = fx.GraphModule(owner, graph, class_name=kind)
    made.graph.eliminate_dead_code()
    return fx.GraphModule(made, made.graph, class_name=kind)  # without what only dead operations read


def _leaf(module: fx.GraphModule) -> nn.Module:
    """The layer itself where a module does nothing but call one."""
    steps = [node for node in module.graph.nodes if node.op not in ("placeholder", "output")]
    layers = list(module.children())
    sole = len(steps) == len(layers) == 1 and steps[0].op == "call_module"
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    return layers[0] if sole and len(inputs) == 1 and not isinstance(layers[0], Reshape) else module


def _rewrite(owner: nn.Module, graph: fx.Graph, node: fx.Node) -> None:
    """Put a module in the place of one operation, where there is one that does the same."""
    if any(check in str(node.target) for check in _CHECKS):
        if not node.users:
            graph.erase_node(node)
        return
    rule = _RULES.get(node.target)
    if rule is None:
        return
    call = _Call.of(node, owner)
    found = rule(call)
    if found is None:
        return
    layer, inputs = found
    name = _free(owner, call.prefix if next(layer.parameters(), None) is not None else node.name)
    owner.set_submodule(name, layer)
    with graph.inserting_before(node):
        made = graph.create_node("call_module", name, (inputs,))  # its module is not yet the owner
    made.meta = dict(node.meta)
    if isinstance(node.meta.get("val"), tuple | list) and rule is not _split:  # (result, saved statistics, ...)
        for user in list(node.users):
            user.replace_all_uses_with(made)
            graph.erase_node(user)
    node.replace_all_uses_with(made)
    graph.erase_node(node)


def _free(owner: nn.Module, name: str) -> str:
    """`name`, or with a number where a module that does something has it."""
    taken = {path for path, module in owner.named_modules() if type(module) is not nn.Module}
    taken |= {path for path, _ in owner.named_parameters()}
    return next(each for each in (name, *(f"{name}_{i}" for i in range(1, len(taken) + 2))) if each not in taken)


_Made = tuple[nn.Module, fx.Node] | None


def _convolution(call: _Call) -> _Made:
    weight = call.tensor("weight")
    if weight is None or call.given.get("transposed"):
        return None
    rank, groups = weight.ndim - 2, int(call.given["groups"])
    window: dict[str, Any] = {}
    for key in ("stride", "padding", "dilation"):
        value = call.given[key]
        window[key] = value if isinstance(value, str) else _spread(value, rank)
    layer = _CONVOLUTIONS[weight.ndim](
        weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:]), groups=groups,
        bias=call.tensor("bias") is not None, device="meta", **window,
    )  # fmt: skip
    return _filled(layer, weight=weight, bias=call.tensor("bias")), call.given["input"]


def _linear(call: _Call) -> _Made:
    weight, bias = call.tensor("weight"), call.tensor("bias")
    if weight is None or weight.ndim != 2 or (bias is None and call.given["bias"] is not None):
        return None
    return _filled(_empty_linear(weight, bias), weight=weight, bias=bias), call.given["input"]


def _product(call: _Call) -> _Made:
    """`addmm(bias, x, weight.t())` and `mm(x, weight.t())`: linear layers after decompositions."""
    inputs, weight = call.given.get("mat1", call.given["self"]), call.tensor("mat2")
    bias = call.tensor("self") if "mat1" in call.given else None
    if weight is None or ("mat1" in call.given and (bias is None or bias.ndim != 1)):
        return None
    plain = [call.given.get(key) in (None, 1) for key in ("alpha", "beta")]
    rows = weight.t()  # (outputs, inputs)
    return (_filled(_empty_linear(rows, bias), weight=rows, bias=bias), inputs) if all(plain) else None


def _batch_norm(call: _Call) -> _Made:
    mean, var = call.tensor("running_mean"), call.tensor("running_var")
    if call.given.get("training"):
        raise RefusedError(_TRAINING)
    sizes = _sizes(call.given["input"])
    if mean is None or var is None or len(sizes) not in _NORMS:
        return None
    affine = call.tensor("weight") is not None
    layer = _NORMS[len(sizes)](
        mean.shape[0], eps=call.given["eps"], momentum=call.given["momentum"], affine=affine, device="meta"
    )
    layer.running_mean, layer.running_var = mean.detach(), var.detach()
    layer.num_batches_tracked = torch.tensor(0)
    tensors = {"weight": call.tensor("weight"), "bias": call.tensor("bias")} if affine else {}
    return _filled(layer, **tensors), call.given["input"]


def _layer_norm(call: _Call) -> _Made:
    weight, bias = call.tensor("weight"), call.tensor("bias")
    if weight is None:
        return None
    shape = list(call.given["normalized_shape"])
    layer = nn.LayerNorm(shape, eps=call.given["eps"], bias=bias is not None, device="meta")
    return _filled(layer, weight=weight, bias=bias), call.given["input"]


def _group_norm(call: _Call) -> _Made:
    weight, bias = call.tensor("weight"), call.tensor("bias")
    if weight is None or bias is None:
        return None
    layer = nn.GroupNorm(call.given["num_groups"], weight.shape[0], eps=call.given["eps"], device="meta")
    return _filled(layer, weight=weight, bias=bias), call.given["input"]


def _embedding(call: _Call) -> _Made:
    weight, padding = call.tensor("weight"), int(call.given["padding_idx"])
    if weight is None:
        return None
    layer = nn.Embedding(weight.shape[0], weight.shape[1], padding_idx=padding if padding >= 0 else None, device="meta")
    return _filled(layer, weight=weight), call.given["indices"]


def _reshape(call: _Call) -> _Made:
    inputs = call.given["self"]
    sizes = flexible(_sizes(inputs), _sizes(call.node))
    return None if sizes is None else (Reshape(sizes), inputs)


def _split(call: _Call) -> _Made:
    """Equal parts, however wide they are."""
    inputs, dim, size = call.given["self"], int(call.given["dim"]), call.given["split_size"]
    whole = _sizes(inputs)[dim]
    if not isinstance(whole, int) or not isinstance(size, int) or whole % size:
        return None
    return Parts(whole // size, dim), inputs


def _dropout(call: _Call) -> _Made:
    if call.given["train"] and call.given["p"]:
        raise RefusedError(_TRAINING)
    return None


class Parts(nn.Module):
    """Its input in `count` equal parts along `dim`."""

    def __init__(self, count: int, dim: int) -> None:
        super().__init__()
        self.count = count
        self.dim = dim

    def forward(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """The parts, in order."""
        return inputs.chunk(self.count, self.dim)


_RULES: dict[Any, Callable[[_Call], _Made]] = {
    **dict.fromkeys((aten.conv1d.default, aten.conv2d.default, aten.conv3d.default), _convolution),
    **dict.fromkeys((aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding), _convolution),
    aten.convolution.default: _convolution,
    aten.linear.default: _linear,
    aten.addmm.default: _product,
    aten.mm.default: _product,
    aten.batch_norm.default: _batch_norm,
    aten._native_batch_norm_legit_no_training.default: _batch_norm,
    aten.layer_norm.default: _layer_norm,
    aten.native_layer_norm.default: _layer_norm,
    aten.group_norm.default: _group_norm,
    aten.embedding.default: _embedding,
    aten.split.Tensor: _split,
    aten.dropout.default: _dropout,
    **dict.fromkeys(_RESHAPES, _reshape),
}


def _stored(value: object, owner: nn.Module) -> Tensor | None:
    """The tensor of `owner` that a node reads, turned round where the graph turns it."""
    if not isinstance(value, fx.Node):
        return None
    if value.op == "call_function" and value.target in _TRANSPOSES:
        inner = _stored(value.args[0], owner)
        return None if inner is None or inner.ndim != 2 else inner.t()
    if value.op != "get_attr":
        return None
    place, _, name = str(value.target).rpartition(".")
    found = getattr(owner.get_submodule(place), name)
    return found if isinstance(found, Tensor) else None


def _empty_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    return nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")


def _filled(layer: nn.Module, **tensors: Tensor | None) -> nn.Module:
    """`layer` with these parameters; a parameter that is shared stays shared."""
    for name, tensor in tensors.items():
        if tensor is not None:
            shared = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor.detach(), requires_grad=False)
            layer.register_parameter(name, shared)
    return layer


def _spread(value: Sequence[int], rank: int) -> tuple[int, ...]:
    return tuple(value) if len(value) == rank else tuple(value) * rank


def _sizes(node: fx.Node) -> list[int | str]:
    """What the exporter wrote down of a tensor's shape; a text stands for a size that is free."""
    value = node.meta["val"]
    shape = (value[0] if isinstance(value, tuple | list) else value).shape
    return [int(size) if isinstance(size, int) else str(size) for size in shape]
