"""One pass over calibration data: second moments, activity and gradients at the input of every layer that reads a unit.

Memory is bounded: layers whose moments would not fit together are seen in several passes, each pass's are handed to
whoever keeps them, and a layer too wide for any (`max_columns`) keeps the diagonal alone. Products are float32 a
batch, summed in float64.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from autoprune.bank.movement import loss_of, movement
from autoprune.bank.patches import moments_shape, positions_of, sampled_patches
from autoprune.model.observe import calls, watching
from autoprune.nest import first_tensor
from autoprune.progress import Progress

_GRADIENT_BATCH = 32
"""Samples in one backward pass at most, which keeps all activations."""


@dataclass(frozen=True, slots=True)
class CalibrationSettings:
    """How much is looked at. Part of the bank's key."""

    patches: int = 32768
    """Input columns sampled for each layer, over all samples."""
    max_columns: int = 6144
    """Widest layer whose full second moments are kept: 6144^2 float64 are 302 MB."""
    memory_bytes: int = 2_000_000_000
    """Moments held at once; more layers than fit are seen in further passes."""
    gradient_samples: int = 512
    seed: int = 0
    movement: bool = False
    """Whether a short fine-tune says which weights it moves away from zero."""


@dataclass(frozen=True, slots=True)
class LayerStatistics:
    """What one layer's inputs looked like. `second` is E[x x^T] (columns, columns) and `mean` E[x], float64; of a
    depthwise layer, whose outputs read one channel each, `second` is (channels, taps, taps).

    `diagonal` is E[x^2]. `mean_abs`, `zero_share` are (inputs,), `per_sample` (samples, inputs) the mean over
    positions, `taylor` (inputs,) the sum over samples of (sum over positions of x * dL/dx)^2, `output_fisher`
    (outputs,) the mean over samples of the sum over positions of (dL/dy)^2. `movement`, where it was asked for, is in
    the weight's shape.
    """

    mean: Tensor
    diagonal: Tensor
    second: Tensor | None
    mean_abs: Tensor
    zero_share: Tensor
    per_sample: Tensor
    taylor: Tensor
    output_fisher: Tensor
    movement: Tensor | None = None


@dataclass(slots=True)
class _Sums:
    """Running sums of one layer while batches go by."""

    chosen_each: int
    generator: torch.Generator
    blocks: int
    """How many matrices the second moments are; 0 where they are not kept."""
    count: int = 0
    mean: Tensor | float = 0.0
    diagonal: Tensor | float = 0.0
    second: Tensor | None = None
    mean_abs: Tensor | float = 0.0
    zero_share: Tensor | float = 0.0
    per_sample: list[Tensor] = field(default_factory=list)

    def see(self, layer: nn.Module, inputs: Tensor, output: Tensor) -> None:
        """Add one batch."""
        chosen = torch.randperm(positions_of(layer, output), generator=self.generator)[: self.chosen_each]
        patches = sampled_patches(layer, inputs, chosen)
        self.count += len(patches)
        self.mean = self.mean + patches.double().sum(0)
        self.diagonal = self.diagonal + patches.square().double().sum(0)
        if self.blocks == 1:
            self._add(patches.T @ patches)
        elif self.blocks:
            each = patches.view(len(patches), self.blocks, -1).transpose(0, 1)  # (channels, patches, taps)
            self._add(each.mT @ each)
        flat = channels_last(layer, inputs)  # (N, positions, inputs)
        self.mean_abs = self.mean_abs + flat.abs().mean(1).double().sum(0)
        self.zero_share = self.zero_share + (flat == 0).float().mean(1).double().sum(0)
        self.per_sample.append(flat.mean(1))

    def _add(self, products: Tensor) -> None:
        """In place: second moments are large."""
        self.second = products.double() if self.second is None else self.second.add_(products)


def channels_last(layer: nn.Module, inputs: Tensor) -> Tensor:
    """Inputs of a layer as (samples, positions, channels)."""
    if isinstance(layer, nn.Linear):
        return inputs.reshape(inputs.shape[0], -1, inputs.shape[-1])
    return inputs.flatten(2).transpose(1, 2)


def in_memory(_layer: str, second: Tensor) -> Tensor:
    """Keeps second moments where they are."""
    return second


