"""autoprune from Python: `search` on your own objects, and what the command line calls. Composes; decides nothing."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from autoprune.apply import apply
from autoprune.config import Config, save_run
from autoprune.core.budget import Budget, parse_budgets
from autoprune.core.exchange import ExportRecord, ImportRecord
from autoprune.core.floor import Floor, floor_of, recorded
from autoprune.core.outcome import OutcomeRecord, PackedItem, PackedRecord, UnitsRecord, VerifyRecord
from autoprune.core.policy import Measured, Policy
from autoprune.core.target import Target
from autoprune.core.unit import NARROWED, SizeOf
from autoprune.costing import Stages, measured_costs
from autoprune.coverage import coverage
from autoprune.data import as_data
from autoprune.engines import open_engine
from autoprune.engines.local import Local
from autoprune.engines.settings import EngineSettings, RaySettings
from autoprune.errors import BudgetError, ConfigError, HelpedError, MissedError
from autoprune.evaluators import evaluator
from autoprune.evaluators.base import Evaluator
from autoprune.evaluators.function import Function
from autoprune.evidence import judge, unit_records, write_down
from autoprune.exporters import exporter
from autoprune.exporting import write_export
from autoprune.files import open_file, read_policy, write_bytes, write_policy, write_text
from autoprune.goal import Plan, Recover, check_goal, resolve_limits
from autoprune.importing import Import, read_import, write_import
from autoprune.loading import load_data, load_factory, load_model, random_data
from autoprune.memory import suit
from autoprune.merging import merge_files
from autoprune.model.describe import macs_of
from autoprune.model.flow import norms_after
from autoprune.model.integers import deployed
from autoprune.model.kernels import SMALLEST
from autoprune.packing.archive import inspected
from autoprune.profile.device_table import read_table
from autoprune.progress import Progress, Silent
from autoprune.pursue import Found, fastest, pursue
from autoprune.report.html import render
from autoprune.resolved import resolved
from autoprune.run import Run
from autoprune.run_folder import usable_folder
from autoprune.runtimes import runtime
from autoprune.runtimes.resident import resident
from autoprune.searching.board import Board
from autoprune.searching.samplers import check_sampler
from autoprune.ship import write_model
from autoprune.spaces import Narrowing, WeightChoice, load_space
from autoprune.sparsity import sparsifier
from autoprune.storage import FLOATS, FileFormat
from autoprune.subject import Task, in_memory, subject_of
from autoprune.transfer import transfer
from autoprune.verify import Stopwatch, latency_record, params, score, size_bytes
from autoprune.workbench import Workbench, prepare


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a search found: the verified policy, the really cut model, the report (HTML) and all its evidence."""

    policy: Policy
    model: nn.Module
    report: str
    record: OutcomeRecord
    folder: Path

    @property
    def met(self) -> bool:
        """Whether every promise was kept when verified."""
        return self.record.met


