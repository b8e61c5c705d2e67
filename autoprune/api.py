"""autoprune from Python: `search` on your own objects, and what the command line calls. Composes; decides nothing."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import mkdtemp

import torch
from torch import Tensor, nn

from autoprune.asked import plan_of, task_of, with_table
from autoprune.config import Config, save_run
from autoprune.core.budget import Budget, parse_budgets
from autoprune.core.floor import Floor, floor_of
from autoprune.core.outcome import OutcomeRecord, UnitsRecord
from autoprune.core.policy import Policy
from autoprune.core.target import Target
from autoprune.core.unit import SizeOf
from autoprune.costing import Stages, measured_costs
from autoprune.coverage import coverage
from autoprune.data import as_data
from autoprune.engines import open_engine
from autoprune.engines.local import Local
from autoprune.errors import BudgetError, HelpedError, MissedError
from autoprune.evaluators import evaluator
from autoprune.evaluators.base import Evaluator
from autoprune.evidence import unit_records, write_down
from autoprune.files import write_bytes, write_policy, write_text
from autoprune.goal import Plan, check_goal, resolve_limits
from autoprune.profile.device_table import read_table
from autoprune.progress import Progress, Silent
from autoprune.pursue import Found, fastest, pursue
from autoprune.report.html import render
from autoprune.run import Run
from autoprune.run_folder import usable_folder
from autoprune.searching.board import Board
from autoprune.searching.samplers import check_sampler
from autoprune.side_file import WEIGHTS
from autoprune.spaces import load_space
from autoprune.sparsity import sparsifier
from autoprune.subject import Task, in_memory, subject_of
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
    task, floor = with_table(task_of(config, folder), config, folder), config.floor
    run = usable_folder(folder / (config.run or "runs/search"))
    save_run(config, folder, run)
    outcomes = _campaign(task, config.budgets, floor, plan=plan_of(config, folder), folder=run, progress=progress)
    return [outcome.record for outcome in outcomes]


def units_of(config: Config, *, folder: Path, latency: bool, progress: Progress) -> UnitsRecord:
    """What can be pruned, with each unit's share of the cost; how much of the model that is, and why not the rest."""
    task = task_of(config, folder)
    subject = subject_of(with_table(task, config, folder) if latency else task, progress)
    run = Run(usable_folder(folder / (config.run or "runs/search")) if latency else Path(), Local())
    space, costs, _ = measured_costs(subject, run, latency=latency, stages=Stages(), progress=progress)
    notes = tuple(f"kept whole: {entry.root} ({entry.reason})" for entry in subject.anatomy.refused)
    if config.data is None:
        notes = ("found with random inputs: there is no data", *notes)
    reached = coverage(costs, subject.anatomy.refused, narrowed=bool(subject.task.spec.narrowed))
    return UnitsRecord(units=unit_records(space, costs, {}), coverage=reached, notes=notes)


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
    write_bytes(folder / WEIGHTS, written.side_file)
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
