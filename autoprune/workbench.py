"""Everything about one model that is measured once and used by every budget: units, bank, cost table, priors.

A workbench is made from a task and a run folder; what the folder holds already (by fingerprint) is not made again.
Knows nothing of budgets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray

from autoprune.bank import store
from autoprune.bank.build import Bank, Harms, local_harms
from autoprune.bank.stitch import Stitcher
from autoprune.banking import bank_of, calibration_of, reference_of, selection_of, stitcher_of
from autoprune.core.cost import LatencyTable
from autoprune.core.space import Choice, Space
from autoprune.costing import Stages
from autoprune.engines.base import Score
from autoprune.errors import TargetError
from autoprune.model.fingerprint import of_tensors, of_text
from autoprune.model.recalibrate import Anchor
from autoprune.nest import first_tensor
from autoprune.profile.cost_model import CostModel
from autoprune.profile.forms import with_forms
from autoprune.progress import Progress
from autoprune.recover.finetune import Schedule
from autoprune.recover.lesson import Lesson
from autoprune.recover.refit import Reference
from autoprune.run import Run
from autoprune.runtimes import runtime
from autoprune.searching.climb import Climber
from autoprune.searching.measured_prior import one_at_a_time
from autoprune.searching.scorer import Scorer, Selection
from autoprune.storage import FLOATS, FileFormat, storage_of
from autoprune.subject import Subject, batches_of
from autoprune.verify import Stopwatch

Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class Workbench:
    """A subject with everything measured about it."""

    subject: Subject
    space: Space
    costs: CostModel
    table: LatencyTable | None
    bank: Bank
    priors: Mapping[str, Sequence[NDArray[np.float64]]]
    stitcher: Stitcher
    selection: Selection
    scorer: Scorer
    quick: Reference
    """Refits finalists, to choose among them."""
    thorough: Reference
    """Refits the chosen one, on all calibration data."""
    stopwatch: Stopwatch
    stages: Stages
    files: FileFormat
    """The file that a budget on size is about."""
    run: Run
    known: dict[object, dict[Choice, Score]] = field(default_factory=dict)
    """The full scores of choices, for every budget, by what trials are recovered with."""
    made: dict[object, object] = field(default_factory=dict)
    """What is made when it is asked for first."""

    def known_by(self, recovery: object) -> dict[Choice, Score]:
        """Full scores of trials that are recovered so."""
        return self.known.setdefault(recovery, {})

    def lesson(self) -> Lesson:
        """What all fine-tunings share: all of the calibration inputs, and what the dense model says of them."""
        return self._once("lesson", self._lesson)

    def climber(self, schedule: Schedule) -> Climber:
        """Scores trials after a recovery of their own; one for each schedule, so that lanes are started once."""
        seed = self.subject.task.seed
        return self._once(schedule, lambda: Climber(self.scorer, self.lesson(), schedule, seed))

    def _once(self, key: object, make: Callable[[], Made]) -> Made:
        if key not in self.made:
            self.made[key] = make()
        return cast(Made, self.made[key])

    def _lesson(self) -> Lesson:
        inputs = self.subject.task.data.calibration_inputs.contiguous(memory_format=self.subject.layout)
        return Lesson.of(self.subject.model, inputs, self.selection.heads, batch=self.subject.batch)


def prepare(
    subject: Subject, space: Space, costs: CostModel, table: LatencyTable | None, *, run: Run, stages: Stages,
    progress: Progress,
) -> Workbench:  # fmt: skip
    """Calibrate, rank, estimate harm: the rest of what every budget shares."""
    task, model = subject.task, subject.model
    samples = subject.samples
    batches = calibration_of(subject)
    bank, key = stages.timed("bank", lambda: bank_of(subject, batches, run, progress))
    stitcher = stitcher_of(subject, bank, space, run.folder, progress)
    selection = selection_of(subject)
    space = _ranked_only(space, bank, stitcher, progress)
    architecture = with_forms(subject.anatomy.architecture, space, runtime(task.target.runtime).forms(task.target))
    files = _file_format(subject, bank.norms, progress)
    storage = stages.timed("storage", lambda: storage_of(stitcher, space, architecture, files))
    latency = None if costs.latency is None else costs.latency.on(space)
    memory = None if costs.memory is None else costs.memory.on(space, architecture)
    costs = CostModel(architecture, space, table, storage=storage, memory=memory, latency=latency)
    priors = stages.timed(
        "priors", lambda: _priors(subject, space, stitcher, selection, run=run, key=key, progress=progress)
    )
    few = batches_of(subject, task.data.calibration_inputs[: samples.refit])
    engine = runtime(task.target.runtime)
    return Workbench(
        subject, space, costs, table, bank, priors, stitcher, selection, Scorer(stitcher, space, selection),
        reference_of(subject, few), reference_of(subject, batches),
        Stopwatch.of(model, engine, task.target, example=subject.example, engine=run.engine), stages, files, run,
    )  # fmt: skip


def _file_format(subject: Subject, norms: Mapping[str, str], progress: Progress) -> FileFormat:
    """As what models are written; where ONNX cannot take this one, as plain tensors, which is told."""
    files = FileFormat(subject.task.size, subject.example, norms)
    if files.kind == "onnx":
        try:
            files.size(subject.model, FLOATS)
        except TargetError as error:
            progress.note(f"size is that of plain tensors: {error}")
            return replace(files, kind="plain")
    return files


def _ranked_only(space: Space, bank: Bank, stitcher: Stitcher, progress: Progress) -> Space:
    """The space without options whose method could not rank a unit (its layers are too wide for second moments)."""
    entries = []
    for entry in space.entries:
        known = bank.orders.get(entry.unit.name)
        options = entry.options
        if entry.unit.kind == "weights" and len(options) > 1 and not stitcher.editor.can_edit(entry.unit.layers[0]):
            options = options[:1]
            progress.note(f"{entry.unit.name}: too wide for second moments; its weights stay as they are")
        if entry.unit.kind == "kernel" and not stitcher.editor.can_edit(entry.unit.layers[0]):
            options = tuple(option for option in options if option.compensate == "none")
        if known is not None:
            options = (options[0], *(option for option in options[1:] if option.method in known))
            if len(options) < len(entry.options):
                progress.note(f"{entry.unit.name}: too wide for second moments; methods that need them are left out")
        entries.append(type(entry)(entry.unit, options))
    return Space(tuple(entries))


def _priors(
    subject: Subject, space: Space, stitcher: Stitcher, selection: Selection, *, run: Run, key: str,
    progress: Progress,
) -> dict[str, Harms]:  # fmt: skip
    """Additive harm of every option by each prior, kept beside the bank."""
    data = of_tensors([("x", subject.parts.selection.inputs), ("y", subject.parts.selection.targets)])
    key = of_text(key, space, data, subject.samples, "priors 5")
    path = run.folder / "bank" / f"priors-{key[:16]}.safetensors"
    stored = store.load_tensors(path, key=key)
    count = subject.samples.probe
    names = ["reconstruction", "second_order", *(["one_at_a_time"] if count else [])]
    if stored is not None:
        return {name: [stored[f"{name}/{unit}"].numpy() for unit in range(len(space.entries))] for name in names}
    pieces = store.Pieces(path.with_suffix(".harms"), key, run.engine.each)
    priors: dict[str, Harms] = local_harms(
        space, stitcher.bank, subject.model, anatomy=subject.anatomy, editor=stitcher.editor,
        resized=_resized_harms(subject, space, stitcher), each=run.engine.each,
    )  # fmt: skip
    if count:
        few = selection.first(batches_of(subject, subject.parts.selection.inputs[:count]))
        small = Anchor.of(subject.model, batches_of(subject, subject.task.data.calibration_inputs[:count]))
        probe = Stitcher(subject.model, subject.anatomy, stitcher.bank, anchor=small, arithmetic=stitcher.arithmetic)
        shape = priors["reconstruction"]
        priors["one_at_a_time"] = one_at_a_time(space, probe, few, shape=shape, progress=progress, each=pieces)
    tensors = {f"{name}/{unit}": torch.from_numpy(row) for name in names for unit, row in enumerate(priors[name])}
    store.save_tensors(path, tensors, {"key": key})
    pieces.forget()
    return priors


def _resized_harms(subject: Subject, space: Space, stitcher: Stitcher) -> dict[int, float]:
    """Relative squared error of the outputs on calibration samples for each smaller height of the input."""
    batch = batches_of(subject, subject.task.data.calibration_inputs[: subject.samples.refit])[0]
    found: dict[int, float] = {}
    for entry in space.entries:
        for option in entry.options[1:] if entry.unit.kind == "resolution" else ():
            smaller = stitcher.build({entry.unit.name: option}).model
            with torch.no_grad():
                wanted, given = first_tensor(subject.model(batch)).double(), first_tensor(smaller(batch)).double()
            spread = (wanted - wanted.mean(0)).square().sum().clamp_min(1e-30)
            found[option.keep] = float((given - wanted).square().sum() / spread)
    return found