def search(  # noqa: PLR0913 (one flat, keyword-only door, like the configuration file)
    model: nn.Module,
    *,
    example: Tensor | None = None,
    calibration: object,
    validation: object,
    budget: str | Sequence[str] | None = None,
    max_drop: str | float | None = None,
    min_accuracy: str | float | None = None,
    max_loss: str | float | None = None,
    metric: str | Evaluator = "top1",
    target: Target | None = None,
    latency_table: str | Path | None = None,
    size: SizeOf = "onnx",
    space: str = "cnn-channels",
    protect: Sequence[str] = (),
    plan: Plan | None = None,
    seed: int = 0,
    run: str | Path | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Search the best policy for `model` within `budget` and verify it on the real runtime.

    `example` is one batch as the target runs it, (batch, ...); default: one validation sample. `calibration` and
    `validation` are tensors or arrays (inputs, targets), a Dataset or a DataLoader; validation must be data that the
    model was not trained on. Of a family (`"3ms,5ms"`) the last outcome is returned and all are in the run folder.
    `max_drop` is how much worse the metric may get (`1%`: points for top1 and other shares, else of the dense value;
    a number: its own unit); `min_accuracy` and `max_loss` bound the metric itself.
    `latency_table` is a file of times of a device that cannot be reached (CSV rows `unit,keep,ms`, or SPDY's timings);
    latency is then by it, and is not measured.
    `size` says what a budget on size counts: the ONNX file, the packed file or the tensors as they are.
    `run` is a folder that later searches reuse; default: a fresh temporary one. Raises BudgetError, MissedError, and
    HelpedError where a search is shared with the machine that is the target (`Plan.storage`).
    """
    data = as_data(calibration, validation)
    goal = Target() if target is None else target
    if example is not None:
        goal = replace(goal, batch=int(example.shape[0]))
    folder = Path(run) if run is not None else Path(mkdtemp(prefix="autoprune-"))
    spec = load_space(space, Path.cwd())
    task = Task(
        model, type(model).__name__, data, evaluator(metric) if isinstance(metric, str) else metric, goal,
        spec.model_copy(update={"protect": (*spec.protect, *protect)}),
        None if example is None else tuple(example.shape[1:]), seed, size,
        table=None if latency_table is None else read_table(Path(latency_table)),
    )  # fmt: skip
    floor = floor_of(
        task.evaluator.name, higher_is_better=task.evaluator.higher_is_better, max_drop=max_drop,
        min_accuracy=min_accuracy, max_loss=max_loss,
    )  # fmt: skip
    texts = [budget] if isinstance(budget, str) else list(budget or ())
    outcomes = _campaign(
        task, parse_budgets(texts), floor, plan=plan or Plan(), folder=folder, progress=progress or Silent()
    )
    if not outcomes:
        raise HelpedError("all trials are done; the policy is written where the latencies were measured")
    return outcomes[-1]


def search_config(config: Config, *, folder: Path, progress: Progress) -> list[OutcomeRecord]:
    """The search of a configuration; everything is written into its run folder, which it continues when it is there.

    `folder` is what the configuration's paths are relative to. Raises MissedError when a verified number misses.
    """
    task, floor = _with_table(_task(config, folder), config, folder), config.floor
    run = usable_folder(folder / (config.run or "runs/search"))
    save_run(config, folder, run)
    outcomes = _campaign(task, config.budgets, floor, plan=_plan(config, folder), folder=run, progress=progress)
    return [outcome.record for outcome in outcomes]


def units_of(config: Config, *, folder: Path, latency: bool, progress: Progress) -> UnitsRecord:
    """What can be pruned, with each unit's share of the cost; how much of the model that is, and why not the rest."""
    task = _task(config, folder)
    subject = subject_of(_with_table(task, config, folder) if latency else task, progress)
    run = Run(usable_folder(folder / (config.run or "runs/search")) if latency else Path(), Local())
    space, costs, _ = measured_costs(subject, run, latency=latency, stages=Stages(), progress=progress)
    notes = tuple(f"kept whole: {entry.root} ({entry.reason})" for entry in subject.anatomy.refused)
    if config.data is None:
        notes = ("found with random inputs: there is no data", *notes)
    reached = coverage(costs, subject.anatomy.refused, narrowed=bool(subject.task.spec.narrowed))
    return UnitsRecord(units=unit_records(space, costs, {}), coverage=reached, notes=notes)


def apply_policy(
    policy_path: Path, config: Config, *, folder: Path, output: Path, anew: bool = False, progress: Progress
) -> dict[str, Path]:
    """Write the cut model of a policy into `output`; kind -> file. With `anew` (a transfer) the policy's methods choose
    what goes on this model's weights, and the policy that comes of it is written, too.
    """
    read_policy(policy_path)  # a damaged one is told at once
    subject = subject_of(_any_policy(_task(config, folder)), progress)
    written: dict[str, Path] = {}
    if anew:
        policy_path = transfer(policy_path, subject, output, refit=config.search.refit, progress=progress)
        written["policy"] = policy_path
    applied = apply(policy_path, subject)
    return written | write_model(
        applied, example=subject.example, factory=config.model, source=folder, folder=output,
        progress=progress,
    )  # fmt: skip


def export_policy(
    policy_path: Path, config: Config, *, folder: Path, tool: str, output: Path, allow_lossy: bool, progress: Progress
) -> ExportRecord:
    """Write a policy as `tool` reads it into `output`. Raises LossyError where that loses something and may not."""
    read_policy(policy_path)  # a damaged one is told at once
    chosen = exporter(tool)
    subject = subject_of(_any_policy(_task(config, folder)), progress)
    laid = resolved(apply(policy_path, subject), subject, title=policy_path.name, factory=config.model)
    return write_export(laid, chosen, output, allow_lossy=allow_lossy)


def import_policy(
    path: Path, config: Config, *, folder: Path, asked: Import, output: Path, progress: Progress
) -> ImportRecord:
    """Write the policy that another tool's file means for the model to `output`. Raises PolicyError where nothing of it
    fits, with all that was asked.
    """
    found = read_import(path, asked)  # a damaged one is told at once
    subject = subject_of(_any_policy(_task(config, folder)), progress)
    return write_import(found, subject, asked, output=output, title=str(path))


def merge_policies(paths: Sequence[Path], output: Path) -> Policy:
    """Join the policies in `paths` into one at `output`. Raises PolicyError where they conflict."""
    return merge_files(paths, output)


def unpack_file(path: Path, output: Path) -> PackedRecord:
    """Write the tensors of a packed model as safetensors, bit for bit. Raises ModelError for a damaged file."""
    with open_file(path) as file:
        unpacked, known = inspected(file.read(), name=str(path))
    tensors = unpacked.tensors
    write_bytes(output, save({name: tensor.contiguous() for name, tensor in tensors.items()}))
    items = [
        PackedItem(name=i.name, kind=i.kind, shape=i.shape, stored_bytes=i.stored_bytes, shannon_bytes=i.shannon_bytes)
        for i in known.items
    ]
    plain = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    return PackedRecord(
        items=tuple(items), overhead_bytes=known.overhead_bytes, size_bytes=known.size_bytes, plain_bytes=plain,
        written=str(output),
    )  # fmt: skip


def verify_policy(policy_path: Path, config: Config, *, folder: Path, progress: Progress) -> VerifyRecord:
    """Measure a policy again on this machine, beside the dense model, and judge it by its own budget and floor.

    A budget or a floor in `config` takes the place of the policy's own.
    """
    read_policy(policy_path)  # a damaged one is told at once
    task = _any_policy(_task(config, folder))
    subject = subject_of(task, progress)
    applied = apply(policy_path, subject)
    progress.phase("verify")
    watch = Stopwatch.of(subject.model, runtime(task.target.runtime), task.target, example=subject.example)
    norms = norms_after(subject.model, task.data.validation_inputs[:2])
    files = FileFormat(applied.policy.size, subject.example, norms)
    ready = deployed(applied.model, norms, applied.scales)
    first, (timing,) = watch.compare([ready])
    texts = list(config.budget or ()) or list(applied.policy.budget.values())
    budget = parse_budgets(texts)[0]
    peaks: list[int | None] = [None, None]
    if any(limit.metric == "memory" for limit in budget.limits):
        peaks = [
            resident(model, subject.example, runtime=runtime(task.target.runtime), target=task.target).model_bytes
            for model in (subject.model, ready)
        ]
    part = subject.parts.held_out
    counted = [
        Measured(
            latency_ms=latency_record(times), ratio=times.ratio,
            score=score(model, task.evaluator, part, batch=subject.batch),
            macs=macs_of(model, task.data.validation_inputs[:1]), params=params(model),
            size_bytes=files.size(model, weights), memory_bytes=memory,
        )
        for model, times, weights, memory in (
            (subject.model, first, FLOATS, peaks[0]), (applied.model, timing, applied.weights, peaks[1])
        )
    ]  # fmt: skip
    dense, pruned = counted
    floor = config.floor
    if not floor.text:
        sense = task.evaluator.higher_is_better
        floor = recorded(applied.policy.floor, task.evaluator.name, higher_is_better=sense)
    base = {"latency": first.median, "macs": dense.macs, "params": dense.params, "size": dense.size_bytes}
    base["memory"] = dense.memory_bytes or 0
    met, verdict = judge(pruned, budget.resolve(base), floor, dense=dense, metric=task.evaluator.name)
    return VerifyRecord(met=met, verdict=verdict, dense=dense, pruned=pruned, budget=budget.text, floor=floor.text)


def _campaign(
    task: Task, budgets: Sequence[Budget], floor: Floor, *, plan: Plan, folder: Path, progress: Progress
) -> list[Outcome]:
    """Every budget on one workbench. All outcomes are written before a missed one is an error."""
    check_goal(budgets, floor)
    check_sampler(plan.sampler)
    for name in {choice.method for choice in task.spec.weights if choice.patterns != ("",)}:
        sparsifier(name)  # an unknown one is told at once
    usable_folder(folder)
    with closing(open_engine(plan.engine, folder, progress)) as engine:
        run = Run(folder, engine, plan.storage, Board(plan.storage, note=progress.note) if plan.storage else None)
        bench = _bench(task, budgets, run, progress)
        outcomes = []
        for budget in budgets:
            try:
                found = _found(bench, budget, floor, plan=plan, progress=progress)
            except HelpedError as helped:
                progress.note(f"{budget.text}: {helped}")
                continue
            outcomes.append(_written(bench, found, floor, folder=folder / _slug(budget, floor), progress=progress))
    missed = [outcome for outcome in outcomes if not outcome.met]
    if missed:
        verdicts = "\n".join(f"{o.record.budget}: {o.record.verdict} ({o.folder})" for o in missed)
        raise MissedError(verdicts)
    return outcomes


def _bench(task: Task, budgets: Sequence[Budget], run: Run, progress: Progress) -> Workbench:
    """Measure costs first: a budget out of reach stops here, before anything long."""
    for limit in (limit for budget in budgets for limit in budget.limits):
        if limit.relative and limit.value >= 1:
            raise BudgetError(f"budget {limit.text}: that is no less than the dense model; try --budget 50%")
    stages = Stages()
    subject = stages.timed("discover", lambda: subject_of(task, progress))
    metrics = {limit.metric for budget in budgets for limit in budget.limits}
    latency = "latency" in metrics or not metrics
    space, costs, table = measured_costs(
        subject, run, latency=latency, stages=stages, progress=progress, memory="memory" in metrics
    )
    for budget in budgets:
        if all(limit.metric != "size" for limit in budget.limits):
            resolve_limits(costs, budget)  # bytes are known once weights have been stored
    return prepare(subject, space, costs, table, run=run, stages=stages, progress=progress)


def _found(bench: Workbench, budget: Budget, floor: Floor, *, plan: Plan, progress: Progress) -> Found:
    if budget.limits:
        return pursue(bench, budget, plan=plan, progress=progress)
    return fastest(bench, floor, plan=plan, progress=progress)


def _written(bench: Workbench, found: Found, floor: Floor, *, folder: Path, progress: Progress) -> Outcome:
    written = write_down(bench, found, floor, title=bench.subject.task.name)
    page = render(written.record)
    write_bytes(folder / "policy.safetensors", written.side_file)
    write_policy(folder / "policy.yaml", written.record.policy)
    write_text(folder / "outcome.json", written.record.model_dump_json(indent=1))
    write_text(folder / "report.html", page)
    progress.note(f"written: {folder / 'policy.yaml'}")
    model = found.chosen.candidate.model
    in_memory(model, torch.contiguous_format)
    return Outcome(written.record.policy, model, page, written.record, folder)


def _slug(budget: Budget, floor: Floor) -> str:
    text = budget.text if budget.limits else f"floor {floor.text}"
    return "".join(c if c.isalnum() or c in ".-" else "_" for c in text.replace("%", "pct").replace(" ", ""))


def _task(config: Config, folder: Path) -> Task:
    data = None if config.data is None else load_data(config, folder=folder)
    model = load_model(config, folder=folder)
    suit(size_bytes(model))
    if ":" in config.metric:
        function: Any = load_factory(config.metric, folder, key="metric")
        judge_by: Evaluator = Function(function, config.metric, higher_is_better=config.higher_is_better)
    else:
        judge_by = evaluator(config.metric)
    spec = load_space(config.space.preset, folder)
    spec = spec.model_copy(update={"protect": (*spec.protect, *config.space.protect)})
    target, shape = config.target.target, config.target.example
    if shape is not None:
        target = replace(target, batch=shape[0])
    if data is None:
        if shape is None:
            raise ConfigError("data: is missing; write e.g. `data: model.py:data`, or give an example's shape")
        data = random_data(model, shape)
    return Task(
        model, type(model).__name__, data, judge_by, target, spec, None if shape is None else shape[1:],
        config.search.seed, config.size, config.search.bank_memory,
    )  # fmt: skip


def _with_table(task: Task, config: Config, folder: Path) -> Task:
    """The task with the times of its device, where the configuration names a table of them."""
    table = config.target.table
    return task if table is None else replace(task, table=read_table(folder / table))


def _any_policy(task: Task) -> Task:
    """The task with every kind of unit that a policy may name, whatever space it was searched in."""
    weights, kernels = task.spec.weights or (WeightChoice(bits=(8,)),), task.spec.kernels or (SMALLEST,)
    resolutions = task.spec.resolutions or (0.5,)
    kinds: dict[str, object] = {**dict.fromkeys(NARROWED, Narrowing()), "blocks": True, "only": ()}
    kinds |= {"weights": weights, "kernels": kernels, "resolutions": resolutions}
    return replace(task, spec=task.spec.model_copy(update=kinds))


def _plan(config: Config, folder: Path) -> Plan:
    asked, ray, recover = config.search, config.ray, config.recover
    callbacks = [_callback(spec, folder) for spec in ray.callbacks]
    settings = RaySettings(
        ray.address, ray.cpus, ray.gpus, ray.target_wait, asha=ray.asha, population=ray.population,
        callbacks=tuple(callbacks),
    )  # fmt: skip
    return Plan(
        asked.trials, asked.seconds, asked.sampler, asked.finalists, asked.refit,
        Recover(recover.steps, recover.learning_rate, recover.batch, recover.trials),
        EngineSettings(asked.engine, asked.workers, asked.retries, settings), asked.storage,
    )  # fmt: skip


def _callback(spec: str, folder: Path) -> object:
    """A callback of Ray Tune by 'module:Name' or 'file.py:function'."""
    return load_factory(spec, folder, key="ray.callbacks")()
