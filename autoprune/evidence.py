"""From what was found to what is written down: policy, side file, outcome record. Looks at the held-out data, once."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from autoprune.contender import counted_macs, latency_of, measured
from autoprune.core.budget import Metric, shown
from autoprune.core.floor import Floor
from autoprune.core.outcome import OutcomeRecord, PredictionCheck, TrialRecord, UnitRecord
from autoprune.core.policy import Evidence, Measured, ModelIdentity, Policy, TargetRecord, UnitDecision
from autoprune.core.space import Space
from autoprune.core.unit import Option, Unit
from autoprune.coverage import coverage
from autoprune.profile.cost_model import CostModel
from autoprune.pursue import Found
from autoprune.side_file import WEIGHTS, digest, side_file
from autoprune.storage import FLOATS
from autoprune.subject import Subject
from autoprune.verify import latency_record, overruns, params, score
from autoprune.workbench import Workbench


@dataclass(frozen=True, slots=True)
class Written:
    """What goes into a budget's folder."""

    record: OutcomeRecord
    side_file: bytes


def write_down(bench: Workbench, found: Found, floor: Floor, *, title: str) -> Written:
    """Measure the held-out numbers and assemble the outcome and the policy's side file."""
    task, part = bench.subject.task, bench.subject.parts.held_out
    dense_score = score(bench.subject.model, task.evaluator, part, batch=bench.subject.batch)
    given, timing = bench.costs.latency, found.dense_timing
    dense = Measured(
        latency_ms=latency_of(bench, timing) if bench.table or given else latency_record(timing),
        ratio=1.0, score=dense_score, divergence=0.0, macs=counted_macs(bench.subject.model, bench),
        params=params(bench.subject.model), size_bytes=bench.files.size(bench.subject.model, FLOATS),
        memory_bytes=round(bench.costs.dense["memory"]) if "memory" in bench.costs.dense else None,
    )  # fmt: skip
    chosen = measured(
        bench, found.chosen, score(found.chosen.candidate.model, task.evaluator, part, batch=bench.subject.batch)
    )
    baselines = {
        contender.label: measured(
            bench, contender, score(contender.candidate.model, task.evaluator, part, batch=bench.subject.batch)
        )
        for contender in found.baselines
    }
    for contender in found.finalists:  # the best baseline, recovered like the finalists
        if contender.label != "finalist" and contender.recovery is not None:
            held_out = score(contender.candidate.model, task.evaluator, part, batch=bench.subject.batch)
            how = "fine-tuned" if "fine-tuned" in contender.recovery else "refitted"
            baselines[f"{contender.label}, {how}"] = measured(bench, contender, held_out)
    options = bench.space.options_of(found.chosen.choice)
    side = side_file(found.chosen.candidate, bench.stitcher, options)
    policy = _policy(bench, found, floor, Evidence(
        metric=task.evaluator.name, dense=dense, pruned=chosen, baselines=baselines, verified=given is None,
        search=_search_facts(bench, found),
    ), side)  # fmt: skip
    source = "" if given is None else f" by the {given.name}, not measured"
    met, verdict = judge(chosen, found.limits, floor, dense=dense, metric=task.evaluator.name, source=source)
    record = OutcomeRecord(
        title=title, budget=found.budget.text, floor=floor.text, metric=task.evaluator.name,
        higher_is_better=task.evaluator.higher_is_better, met=met, verdict=verdict,
        beats_baselines=_beats(chosen, baselines, found, task.evaluator.higher_is_better), policy=policy, dense=dense,
        chosen=chosen, finalists=tuple(measured(bench, contender) for contender in found.finalists),
        baselines=baselines, units=unit_records(bench.space, bench.costs, _options(bench, found)),
        coverage=coverage(bench.costs, bench.subject.anatomy.refused, narrowed=bool(task.spec.narrowed)),
        trials=_trials(found), check=_check(bench), seconds={k: round(v, 2) for k, v in bench.stages.seconds.items()},
        notes=tuple(f"kept whole: {entry.root} ({entry.reason})" for entry in bench.subject.anatomy.refused),
    )  # fmt: skip
    return Written(record, side)


def judge(
    value: Measured, limits: Mapping[Metric, float], floor: Floor, *, dense: Measured, metric: str, source: str = ""
) -> tuple[bool, str]:
    """Whether every promise holds, and one sentence that says by how much; `source` says what latency is known by."""
    over = overruns(value, limits)
    parts: list[str] = []
    numbers = value.costs
    for name, limit in limits.items():
        known = source if name == "latency" else ""
        if name in over:
            missed = 100 * (over[name] - 1)
            parts.append(f"{name} {shown(name, numbers[name])} misses {shown(name, limit)} by {missed:.1f} %{known}")
        else:
            spare = f"({100 * (1 - numbers[name] / limit):.1f} % to spare)"
            parts.append(f"{name} {shown(name, numbers[name])} keeps {shown(name, limit)} {spare}{known}")
    met = not over
    if value.score is not None and dense.score is not None:
        short = floor.shortfall(value.score.value, dense.score.value)
        scored = f"{metric} {value.score.value:.4f} (dense {dense.score.value:.4f})"
        if floor.text:
            side = "below" if floor.higher_is_better else "above"
            parts.append(f"{scored} {'keeps' if short <= 0 else f'is {short:.4f} {side}'} the floor ({floor.text})")
            met = met and short <= 0
        else:
            parts.append(scored)
    return met, "; ".join(parts)


