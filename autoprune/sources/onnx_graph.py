"""ONNX files as modules: layers by onnx2pytorch, wired by a graph of our own, without weights held twice.

The graph is simplified by ONNX Runtime first (constants, identities, norms after convolutions), and the result is
compared with its own values, node by node.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, fx, nn

from autoprune.sources.refusal import RefusedError, library
from autoprune.sources.reshape import Reshape, flexible

TOLERANCE = 1e-4
BATCH = 2
_NORMS: dict[int, Any] = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def from_onnx(path: Path) -> nn.Module:
    """The model of an .onnx file, computing what ONNX Runtime computes. Raises RefusedError that names the node."""
    library("onnx2pytorch", extra="onnx-import")
    runtime = library("onnxruntime", extra="onnx-import")
    content = _simplified(path, runtime)
    inputs = _checked_inputs(content)
    made = _Wired(content).module()
    example = _example(inputs)
    _check_same(made, content, example, runtime)
    return made.eval()


def _simplified(path: Path, runtime: Any) -> onnx.ModelProto:
    """The file after ONNX Runtime's basic optimisations, in operations of the standard, with shapes."""
    with TemporaryDirectory(prefix="autoprune-") as folder:
        options = runtime.SessionOptions()
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(Path(folder) / "simple.onnx")
        options.log_severity_level = 3
        try:
            runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            content = onnx.load(options.optimized_model_filepath, load_external_data=False)
            onnx.external_data_helper.load_external_data_for_model(content, str(path.parent))
            return onnx.shape_inference.infer_shapes(content, data_prop=True)
        except Exception as error:
            text = " ".join(str(error).split())[:400]
            raise RefusedError(f"ONNX Runtime cannot read it ({type(error).__name__}: {text})") from error


def _checked_inputs(content: onnx.ModelProto) -> onnx.ValueInfoProto:
    """The one tensor of floats that the graph reads."""
    stored = {tensor.name for tensor in content.graph.initializer}
    inputs = [value for value in content.graph.input if value.name not in stored]
    kinds = [value.type.tensor_type.elem_type for value in inputs]
    if kinds != [onnx.TensorProto.FLOAT]:
        names = ", ".join(f"{value.name}" for value in inputs)
        raise RefusedError(f"it reads {names or 'nothing'}; it must read one tensor of 32-bit floats")
    others = sorted({node.domain for node in content.graph.node} - {"", "ai.onnx"})
    if others:
        raise RefusedError(f"it has operations outside the standard ({', '.join(others)})")
    found: onnx.ValueInfoProto = inputs[0]
    return found


def _example(value: onnx.ValueInfoProto) -> Tensor:
    """Random numbers of the graph's input shape; a batch of 2 where it is free."""
    sizes = _sizes(value)
    free = [size for size in sizes[1:] if not isinstance(size, int)]
    if not sizes or free:
        raise RefusedError(
            f"its input {value.name} has free sizes beside the batch ({sizes}); export it with fixed ones"
        )
    shape = [sizes[0] if isinstance(sizes[0], int) else BATCH, *sizes[1:]]
    return torch.randn([int(str(size)) for size in shape], generator=torch.Generator().manual_seed(0))


