"""What a model takes on disk: its state as it is, or packed (bitmask and values, int8, entropy coded)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from autoprune.bank.sparse import Edit, Editor
from autoprune.bank.stitch import Candidate
from autoprune.core.cost import Storage
from autoprune.core.space import Space
from autoprune.core.unit import SizeOf
from autoprune.model.coupling import is_matrix
from autoprune.model.cut import Kept
from autoprune.packing.archive import Packed, packed
from autoprune.packing.coding import Codes, encode
from autoprune.verify import size_bytes

SCALE_BYTES = 4


def storage_of(model: nn.Module, space: Space, editor: Editor, size: SizeOf) -> Storage:
    """Bytes a weight for every option of every `weights` unit, found by really storing each edit of the dense layer."""
    pack = size == "packed"
    rates: dict[str, tuple[float, ...]] = {}
    for entry in space.entries:
        if entry.unit.kind != "weights":
            continue
        name = entry.unit.layers[0]
        layer = model.get_submodule(name)
        edits = [None, *editor.edits(name, layer, entry.options[1:], kept=Kept())]
        rates[entry.unit.name] = tuple(
            _bytes(layer, edit, pack=pack) / (option.keep if option.rank else entry.unit.width)
            for edit, option in zip(edits, entry.options, strict=True)
        )
    if not pack:
        return Storage(rates)
    return Storage(rates, dense_bytes=float(file_bytes(model, {}, size)))


def _bytes(layer: nn.Module, edit: Edit | None, *, pack: bool) -> float:
    assert is_matrix(layer)
    parts = (layer.weight.detach(),) if edit is None else edit.stored
    return float(sum(len(encode(part).payload) if pack else part.numel() * part.element_size() for part in parts))


def packed_model(state: Mapping[str, Tensor], quantised: Mapping[str, Codes]) -> Packed:
    """A model's state as a packed file; `quantised` by the name of the weight."""
    rest = {name: tensor for name, tensor in state.items() if name not in quantised}
    return packed(rest, quantised, about={"by": "autoprune"})


def quantised_of(candidate: Candidate) -> dict[str, Codes]:
    """The weights of a candidate that are stored as integers, by their names in its state."""
    return {f"{layer}.weight": edit.codes for layer, edit in candidate.edits.items() if edit.codes is not None}


def file_bytes(model: nn.Module, quantised: Mapping[str, Codes], size: SizeOf) -> int:
    """Bytes of the file a user would ship."""
    if size == "packed":
        return packed_model(dict(model.state_dict()), quantised).inventory.size_bytes
    saved = sum(3 * codes.codes.numel() - SCALE_BYTES * len(codes.scales) for codes in quantised.values())
    return size_bytes(model) - saved
