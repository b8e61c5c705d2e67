"""The cost side of a search: tables of latency and memory, measured on the target or read from the run folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError
from torch import nn

from autoprune.bank.ranges import observe_arithmetic
from autoprune.bank.stitch import shape_only
from autoprune.core.cost import LatencyTable
from autoprune.core.memory_table import MemoryTable
from autoprune.core.space import Choice, Space
from autoprune.files import write_bytes
from autoprune.memory import give_back
from autoprune.model.discover import Anatomy
from autoprune.model.fingerprint import of_tensors, of_text
from autoprune.model.flow import norms_after
from autoprune.model.integers import Arithmetic
from autoprune.profile.cost_model import CostModel
from autoprune.profile.device_table import DeviceTable, laid
from autoprune.profile.forms import with_forms
from autoprune.profile.latency import Bench, measure_table
from autoprune.profile.memory import MemoryModel, live_map_of, measure_memory
from autoprune.progress import Progress
from autoprune.run import Kept, Run
from autoprune.runtimes import runtime
from autoprune.spaces import resolve
from autoprune.subject import Subject, batches_of
from autoprune.verify import Stopwatch

Result = TypeVar("Result")


@dataclass(slots=True)
class Stages:
    """Wall seconds of each stage, summed."""

    seconds: dict[str, float] = field(default_factory=dict)

    def timed(self, name: str, work: Callable[[], Result]) -> Result:
        """Run `work` and add its time to stage `name`. What it needed in memory is given back."""
        start = time.perf_counter()
        try:
            return work()
        finally:
            give_back()
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def measured_costs(
    subject: Subject, run: Run, *, latency: bool, stages: Stages, progress: Progress, memory: bool = False
) -> tuple[Space, CostModel, LatencyTable | None]:
    """The cost table, and the space whose widths fit the runtime's steps. Latency and memory are measured only when
    asked for. Where the task has a table of a device's times, the space is what it names, and no latency is measured.
    """
    task = subject.task
    if task.table is not None:
        return *_given_costs(subject, task.table, run, stages=stages, progress=progress, memory=memory), None
    units = subject.anatomy.units
    forms = runtime(task.target.runtime).forms(task.target)
    first = resolve(units, task.spec, forms=forms)
    if first != resolve(units, task.spec):
        progress.note(f"{task.target.runtime} on {task.target.device} computes in floats; options with inputs: [8] go")
    table = stages.timed("profile", lambda: _table(subject, first, run, progress)) if latency else None
    aligned = None
    if table is not None:
        aligned = CostModel(with_forms(subject.anatomy.architecture, first, forms), first, table).aligned_widths
    space = resolve(units, task.spec, aligned=aligned, forms=forms)
    peak = stages.timed("memory", lambda: _memory(subject, space, run, progress)) if memory else None
    return space, CostModel(with_forms(subject.anatomy.architecture, space, forms), space, table, memory=peak), table


def _given_costs(
    subject: Subject, table: DeviceTable, run: Run, *, stages: Stages, progress: Progress, memory: bool
) -> tuple[Space, CostModel]:
    """The space that a device's times are laid over, and costs whose latency is theirs."""
    space, latency = laid(table, subject.anatomy.units, subject.task.spec)
    whole = [entry.unit.name for entry in space.entries if len(entry.options) == 1]
    more = f" and {len(whole) - 3} more" if len(whole) > 3 else ""
    rest = f"; units without times to choose from stay whole: {', '.join(whole[:3])}{more}" if whole else ""
    progress.note(f"latency is by the {table.name}, not measured{rest}")
    peak = stages.timed("memory", lambda: _memory(subject, space, run, progress)) if memory else None
    forms = runtime(subject.task.target.runtime).forms(subject.task.target)
    architecture = with_forms(subject.anatomy.architecture, space, forms)
    return space, CostModel(architecture, space, memory=peak, latency=latency)