def calibrate(
    model: nn.Module, layers: Sequence[str], *, batches: Sequence[Tensor], targets: Sequence[Tensor],
    settings: CalibrationSettings, progress: Progress, keep: Callable[[str, Tensor], Tensor] = in_memory,
) -> dict[str, LayerStatistics]:  # fmt: skip
    """Statistics at the input of each of `layers`. `targets` hold each batch's classes, (samples,), int64.

    `keep(layer, second)` is told each layer's second moments as soon as they are whole and returns where they are kept.
    """
    modules = dict(model.named_modules())
    shapes = {call.name: call for call in calls(model, batches[0][:1])}
    sizes = {name: moments_shape(modules[name], shapes[name].inputs) for name in layers}
    passes = list(_passes(sizes, settings))
    progress.phase("calibrate", len(batches) * len(passes))
    gradients = _gradients(model, layers, batches=batches, targets=targets, limit=settings.gradient_samples)
    moved = movement(model, layers, batches=batches, targets=targets) if settings.movement else {}
    found: dict[str, LayerStatistics] = {}
    samples = sum(len(batch) for batch in batches)
    for together in passes:
        sums: dict[str, _Sums] = {}
        for name in together:
            generator = torch.Generator().manual_seed(settings.seed * 7919 + zlib.crc32(name.encode()))
            each = max(1, -(-settings.patches // samples))
            blocks, columns = sizes[name]
            sums[name] = _Sums(each, generator, blocks if columns <= settings.max_columns else 0)
        _observe(model, sums, batches, progress)
        for name in together:
            done = _finished(sums.pop(name), *gradients[name])
            second = None if done.second is None else keep(name, done.second)
            found[name] = replace(done, second=second, movement=moved.get(name))
    return {name: found[name] for name in layers}


def _passes(sizes: Mapping[str, tuple[int, int]], settings: CalibrationSettings) -> Iterator[list[str]]:
    """Layers that are seen together: their moments, (matrices, columns) each, fit the memory bound."""
    together: list[str] = []
    held = 0
    for name, (blocks, columns) in sizes.items():
        needed = 8 * blocks * columns**2 if columns <= settings.max_columns else 0
        if together and held + needed > settings.memory_bytes:
            yield together
            together, held = [], 0
        together.append(name)
        held += needed
    if together:
        yield together


def _observe(model: nn.Module, sums: Mapping[str, _Sums], batches: Sequence[Tensor], progress: Progress) -> None:
    modules = dict(model.named_modules())
    hooks = {name: (lambda inputs, output, name=name: sums[name].see(modules[name], inputs, output)) for name in sums}
    with torch.no_grad(), watching(model, hooks):
        for batch in batches:
            model(batch)
            progress.step()


@contextmanager
def _differentiable(model: nn.Module) -> Iterator[None]:
    """Parameters without gradients, so that a backward pass costs what the activations need and no more."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _gradients(
    model: nn.Module, layers: Sequence[str], *, batches: Sequence[Tensor], targets: Sequence[Tensor], limit: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """For each layer the Taylor scores of its inputs and the Fisher information of its outputs (`limit` samples)."""
    modules = dict(model.named_modules())
    sums: dict[str, list[Tensor | float]] = {name: [0.0, 0.0] for name in layers}

    def hold(name: str, inputs: Tensor, output: Tensor) -> None:
        layer, values = modules[name], inputs.detach().clone()

        def taylor(gradient: Tensor) -> None:
            sums[name][0] = sums[name][0] + _taylor(layer, values, gradient)

        def fisher(gradient: Tensor) -> None:
            sums[name][1] = sums[name][1] + _fisher(layer, gradient)

        # Hooks, not `retain_grad`: an activation in place would move that to the value after it.
        for tensor, see in ((inputs, taylor), (output, fisher)):
            if tensor.requires_grad:
                tensor.register_hook(see)  # type: ignore[no-untyped-call]

    hooks = {name: (lambda x, y, name=name: hold(name, x, y)) for name in layers}
    # Tokens have no gradient: what is looked up for them begins the graph.
    tokens = {name: _begin_graph for name, module in modules.items() if isinstance(module, nn.Embedding)}
    together = min(_GRADIENT_BATCH, len(batches[0]))
    few = torch.split(torch.cat(tuple(batches))[:limit], together)
    wanted_of = torch.split(torch.cat(tuple(targets))[:limit], together)
    with _differentiable(model), watching(model, {**tokens, **hooks}):
        for batch, wanted in zip(few, wanted_of, strict=True):
            floating = batch.clone().requires_grad_() if batch.is_floating_point() else batch
            loss = loss_of(first_tensor(model(floating)), wanted)
            loss.backward()  # type: ignore[no-untyped-call]
    shown = {call.name: call for call in calls(model, batches[0][:1])}
    return {
        name: (
            _per_channel(modules[name], shown[name].inputs, taylor),
            _per_channel(modules[name], shown[name].output, fisher) / max(sum(map(len, few)), 1),
        )
        for name, (taylor, fisher) in sums.items()
    }


def _begin_graph(_tokens: Tensor, vectors: Tensor) -> Tensor:
    return vectors.requires_grad_()


def _taylor(layer: nn.Module, inputs: Tensor, gradient: Tensor) -> Tensor:
    product = channels_last(layer, inputs * gradient)  # (N, positions, inputs)
    return product.sum(1).double().square().sum(0)


def _fisher(layer: nn.Module, gradient: Tensor) -> Tensor:
    return channels_last(layer, gradient).square().sum(1).double().sum(0)


def _per_channel(layer: nn.Module, tensor: Tensor, total: Tensor | float) -> Tensor:
    """A running sum as a tensor, zero where no gradient came by."""
    if isinstance(total, Tensor):
        return total
    return torch.zeros(channels_last(layer, tensor).shape[-1], dtype=torch.float64)


def _finished(sums: _Sums, taylor: Tensor, fisher: Tensor) -> LayerStatistics:
    samples = sum(len(values) for values in sums.per_sample)
    mean, diagonal = torch.as_tensor(sums.mean) / sums.count, torch.as_tensor(sums.diagonal) / sums.count
    return LayerStatistics(
        mean=mean,
        diagonal=diagonal,
        second=sums.second.div_(sums.count) if sums.second is not None else None,
        mean_abs=torch.as_tensor(sums.mean_abs) / samples,
        zero_share=torch.as_tensor(sums.zero_share) / samples,
        per_sample=torch.cat(sums.per_sample),
        taylor=taylor,
        output_fisher=fisher,
    )