def model_identity(subject: Subject) -> ModelIdentity:
    """Which model a policy belongs to."""
    shape = [subject.task.target.batch, *subject.example.shape[1:]]
    return ModelIdentity(
        name=subject.task.name, fingerprint=subject.fingerprint, structure=subject.structure,
        params=params(subject.task.model), example=[shape],
    )  # fmt: skip


def unit_records(space: Space, costs: CostModel, options: Mapping[str, Option]) -> tuple[UnitRecord, ...]:
    """Every unit with its share of the dense cost: what is gone when its layers are gone."""
    total = costs.dense
    latency = total.get("latency")
    return tuple(
        UnitRecord(
            name=unit.name, kind=unit.kind, width=unit.width,
            keep=options[unit.name].keep if unit.name in options else unit.width,
            method=_how(unit, options.get(unit.name)),
            macs_share=_share(unit, space, costs, "macs"),
            latency_share=_share(unit, space, costs, "latency") if latency is not None else None,
        )
        for unit in space.units
    )  # fmt: skip


def _how(unit: Unit, option: Option | None) -> str:
    """What is done, in a word or a few."""
    if option is None:
        return "keep"
    return option.label if unit.kind == "weights" else option.method


def _share(unit: Unit, space: Space, costs: CostModel, metric: Metric) -> float:
    """What share of the dense cost this unit's narrowest option saves: the most it can give."""
    index = space.names.index(unit.name)
    saved = -float(min(costs.linearise(metric, space.dense)[index], default=0.0))
    return max(0.0, saved / costs.dense[metric])


def _options(bench: Workbench, found: Found) -> dict[str, Option]:
    return bench.space.options_of(found.chosen.choice)


def decisions(units: Mapping[str, Unit], options: Mapping[str, Option]) -> dict[str, UnitDecision]:
    """Options as the policy file says them."""
    return {
        name: UnitDecision(
            kind=units[name].kind, method=option.method, keep=option.keep, of=units[name].width,
            compensate=option.compensate, pattern=option.pattern, bits=option.bits, rank=option.rank,
            inputs=option.inputs,
        )
        for name, option in options.items()
    }  # fmt: skip


def _policy(bench: Workbench, found: Found, floor: Floor, evidence: Evidence, side: bytes) -> Policy:
    return Policy(
        units=decisions({unit.name: unit for unit in bench.space.units}, _options(bench, found)),
        model=model_identity(bench.subject),
        target=_target(bench),
        budget={limit.metric: limit.text for limit in found.budget.limits},
        size=bench.files.kind,
        floor=floor.record,
        evidence=evidence,
        weights=WEIGHTS,
        weights_sha256=digest(side),
    )  # fmt: skip


def _target(bench: Workbench) -> TargetRecord:
    """What latency was measured on, or the table that it is by."""
    target, given = bench.subject.task.target, bench.subject.task.table
    if given is None:
        return TargetRecord(
            runtime=target.runtime, device=target.device, threads=target.threads, batch=target.batch,
            precision=target.precision, where=bench.run.engine.measure(where),
        )  # fmt: skip
    memory = "" if bench.costs.memory is None else f"; memory by {target.text} on {bench.run.engine.measure(where)}"
    return TargetRecord(
        runtime="table", device=given.file, threads=target.threads, batch=target.batch, precision=target.precision,
        where=f"{given.name}{memory}",
    )  # fmt: skip


def _search_facts(bench: Workbench, found: Found) -> dict[str, object]:
    study, table = found.record.study, bench.subject.task.table
    given = {} if table is None else {"latency_table": {"file": table.file, "sha256": table.digest}}
    return given | {
        "sampler": type(study.sampler).__name__, "trials": len(found.record.trials()), "rounds": found.rounds,
        "seed": bench.subject.task.seed, "study": study.study_name,
        "limits": {metric: float(value) for metric, value in found.limits.items()},
        "versions": {"autoprune": version("autoprune"), "torch": str(torch.__version__), "optuna": version("optuna")},
    }  # fmt: skip


def _beats(chosen: Measured, baselines: Mapping[str, Measured], found: Found, higher_is_better: bool) -> bool:
    """Whether no baseline within the budget scored better on held-out data."""
    assert chosen.score is not None
    rivals = [b.score.value for b in baselines.values() if b.score is not None and not overruns(b, found.limits)]
    mine = chosen.score.value
    return all(mine >= value if higher_is_better else mine <= value for value in rivals)


def _trials(found: Found) -> tuple[TrialRecord, ...]:
    records = []
    for trial in found.record.trials():
        costs = {k.removeprefix("cost."): float(v) for k, v in trial.user_attrs.items() if k.startswith("cost.")}
        records.append(TrialRecord(
            number=trial.number, origin=str(trial.user_attrs.get("origin", "")), state=trial.state.name.lower(),
            divergence=trial.value if trial.values else None, costs=costs,
        ))  # fmt: skip
    return tuple(records)


def _check(bench: Workbench) -> PredictionCheck | None:
    if bench.table is None:
        return None
    check = bench.table.check
    return PredictionCheck(models=check.models, median_error=check.median_error, worst_error=check.worst_error)


def where() -> str:
    """The machine, for the record."""
    return f"{platform.system()} {platform.machine()}, {_processor()}, {os.cpu_count()} processors"


def _processor() -> str:
    """Its name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or "unknown processor")
