"""Weights that an ONNX graph holds as integers or halves, and the nodes that make floats of them. Knows no models.

Cast and Mul are done once, when ONNX Runtime loads the file: the session is that of the float model. A DequantizeLinear
it keeps and runs every time, and what it does for constant weights is lost: 1.3 to 3 times as slow, 5 to 19 times with
4 bits in linear layers (version 1.31, one thread); before a MatMul it makes MatMulNBits of it, which rounds the inputs
to 8 bits, too. Only between activations that are integers is it fused, and only with codes of a byte.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime as _onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper, version_converter

from autoprune.errors import TargetError, listed, near_miss

if TYPE_CHECKING:
    from autoprune.packing.coding import Codes

onnxruntime: Any = _onnxruntime  # it declares none of its names as exported

INT4_OPSET, INT4_IR = 21, 10
"""The first versions of ONNX that know 4-bit integers."""


@dataclass(frozen=True, slots=True)
class Stored:
    """What stands in the place of one float initialiser."""

    tensors: tuple[onnx.TensorProto, ...]
    nodes: tuple[onnx.NodeProto, ...]


def with_stored_weights(
    graph: bytes, quantised: Mapping[str, Codes], halves: Collection[str], *, fused: Collection[str] = ()
) -> bytes:
    """`graph` with the float32 initialisers named in `quantised` as integers and those in `halves` as float16.

    Codes are of the weight as torch has it; where the initialiser is that transposed, they are too. Codes within
    [-8, 7] take half a byte where ONNX Runtime runs that, but not those of `fused`: layers whose activations are
    integers. Texts that only tell about the graph are left out. Raises TargetError for names that the graph does not
    have and for shapes that differ.
    """
    proto = bare(graph)
    _check_names(proto, quantised, halves)
    small = {name for name, codes in quantised.items() if name not in fused and is_int4(codes.codes.numpy())}
    if small and runs_int4() and (raised := with_int4(proto)) is not None:
        proto = raised
    else:
        small = set()
    tensors: list[onnx.TensorProto] = []
    nodes: list[onnx.NodeProto] = []
    count = 0
    for tensor in proto.graph.initializer:
        if tensor.name not in quantised and tensor.name not in halves:
            tensors.append(tensor)
            continue
        if tensor.name in quantised:
            codes, scales, axis = _laid(tensor, quantised[tensor.name])
            if tensor.name in fused:
                stored = dequantised(tensor.name, count, codes, scales, axis=axis)
            else:
                stored = multiplied(tensor.name, count, codes, scales, axis=axis, nibbles=tensor.name in small)
        else:
            stored = half(tensor.name, count, numpy_helper.to_array(tensor))
        tensors += stored.tensors
        nodes += stored.nodes
        count += 1
    nodes += proto.graph.node
    del proto.graph.initializer[:], proto.graph.node[:]
    proto.graph.initializer.extend(tensors)
    proto.graph.node.extend(nodes)
    return bytes(proto.SerializeToString(deterministic=True))


def multiplied(
    name: str, index: int, codes: NDArray[np.int8], scales: NDArray[np.float32], *, axis: int, nibbles: bool = False
) -> Stored:
    """The tensor `name` as `codes` times `scales`, one along `axis`; `index` tells its parts from others'.

    With `nibbles` two codes share a byte.
    """
    stored, factors, floats = (f"{part}:{index:02}" for part in ("codes", "scales", "float"))
    kind, raw = (TensorProto.INT4, _pairs(codes)) if nibbles else (TensorProto.INT8, codes.tobytes())
    aligned = scales.reshape(-1, *(1,) * (codes.ndim - 1 - axis))  # leading axes are broadcast anyway
    cast = helper.make_node("Cast", [stored], [floats], to=TensorProto.FLOAT)
    times = helper.make_node("Mul", [floats, factors], [name])
    tensor = helper.make_tensor(stored, kind, codes.shape, raw, raw=True)
    return Stored((tensor, numpy_helper.from_array(aligned, factors)), (cast, times))


def dequantised(name: str, index: int, codes: NDArray[np.int8], scales: NDArray[np.float32], *, axis: int) -> Stored:
    """The same as one node that runtimes know from integer arithmetic."""
    stored, factors = f"codes:{index:02}", f"scales:{index:02}"
    node = helper.make_node("DequantizeLinear", [stored, factors], [name], axis=axis)
    return Stored((numpy_helper.from_array(codes, stored), numpy_helper.from_array(scales, factors)), (node,))


def half(name: str, index: int, values: NDArray[Any]) -> Stored:
    """The tensor `name` as float16. Raises TargetError for values beyond its range."""
    with np.errstate(over="ignore"):
        halves = values.astype(np.float16)
    if not np.isfinite(halves).all():
        raise TargetError(f"onnx: {name!r} has values that float16 cannot hold (65504 at most); keep it in 32 bits")
    stored = f"half:{index:02}"
    cast = helper.make_node("Cast", [stored], [name], to=TensorProto.FLOAT)
    return Stored((numpy_helper.from_array(halves, stored),), (cast,))


def find_weights(graph: bytes, weights: Mapping[str, NDArray[Any]]) -> dict[str, tuple[str, ...]]:
    """For each of `weights` the initialisers that hold exactly its values, or those of a matrix transposed.

    Exporters rename weights, and merge those that are equal.
    """
    by_shape: dict[tuple[int, ...], list[tuple[str, NDArray[Any]]]] = defaultdict(list)
    for tensor in onnx.load_from_string(graph).graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            by_shape[tuple(tensor.dims)].append((tensor.name, numpy_helper.to_array(tensor)))
    return {
        name: tuple(dict.fromkeys(
            initialiser
            for laid in ((values, values.T) if values.ndim == 2 else (values,))
            for initialiser, held in by_shape.get(laid.shape, ()) if np.array_equal(held, laid)
        ))
        for name, values in weights.items()
    }  # fmt: skip


def bare(graph: bytes) -> onnx.ModelProto:
    """A graph without texts that only tell about it: notes, shapes between nodes, stack traces with their paths."""
    proto = onnx.load_from_string(graph)
    shown = (*proto.graph.input, *proto.graph.output)
    for part in (proto, proto.graph, *shown, *proto.graph.node, *proto.graph.initializer):
        part.ClearField("doc_string")
        if "metadata_props" in part.DESCRIPTOR.fields_by_name:
            part.ClearField("metadata_props")
    del proto.graph.value_info[:]
    return proto


def is_int4(codes: NDArray[np.int8]) -> bool:
    """Whether every one of `codes` fits in 4 bits."""
    return bool(codes.min(initial=0) >= -8 and codes.max(initial=0) <= 7)


@cache
def runs_int4() -> bool:
    """Whether the installed ONNX Runtime decodes 4-bit integers; found out on a graph of three."""
    codes = np.array([[-8, 7, 1]], np.int8)
    stored = multiplied("weight", 0, codes, np.ones(1, np.float32), axis=0, nibbles=True)
    shown = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3]) for name in ("input", "output")]
    nodes = [*stored.nodes, helper.make_node("Add", ["input", "weight"], ["output"])]
    graph = helper.make_graph(nodes, "int4", shown[:1], shown[1:], list(stored.tensors))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", INT4_OPSET)], ir_version=INT4_IR)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        found = session.run(None, {"input": np.zeros((1, 3), np.float32)})[0]
    except Exception:  # noqa: BLE001 - whatever it says: it does not
        return False
    return bool(np.array_equal(found, codes))


def with_int4(proto: onnx.ModelProto) -> onnx.ModelProto | None:
    """`proto` in the first version that knows 4-bit integers, or None where ONNX cannot convert it."""
    if all(opset.version >= INT4_OPSET for opset in proto.opset_import if not opset.domain):
        return proto
    try:
        raised = version_converter.convert_version(proto, INT4_OPSET)
    except Exception:  # noqa: BLE001 - a converter in C++ that raises anything
        return None
    del raised.graph.value_info[:]
    raised.ir_version = max(raised.ir_version, INT4_IR)
    return raised


def _pairs(codes: NDArray[np.int8]) -> bytes:
    """Two codes a byte, the first in the low half; the last may be alone."""
    flat = codes.reshape(-1)
    whole = np.append(flat, np.zeros(flat.size % 2, np.int8)).view(np.uint8) & 15
    return (whole[0::2] | whole[1::2] << 4).tobytes()


def _check_names(proto: onnx.ModelProto, quantised: Mapping[str, Codes], halves: Collection[str]) -> None:
    known = {tensor.name for tensor in proto.graph.initializer if tensor.data_type == TensorProto.FLOAT}
    problems = [
        f"{name!r} is no float32 weight of the graph; {near_miss(name, known)}"
        for name in sorted({*quantised, *halves} - known)
    ]
    problems += [f"{name!r} is to be integers and halves; choose one" for name in sorted({*quantised} & {*halves})]
    if problems:
        raise TargetError(f"onnx: weights cannot be stored as asked:\n{listed(problems)}")


def _laid(tensor: onnx.TensorProto, codes: Codes) -> tuple[NDArray[np.int8], NDArray[np.float32], int]:
    """Codes in the initialiser's layout, scales, and the axis that these run along."""
    stored = codes.codes.reshape(codes.shape).numpy()
    ways = {0: stored, 1: stored.T} if stored.ndim == 2 else {0: stored}
    fitting = {axis: way for axis, way in ways.items() if way.shape == tuple(tensor.dims)}
    if not fitting:
        raise TargetError(f"onnx: {tensor.name!r} is {tuple(tensor.dims)}, but its codes are {codes.shape}")
    axis = min(fitting)
    if len(fitting) > 1:  # a square one: as its values lie
        values, decoded = numpy_helper.to_array(tensor), codes.dequantised().numpy()
        axis = int(np.abs(values - decoded.T).sum() < np.abs(values - decoded).sum())
    return np.ascontiguousarray(fitting[axis]), codes.scales.numpy(), axis
