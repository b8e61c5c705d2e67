"""One pass over calibration data: second moments, activity and gradients at the input of every layer that reads a unit.

Memory is bounded: layers whose moments would not fit together are seen in several passes, and a layer too wide for any
(`max_columns`) keeps the diagonal alone. Products are float32 a batch, summed in float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from autoprune.bank.patches import columns, positions_of, sampled_patches
from autoprune.model.observe import calls, watching
from autoprune.progress import Progress


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


@dataclass(frozen=True, slots=True)
class LayerStatistics:
    """What one layer's inputs looked like. `second` is E[x x^T] (columns, columns) and `mean` E[x], float64.

    `diagonal` is E[x^2]. `mean_abs`, `zero_share` are (inputs,), `per_sample` (samples, inputs) the mean over
    positions, `taylor` (inputs,) the sum over samples of (sum over positions of x * dL/dx)^2, `output_fisher`
    (outputs,) the mean over samples of the sum over positions of (dL/dy)^2.
    """

    mean: Tensor
    diagonal: Tensor
    second: Tensor | None
    mean_abs: Tensor
    zero_share: Tensor
    per_sample: Tensor
    taylor: Tensor
    output_fisher: Tensor


@dataclass(slots=True)
class _Sums:
    """Running sums of one layer while batches go by."""

    chosen_each: int
    generator: torch.Generator
    keeps_second: bool
    count: int = 0
    mean: Tensor | float = 0.0
    diagonal: Tensor | float = 0.0
    second: Tensor | float = 0.0
    mean_abs: list[Tensor] = field(default_factory=list)
    zero_share: list[Tensor] = field(default_factory=list)
    per_sample: list[Tensor] = field(default_factory=list)

    def see(self, layer: nn.Module, inputs: Tensor, output: Tensor) -> None:
        """Add one batch."""
        chosen = torch.randperm(positions_of(layer, output), generator=self.generator)[: self.chosen_each]
        patches = sampled_patches(layer, inputs, chosen)
        self.count += len(patches)
        self.mean = self.mean + patches.double().sum(0)
        self.diagonal = self.diagonal + patches.square().double().sum(0)
        if self.keeps_second:
            self.second = self.second + (patches.T @ patches).double()
        flat = channels_last(layer, inputs)  # (N, positions, inputs)
        self.mean_abs.append(flat.abs().mean((0, 1)))
        self.zero_share.append((flat == 0).float().mean((0, 1)))
        self.per_sample.append(flat.mean(1))


def channels_last(layer: nn.Module, inputs: Tensor) -> Tensor:
    """Inputs of a layer as (samples, positions, channels)."""
    if isinstance(layer, nn.Linear):
        return inputs.reshape(inputs.shape[0], -1, inputs.shape[-1])
    return inputs.flatten(2).transpose(1, 2)


def calibrate(
    model: nn.Module, layers: Sequence[str], *, batches: Sequence[Tensor], targets: Sequence[Tensor],
    settings: CalibrationSettings, progress: Progress,
) -> dict[str, LayerStatistics]:  # fmt: skip
    """Statistics at the input of each of `layers`. `targets` hold each batch's classes, (samples,), int64."""
    modules = dict(model.named_modules())
    shapes = {call.name: call for call in calls(model, batches[0][:1])}
    widths = {name: columns(modules[name], shapes[name].inputs) for name in layers}
    passes = list(_passes(widths, settings))
    progress.phase("calibrate", len(batches) * len(passes))
    gradients = _gradients(model, layers, batches=batches, targets=targets, limit=settings.gradient_samples)
    sums: dict[str, _Sums] = {}
    samples = sum(len(batch) for batch in batches)
    for together in passes:
        for index, name in enumerate(together):
            generator = torch.Generator().manual_seed(settings.seed * 7919 + index)
            each = max(1, -(-settings.patches // samples))
            sums[name] = _Sums(each, generator, keeps_second=widths[name] <= settings.max_columns)
        _observe(model, {name: sums[name] for name in together}, batches, progress)
    return {name: _finished(sums[name], *gradients[name]) for name in layers}


def _passes(widths: Mapping[str, int], settings: CalibrationSettings) -> Iterator[list[str]]:
    """Layers that are seen together: their moments fit the memory bound."""
    together: list[str] = []
    held = 0
    for name, width in widths.items():
        needed = 8 * width**2 if width <= settings.max_columns else 0
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
    held: dict[str, tuple[Tensor, Tensor]] = {}
    sums: dict[str, tuple[Tensor | float, Tensor | float]] = dict.fromkeys(layers, (0.0, 0.0))

    def hold(name: str, inputs: Tensor, output: Tensor) -> None:
        for tensor in (inputs, output):
            if tensor.requires_grad:
                tensor.retain_grad()
        held[name] = (inputs, output)

    hooks = {name: (lambda x, y, name=name: hold(name, x, y)) for name in layers}
    seen = 0
    with _differentiable(model), watching(model, hooks):
        for batch, wanted in zip(batches, targets, strict=True):
            if seen >= limit:
                break
            floating = batch.clone().requires_grad_() if batch.is_floating_point() else batch
            outputs = model(floating)
            loss = _loss(outputs[0] if isinstance(outputs, (tuple, list)) else outputs, wanted)
            loss.backward()  # type: ignore[no-untyped-call]
            seen += len(batch)
            for name, (x, y) in held.items():
                before = sums[name]
                sums[name] = (before[0] + _taylor(modules[name], x), before[1] + _fisher(modules[name], y))
            held.clear()
    count = max(seen, 1)
    return {
        name: (
            torch.as_tensor(taylor, dtype=torch.float64),
            torch.as_tensor(fisher, dtype=torch.float64) / count,
        )
        for name, (taylor, fisher) in sums.items()
    }


def _loss(outputs: Tensor, wanted: Tensor) -> Tensor:
    """Cross-entropy for classes (int64), else the squared error; summed over samples."""
    if wanted.dtype == torch.int64:
        return functional.cross_entropy(outputs.flatten(0, -2), wanted.flatten(), reduction="sum")
    return (outputs - wanted.view_as(outputs)).square().sum()


def _taylor(layer: nn.Module, inputs: Tensor) -> Tensor:
    if inputs.grad is None:
        return torch.zeros(channels_last(layer, inputs).shape[-1], dtype=torch.float64)
    product = channels_last(layer, inputs.detach() * inputs.grad)  # (N, positions, inputs)
    return product.sum(1).double().square().sum(0)


def _fisher(layer: nn.Module, output: Tensor) -> Tensor:
    if output.grad is None:
        return torch.zeros(channels_last(layer, output).shape[-1], dtype=torch.float64)
    return channels_last(layer, output.grad).double().square().sum((0, 1))


def _finished(sums: _Sums, taylor: Tensor, fisher: Tensor) -> LayerStatistics:
    mean, diagonal = torch.as_tensor(sums.mean) / sums.count, torch.as_tensor(sums.diagonal) / sums.count
    return LayerStatistics(
        mean=mean,
        diagonal=diagonal,
        second=torch.as_tensor(sums.second) / sums.count if sums.keeps_second else None,
        mean_abs=torch.stack(sums.mean_abs).mean(0).double(),
        zero_share=torch.stack(sums.zero_share).mean(0).double(),
        per_sample=torch.cat(sums.per_sample),
        taylor=taylor,
        output_fisher=fisher,
    )
