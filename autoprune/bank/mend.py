"""Weights of a layer after what it reads, or the blocks after it, was cut: a function of moments and what stays."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoprune.bank.calibrate import LayerStatistics
from autoprune.bank.depth import Run
from autoprune.bank.views import centred, kept_columns, moment_blocks
from autoprune.definite import damped_cholesky, mean_diagonal
from autoprune.methods.compensate import DAMPING, least_squares
from autoprune.model.cut import Kept, Mended
from autoprune.model.flow import norm_scale
from autoprune.model.recalibrate import Expected


@dataclass(frozen=True, slots=True)
class Solution:
    """A mended layer, and what its norm is to expect of it where it does more than the dense layer did."""

    mended: Mended
    expected: Expected | None


class Mender:
    """Mends layers by least squares on calibration moments, remembering what it solved.

    Edits depend on the layer, its kept inputs and kernel and the blocks dropped right after it alone, whatever units
    the inputs belong to, so units that share a consumer (a concatenation) are mended together. `memory_bytes` bounds
    what is remembered.
    """

    def __init__(
        self, model: nn.Module, statistics: Mapping[str, LayerStatistics], *, norms: Mapping[str, str],
        memory_bytes: int = 500_000_000,
    ) -> None:  # fmt: skip
        self._modules = dict(model.named_modules())
        self._statistics = statistics
        self._norms = norms
        self._solved: OrderedDict[tuple[str, bytes, int, tuple[str, ...]], Solution] = OrderedDict()
        self._held = 0
        self._memory_bytes = memory_bytes

    def __getstate__(self) -> dict[str, object]:
        """Without what it remembers: that is made again where it is needed."""
        return vars(self) | {"_solved": OrderedDict(), "_held": 0}

    def mend(self, name: str, kept: Kept, run: Run | None = None) -> Solution | None:
        """New weights of layer `name` reading what is `kept`, in the place of the blocks of `run` too.

        None where its moments were too large to keep.
        """
        statistics = self._statistics.get(name)
        if statistics is None or statistics.second is None:
            return None
        inputs = b"" if kept.inputs is None else kept.inputs.numpy().tobytes()
        key = (name, inputs, kept.kernel or 0, run.blocks if run else ())
        if key in self._solved:
            self._solved.move_to_end(key)
            return self._solved[key]
        norm = self._norms.get(name)
        solution = solve(
            self._modules[name], statistics, kept=kept, norm=self._modules[norm] if norm else None, run=run
        )
        self._solved[key] = solution
        self._held += _bytes(solution)
        while self._held > self._memory_bytes:
            _, oldest = self._solved.popitem(last=False)
            self._held -= _bytes(oldest)
        return solution


def _bytes(solution: Solution) -> int:
    return solution.mended.weight.numel() * solution.mended.weight.element_size()


def solve(
    layer: nn.Module, statistics: LayerStatistics, *, kept: Kept, norm: nn.Module | None, run: Run | None = None
) -> Solution:
    """The least squares weights and bias of `layer` when it reads what is `kept` alone: inputs, the kernel's middle.

    All outputs are there; those that `kept` leaves are chosen later. Only a layer without groups has a `run`.
    """
    weight = layer.weight
    assert isinstance(weight, Tensor)
    matrix = weight.detach().double().flatten(1)  # (outputs, columns of one group)
    bias = layer.bias.detach().double() if isinstance(layer.bias, Tensor) else None
    moments = centred(statistics, shifts=norm is not None or bias is not None)
    assert moments is not None
    expected = None
    added = torch.zeros(len(matrix), dtype=torch.float64)
    if run is not None:
        dense = ((matrix @ moments) * matrix).sum(1)
        scale = norm_scale(norm) if norm is not None else torch.ones(len(matrix), dtype=torch.float64)
        scale = torch.where(scale.abs() < 1e-6, 1e-6, scale)
        matrix = (
            matrix
            + torch.cholesky_solve(run.cross.T.double(), damped_cholesky(moments, DAMPING * mean_diagonal(moments))).T
            / scale[:, None]
        )
        added = run.shift / scale
        factor = ((matrix @ moments) * matrix).sum(1) / dense.clamp_min(1e-12)
        expected = Expected(added.float(), factor.float())
    mended, shift = _by_group(layer, matrix, moments, statistics.mean, kept)
    new_bias = (bias + shift + added).to(mended.dtype) if bias is not None else None
    return Solution(Mended(mended, new_bias), expected)


def _by_group(layer: nn.Module, matrix: Tensor, moments: Tensor, mean: Tensor, kept: Kept) -> tuple[Tensor, Tensor]:
    """The solved weight in the layer's own shape, and by how much the mean of each output would fall."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    columns, blocks = kept_columns(layer, kept), moment_blocks(moments, matrix.shape[1])
    rows, means = matrix.view(len(blocks), -1, matrix.shape[1]), mean.view(len(blocks), -1)
    parts, shifts = [], []
    for own, block, middle, stay in zip(rows, blocks, means, columns, strict=True):
        solved = least_squares(own, block, stay)
        shifts.append(own @ middle - solved @ middle[stay])
        parts.append(solved)
    window = weight.shape[2:] if kept.kernel is None else (kept.kernel,) * (weight.ndim - 2)
    return torch.cat(parts).reshape(len(matrix), -1, *window).to(weight.dtype), torch.cat(shifts)