def arithmetic_of(subject: Subject, space: Space, folder: Path, progress: Progress) -> dict[str, Arithmetic]:
    """How layers compute in integers where `space` lets them, observed or read from the run folder."""
    layers = [e.unit.layers[0] for e in space.entries if any(option.form == "integer" for option in e.options)]
    if not layers:
        return {}
    inputs = subject.task.data.calibration_inputs[: subject.samples.refit]
    key = of_text(subject.fingerprint, of_tensors([("x", inputs)]), layers, "ranges 1")
    path = folder / "bank" / f"ranges-{key[:16]}.json"
    values = TypeAdapter(dict[str, Arithmetic])
    if path.exists():
        with suppress(ValidationError):
            return values.validate_json(path.read_bytes())
    batches = batches_of(subject, inputs)
    norms = norms_after(subject.model, batches[0][:2])
    found = observe_arithmetic(subject.model, layers, norms=norms, batches=batches, progress=progress)
    write_bytes(path, values.dump_json(found, indent=1))
    return found


def _table(subject: Subject, space: Space, run: Run, progress: Progress) -> LatencyTable:
    """The latency table of this model's shapes on the target, measured or read."""
    task, engine = subject.task, runtime(subject.task.target.runtime)
    architecture = with_forms(subject.anatomy.architecture, space, engine.forms(task.target))
    key = of_text(architecture, space, task.target.text, tuple(subject.example.shape), engine.version(), "table 7")

    def measured() -> LatencyTable:
        progress.phase("profile")
        table = run.engine.measure(
            measure_table, space, architecture, bench=_shapes(subject, space, run.folder, progress), key=key,
            seed=task.seed, models=subject.samples.fit, check=subject.samples.check, progress=progress,
        )  # fmt: skip
        return table.model_copy(update={"where": run.engine.where() or ""})

    kept = Kept("latency", key, LatencyTable)
    table, reused = kept.found_or_made(run, measured, note=progress.note)
    if not reused:
        return table
    progress.note(f"reused the latency table ({table.fitted_models} models, {key[:16]})")
    if run.engine.where() is None or run.board is not None:
        return table  # nobody to ask today, or others count with the same number
    return table.model_copy(update={"dense_s": _dense_latency(subject, run)})


def _shapes(subject: Subject, space: Space, folder: Path, progress: Progress) -> Bench:
    """Where choices become models for the clock."""
    arithmetic = arithmetic_of(subject, space, folder, progress)
    norms = norms_after(subject.model, subject.task.data.validation_inputs[:2])
    builder = ShapeBuilder(subject.model, subject.anatomy, space, norms, arithmetic)
    return Bench(builder, runtime(subject.task.target.runtime), subject.task.target, subject.example)


@dataclass(frozen=True, slots=True)
class ShapeBuilder:
    """Makes models of the shapes of choices, for the clock alone."""

    model: nn.Module
    anatomy: Anatomy
    space: Space
    norms: Mapping[str, str]
    arithmetic: Mapping[str, Arithmetic]

    def __call__(self, choice: Choice) -> nn.Module:
        """The model of one choice."""
        options = self.space.options_of(choice)
        return shape_only(self.model, self.anatomy, options, norms=self.norms, arithmetic=self.arithmetic)


def _memory(subject: Subject, space: Space, run: Run, progress: Progress) -> MemoryModel:
    """What this model's shapes need in memory on the target, measured or read."""
    task, engine = subject.task, runtime(subject.task.target.runtime)
    architecture = with_forms(subject.anatomy.architecture, space, engine.forms(task.target))
    key = of_text(architecture, space, task.target.text, tuple(subject.example.shape), engine.version(), "memory 2")
    bench = _shapes(subject, space, run.folder, progress)

    def measured() -> MemoryTable:
        return run.engine.measure(
            measure_memory, space, architecture, bench=bench, key=key, seed=task.seed, progress=progress
        )

    table, _ = Kept("memory", key, MemoryTable).found_or_made(run, measured, note=progress.note)
    return MemoryModel(live_map_of(space, bench), table, space, architecture)


def _dense_latency(subject: Subject, run: Run) -> float:
    """Seconds the dense model takes today; a reused table knows shares alone."""
    engine = runtime(subject.task.target.runtime)
    watch = Stopwatch.of(subject.model, engine, subject.task.target, example=subject.example, engine=run.engine)
    return watch.compare([])[0].median
