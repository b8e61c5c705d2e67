"""One budget, from limits to a verified outcome: search, time, recover, choose, judge.

Candidates are chosen on the selection data alone. The held-out part is looked at once, for the claimed numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from autoprune.bank.stitch import Candidate, deployable, shape_only
from autoprune.contender import Contender, misses, off_by, predicted
from autoprune.core.budget import Budget, Limit, Metric
from autoprune.core.cost import LatencyTable, SharesTable
from autoprune.core.floor import Floor
from autoprune.core.space import Choice
from autoprune.engines.base import Lanes
from autoprune.errors import BudgetError
from autoprune.goal import Plan, Recover, resolve_limits
from autoprune.model.fingerprint import of_text
from autoprune.profile.clock import Timing
from autoprune.profile.cost_model import CostModel
from autoprune.profile.latency import refitted
from autoprune.progress import Progress
from autoprune.recover.course import Course, divergence, recovered
from autoprune.recover.finetune import Schedule
from autoprune.recover.refit import Reference, refit
from autoprune.rivals import baseline_choices
from autoprune.run import Kept
from autoprune.runtimes import runtime
from autoprune.runtimes.resident import resident
from autoprune.searching import scorer
from autoprune.searching.loop import Effort, Finished, ranked, run_search
from autoprune.searching.problem import Problem
from autoprune.searching.sampler import prior_starts
from autoprune.searching.samplers import sampler_by_name
from autoprune.searching.study import StudyRecord, open_study
from autoprune.storage import Weights
from autoprune.verify import score, size_bytes
from autoprune.workbench import Workbench

ROUNDS = 3
"""How often the table is corrected and the search repeated when no finalist keeps the budget."""
_MOST_MARGIN = 0.03
_FINALIST_BYTES = 1_250_000_000
"""Weights of dense models as many as there are finalists, at most."""
_CLOSE = 0.95
"""How near a prediction must be to the budget, and a measurement to the prediction, to be left as they are."""
_AIM_ROUNDS = 20
_RACE = 4
"""Finalists get one in so many of the steps that the chosen one gets."""


@dataclass(frozen=True, slots=True)
class Found:
    """What the pursuit of one budget gave, with everything the report needs."""

    budget: Budget
    limits: Mapping[Metric, float]
    chosen: Contender
    finalists: tuple[Contender, ...]
    baselines: tuple[Contender, ...]
    dense_timing: Timing
    record: StudyRecord
    rounds: int


def pursue(bench: Workbench, budget: Budget, *, plan: Plan, progress: Progress, name: str | None = None) -> Found:
    """Search within `budget`, correct the table where reality differs, recover the finalists and choose one."""
    plan = replace(plan, finalists=_affordable(bench.subject.model, plan.finalists))
    limits = resolve_limits(bench.costs, budget)
    allowed = _with_margin(bench, limits, finalists=plan.finalists)
    bench = _aimed(bench, allowed, progress)
    allowed = _sized(bench, allowed)
    study = name or budget.text
    attempt = _attempt(bench, allowed, limits, plan, study=study, progress=progress)
    rounds = 1
    if attempt.keeping and "latency" in limits and (off := _wasted(bench, attempt, allowed)) is not None:
        progress.note(
            f"latency is {off:.3f} x the prediction, which leaves some of the budget; predictions are corrected"
        )
        near = [(contender.choice, contender.timing.ratio) for contender in attempt.finalists]
        corrected = _corrected(bench, near)
        fewer = replace(plan, trials=max(20, plan.trials // 4))
        again = _attempt(corrected, allowed, limits, fewer, study=f"{study} closer", progress=progress)
        bench, attempt, rounds = corrected, _either(attempt, again), 2
    while not attempt.keeping and rounds < ROUNDS:
        missed = {
            metric: float(np.median([off_by(bench, contender, metric) for contender in attempt.finalists]))
            for metric in limits
        }
        shown = ", ".join(f"{metric} is {off:.3f} x the prediction" for metric, off in missed.items())
        progress.note(f"no finalist keeps the budget: {shown}; predictions are corrected")
        if "latency" in missed:
            missed.pop("latency")
            near = [(contender.choice, contender.timing.ratio) for contender in attempt.finalists]
            bench = _corrected(bench, near, least=1.005)
        allowed |= {metric: min(allowed[metric], limits[metric] / max(off, 1.001)) for metric, off in missed.items()}
        fewer = replace(plan, trials=max(20, plan.trials // 4))
        try:
            attempt = _attempt(bench, allowed, limits, fewer, study=f"{study} round {rounds + 1}", progress=progress)
        except BudgetError:
            progress.note("with the corrected table nothing is within reach; going on with the nearest")
            break
        rounds += 1
    keeping, finalists, baselines = attempt.keeping, attempt.finalists, attempt.baselines
    recovered = _recovered(bench, keeping or finalists, baselines, limits, plan=plan, progress=progress)
    chosen = min(recovered, key=lambda contender: contender.divergence)
    chosen = bench.stages.timed("recover", lambda: _mended(bench, chosen, bench.thorough)) if plan.refit else chosen
    if plan.recover.steps:
        chosen = bench.stages.timed("recover", lambda: _trained(bench, chosen, plan.recover, progress))
    return Found(budget, limits, chosen, tuple(recovered), tuple(baselines), attempt.dense, attempt.record, rounds)


def _affordable(model: nn.Module, finalists: int) -> int:
    """How many finalists are held at once: fewer of a large model, two at least."""
    return int(min(finalists, max(2, _FINALIST_BYTES // max(size_bytes(model), 1))))


@dataclass(frozen=True, slots=True)
class _Attempt:
    """One search and what its best candidates really cost."""

    keeping: list[Contender]
    finalists: list[Contender]
    baselines: list[Contender]
    dense: Timing
    record: StudyRecord


def _wasted(bench: Workbench, attempt: _Attempt, allowed: Mapping[Metric, float]) -> float | None:
    """Measured over predicted, where finalists are so much faster that budget is left: predicted to be at the limit,
    and measured well below.
    """
    off = float(np.median([off_by(bench, contender, "latency") for contender in attempt.finalists]))
    nearest = max(contender.predicted["latency"] for contender in attempt.finalists)
    return off if off < _CLOSE and nearest > _CLOSE * allowed["latency"] else None


def _either(one: _Attempt, other: _Attempt) -> _Attempt:
    """The best that two attempts at one budget found, as many as one of them has; baselines and the dense model's time
    are the later one's.
    """
    most = max(len(one.finalists), len(other.finalists))
    both = {contender.choice: contender for contender in (*one.finalists, *other.finalists)}
    kept = {contender.choice for contender in (*one.keeping, *other.keeping)}
    best = sorted(both.values(), key=lambda contender: contender.divergence)
    return replace(other, finalists=best[:most], keeping=[each for each in best if each.choice in kept][:most])


def _attempt(
    bench: Workbench, allowed: Mapping[Metric, float], limits: Mapping[Metric, float], plan: Plan, *, study: str,
    progress: Progress,
) -> _Attempt:  # fmt: skip
    """Search with predictions below `allowed`, then time the best: those that keep `limits`, and all."""
    problem, record, finished = _search(bench, allowed, plan, study=study, progress=progress)
    finalists, baselines, dense = _timed(bench, problem, record, finished, plan=plan, progress=progress)
    keeping = [contender for contender in finalists if not misses(bench, contender, limits)]
    return _Attempt(keeping, finalists, baselines, dense, record)


def fastest(bench: Workbench, floor: Floor, *, plan: Plan, progress: Progress, steps: int = 5) -> Found:
    """The fastest policy above `floor`, by bisection over the latency budget; judged on the selection data.

    Raises BudgetError when not even a hair's breadth below the dense model's latency keeps the floor.
    """
    least, dense = bench.costs.range("latency")
    low, high, best = least / dense, 1.0, None
    each = replace(plan, trials=max(20, plan.trials // steps), finalists=min(plan.finalists, 3))
    for step in range(steps):
        share = (low + high) / 2 if step else min(0.75, (low + high) / 2 + 0.1)
        budget = Budget((Limit("latency", share, relative=True, text=f"{100 * share:.1f}%"),))
        found = pursue(bench, budget, plan=each, progress=progress, name=f"floor {budget.text}")
        kept = _keeps_floor(bench, floor, found.chosen) and not misses(bench, found.chosen, found.limits)
        progress.note(f"latency {budget.text}: the floor {'holds' if kept else 'does not hold'} on the selection data")
        low, high = (low, share) if kept else (share, high)
        best = found if kept else best
    if best is None:
        raise BudgetError(f"no policy faster than the dense model keeps the floor ({floor.text}); allow a larger drop")
    return best


def _keeps_floor(bench: Workbench, floor: Floor, contender: Contender) -> bool:
    task, part = bench.subject.task, bench.subject.parts.selection
    dense = score(bench.subject.model, task.evaluator, part, batch=bench.subject.batch)
    value = score(contender.candidate.model, task.evaluator, part, batch=bench.subject.batch)
    return floor.shortfall(value.value, dense.value) <= 0


def _with_margin(bench: Workbench, limits: Mapping[Metric, float], *, finalists: int) -> dict[Metric, float]:
    """Limits for predictions: latency and memory are aimed at a little below, by what the tables' checks say.

    The more finalists are timed, the closer one may aim: one of them has to keep the budget.
    """
    checks = {"latency": bench.table and bench.table.check, "memory": bench.costs.memory and bench.costs.memory.check}
    errors = {
        metric: min(1.5 * check.median_error / math.sqrt(finalists), _MOST_MARGIN)
        for metric, check in checks.items() if check
    }  # fmt: skip
    return {metric: limit * (1 - errors.get(metric, 0.0)) for metric, limit in limits.items()}


def _aimed(bench: Workbench, limits: Mapping[Metric, float], progress: Progress) -> Workbench:
    """The workbench, its table fitted again with models near the budget: the priors' own solutions.

    The table is fitted to all widths alike; a search goes where it errs in the search's favour.
    """
    if "latency" not in limits or bench.table is None:
        return bench
    choices = list(dict.fromkeys(prior_starts(Problem(bench.space, bench.costs, limits, bench.priors)).values()))
    if not choices:
        return bench
    near = bench.stages.timed("aim", lambda: _timed_near(bench, choices, progress))
    progress.note(f"near the budget latency is {_off(bench, near):.3f} x the prediction; the table is fitted again")
    return _corrected(bench, near)


def _timed_near(bench: Workbench, choices: Sequence[Choice], progress: Progress) -> list[tuple[Choice, float]]:
    """`choices` with what share of the dense latency each takes: measured, or what was measured of the same choices
    before, so that a search that is resumed, or shared, believes the same costs.
    """
    assert bench.table is not None
    subject, run = bench.subject, bench.run

    def measured() -> SharesTable:
        progress.phase("aim", len(choices))
        stitcher = bench.stitcher
        models = [
            shape_only(subject.model, subject.anatomy, bench.space.options_of(choice), norms=stitcher.norms,
                       arithmetic=stitcher.arithmetic)
            for choice in choices
        ]  # fmt: skip
        _, timings = replace(bench.stopwatch, rounds=_AIM_ROUNDS).compare(models)
        progress.step(len(choices))
        return SharesTable(key=key, shares=tuple(timing.ratio for timing in timings))

    key = of_text(bench.table.key, bench.space, choices, "near 1")
    found, _ = Kept("near", key, SharesTable).found_or_made(run, measured, note=progress.note)
    return list(zip(choices, found.shares, strict=True))


def _off(bench: Workbench, near: Sequence[tuple[Choice, float]]) -> float:
    """Measured shares over predicted ones, the median of some choices."""
    dense = bench.costs.dense["latency"]
    return float(np.median([share * dense / bench.costs.cost("latency", choice) for choice, share in near]))


def _sized(bench: Workbench, limits: Mapping[Metric, float]) -> dict[Metric, float]:
    """Limits for predictions, size a little lower where files near the budget come out larger than predicted."""
    allowed = dict(limits)
    if "size" not in allowed:
        return allowed
    off = [1.0]
    for choice in dict.fromkeys(prior_starts(Problem(bench.space, bench.costs, limits, bench.priors)).values()):
        candidate = bench.stitcher.build(bench.space.options_of(choice), recalibrate=False)
        actual = bench.files.size(candidate.model, Weights.of(candidate))
        off.append(actual / bench.costs.cost("size", choice))
    allowed["size"] /= max(off)
    return allowed


def _corrected(bench: Workbench, near: Sequence[tuple[Choice, float]], *, least: float | None = None) -> Workbench:
    """The same workbench, its table fitted again with models that were timed near the budget, and scaled by what is
    then left of their error; by `least` at least.
    """
    assert bench.table is not None
    before = bench.costs
    table = refitted(bench.table, bench.space, before.architecture, near, seed=bench.subject.task.seed)

    def with_table(table: LatencyTable) -> Workbench:
        costs = CostModel(before.architecture, bench.space, table, storage=before.storage, memory=before.memory)
        return replace(bench, table=table, costs=costs)

    off = _off(with_table(table), near)
    correction = off if least is None else max(off, least)
    return with_table(table.model_copy(update={"correction": correction}))


def _search(
    bench: Workbench, limits: Mapping[Metric, float], plan: Plan, *, study: str, progress: Progress
) -> tuple[Problem, StudyRecord, tuple[Finished, ...]]:
    task = bench.subject.task
    problem = Problem(bench.space, bench.costs, limits, bench.priors)
    sampler = sampler_by_name(plan.sampler, problem, seed=task.seed)
    known: tuple[object, ...] = (
        bench.space,
        bench.subject.fingerprint,
        task.target.text,
        plan.sampler,
        task.seed,
        scorer.VERSION,
    )
    if plan.recover.trials:
        known = (*known, plan.recover)
    record = open_study(
        bench.run.studies, problem, sampler=sampler, note=progress.note, name=f"{study} [{of_text(*known)[:8]}]"
    )
    starts = baseline_choices(bench, problem)
    if not starts and not prior_starts(problem):
        raise BudgetError(f"budget {study}: no policy keeps all limits at once; loosen one of them")
    progress.phase("search", plan.trials)
    effort = Effort(plan.trials, plan.seconds, plan.engine.retries)
    finished = bench.stages.timed(
        "search",
        lambda: run_search(
            problem, record, _lanes(bench, plan.recover), effort, baselines=starts, known=bench.known_by(plan.recover),
            progress=progress,
        ),
    )  # fmt: skip
    if not finished:
        raise BudgetError(f"budget {study}: no trial was finished; give more --trials or --seconds")
    return problem, record, finished


def _lanes(bench: Workbench, plan: Recover) -> Lanes:
    """Who scores trials: as they are stitched, or after a recovery of their own."""
    engine = bench.run.engine
    if not plan.trials:
        return engine.lanes(bench.scorer)
    schedule = Schedule(plan.steps, plan.learning_rate, batch=plan.batch)
    return engine.climbs(bench.climber(schedule))


def _timed(
    bench: Workbench, problem: Problem, record: StudyRecord, finished: Sequence[Finished], *, plan: Plan,
    progress: Progress,
) -> tuple[list[Contender], list[Contender], Timing]:  # fmt: skip
    """Finalists and baselines really cut and timed beside the dense model."""
    chosen = list(finished[: plan.finalists])
    starts = {f.origin.removeprefix("baseline:"): f for f in ranked(record) if f.origin.startswith("baseline:")}
    for name, choice in baseline_choices(bench, problem).items():
        match = next((f for f in finished if f.choice == problem.space.normal(choice)), None)
        if match is not None:
            starts.setdefault(name, match)
    labelled = [("finalist", trial) for trial in chosen] + list(starts.items())
    progress.phase("verify", len(labelled))

    def work() -> tuple[list[Contender], list[Contender], Timing]:
        candidates = [bench.stitcher.build(bench.space.options_of(trial.choice)) for _, trial in labelled]
        ready = [deployable(candidate, bench.stitcher.norms) for candidate in candidates]
        dense, timings = bench.stopwatch.compare(ready)
        contenders = [
            Contender(
                label, trial.choice, candidate, timing, predicted(bench, trial.choice), trial.value,
                bench.files.size(candidate.model, Weights.of(candidate)), memory_bytes=_memory(bench, model),
            )
            for (label, trial), candidate, model, timing in zip(labelled, candidates, ready, timings, strict=True)
        ]  # fmt: skip
        progress.step(len(labelled))
        return contenders[: len(chosen)], contenders[len(chosen) :], dense

    return bench.stages.timed("verify", work)


def _memory(bench: Workbench, model: nn.Module) -> int | None:
    """Peak memory of a deployable model, measured in fresh processes, where a budget asks for it."""
    if bench.costs.memory is None:
        return None
    task = bench.subject.task
    found = bench.run.engine.measure(
        resident, model, bench.subject.example, runtime=runtime(task.target.runtime), target=task.target
    )
    return found.model_bytes


def _recovered(
    bench: Workbench, finalists: Sequence[Contender], baselines: Sequence[Contender], limits: Mapping[Metric, float],
    *, plan: Plan, progress: Progress,
) -> list[Contender]:  # fmt: skip
    """Finalists, and the best baseline that keeps the budget, refitted and scored again on all selection data."""
    standing = [contender for contender in baselines if not misses(bench, contender, limits)]
    best = min(standing, key=lambda contender: contender.divergence, default=None)
    racing = list(finalists)
    if best is not None and all(best.choice != contender.choice for contender in finalists):
        racing.append(best)
    if plan.refit:
        progress.phase("recover", len(racing))

        def mend(contender: Contender) -> Contender:
            mended = _mended(bench, contender, bench.quick)
            progress.step()
            return mended

        racing = bench.stages.timed("recover", lambda: [mend(contender) for contender in racing])
    if plan.recover.steps:
        racing = bench.stages.timed("recover", lambda: _tuned(bench, racing, plan.recover, progress))
    return racing


def _tuned(bench: Workbench, racing: Sequence[Contender], plan: Recover, progress: Progress) -> list[Contender]:
    """Contenders after a short fine-tuning each, all of them at once where the engine can: ranks before and after
    recovery differ.
    """
    progress.phase("fine-tune", len(racing))
    few = replace(plan, steps=max(1, plan.steps // _RACE))
    course = _course(bench, racing[0], few)
    tuned = []
    candidates = [contender.candidate for contender in racing]
    for contender, found in zip(racing, bench.run.engine.each(recovered, course, candidates), strict=True):
        tuned.append(_better(bench, contender, *found, steps=few.steps))
        progress.step()
    return tuned


def _trained(bench: Workbench, contender: Contender, plan: Recover, progress: Progress) -> Contender:
    """The chosen contender after all of its fine-tuning, or as it was where that made it no better."""
    progress.phase("fine-tune")
    course = _course(bench, contender, plan)
    state = bench.run.engine.train(course)
    if state is None:
        progress.note("fine-tuning found no finite loss; the candidate stays as it was")
        return contender
    candidate = course.finished(state)
    return _better(bench, contender, divergence(candidate.model, bench.selection, bench.bank.norms), candidate,
                   steps=plan.steps)  # fmt: skip


def _course(bench: Workbench, contender: Contender, plan: Recover) -> Course:
    schedule = Schedule(plan.steps, plan.learning_rate, batch=plan.batch)
    return Course(
        bench.lesson(), contender.candidate, bench.selection, bench.bank.norms, schedule, bench.subject.task.seed
    )


def _better(bench: Workbench, before: Contender, least: float, candidate: Candidate, *, steps: int) -> Contender:
    """A contender with the weights of a fine-tuning, or itself where these are no better on the selection data."""
    if not least < before.divergence:
        return before
    how = f"fine-tuned in {steps} steps"
    return replace(
        before, candidate=candidate, divergence=least,
        recovery=how if before.recovery is None else f"{before.recovery.partition(', fine')[0]}, {how}",
        size_bytes=bench.files.size(candidate.model, Weights.of(candidate)),
    )  # fmt: skip


def _mended(bench: Workbench, contender: Contender, reference: Reference) -> Contender:
    """A refitted copy of a contender, or the contender itself where that made it no better on the selection data."""
    candidate = bench.stitcher.build(bench.space.options_of(contender.choice))
    refitted = refit(reference, candidate, edits=bench.stitcher.edited_layers(bench.space.options_of(contender.choice)))
    candidate = replace(candidate, edits={**candidate.edits, **refitted.edits})
    divergence = float(bench.selection.divergences(candidate.model).mean())
    if not divergence < contender.divergence:
        return contender
    return replace(
        contender, candidate=candidate, divergence=divergence, recovery=f"refit of {refitted.layers} layers",
        size_bytes=bench.files.size(candidate.model, Weights.of(candidate)),
    )  # fmt: skip
