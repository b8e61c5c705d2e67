"""Zeros and integers inside layers, as the layers are once everything around them was cut.

An edit is a function of the layer's weights at hand, its calibration moments and the inputs that stay. Knows nothing of
which policy it is part of.
"""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoprune.bank.calibrate import LayerStatistics
from autoprune.bank.views import centred, kept_columns
from autoprune.core.pattern import parse_pattern
from autoprune.core.unit import Option
from autoprune.model.coupling import is_matrix
from autoprune.model.cut import Kept
from autoprune.model.factor import factor_layer, low_rank
from autoprune.model.flow import norm_scale
from autoprune.packing.coding import Codes
from autoprune.sparsity import sparsifier
from autoprune.sparsity.base import LayerView
from autoprune.sparsity.quantise import quantise

_STACKED_BYTES = 2**28
"""Weights of all options that go through one sweep together."""

_Key = tuple[str, bytes, int, bytes, Option]
"""Layer, the inputs and the kernel that stay, what its weights are, what is done to them."""


@dataclass(frozen=True, slots=True)
class Edit:
    """New weights of one layer, in its own shape and type, and how they are stored when not as floats.

    `shift` (outputs,) is by how much the mean of each output falls: a bias or a norm is to make up for it.
    """

    weight: Tensor
    shift: Tensor
    codes: Codes | None = None
    factors: tuple[Tensor, Tensor] | None = None
    """The weights of the two layers that this one becomes; `weight` is their product."""
    half: bool = False
    """Whether the weights are stored as halves."""

    @property
    def stored(self) -> tuple[Tensor, ...]:
        """What is kept of the weights on disk."""
        if self.codes is not None:
            return self.codes.codes, self.codes.scales
        return self.factors if self.factors is not None else (self.weight,)


@dataclass(frozen=True, slots=True)
class Reading:
    """What a layer reads: `moments` (columns, columns), about the mean where that can be made up for, and `mean`
    (columns,), channel-major, float64; and the `scale` (outputs,) that a norm gives what it makes of it. `movement`
    (outputs, columns) are the scores of a fine-tune, where there was one.
    """

    moments: Tensor
    mean: Tensor
    scale: Tensor
    movement: Tensor | None = None


def edited(weight: Tensor, reading: Reading, options: Sequence[Option], *, seed: int) -> list[Edit]:
    """What each of `options` makes of `weight` (outputs, inputs, *kernel); together is much faster than one by one."""
    split = {option: _factored(weight, reading, option.rank) for option in options if option.rank}
    others = [option for option in dict.fromkeys(options) if not option.rank]
    found = split | dict(zip(others, _reweighted(weight, reading, others, seed=seed), strict=True))
    return [found[option] for option in options]


def _factored(weight: Tensor, reading: Reading, rank: int) -> Edit:
    """The layer as two."""
    matrix = weight.double().flatten(1)
    first, second = low_rank(matrix, reading.moments, reading.scale, rank)
    shift = (matrix - second @ first) @ reading.mean
    factors = (
        first.reshape(rank, *weight.shape[1:]).to(weight.dtype),
        second.reshape(len(weight), rank, *(1,) * (weight.ndim - 2)).to(weight.dtype),
    )
    return Edit((second @ first).reshape(weight.shape).to(weight.dtype), shift, factors=factors)


