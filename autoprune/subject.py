"""The subject of a search: the task a person brings, and the model as the search sees it. Nothing is measured here."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoprune.core.target import Target
from autoprune.core.unit import SizeOf
from autoprune.data import Data, Split, check_fits, split
from autoprune.evaluators.base import Evaluator
from autoprune.model.describe import macs_of
from autoprune.model.discover import Anatomy, discover
from autoprune.model.fingerprint import structure_fingerprint, weights_fingerprint
from autoprune.model.observe import largest_activation
from autoprune.model.plain import Kinds, plain_copy
from autoprune.profile.device_table import DeviceTable
from autoprune.progress import Progress
from autoprune.spaces import SpaceSpec

BANK_MEMORY = 4_000_000_000
MOST_BATCH = 128
BATCH_BYTES = 2**24
"""The largest activation of one batch: what fits the caches and is not mapped anew for every layer is twice as fast."""


@dataclass(frozen=True, slots=True)
class Task:
    """What a person brings: a trained model, data, a metric, a target, and what may be done."""

    model: nn.Module
    name: str
    data: Data
    evaluator: Evaluator
    target: Target
    spec: SpaceSpec
    example_shape: tuple[int, ...] | None = None
    """Shape of one sample on the target, without the batch; None: the data's."""
    seed: int = 0
    size: SizeOf = "onnx"
    bank_memory: int = BANK_MEMORY
    """Bytes of second moments held in memory; the rest is on disk."""
    table: DeviceTable | None = None
    """Times of a device that cannot be reached, by which latency is told in place of the target's."""


@dataclass(frozen=True, slots=True)
class Samples:
    """How many samples each step looks at. Set by the model's MACs, so that a step costs alike for all models and the
    same model is always treated alike; a model of up to 125 MMACs gets the most.
    """

    calibrate: int
    """Moments and final refits."""
    gradients: int
    recalibrate: int
    """Batch norms of every candidate."""
    select: int
    """Every candidate: those that it is compared with the dense model on."""
    probe: int
    """One unit changed alone; none for models so large that it would take minutes."""
    refit: int
    """Finalists, before one of them is chosen."""
    fit: int
    """Whole models that the latency table is fitted to; fewer of large ones, whose layers are mostly alike."""
    check: int
    """Whole models that it is checked on."""
    patches: int
    """Input columns of each layer, over all samples."""

    @classmethod
    def of(cls, macs: int) -> Samples:
        """For a model of so many multiply-adds a sample."""

        def within(total: float, least: int, most: int) -> int:
            return int(min(most, max(least, total / max(macs, 1))))

        return cls(
            calibrate=within(256e9, 256, 2048),
            gradients=within(32e9, 32, 512),
            recalibrate=within(32e9, 64, 256),
            select=within(400e9, 32, 2**31),
            probe=within(24e9, 24, 256) if macs <= 500e6 else 0,
            fit=within(150e9, 20, 32),
            check=within(40e9, 6, 20),
            refit=within(64e9, 32, 512),
            patches=within(4.1e12, 8192, 32768),
        )


@dataclass(frozen=True, slots=True)
class Subject:
    """The model as the search sees it: a private copy, its units, its data in batches, what it is."""

    task: Task
    model: nn.Module
    anatomy: Anatomy
    parts: Split
    example: Tensor
    """One batch of the target's shape."""
    samples: Samples
    batch: int
    """Samples in one forward pass: at most 128, fewer where activations are large."""
    layout: torch.memory_format
    """How activations lie in memory: channels last where the model takes that."""
    fingerprint: str
    structure: str
    plain: Kinds
    """Modules of the person's model in whose places plain ones stand here."""


def subject_of(task: Task, progress: Progress) -> Subject:
    """Copy the model, discover its units and split the data. The user's model is not written, here or later."""
    progress.phase("discover")
    model = copy.deepcopy(task.model).eval()
    check_fits(model, task.data)
    plain = plain_copy(model, task.data.validation_inputs[:2])
    model = plain.model
    for name in plain.refused:
        progress.note(f"kept opaque: {name} (the model computes something else with a plain module in its place)")
    layout = _layout(model, task.data.validation_inputs[:1])
    in_memory(model, layout)
    parts = split(task.data)
    if parts.note:
        progress.note(parts.note)
    anatomy = discover(
        model,
        task.data.validation_inputs[:2],
        protect=task.spec.protect,
        narrow=task.spec.narrowed,
        only=task.spec.only,
        blocks=task.spec.blocks,
        weights=bool(task.spec.weights),
        dense_layers=task.spec.dense_layers,
        hidden=task.spec.hidden,
        kernels=bool(task.spec.kernels),
        resolutions=bool(task.spec.resolutions),
    )
    if anatomy.refused:
        more = f" and {len(anatomy.refused) - 1} more" if len(anatomy.refused) > 1 else ""
        progress.note(f"kept whole: {anatomy.refused[0].root}{more} (`autoprune units` says why)")
    shape = task.example_shape or tuple(task.data.validation_inputs.shape[1:])
    example = torch.randn(task.target.batch, *shape, generator=torch.Generator().manual_seed(0))
    if shape == tuple(task.data.validation_inputs.shape[1:]):
        example = task.data.validation_inputs[:1].expand(task.target.batch, *shape).contiguous()
    batch = BATCH_BYTES // largest_activation(model, task.data.validation_inputs)
    return Subject(
        task, model, anatomy, parts, example, Samples.of(macs_of(model, task.data.validation_inputs[:1])),
        max(1, min(MOST_BATCH, batch)), layout, weights_fingerprint(task.model), structure_fingerprint(task.model),
        plain.kinds,
    )  # fmt: skip


def _layout(model: nn.Module, sample: Tensor) -> torch.memory_format:
    """Channels last is a third faster on CPUs, with the same numbers; a `view` in the model may not take it."""
    if sample.ndim != 4:
        return torch.contiguous_format
    trial = copy.deepcopy(model)
    in_memory(trial, torch.channels_last)
    try:
        with torch.no_grad():
            trial(sample.contiguous(memory_format=torch.channels_last))
    except RuntimeError:
        return torch.contiguous_format
    return torch.channels_last


def in_memory(model: nn.Module, memory_format: torch.memory_format) -> None:
    """Lay the weights of every 2-d convolution of `model` (our own copy) out so, in place."""
    for parameter in model.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=memory_format)


def batches_of(subject: Subject, inputs: Tensor) -> tuple[Tensor, ...]:
    """`inputs` (samples, ...) in batches, laid out as the model likes them."""
    return torch.split(inputs.contiguous(memory_format=subject.layout), subject.batch)
