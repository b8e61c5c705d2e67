"""The bank of a subject, what builds candidates from it, and what these are mended with and compared on.

The bank is made from calibration data, or read from the run folder. Knows what a bank is made of and by what it is
known again. Does not know costs, budgets or searches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from autoprune.bank import store
from autoprune.bank.build import Bank, CalibrationData, observe, rank
from autoprune.bank.calibrate import CalibrationSettings
from autoprune.bank.depth import observe_runs
from autoprune.bank.stitch import Stitcher
from autoprune.core.space import Space
from autoprune.costing import arithmetic_of
from autoprune.evaluators.divergence import class_dim
from autoprune.methods import method
from autoprune.model.fingerprint import of_tensors, of_text
from autoprune.model.flow import norms_after
from autoprune.model.recalibrate import Anchor
from autoprune.nest import first_tensor
from autoprune.progress import Progress
from autoprune.recover.refit import Reference, RefitSettings
from autoprune.run import Run
from autoprune.searching.scorer import Selection
from autoprune.sparsity import sparsifier
from autoprune.subject import Subject, batches_of


def bank_of(subject: Subject, batches: tuple[Tensor, ...], run: Run, progress: Progress) -> tuple[Bank, str]:
    """The bank, read from the run folder when it was made from the same weights, data and methods."""
    task, samples = subject.task, subject.samples
    chosen = [choice.method for choice in task.spec.weights if choice.patterns != ("",)]
    settings = CalibrationSettings(
        patches=samples.patches, gradient_samples=samples.gradients, seed=task.seed,
        movement=any("movement" in sparsifier(name).needs for name in chosen),
    )  # fmt: skip
    names = sorted({choice.method for choice in task.spec.methods})
    versions = [(name, method(name).version) for name in names]
    data = of_tensors([("x", task.data.calibration_inputs), ("y", task.data.calibration_targets)])
    key = of_text(subject.fingerprint, data, versions, settings, samples, subject.anatomy.units, "bank 5")
    path = run.folder / "bank" / f"{key[:16]}.safetensors"
    norms = norms_after(subject.model, batches[0][:2])
    moments = store.Moments(path.parent, key, memory_bytes=task.bank_memory, progress=progress)
    tensors = store.load_tensors(path, key=key)
    known = None if tensors is None else store.unpack(tensors, norms, moments)
    if known is not None:
        progress.note(f"reused the bank ({path.name})")
        return known, key
    targets = _classes(subject, batches)
    progress.phase("depth")
    few = batches_of(subject, task.data.calibration_inputs[: samples.refit])
    runs = observe_runs(
        subject.model,
        subject.anatomy.blocks,
        few,
        norms=norms,
        patches=settings.patches,
        max_columns=settings.max_columns,
    )  # fmt: skip
    statistics = observe(
        subject.model, subject.anatomy, CalibrationData(batches, targets), others=tuple(runs),
        settings=replace(settings, memory_bytes=task.bank_memory), progress=progress, keep=moments.keep,
    )  # fmt: skip
    pieces = store.Pieces(path.with_suffix(".orders"), key, run.engine.each)
    orders = rank(
        subject.model, subject.anatomy, statistics, norms=norms, methods=names, targets=torch.cat(targets),
        seed=task.seed, progress=progress, each=pieces,
    )  # fmt: skip
    bank = Bank(statistics, orders, norms, runs)
    store.save_tensors(path, store.pack(bank), {"key": key})
    pieces.forget()
    return bank, key


def _classes(subject: Subject, batches: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What gradients are taken against: labels, or the dense model's own answers where there are none."""
    given = subject.task.data.calibration_targets
    if given is not None:
        return torch.split(given[: subject.samples.calibrate], subject.batch)
    wanted = subject.task.data.validation_targets
    with torch.no_grad():
        outputs = [first_tensor(subject.model(batch)) for batch in batches]
    return tuple(
        output if wanted.is_floating_point() else output.argmax(class_dim(output, wanted)) for output in outputs
    )


def stitcher_of(subject: Subject, bank: Bank, space: Space, folder: Path, progress: Progress) -> Stitcher:
    """Builds candidates of `space`, anchored on the calibration data."""
    few = subject.task.data.calibration_inputs[: subject.samples.recalibrate]
    anchor = Anchor.of(subject.model, batches_of(subject, few))
    arithmetic = arithmetic_of(subject, space, folder, progress)
    return Stitcher(subject.model, subject.anatomy, bank, anchor=anchor, arithmetic=arithmetic)


def calibration_of(subject: Subject) -> tuple[Tensor, ...]:
    """The calibration inputs that the bank is made of, in batches."""
    return batches_of(subject, subject.task.data.calibration_inputs[: subject.samples.calibrate])


def selection_of(subject: Subject) -> Selection:
    """The selection part of the validation data, as candidates are compared on it."""
    count, part = subject.samples.select, subject.parts.selection
    return Selection.of(subject.model, batches_of(subject, part.inputs[:count]), part.targets[:count])


def reference_of(subject: Subject, batches: tuple[Tensor, ...]) -> Reference:
    """Refits candidates of the subject's model on `batches` of calibration inputs."""
    settings = RefitSettings(patches=subject.samples.patches * 3 // 2)
    return Reference.of(subject.model, batches, blocks=subject.anatomy.blocks, settings=settings)
