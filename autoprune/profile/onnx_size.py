"""How many bytes the ONNX file of any choice takes: a sum over layers, from one export of the dense model.

What a layer takes while it is there are its nodes and names; the rest goes with its widths. Lengths that the format
writes with one byte more or less, and names that change where a block is gone, are not followed: a few bytes a layer.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor, nn

from autoprune.core.architecture import Layer
from autoprune.errors import TargetError, listed
from autoprune.profile.onnx_export import LOST, folded
from autoprune.runtimes.onnx_weights import (
    Stored,
    bare,
    dequantised,
    find_weights,
    half,
    multiplied,
    runs_int4,
    with_int4,
)
from autoprune.runtimes.onnxruntime import export

FLOAT, HALF, SCALE = 4, 2, 4
"""Bytes of a number."""
_WHOLE = ""
"""The key of what is one tensor and no layer."""


@dataclass(frozen=True, slots=True)
class LayerBytes:
    """What one layer stored in some bits takes: `present` while it is there, and for each pair of an input and an
    output and for each output.
    """

    present: float
    per_pair: float
    per_output: float


@dataclass(frozen=True, slots=True)
class OnnxBytes:
    """Bytes of the file as sums over layers; all by layer, with weights as floats where nothing else is said."""

    constant: float
    """What no choice changes."""
    present: Mapping[str, float]
    per_pair: Mapping[str, float]
    """Of the weight for each input times output; 0 for depthwise layers and norms."""
    copies: Mapping[str, int]
    """How often the weight, or the parameter outside layers, is in the file."""
    per_output: Mapping[str, float]
    """Of vectors (bias, a norm's), for each output."""
    kernel_per_output: Mapping[str, float]
    """Of a depthwise layer's weight, for each output."""
    integer_extra: Mapping[str, float]
    """What decoding integers takes above one float tensor, while the layer is there."""
    fused_extra: Mapping[str, float]
    """The same, of a layer whose activations are integers, too; not what rounds these."""
    half_extra: Mapping[str, float]
    scales_per_output: Mapping[str, float]
    """Of the integers' scales, for each output."""
    smallest: float
    """Bytes of an integer of 4 bits or fewer: half a one, or a whole one where the runtime does not know them."""

    def of(self, layer: str, bits: int, *, fused: bool = False) -> LayerBytes:
        """One layer with its weights in `bits`: 32 as floats, 16 as halves, 8 and fewer as integers."""
        rate, extra, scales = 1.0, 0.0, 0.0
        if bits <= 8:
            rate = (self.smallest if bits <= 4 and not fused else 1.0) / FLOAT
            extra = self.fused_extra[layer] if fused else self.integer_extra[layer]
            scales = self.scales_per_output[layer]
        elif bits <= 16:
            rate, extra = HALF / FLOAT, self.half_extra[layer]
        return LayerBytes(
            self.present[layer] + extra,
            rate * self.per_pair[layer],
            self.per_output[layer] + rate * self.kernel_per_output[layer] + scales,
        )

    def predict(
        self, widths: Mapping[str, tuple[int, int]], bits: Mapping[str, int], *, fused: Collection[str] = ()
    ) -> float:
        """The file with the layers of `widths` (layer -> inputs, outputs) alone; `bits` are 32 where not given."""
        total = self.constant
        for layer, (inputs, outputs) in widths.items():
            each = self.of(layer, bits.get(layer, 32), fused=layer in fused)
            total += each.present + each.per_pair * inputs * outputs + each.per_output * outputs
        return total


def onnx_bytes(
    model: nn.Module, example: Tensor, *, norms: Mapping[str, str], layers: Sequence[Layer],
    dynamic_batch: bool = False,
) -> OnnxBytes:  # fmt: skip
    """Where the bytes of the file that `export_stored` makes of `model` go, for `layers`: all that a choice may change.

    Parameters outside layers are there by their names; a file may hold them several times (a head that is tied to its
    embedding is written transposed besides), or not as such at all (where they went into a constant). Raises
    TargetError where a layer's weight is not in the exported graph.
    """
    own, _ = folded(model, norms)
    marks = _marked(own, layers)
    graph = export(own, example, dynamic_batch=dynamic_batch)
    proto = bare(graph)
    places = _places(graph, marks)
    stored = [layer for layer in layers if layer.kind != "product"]
    parts = _counted(proto, places, _owners(graph, own, stored, places))
    found = {layer.name: parts.get(layer.name, _Parts()) for layer in layers}
    copies = {layer.name: found[layer.name].matrices for layer in layers}
    lost = [each for each in stored if each.kind == "other" and (each.inputs.terms or each.outputs.terms)]
    copies |= {each.name: max(1, copies[each.name]) for each in lost}  # it is in some constant
    matrix = {layer.name: float(FLOAT * copies[layer.name] * layer.kernel) for layer in layers}
    deep = {layer.name for layer in layers if layer.kind == "depthwise"}
    int4 = runs_int4() and with_int4(proto) is not None
    return OnnxBytes(
        constant=float(proto.ByteSize() - sum(part.present + part.numbers for part in found.values())),
        present={name: float(part.present) for name, part in found.items()},
        per_pair={each.name: 0.0 if each.name in deep else matrix[each.name] / each.groups for each in layers},
        copies=copies,
        per_output={name: float(FLOAT * part.vectors) for name, part in found.items()},
        kernel_per_output={each.name: matrix[each.name] if each.name in deep else 0.0 for each in layers},
        integer_extra={name: float(part.integer_extra) for name, part in found.items()},
        fused_extra={name: float(part.fused_extra) for name, part in found.items()},
        half_extra={name: float(part.half_extra) for name, part in found.items()},
        scales_per_output={name: float(SCALE * part.matrices) for name, part in found.items()},
        smallest=0.5 if int4 else 1.0,
    )


@dataclass(slots=True)
class _Parts:
    """What is found of one layer: bytes of all but numbers, bytes of numbers, and how many tensors there are."""

    present: int = 0
    numbers: int = 0
    integer_extra: int = 0
    fused_extra: int = 0
    half_extra: int = 0
    matrices: int = 0
    vectors: int = 0


def _counted(
    proto: onnx.ModelProto, places: Mapping[str, tuple[str, str]], owners: Sequence[str | None]
) -> dict[str, _Parts]:
    """What belongs to each layer of a graph, by the `owners` of its nodes and the `places` of its tensors."""
    parts: dict[str, _Parts] = defaultdict(_Parts)
    readers: dict[str, set[str | None]] = defaultdict(set)
    for node, owner in zip(proto.graph.node, owners, strict=True):
        if owner is not None:
            parts[owner].present += _entry(node)
        for name in node.input:
            readers[name].add(owner)
    for tensor in proto.graph.initializer:
        alone = next(iter(readers[tensor.name])) if len(readers[tensor.name]) == 1 else None
        if tensor.name in places:
            layer, key = places[tensor.name]
            index = sum(part.matrices for part in parts.values())
            is_matrix = key == _WHOLE or (key == "weight" and len(tensor.dims) > 1)
            _add(parts[layer], tensor, index, vector=not is_matrix)
        elif alone is not None:  # of something that is not cut, but goes with its block
            parts[alone].present += _entry(tensor)
    return parts


def _add(part: _Parts, tensor: onnx.TensorProto, index: int, *, vector: bool) -> None:
    """Count one tensor of a layer in."""
    header = _entry(tensor) - len(tensor.raw_data)
    part.present += header
    part.numbers += len(tensor.raw_data)
    if vector:
        part.vectors += 1
        return
    part.matrices += 1
    codes = np.zeros(tuple(tensor.dims), np.int8)
    scales = np.zeros(len(codes), np.float32)
    part.integer_extra += _fixed(multiplied(tensor.name, index, codes, scales, axis=0)) - header
    part.fused_extra += _fixed(dequantised(tensor.name, index, codes, scales, axis=0)) - header
    part.half_extra += _fixed(half(tensor.name, index, codes)) - header


def _entry(part: onnx.NodeProto | onnx.TensorProto) -> int:
    """Bytes of one node or tensor in its graph: a tag, the length in groups of 7 bits, and itself."""
    size = int(part.ByteSize())
    return 1 + max(1, -(-size.bit_length() // 7)) + size


def _fixed(stored: Stored) -> int:
    """Bytes of what is stored but for the numbers."""
    tensors = sum(_entry(tensor) - len(tensor.raw_data) for tensor in stored.tensors)
    return tensors + sum(_entry(node) for node in stored.nodes)


def _marked(own: nn.Module, layers: Sequence[Layer]) -> dict[tuple[str, str], Tensor]:
    """Random numbers in every tensor of our own copy's layers, (layer, key) -> them: none is taken for another."""
    generator = torch.Generator().manual_seed(0)
    marks: dict[tuple[str, str], Tensor] = {}
    for layer in layers:
        for key, tensor in _tensors_of(own, layer):
            if tensor.is_floating_point():
                tensor.data.uniform_(0.5, 1.5, generator=generator)  # a variance is positive
                marks[layer.name, key] = tensor.data
    return marks


def _tensors_of(own: nn.Module, layer: Layer) -> Iterator[tuple[str, Tensor]]:
    """What a layer owns, by key."""
    if layer.kind == "other":
        yield from ((_WHOLE, tensor) for name, tensor in own.named_parameters() if name == layer.name)
    elif layer.kind != "product":
        module = own.get_submodule(layer.name)
        for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if key != "weight" or layer.owned:
                yield key, tensor


def _places(graph: bytes, marks: Mapping[tuple[str, str], Tensor]) -> dict[str, tuple[str, str]]:
    """Initialiser -> the layer and key whose numbers it holds; one that two layers share is the first's."""
    names = {f"{layer}.{key}": (layer, key) for layer, key in marks}
    values = {name: marks[pair].numpy() for name, pair in names.items()}
    found = find_weights(graph, values)
    found |= _reshaped(graph, {name: values[name] for name, (_, key) in names.items() if key == _WHOLE})
    lost = [f"{n!r}: {LOST}" for n, (_, key) in names.items() if key == "weight" and not found[n]]
    if lost:
        raise TargetError(f"onnx: weights that are not in the exported graph:\n{listed(lost)}")
    places: dict[str, tuple[str, str]] = {}
    for name, initialisers in found.items():
        for place in initialisers:
            places.setdefault(place, names[name])
    return places


def _reshaped(graph: bytes, values: Mapping[str, NDArray[Any]]) -> dict[str, tuple[str, ...]]:
    """For each of `values` the initialisers that hold them in any shape: the slopes of channels as (channels, 1, 1)."""
    by_size: dict[int, list[tuple[str, NDArray[Any]]]] = defaultdict(list)
    for tensor in onnx.load_from_string(graph).graph.initializer if values else ():
        if tensor.data_type == onnx.TensorProto.FLOAT:
            array = numpy_helper.to_array(tensor)
            by_size[array.size].append((tensor.name, array.reshape(-1)))
    return {
        name: tuple(dict.fromkeys(
            initialiser
            for laid in (array, array.T)
            for initialiser, held in by_size.get(array.size, ()) if np.array_equal(held, laid.reshape(-1))
        ))
        for name, array in values.items()
    }  # fmt: skip


def _owners(
    graph: bytes, own: nn.Module, layers: Sequence[Layer], places: Mapping[str, tuple[str, str]]
) -> list[str | None]:
    """For each node the layer without which it would not be there: its own, or the last one of its block; of a node
    that nothing names and no input reaches, that of what reads it.
    """
    running = [layer for layer in layers if layer.kind not in ("norm", "other")]
    last: dict[str | None, str] = {layer.block: layer.name for layer in running if layer.block is not None}
    names = {layer.name for layer in layers}
    modules = {name for name, _ in own.named_modules()}
    owners: list[str | None] = []
    proto = onnx.load_from_string(graph).graph
    for node in proto.node:
        reads = next((places[name][0] for name in node.input if name in places), None)
        scope = _scope(node, modules)
        block = next((block for block in last if f"{scope}.".startswith(f"{block}.")), None)
        rest = last.get(block)
        owners.append(reads or (scope if scope in names else rest))
    block_of = {layer.name: layer.block for layer in layers}
    return _with_constants(proto, owners, block_of=block_of, last=last)


def _with_constants(
    graph: onnx.GraphProto, owners: Sequence[str | None], *, block_of: Mapping[str, str | None],
    last: Mapping[str | None, str],
) -> list[str | None]:  # fmt: skip
    """`owners` with those of constant nodes that are read within one block alone."""
    found = list(owners)
    changing = {value.name for value in graph.input}
    readers: dict[str, set[str | None]] = defaultdict(set)
    for node in graph.node:
        if changing & set(node.input):
            changing |= set(node.output)
    for index in reversed(range(len(graph.node))):
        node = graph.node[index]
        if found[index] is None and not changing & set(node.output):
            around = {reader and block_of[reader] for name in node.output for reader in readers[name]}
            found[index] = last.get(around.pop()) if len(around) == 1 else None
        for name in node.input:
            readers[name].add(found[index])
    return found


def _scope(node: onnx.NodeProto, modules: Collection[str]) -> str:
    """The innermost module that made a node: from its notes, or from a name like `/layer1/layer1.0/conv1/Conv`."""
    for note in node.metadata_props:
        if note.key == "pkg.torch.onnx.name_scopes":
            return next((name for name in reversed(ast.literal_eval(note.value)) if name in modules), "")
    path = before = ""
    for part in node.name.split("/")[1:-1]:
        # A child of a Sequential repeats its parent's name.
        deeper = path + part.removeprefix(before) if before and part.startswith(f"{before}.") else ""
        inside = f"{path}.{part}" if path else part
        if deeper not in modules and inside not in modules:
            break
        path, before = deeper if deeper and deeper in modules else inside, part
    return path