class _Wired:
    """One graph being turned into modules."""

    def __init__(self, content: onnx.ModelProto) -> None:
        self.content = onnx.ModelProto()
        self.content.CopyFrom(content)  # onnx2pytorch takes nodes out of it
        graph = self.content.graph
        self.tensors = {tensor.name: tensor for tensor in graph.initializer}
        self.sizes = {value.name: _sizes(value) for value in (*graph.input, *graph.value_info, *graph.output)}
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.values: dict[str, fx.Node] = {}
        self.names: set[str] = set()

    def module(self) -> fx.GraphModule:
        """The whole graph. Raises RefusedError for the node that cannot be converted."""
        reads = next(value.name for value in self.content.graph.input if value.name not in self.tensors)
        self.values[reads] = self.graph.placeholder("inputs")
        for node, operation in self._operations():
            self._add(node, operation)
        outputs = [self.values[value.name] for value in self.content.graph.output]
        self.graph.output(outputs[0] if len(outputs) == 1 else tuple(outputs))
        made = fx.GraphModule(self.root, self.graph, class_name="FromOnnx")
        made.graph.eliminate_dead_code()
        return fx.GraphModule(made, made.graph, class_name="FromOnnx")

    def _operations(self) -> Iterator[tuple[onnx.NodeProto, Any]]:
        """Every node with what computes it; onnx2pytorch joins nodes of the graph meanwhile."""
        convert = library("onnx2pytorch.convert.operations", extra="onnx-import").convert_operations
        opset = next(entry.version for entry in self.content.opset_import if entry.domain in ("", "ai.onnx"))
        graph = self.content.graph
        found: dict[str, Any] = {}
        steps = convert(graph, opset, 0, False)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="No explicit conversion")
            warnings.filterwarnings("ignore", category=UserWarning)
            while True:
                place = len(found)
                try:
                    output, _, operation = next(steps)
                except StopIteration:
                    break
                except Exception as error:
                    raise RefusedError(f"{_told(graph.node[place])} cannot be converted: {error}") from error
                found[output] = operation
        for node in graph.node:
            yield node, found[node.output[0]]

    def _add(self, node: onnx.NodeProto, operation: Any) -> None:
        own = self._layer(node, operation)
        if isinstance(own, partial) and own.func is torch.cat:
            arguments: tuple[Any, ...] = ([self._read(name) for name in node.input],)
            made = self.graph.call_function(torch.cat, arguments, dict(own.keywords))
        elif isinstance(own, nn.Module):
            made = self.graph.call_module(self._place(node, own), self._arguments(node, own))
        else:
            made = self.graph.call_function(own, self._arguments(node, own))
        made.meta["onnx"] = node
        if _gives_many(own):
            for place, name in enumerate(node.output):
                self.values[name] = self.graph.call_function(_item, (made, place))
        else:
            self.values[node.output[0]] = made

    def _arguments(self, node: onnx.NodeProto, operation: Any) -> tuple[Any, ...]:
        """What the node reads; a layer that holds its weights reads the first input that is none of them."""
        if isinstance(operation, Reshape):
            return (self._read(node.input[0]),)
        if any(True for _ in getattr(operation, "parameters", lambda: ())()):
            return tuple(self._read(name) for name in node.input if name and name not in self.tensors)
        names = list(node.input)
        while names and not names[-1]:
            names.pop()
        return tuple(self._read(name) if name else None for name in names)

    def _read(self, name: str) -> fx.Node:
        """A value of the graph; of a constant, a buffer."""
        if name not in self.values:
            own = self._free(f"constant_{name}")
            self.root.register_buffer(own, _tensor(self.tensors[name]))
            self.values[name] = self.graph.get_attr(own)
        return self.values[name]

    def _layer(self, node: onnx.NodeProto, operation: Any) -> Any:
        """torch's own layer where onnx2pytorch has one that pruning would not know, otherwise `operation`."""
        rule = _OWN.get(node.op_type)
        own = None if rule is None else rule(self, node, operation)
        return operation if own is None else own

    def _place(self, node: onnx.NodeProto, layer: nn.Module) -> str:
        """Add `layer` under a name from its weight's, else from the node's."""
        weights = [name for name in node.input if name in self.tensors and "::" not in name and "." in name]
        told = weights[0].rpartition(".")[0] if weights and any(True for _ in layer.parameters()) else node.name
        name = self._free(told or node.op_type)
        self.root.add_module(name, layer)
        return name

    def _free(self, told: str) -> str:
        plain = re.sub(r"\W+", "_", told).strip("_") or "step"
        plain = f"_{plain}" if plain[0].isdigit() else plain
        name = next(n for n in (plain, *(f"{plain}_{i}" for i in range(1, len(self.names) + 2))) if n not in self.names)
        self.names.add(name)
        return name

    def _stored(self, node: onnx.NodeProto, place: int) -> Tensor | None:
        name = node.input[place] if place < len(node.input) else ""
        return _tensor(self.tensors[name]) if name in self.tensors else None


def _batch_norm(wired: _Wired, node: onnx.NodeProto, _: Any) -> nn.Module | None:
    tensors = [wired._stored(node, place) for place in range(1, 5)]
    kind = _NORMS.get(len(wired.sizes.get(node.input[0], ())))
    if kind is None or any(tensor is None for tensor in tensors):
        return None
    weight, bias, mean, var = (tensor for tensor in tensors if tensor is not None)
    layer: nn.Module = kind(len(weight), eps=_attribute(node, "epsilon", 1e-5))
    layer.load_state_dict({"weight": weight, "bias": bias, "running_mean": mean, "running_var": var}, strict=False)
    return layer.eval()


