"""What building the bank costs against one calibration pass with gradients, in one run.

    python benchmarks/bank_cost.py --folder PATH_OF_THE_DATA --model resnet56

The pass: the dense model forward and backward over all calibration samples, batch by batch, nothing observed; timed
before, between and after. The bank: statistics, removal orders of every structured method, and the edited weights and
local harms of every sparsifier at ten levels and of integers, from nothing to the last number.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from tempfile import mkdtemp

import torch
from torch.nn import functional

from autoprune.bank.build import Bank, CalibrationData, local_harms, observe, rank
from autoprune.bank.calibrate import CalibrationSettings
from autoprune.bank.depth import observe_runs
from autoprune.bank.stitch import Stitcher
from autoprune.bank.store import Moments
from autoprune.core.target import Target
from autoprune.data import as_data
from autoprune.evaluators import evaluator
from autoprune.methods import METHODS
from autoprune.model.flow import norms_after
from autoprune.model.recalibrate import Anchor
from autoprune.progress import Silent
from autoprune.spaces import MethodChoice, SpaceSpec, WeightChoice, resolve
from autoprune.sparsity import SPARSIFIERS
from autoprune.subject import Subject, Task, batches_of, subject_of

LEVELS = tuple(f"{percent}%" for percent in (10, 20, 30, 40, 50, 60, 70, 80, 90, 95))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="folder with zoo.py, its weights and data")
    parser.add_argument("--model", default="resnet56")
    asked = parser.parse_args()
    sys.path.insert(0, str(asked.folder))
    import zoo  # noqa: PLC0415 (lies where the user says)

    spec = SpaceSpec(
        methods=tuple(MethodChoice(method=name) for name in METHODS), levels=10,
        weights=(*(WeightChoice(method=name, patterns=LEVELS) for name in SPARSIFIERS),
                 WeightChoice(bits=(8, 4))),
    )  # fmt: skip
    data = as_data(zoo.data(asked.model, "train"), zoo.data(asked.model, "val"))
    task = Task(getattr(zoo, asked.model)(), asked.model, data, evaluator("top1"), Target(), spec)
    subject = subject_of(task, Silent())
    passes = [gradient_pass(subject)]
    parts = build(subject)
    passes.append(gradient_pass(subject))
    one, whole = sum(passes) / len(passes), sum(parts.values())
    for name, seconds in parts.items():
        print(f"{name}: {seconds:.1f} s")
    shown = ", ".join(f"{seconds:.1f}" for seconds in passes)
    print(f"bank: {whole:.1f} s; a pass with gradients over the same samples: {shown} s; ratio {whole / one:.2f}")
    print(json.dumps({"ratio": whole / one, "passes": passes, "parts": parts}))


def inputs_of(subject: Subject) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    count = subject.samples.calibrate
    batches = batches_of(subject, subject.task.data.calibration_inputs[:count])
    return batches, torch.split(subject.task.data.calibration_targets[:count], subject.batch)


def gradient_pass(subject: Subject) -> float:
    """Seconds of one forward and backward over all calibration samples."""
    batches, targets = inputs_of(subject)
    start = time.perf_counter()
    for batch, wanted in zip(batches, targets, strict=True):
        subject.model.zero_grad()
        functional.cross_entropy(subject.model(batch), wanted, reduction="sum").backward()
    subject.model.zero_grad()
    return time.perf_counter() - start


def build(subject: Subject) -> dict[str, float]:
    """Seconds of every part of the bank."""
    parts: dict[str, float] = {}
    clock = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal clock
        parts[name], clock = time.perf_counter() - clock, time.perf_counter()

    batches, targets = inputs_of(subject)
    norms = norms_after(subject.model, batches[0][:2])
    settings = CalibrationSettings(
        patches=subject.samples.patches, gradient_samples=subject.samples.gradients, movement=True
    )
    few = batches_of(subject, subject.task.data.calibration_inputs[: subject.samples.refit])
    runs = observe_runs(subject.model, subject.anatomy.blocks, few, norms=norms, patches=settings.patches,
                        max_columns=settings.max_columns)  # fmt: skip
    lap("depth")
    moments = Moments(Path(mkdtemp()), "k" * 32, memory_bytes=4_000_000_000, progress=Silent())
    statistics = observe(
        subject.model, subject.anatomy, CalibrationData(batches, targets), others=tuple(runs), settings=settings,
        progress=Silent(), keep=moments.keep,
    )  # fmt: skip
    lap("statistics")
    orders = rank(
        subject.model, subject.anatomy, statistics, norms=norms, methods=list(METHODS), targets=torch.cat(targets),
        seed=0, progress=Silent(),
    )  # fmt: skip
    lap("orders")
    bank = Bank(statistics, orders, norms, runs)
    anchor = Anchor.of(subject.model, few)
    lap("anchor")
    stitcher = Stitcher(subject.model, subject.anatomy, bank, anchor=anchor)
    space = resolve(subject.anatomy.units, subject.task.spec)
    local_harms(space, bank, subject.model, anatomy=subject.anatomy, editor=stitcher.editor)
    lap("edits and harms")
    return parts


if __name__ == "__main__":
    main()
