"""Weights of a layer after its inputs were cut: a pure function of the layer, its moments and what stays."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from autoprune.bank.calibrate import LayerStatistics
from autoprune.bank.views import centred, input_matrix
from autoprune.methods.compensate import least_squares
from autoprune.model.coupling import CONVOLUTIONS
from autoprune.model.cut import Mended


class Mender:
    """Mends layers by least squares on calibration moments, remembering what it solved.

    Edits depend on the layer and its kept inputs alone, whatever units those belong to, so units that share a
    consumer (a concatenation) are mended together. `memory_bytes` bounds what is remembered.
    """

    def __init__(
        self, model: nn.Module, statistics: Mapping[str, LayerStatistics], *, norms: Mapping[str, str],
        memory_bytes: int = 500_000_000,
    ) -> None:  # fmt: skip
        self._modules = dict(model.named_modules())
        self._statistics = statistics
        self._norms = norms
        self._solved: OrderedDict[tuple[str, bytes], Mended] = OrderedDict()
        self._held = 0
        self._memory_bytes = memory_bytes

    def mend(self, name: str, inputs: Tensor) -> Mended | None:
        """New weights of layer `name` reading `inputs` alone; None where its moments were too large to keep."""
        statistics = self._statistics.get(name)
        if statistics is None or statistics.second is None:
            return None
        key = (name, inputs.numpy().tobytes())
        if key in self._solved:
            self._solved.move_to_end(key)
            return self._solved[key]
        mended = solve(self._modules[name], statistics, inputs=inputs, norm=self._norms.get(name))
        self._solved[key] = mended
        self._held += mended.weight.numel() * mended.weight.element_size()
        while self._held > self._memory_bytes:
            _, oldest = self._solved.popitem(last=False)
            self._held -= oldest.weight.numel() * oldest.weight.element_size()
        return mended


def solve(layer: nn.Module, statistics: LayerStatistics, *, inputs: Tensor, norm: str | None) -> Mended:
    """The least squares weights and bias of `layer` when it reads `inputs` (channel indices, ascending) alone."""
    matrix = input_matrix(layer)
    groups = layer.groups if isinstance(layer, CONVOLUTIONS) else 1
    bias = layer.bias.detach().double() if isinstance(layer.bias, Tensor) else None
    moments = centred(statistics, shifts=norm is not None or bias is not None)
    assert moments is not None
    weight = layer.weight
    assert isinstance(weight, Tensor)
    area = weight[0, 0].numel()
    each = len(inputs) // groups
    rows = len(matrix) // groups
    parts, shift = [], torch.zeros(len(matrix), dtype=torch.float64)
    for group in range(groups):
        columns = (inputs[group * each : (group + 1) * each, None] * area + torch.arange(area)).flatten()
        lines = slice(group * rows, (group + 1) * rows)
        solved = least_squares(matrix[lines], moments, columns)
        shift[lines] = matrix[lines] @ statistics.mean - solved @ statistics.mean[columns]
        parts.append(solved)
    shape = (len(matrix), each, *weight.shape[2:])
    mended = torch.cat(parts).reshape(shape).to(weight.dtype)
    return Mended(mended, (bias + shift).to(weight.dtype) if bias is not None else None)