def _layer_norm(wired: _Wired, node: onnx.NodeProto, _: Any) -> nn.Module | None:
    weight, bias = wired._stored(node, 1), wired._stored(node, 2)
    rank = len(wired.sizes.get(node.input[0], ()))
    if weight is None or weight.ndim != 1 or len(node.output) > 1 or _attribute(node, "axis", -1) not in (-1, rank - 1):
        return None
    layer = nn.LayerNorm(len(weight), eps=_attribute(node, "epsilon", 1e-5), bias=bias is not None)
    layer.load_state_dict({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
    return layer


def _reshape(wired: _Wired, node: onnx.NodeProto, _: Any) -> nn.Module | None:
    """By the numbers that shape inference knows."""
    before, after = wired.sizes.get(node.input[0]), wired.sizes.get(node.output[0])
    sizes = None if before is None or after is None else flexible(before, after)
    return None if sizes is None else Reshape(sizes)


def _flatten(_: _Wired, node: onnx.NodeProto, __: Any) -> nn.Module | None:
    return nn.Flatten(1) if _attribute(node, "axis", 1) == 1 else None


def _linear(_: _Wired, __: onnx.NodeProto, operation: Any) -> nn.Module | None:
    """onnx2pytorch takes whatever is added for a bias, also what differs from position to position."""
    bias = operation.bias if isinstance(operation, nn.Linear) else None
    if bias is None or bias.ndim == 1:
        return None
    bare = nn.Linear(operation.in_features, operation.out_features, bias=False)
    bare.weight = operation.weight
    return nn.Sequential(bare, _Added(bias.detach()))


def _max_pool(_: _Wired, node: onnx.NodeProto, operation: Any) -> nn.Module | None:
    """onnx2pytorch asks for indices, too."""
    pools = [each for each in operation.modules() if isinstance(each, nn.modules.pooling._MaxPoolNd)]
    for pool in pools if len(node.output) == 1 else ():
        pool.return_indices = False
    return None


class _Added(nn.Module):
    """Its input plus a constant."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("values", values)

    def forward(self, inputs: Tensor) -> Tensor:
        """The sum."""
        values = self.values
        assert isinstance(values, Tensor)
        return inputs + values


_OWN: Mapping[str, Callable[[_Wired, onnx.NodeProto, Any], nn.Module | None]] = {
    "BatchNormalization": _batch_norm,
    "LayerNormalization": _layer_norm,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "MatMul": _linear,
    "MaxPool": _max_pool,
}


def _gives_many(operation: Any) -> bool:
    """Whether an operation returns a tuple; those of onnx2pytorch that do are listed there."""
    if isinstance(operation, nn.modules.pooling._MaxPoolNd):
        return bool(operation.return_indices)
    kinds = library("onnx2pytorch.constants", extra="onnx-import").MULTIOUTPUT_LAYERS
    inner = operation if isinstance(operation, nn.Sequential) else (operation,)
    return any(isinstance(each, kinds) and not isinstance(each, nn.modules.pooling._MaxPoolNd) for each in inner)


def _item(values: Any, place: int) -> Any:
    return values[place]


def _check_same(model: fx.GraphModule, content: onnx.ModelProto, example: Tensor, runtime: Any) -> None:
    """Raises RefusedError that names the first node whose values differ from ONNX Runtime's."""
    wanted = _values(content, example, runtime)
    names = {node.meta["onnx"].output[0]: node for node in model.graph.nodes if "onnx" in node.meta}
    found = _Watched(model)
    try:
        with torch.no_grad():
            found.run(example)
    except Exception as error:
        at = f"{_told(found.last.meta['onnx'])}: " if found.last is not None and "onnx" in found.last.meta else ""
        raise RefusedError(f"{at}it does not run as modules: {type(error).__name__}: {error}") from error
    for output, node in names.items():
        values, right = found.seen.get(node.name), wanted.get(output)
        if not isinstance(values, Tensor) or right is None or not values.is_floating_point():
            continue
        off = _off(values, right)
        if not off <= TOLERANCE:
            raise RefusedError(f"{_told(node.meta['onnx'])} computes something else as a module (off by {off:.2g})")


def _off(values: Tensor, right: Any) -> float:
    """The largest difference, over the largest value if that is above 1."""
    if tuple(values.shape) != tuple(right.shape):
        return float("inf")
    if not right.size:
        return 0.0
    return float(np.abs(values.numpy() - right).max() / max(1.0, float(np.abs(right).max())))


def _values(content: onnx.ModelProto, example: Tensor, runtime: Any) -> dict[str, Any]:
    """Every value of the graph on `example`, by ONNX Runtime without further optimisations."""
    whole = onnx.ModelProto()
    whole.CopyFrom(content)
    outputs = [node.output[0] for node in whole.graph.node]
    del whole.graph.output[:]
    whole.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = runtime.InferenceSession(whole.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip(outputs, session.run(outputs, {session.get_inputs()[0].name: example.numpy()}), strict=True))


class _Watched(fx.Interpreter):
    """Runs a graph and keeps every value."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seen: dict[str, Any] = {}
        self.last: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        """One step."""
        self.last = n
        value = super().run_node(n)
        self.seen[n.name] = value
        return value


def _told(node: onnx.NodeProto) -> str:
    return f"{node.op_type} node {node.name or node.output[0]!r}"


def _tensor(stored: onnx.TensorProto) -> Tensor:
    return torch.from_numpy(np.array(numpy_helper.to_array(stored)))


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    return next((onnx.helper.get_attribute_value(each) for each in node.attribute if each.name == name), default)


def _sizes(value: onnx.ValueInfoProto) -> list[int | str | None]:
    """Integers, names of free sizes, None for unknown ones; empty where the rank is not known."""
    return [
        int(dim.dim_value) if dim.HasField("dim_value") else dim.dim_param or None
        for dim in value.type.tensor_type.shape.dim
    ]