def _reweighted(weight: Tensor, reading: Reading, options: Sequence[Option], *, seed: int) -> list[Edit]:
    """The layer with other weights, for options that leave it one layer."""
    order = _by_position(weight)
    moments = reading.moments[order][:, order]
    moved = None if reading.movement is None else reading.movement[:, order]
    view = LayerView(weight.double().flatten(1)[:, order], moments, weight.shape[1], reading.scale.abs(), moved)
    each = max(1, _STACKED_BYTES // (8 * weight.numel()))
    edits: list[Edit] = []
    for start in range(0, len(options), each):
        some = options[start : start + each]
        edits += [
            _edit(weight, reading.mean, new, codes, order, half=option.bits == 16)
            for option, new, codes in zip(some, *_reworked(view, some, seed=seed), strict=True)
        ]
    return edits


def _reworked(view: LayerView, options: Sequence[Option], *, seed: int) -> tuple[list[Tensor], list[Codes | None]]:
    """The view's weights as each option leaves them, with the integers where they are stored so."""
    patterned: dict[str, list[str]] = {}
    for option in options:
        if option.pattern and option.pattern not in patterned.setdefault(option.method, []):
            patterned[option.method].append(option.pattern)
    sparse: dict[tuple[str, str], Tensor] = {}
    for method, patterns in patterned.items():
        generator = torch.Generator().manual_seed(seed)
        found = sparsifier(method).sparsify(view, [parse_pattern(pattern) for pattern in patterns], generator)
        sparse |= {(method, pattern): new for pattern, new in zip(patterns, found, strict=True)}
    weights = [sparse[option.method, option.pattern] if option.pattern else view.weight for option in options]
    integers = [index for index, option in enumerate(options) if option.bits <= 8]
    codes: list[Codes | None] = [None] * len(options)
    if integers:
        stored = quantise(view, [weights[index] for index in integers], [options[index].bits for index in integers])
        for index, found_codes in zip(integers, stored, strict=True):
            codes[index] = found_codes
    return weights, codes


def _edit(weight: Tensor, mean: Tensor, new: Tensor, codes: Codes | None, order: Tensor, *, half: bool) -> Edit:
    """An edit in the layer's own order of columns, shape and type."""
    if codes is not None:
        codes = Codes(_restored(codes.codes, order), codes.scales, tuple(weight.shape))
    final = _restored(new, order).reshape(weight.shape) if codes is None else codes.dequantised()
    final = final.half() if half else final
    shift = (weight.double().flatten(1) - final.double().flatten(1)) @ mean
    return Edit(final.to(weight.dtype), shift, codes, half=half)


def _by_position(weight: Tensor) -> Tensor:
    """For each column in a view's order (kernel position first) its place in the channel-major order."""
    inputs, area = weight.shape[1], weight[0, 0].numel()
    return (torch.arange(inputs) * area + torch.arange(area)[:, None]).flatten()


def _restored(matrix: Tensor, order: Tensor) -> Tensor:
    back = torch.empty_like(matrix)
    back[:, order] = matrix
    return back


class Editor:
    """Edits layers of cut candidates on calibration moments, remembering what it did within `memory_bytes`."""

    def __init__(
        self, model: nn.Module, statistics: Mapping[str, LayerStatistics], *, norms: Mapping[str, str], seed: int = 0,
        memory_bytes: int = 500_000_000,
    ) -> None:  # fmt: skip
        self._modules = dict(model.named_modules())
        self._statistics = statistics
        self._norms = norms
        self._seed = seed
        self._done: OrderedDict[_Key, Edit] = OrderedDict()
        self._held = 0
        self._memory_bytes = memory_bytes

    def __getstate__(self) -> dict[str, object]:
        """Without what it remembers: that is made again where it is needed."""
        return vars(self) | {"_done": OrderedDict(), "_held": 0}

    def can_edit(self, name: str) -> bool:
        """Whether the second moments of a layer's inputs are known."""
        statistics = self._statistics.get(name)
        return statistics is not None and statistics.second is not None

    def reading(self, name: str, layer: nn.Module, kept: Kept) -> Reading:
        """What `layer` reads where `kept` says which of its channels and its kernel are left; `can_edit` it first."""
        assert is_matrix(layer)
        statistics, norm = self._statistics[name], self._norms.get(name)
        moments = centred(statistics, shifts=norm is not None or layer.bias is not None)
        assert moments is not None
        mean, moved = statistics.mean, statistics.movement
        moved = None if moved is None else moved.double().flatten(1)
        scale = norm_scale(self._modules[norm]) if norm else torch.ones(layer.weight.shape[0], dtype=torch.float64)
        if kept.outputs is not None:
            scale = scale[kept.outputs] if norm else scale  # ones for the outputs at hand
            moved = None if moved is None else moved[kept.outputs]
        if not kept.reads_all:
            columns = kept_columns(self._modules[name], kept)[0]
            moments, mean = moments[columns][:, columns], mean[columns]
            moved = None if moved is None else moved[:, columns]
        return Reading(moments, mean, scale, moved)

    def edits(self, name: str, layer: nn.Module, options: Sequence[Option], *, kept: Kept) -> list[Edit]:
        """What each of `options` makes of the weights that `layer` has now, `kept` saying what of it is left."""
        assert is_matrix(layer)
        weight = layer.weight.detach()
        inputs = b"" if kept.inputs is None else kept.inputs.numpy().tobytes()
        state = (name, inputs, kept.kernel or 0, _digest(weight))
        missing = [option for option in dict.fromkeys(options) if (*state, option) not in self._done]
        found: dict[Option, Edit] = {}
        if missing:
            seed = self._seed + zlib.crc32(name.encode())
            new = edited(weight, self.reading(name, layer, kept), missing, seed=seed)
            found = dict(zip(missing, new, strict=True))
        edits = [found[option] if option in found else self._known((*state, option)) for option in options]
        for option, edit in found.items():
            self._remember((*state, option), edit)
        return edits

    def _known(self, key: _Key) -> Edit:
        self._done.move_to_end(key)
        return self._done[key]

    def _remember(self, key: _Key, edit: Edit) -> None:
        self._done[key] = edit
        self._held += _bytes(edit)
        while self._held > self._memory_bytes:
            _, oldest = self._done.popitem(last=False)
            self._held -= _bytes(oldest)


def apply_edit(model: nn.Module, name: str, edit: Edit) -> None:
    """Write an edit into a layer of our own copy; its bias, where it has one, makes up for the shift of the mean."""
    layer = model.get_submodule(name)
    assert is_matrix(layer)
    if layer.bias is not None:
        layer.bias.data = layer.bias.data + edit.shift.to(layer.bias.dtype)
    if edit.factors is None:
        layer.weight.data = edit.weight.clone()
        return
    pair = factor_layer(model, name, len(edit.factors[0]))
    for part, weight in zip(pair, edit.factors, strict=True):
        assert is_matrix(part)
        part.weight.data = weight.clone()


def _digest(weight: Tensor) -> bytes:
    return zlib.crc32(weight.contiguous().numpy().tobytes()).to_bytes(4, "little")


def _bytes(edit: Edit) -> int:
    held = (edit.weight, *(edit.stored if edit.codes or edit.factors else ()))
    return sum(tensor.numel() * tensor.element_size() for tensor in held)
