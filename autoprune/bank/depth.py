"""Depth compensation: what a branch must add for the blocks dropped right after it, learnt in calibration.

When the blocks after an addition go, the sum stands for the sum after the last of them. The layer that enters the
addition is solved for that: its dense output plus the difference of the two sums, which is regressed on its inputs.
The cross moments are collected in one pass over the dense model; nothing depends on which channels stay.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoprune.bank.patches import is_solvable, positions_of, sampled_outputs, sampled_patches
from autoprune.model.additions import Link, links, watching_additions
from autoprune.model.blocks import Block
from autoprune.model.flow import tails_of
from autoprune.model.observe import watching

LONGEST_RUN = 4
"""Blocks, or branches of them, dropped in a row that a branch is prepared to stand in for."""


@dataclass(frozen=True, slots=True)
class Run:
    """Blocks (or their branches) dropped in a row after an addition. `cross` is E[d x^T] about the means, (outputs,
    columns) float32, of the difference d between the sum after the last block and the sum at hand, and the layer's
    inputs x; `shift` is E[d].
    """

    blocks: tuple[str, ...]
    cross: Tensor
    shift: Tensor


@dataclass(slots=True)
class _Sums:
    cross: Tensor | None = None
    difference: Tensor | float = 0.0
    inputs: Tensor | float = 0.0
    count: int = 0

    def see(self, difference: Tensor, patches: Tensor) -> None:
        product = difference.T @ patches
        self.cross = product.double() if self.cross is None else self.cross.add_(product)  # in place: it is large
        self.difference = self.difference + difference.double().sum(0)
        self.inputs = self.inputs + patches.double().sum(0)
        self.count += len(patches)

    def run(self, blocks: tuple[str, ...]) -> Run:
        shift, mean = torch.as_tensor(self.difference) / self.count, torch.as_tensor(self.inputs) / self.count
        assert self.cross is not None
        return Run(blocks, (self.cross / self.count - torch.outer(shift, mean)).float(), shift)


def observe_runs(
    model: nn.Module, blocks: Sequence[Block], batches: Sequence[Tensor], *, norms: Mapping[str, str], patches: int,
    max_columns: int,
) -> dict[str, tuple[Run, ...]]:  # fmt: skip
    """For each layer that enters an addition: the runs of blocks it may stand in for, shortest first."""
    tails = tails_of(model, norms, batches[0][:2])
    found = links(model, batches[0][:2], layers=tails, blocks=blocks)
    modules = dict(model.named_modules())
    makers = {norm: layer for layer, norm in norms.items()}
    ends = {tail: _ends(found, tail) for tail in found if is_solvable(modules[makers.get(tail, tail)], max_columns)}
    ends = {tail: reached for tail, reached in ends.items() if reached}
    if not ends:
        return {}
    sums = {(tail, run): _Sums() for tail, reached in ends.items() for run in reached}
    each = max(1, -(-patches // sum(len(batch) for batch in batches)))
    seen = _Batch(modules, {tail: makers.get(tail, tail) for tail in found}, each)
    with torch.no_grad(), watching(model, seen.hooks(ends)), watching_additions(model, tails, seen.added):
        for index, batch in enumerate(batches):
            seen.start(index)
            model(batch)
            for (tail, run), total in sums.items():
                last = ends[tail][run]
                if seen.totals[last].shape == seen.totals[tail].shape:
                    total.see(seen.totals[last] - seen.totals[tail], seen.patches[tail])
    runs: dict[str, list[Run]] = {}
    for (tail, run), total in sums.items():
        if total.count:
            runs.setdefault(makers.get(tail, tail), []).append(total.run(run))
    return {layer: tuple(entries) for layer, entries in runs.items()}


class _Batch:
    """The sampled inputs of the layers and the sampled sums of one batch; positions depend on the grid's size alone."""

    def __init__(self, modules: Mapping[str, nn.Module], makers: Mapping[str, str], each: int) -> None:
        self._modules = modules
        self._makers = makers
        self._each = each
        self._index = 0
        self.patches: dict[str, Tensor] = {}
        self.totals: dict[str, Tensor] = {}

    def start(self, index: int) -> None:
        """Forget the last batch."""
        self._index = index
        self.patches.clear()
        self.totals.clear()

    def hooks(self, tails: Collection[str]) -> dict[str, _Taker]:
        """One hook for each layer whose inputs are wanted."""
        return {self._makers[tail]: _Taker(self, tail) for tail in tails}

    def take(self, tail: str, inputs: Tensor, output: Tensor) -> None:
        """Sample the inputs of the layer that `tail` belongs to."""
        module = self._modules[self._makers[tail]]
        self.patches[tail] = sampled_patches(module, inputs, self._chosen(positions_of(module, output)))

    def added(self, tail: str, _branch: Tensor, total: Tensor) -> None:
        """Sample the sum that `tail` entered."""
        if tail not in self._makers:
            return
        module = self._modules[self._makers[tail]]
        self.totals[tail] = sampled_outputs(module, total, self._chosen(positions_of(module, total)))

    def _chosen(self, positions: int) -> Tensor:
        generator = torch.Generator().manual_seed(positions * 1009 + self._index)
        return torch.randperm(positions, generator=generator)[: self._each]


@dataclass(frozen=True, slots=True)
class _Taker:
    batch: _Batch
    tail: str

    def __call__(self, inputs: Tensor, output: Tensor) -> None:
        self.batch.take(self.tail, inputs, output)


def _ends(found: Mapping[str, Link | None], tail: str) -> dict[tuple[str, ...], str]:
    """Runs of blocks that can be dropped after the sum of `tail`, each with the layer whose sum is stood in for."""
    ends: dict[tuple[str, ...], str] = {}
    blocks: tuple[str, ...] = ()
    link = found[tail]
    while link is not None and len(blocks) < LONGEST_RUN:
        blocks = (*blocks, link.block)
        ends[blocks] = link.layer
        link = found.get(link.layer)
    return ends
