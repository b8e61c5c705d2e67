"""The cost side of a search: tables of latency and memory, measured on the target or read from the run folder."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
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
from autoprune.files import write_bytes, write_text
from autoprune.memory import give_back
from autoprune.model.fingerprint import of_tensors, of_text
from autoprune.model.flow import norms_after
from autoprune.model.integers import Arithmetic
from autoprune.profile.cost_model import CostModel
from autoprune.profile.forms import with_forms
from autoprune.profile.latency import Bench, measure_table
from autoprune.profile.memory import MemoryModel, live_map_of, measure_memory
from autoprune.progress import Progress
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
    subject: Subject, folder: Path, *, latency: bool, stages: Stages, progress: Progress, memory: bool = False
) -> tuple[Space, CostModel, LatencyTable | None]:
    """The cost table, and the space whose widths fit the runtime's steps. Latency and memory are measured only when
    asked for.
    """
    task = subject.task
    units = subject.anatomy.units
    forms = runtime(task.target.runtime).forms(task.target)
    first = resolve(units, task.spec, forms=forms)
    if first != resolve(units, task.spec):
        progress.note(f"{task.target.runtime} on {task.target.device} computes in floats; options with inputs: [8] go")
    table = stages.timed("profile", lambda: _table(subject, first, folder, progress)) if latency else None
    aligned = None
    if table is not None:
        aligned = CostModel(with_forms(subject.anatomy.architecture, first, forms), first, table).aligned_widths
    space = resolve(units, task.spec, aligned=aligned, forms=forms)
    peak = stages.timed("memory", lambda: _memory(subject, space, folder, progress)) if memory else None
    return space, CostModel(with_forms(subject.anatomy.architecture, space, forms), space, table, memory=peak), table


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


def _table(subject: Subject, space: Space, folder: Path, progress: Progress) -> LatencyTable:
    """The latency table of this model's shapes on this target and machine, measured or read."""
    task = subject.task
    engine = runtime(task.target.runtime)
    architecture = with_forms(subject.anatomy.architecture, space, engine.forms(task.target))
    key = of_text(
        architecture, space, task.target.text, tuple(subject.example.shape), engine.version(),
        platform.node(), platform.processor(), "table 6",
    )  # fmt: skip
    path = folder / "tables" / f"{key[:16]}.json"
    if path.exists():
        try:
            table = LatencyTable.model_validate_json(path.read_text(encoding="utf-8"))
        except ValueError:
            progress.note(f"{path} is damaged and is measured anew")
        else:
            if table.key == key:
                progress.note(f"reused the latency table ({table.fitted_models} models, {path.name})")
                return table.model_copy(update={"dense_s": _dense_latency(subject)})

    bench = _shapes(subject, space, folder, progress)
    table = measure_table(
        space, architecture, bench=bench, key=key, seed=task.seed, progress=progress,
        models=subject.samples.fit, check=subject.samples.check,
    )  # fmt: skip
    write_text(path, table.model_dump_json(indent=1))
    return table


def _shapes(subject: Subject, space: Space, folder: Path, progress: Progress) -> Bench:
    """Where choices become models for the clock."""
    arithmetic = arithmetic_of(subject, space, folder, progress)
    norms = norms_after(subject.model, subject.task.data.validation_inputs[:2])

    def build(choice: Choice) -> nn.Module:
        options = space.options_of(choice)
        return shape_only(subject.model, subject.anatomy, options, norms=norms, arithmetic=arithmetic)

    return Bench(build, runtime(subject.task.target.runtime), subject.task.target, subject.example)


def _memory(subject: Subject, space: Space, folder: Path, progress: Progress) -> MemoryModel:
    """What this model's shapes need in memory on this target and machine, measured or read."""
    task = subject.task
    engine = runtime(task.target.runtime)
    architecture = with_forms(subject.anatomy.architecture, space, engine.forms(task.target))
    key = of_text(
        architecture,
        space,
        task.target.text,
        tuple(subject.example.shape),
        engine.version(),
        platform.node(),
        "memory 1",
    )
    path = folder / "tables" / f"memory-{key[:16]}.json"
    bench = _shapes(subject, space, folder, progress)
    table = None
    if path.exists():
        with suppress(ValidationError):
            table = MemoryTable.model_validate_json(path.read_text(encoding="utf-8"))
    if table is None or table.key != key:
        table = measure_memory(space, architecture, bench=bench, key=key, seed=task.seed, progress=progress)
        write_text(path, table.model_dump_json(indent=1))
    return MemoryModel(live_map_of(space, bench), table, space, architecture)


def _dense_latency(subject: Subject) -> float:
    """Seconds the dense model takes today; a reused table knows shares alone."""
    engine = runtime(subject.task.target.runtime)
    return Stopwatch.of(subject.model, engine, subject.task.target, example=subject.example).compare([])[0].median
