"""The file that a model is shipped as, and what every choice takes of it: ONNX, packed, or tensors as they are."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from autoprune.bank.sparse import Edit, Editor
from autoprune.bank.stitch import Candidate, Stitcher
from autoprune.core.architecture import Architecture, Layer
from autoprune.core.cost import LayerBytes, Rate, Storage
from autoprune.core.space import Space, UnitOptions
from autoprune.core.unit import Option, SizeOf
from autoprune.model.coupling import is_matrix
from autoprune.model.cut import Kept
from autoprune.model.integers import integer_layers
from autoprune.packing.archive import Item, Packed, packed
from autoprune.packing.coding import Codes, encode
from autoprune.profile.onnx_export import export_stored
from autoprune.profile.onnx_size import OnnxBytes, onnx_bytes
from autoprune.verify import size_bytes

FLOAT_BYTES = 4
SCALE_BYTES = 4


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights of a model that are not stored as floats, by their names in its state."""

    quantised: Mapping[str, Codes]
    halves: Collection[str] = ()

    @classmethod
    def of(cls, candidate: Candidate) -> Weights:
        """Those of a candidate."""
        edits = {f"{layer}.weight": edit for layer, edit in candidate.edits.items()}
        quantised = {name: edit.codes for name, edit in edits.items() if edit.codes is not None}
        return cls(quantised, tuple(name for name, edit in edits.items() if edit.half))


FLOATS = Weights({})
"""What a model has whose weights are all floats."""


@dataclass(frozen=True, slots=True)
class FileFormat:
    """How models are written: as what, for inputs like `example` of any batch, with which norm after which layer."""

    kind: SizeOf
    example: Tensor
    norms: Mapping[str, str]

    def size(self, model: nn.Module, weights: Weights) -> int:
        """Bytes of the file a user would ship. Raises TargetError for a model that ONNX cannot take."""
        if self.kind == "onnx":
            return len(onnx_file(model, weights, example=self.example, norms=self.norms))
        if self.kind == "packed":
            return packed_model(dict(model.state_dict()), weights.quantised).inventory.size_bytes
        saved = sum(3 * codes.codes.numel() - SCALE_BYTES * len(codes.scales) for codes in weights.quantised.values())
        halves: list[Tensor] = [tensor for name, tensor in model.state_dict().items() if name in weights.halves]
        return size_bytes(model) - saved - sum(2 * tensor.numel() for tensor in halves)


def onnx_file(model: nn.Module, weights: Weights, *, example: Tensor, norms: Mapping[str, str]) -> bytes:
    """A model as an ONNX file whose batch is free, integers and halves stored as such."""
    integer = [f"{layer}.weight" for layer in integer_layers(model)]
    return export_stored(
        model, example, norms=norms, quantised=weights.quantised, halves=weights.halves, fused=integer,
        dynamic_batch=True,
    )  # fmt: skip


def packed_model(state: Mapping[str, Tensor], quantised: Mapping[str, Codes]) -> Packed:
    """A model's state as a packed file; `quantised` by the name of the weight."""
    rest = {name: tensor for name, tensor in state.items() if name not in quantised}
    return packed(rest, quantised, about={"by": "autoprune"})


def storage_of(stitcher: Stitcher, space: Space, architecture: Architecture, files: FileFormat) -> Storage:
    """What every choice of `space` takes of a file. `architecture` has each layer once for each of its forms."""
    dense_bytes = files.size(stitcher.model, FLOATS)
    weights = [entry for entry in space.entries if entry.unit.kind == "weights"]
    if files.kind == "onnx":
        return _onnx_storage(stitcher, weights, architecture, files, dense_bytes)
    if files.kind == "packed":
        return _packed_storage(stitcher, weights, architecture, dense_bytes)
    layers = tuple(
        LayerBytes(layer.buffer_bytes_fixed, FLOAT_BYTES * layer.bias_like + layer.buffer_bytes_each)
        for layer in architecture.layers
    )
    rates = {entry.unit.name: tuple(_plain_rate(option) for option in entry.options) for entry in weights}
    return Storage(dense_bytes, layers, rates)


def _plain_rate(option: Option) -> Rate:
    return Rate(1.0, per_output=SCALE_BYTES) if option.bits <= 8 else Rate(option.bits / 8)


def _onnx_storage(
    stitcher: Stitcher, weights: Sequence[UnitOptions], architecture: Architecture, files: FileFormat, dense_bytes: int
) -> Storage:
    dense = [layer for layer in architecture.layers if layer.form == "float"]
    known = onnx_bytes(stitcher.model, files.example, norms=files.norms, layers=dense, dynamic_batch=True)
    rounding = _rounding_bytes(stitcher, weights, files, known, dense_bytes)
    rates = {
        entry.unit.name: tuple(_onnx_rate(known, entry.unit.layers[0], option, rounding) for option in entry.options)
        for entry in weights
    }
    return Storage(dense_bytes, tuple(_onnx_layer(known, layer) for layer in architecture.layers), rates)


