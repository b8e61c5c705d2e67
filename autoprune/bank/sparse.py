"""Zeros and integers inside layers, as the layers are once everything around them was cut.

An edit is a function of the layer's weights at hand, its calibration moments and the inputs that stay. Knows nothing of
which policy it is part of.
"""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoprune.bank.calibrate import LayerStatistics
from autoprune.bank.views import centred
from autoprune.core.pattern import parse_pattern
from autoprune.core.unit import Option
from autoprune.model.coupling import is_matrix
from autoprune.model.cut import Kept
from autoprune.model.flow import norm_scale
from autoprune.sparsity import sparsifier
from autoprune.sparsity.base import LayerView
from autoprune.sparsity.quantise import quantise


@dataclass(frozen=True, slots=True)
class Edit:
    """New weights of one layer, in its own shape and type, and how they are stored when not as floats.

    `shift` (outputs,) is by how much the mean of each output falls: a bias or a norm is to make up for it.
    """

    weight: Tensor
    shift: Tensor
    codes: Tensor | None = None
    """(outputs, columns) int8 in the order of `weight.flatten(1)`."""
    scales: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """What a layer reads: `moments` (columns, columns), about the mean where that can be made up for, and `mean`
    (columns,), channel-major, float64; and the `scale` (outputs,) that a norm gives what it makes of it.
    """

    moments: Tensor
    mean: Tensor
    scale: Tensor


def edited(weight: Tensor, reading: Reading, option: Option, *, seed: int) -> Edit:
    """What `option` makes of `weight` (outputs, inputs, *kernel)."""
    order = _by_position(weight)
    moments = reading.moments[order][:, order]
    view = LayerView(weight.double().flatten(1)[:, order], moments, weight.shape[1], reading.scale.abs())
    new = view.weight
    if option.pattern:
        generator = torch.Generator().manual_seed(seed)
        new = sparsifier(option.method).sparsify(view, parse_pattern(option.pattern), generator)
    stored = quantise(LayerView(new, view.moments, view.inputs), bits=option.bits) if option.bits < 32 else None
    final = _restored(new if stored is None else stored.weight, order)
    shift = (weight.double().flatten(1) - final.double()) @ reading.mean
    whole = final.to(weight.dtype).reshape(weight.shape)
    if stored is None:
        return Edit(whole, shift)
    return Edit(whole, shift, _restored(stored.codes, order), stored.scales)


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
        self._done: OrderedDict[tuple[str, Option, bytes, bytes], Edit] = OrderedDict()
        self._held = 0
        self._memory_bytes = memory_bytes

    def can_edit(self, name: str) -> bool:
        """Whether the second moments of a layer's inputs are known."""
        statistics = self._statistics.get(name)
        return statistics is not None and statistics.second is not None

    def reading(self, name: str, layer: nn.Module, kept: Kept) -> Reading:
        """What `layer` reads where `kept` says which of its channels are left; `can_edit` it first."""
        assert is_matrix(layer)
        statistics, norm = self._statistics[name], self._norms.get(name)
        moments = centred(statistics, shifts=norm is not None or layer.bias is not None)
        assert moments is not None
        mean = statistics.mean
        scale = norm_scale(self._modules[norm]) if norm else torch.ones(layer.weight.shape[0], dtype=torch.float64)
        if norm and kept.outputs is not None:
            scale = scale[kept.outputs]
        if kept.inputs is not None:
            area = layer.weight[0, 0].numel()
            columns = (kept.inputs[:, None] * area + torch.arange(area)).flatten()
            moments, mean = moments[columns][:, columns], mean[columns]
        return Reading(moments, mean, scale)

    def edit(self, name: str, layer: nn.Module, option: Option, *, kept: Kept) -> Edit:
        """What `option` makes of the weights that `layer` has now, `kept` saying which channels of it are left."""
        assert is_matrix(layer)
        weight = layer.weight.detach()
        inputs = kept.inputs
        key = (name, option, b"" if inputs is None else inputs.numpy().tobytes(), _digest(weight))
        if key in self._done:
            self._done.move_to_end(key)
            return self._done[key]
        found = edited(weight, self.reading(name, layer, kept), option, seed=self._seed + zlib.crc32(name.encode()))
        self._done[key] = found
        self._held += _bytes(found)
        while self._held > self._memory_bytes:
            _, oldest = self._done.popitem(last=False)
            self._held -= _bytes(oldest)
        return found


def apply_edit(layer: nn.Module, edit: Edit) -> None:
    """Write an edit into a layer of our own copy; its bias, where it has one, makes up for the shift of the mean."""
    assert is_matrix(layer)
    layer.weight.data = edit.weight.clone()
    if layer.bias is not None:
        layer.bias.data = layer.bias.data + edit.shift.to(layer.bias.dtype)


def _digest(weight: Tensor) -> bytes:
    return zlib.crc32(weight.contiguous().numpy().tobytes()).to_bytes(4, "little")


def _bytes(edit: Edit) -> int:
    return edit.weight.numel() * edit.weight.element_size() + (0 if edit.codes is None else edit.codes.numel())