def _onnx_layer(known: OnnxBytes, layer: Layer) -> LayerBytes:
    if layer.form != "low_rank":
        return LayerBytes(known.present[layer.name], known.per_output[layer.name], known.copies[layer.name])
    name, _, part = layer.name.rpartition(".")
    return LayerBytes(known.present[name], known.per_output[name] if part == "1" else 0.0)  # the bias is the second's


def _onnx_rate(known: OnnxBytes, layer: str, option: Option, rounding: float) -> Rate:
    fused = option.form == "integer"
    each, plain = known.of(layer, option.bits, fused=fused), known.of(layer, 32)
    share = each.per_pair / plain.per_pair if plain.per_pair else 1.0
    present = each.present - plain.present + (rounding if fused else 0.0)
    return Rate(FLOAT_BYTES * share, per_output=each.per_output - plain.per_output, present=present)


def _rounding_bytes(
    stitcher: Stitcher, weights: Sequence[UnitOptions], files: FileFormat, known: OnnxBytes, dense_bytes: int
) -> float:
    """What rounding the activations of a layer that computes in integers takes, on average over all that may."""
    integer = [(e.unit, [o for o in e.options if o.form == "integer"]) for e in weights]
    options = {unit.name: some[0] for unit, some in integer if some}
    if not options:
        return 0.0
    candidate = stitcher.build(options, recalibrate=False)
    more = float(files.size(candidate.model, Weights.of(candidate)) - dense_bytes)
    for name in stitcher.edited_layers(options):
        layer = stitcher.model.get_submodule(name)
        assert is_matrix(layer)
        outputs, inputs = layer.weight.shape[:2]
        now, before = known.of(name, 8, fused=True), known.of(name, 32)
        more -= now.present - before.present + outputs * (now.per_output - before.per_output)
        more -= inputs * outputs * (now.per_pair - before.per_pair)
    return more / len(options)


def _packed_storage(
    stitcher: Stitcher, weights: Sequence[UnitOptions], architecture: Architecture, dense_bytes: int
) -> Storage:
    inventory = packed_model(dict(stitcher.model.state_dict()), {}).inventory
    name_bytes = inventory.overhead_bytes / max(len(inventory.items), 1)
    held: dict[str, list[Item]] = defaultdict(list)
    whole: dict[str, Item] = {}
    for item in inventory.items:
        held[item.name.rpartition(".")[0]].append(item)
        whole[item.name] = item
    edited = {entry.unit.layers[0] for entry in weights}
    layers = tuple(
        _packed_tensor(whole.get(layer.name), name_bytes)
        if layer.kind in ("product", "other")
        else _packed_layer(held[layer.name], name_bytes, is_edited=layer.unit is not None or layer.name in edited)
        for layer in architecture.layers
    )
    rates = {entry.unit.name: _packed_rates(stitcher.model, entry, stitcher.editor) for entry in weights}
    return Storage(dense_bytes, layers, rates)


def _packed_layer(items: Sequence[Item], name_bytes: float, *, is_edited: bool) -> LayerBytes:
    """Vectors shrink with the layer's outputs; each tensor is named in the header. What weights take that some unit
    edits is known by option.
    """
    vectors = sum(item.stored_bytes / item.shape[0] for item in items if len(item.shape) == 1)
    present = name_bytes * len(items) + sum(item.stored_bytes for item in items if not item.shape)
    matrix = next((item for item in items if len(item.shape) > 1), None)
    return LayerBytes(present, vectors, 1.0 if is_edited or matrix is None else _packing(matrix))


def _packed_tensor(item: Item | None, name_bytes: float) -> LayerBytes:
    """A parameter outside layers shrinks in proportion; a buffer stays or goes. A product stores nothing."""
    if item is None:
        return LayerBytes(0.0, 0.0)
    return LayerBytes(name_bytes, 0.0, _packing(item))


def _packing(item: Item) -> float:
    """Stored bytes of a tensor over those of floats."""
    return item.stored_bytes / (FLOAT_BYTES * max(math.prod(item.shape), 1))


def _packed_rates(model: nn.Module, entry: UnitOptions, editor: Editor) -> tuple[Rate, ...]:
    """Found by really storing each edit of the dense layer."""
    name = entry.unit.layers[0]
    layer = model.get_submodule(name)
    edits = [None, *editor.edits(name, layer, entry.options[1:], kept=Kept())]
    return tuple(
        Rate(_stored_bytes(layer, edit) / (option.keep if option.rank else entry.unit.width))
        for edit, option in zip(edits, entry.options, strict=True)
    )


def _stored_bytes(layer: nn.Module, edit: Edit | None) -> float:
    assert is_matrix(layer)
    parts = (layer.weight.detach(),) if edit is None else edit.stored
    return float(sum(len(encode(part).payload) for part in parts))
