"""One budget, from limits to a verified outcome: search, time, recover, choose, judge.

Candidates are chosen on the selection data alone. The held-out part is looked at once, for the claimed numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from autoprune.aim import aimed, corrected, sized, with_margin
from autoprune.bank.stitch import Candidate, deployable
from autoprune.contender import Contender, misses, off_by, predicted
from autoprune.core.budget import Budget, Limit, Metric
from autoprune.core.floor import Floor
from autoprune.core.space import Choice
from autoprune.engines.base import Lanes
from autoprune.errors import BudgetError, HelpedError
from autoprune.goal import Plan, Recover, resolve_limits
from autoprune.model.fingerprint import of_text
from autoprune.profile.clock import Timing
from autoprune.progress import Progress
from autoprune.recover.course import divergence
from autoprune.recovery import finish, race, schedule_of
from autoprune.rivals import baseline_choices
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
_FINALIST_BYTES = 1_250_000_000
"""Weights of dense models as many as there are finalists, at most."""
_CLOSE = 0.95
"""How near a prediction must be to the budget, and a measurement to the prediction, to be left as they are."""


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
    allowed = with_margin(bench, limits, finalists=plan.finalists)
    bench = aimed(bench, allowed, progress)
    allowed = sized(bench, allowed)
    study = name or budget.text
    attempt = _attempt(bench, allowed, limits, plan, study=study, progress=progress)
    rounds = 1
    if attempt.keeping and "latency" in limits and (off := _wasted(bench, attempt, allowed)) is not None:
        progress.note(
            f"latency is {off:.3f} x the prediction, which leaves some of the budget; predictions are corrected"
        )
        near = [(contender.choice, contender.timing.ratio) for contender in attempt.finalists]
        better = corrected(bench, near)
        fewer = replace(plan, trials=max(20, plan.trials // 4))
        again = _attempt(better, allowed, limits, fewer, study=f"{study} closer", progress=progress)
        bench, attempt, rounds = better, _either(attempt, again), 2
    while not attempt.keeping and rounds < ROUNDS:
        missed = {
            metric: float(np.median([off_by(bench, contender, metric) for contender in attempt.finalists]))
            for metric in limits
        }
        shown = ", ".join(f"{metric} is {off:.3f} x the prediction" for metric, off in missed.items())
        progress.note(f"no finalist keeps the budget: {shown}; predictions are corrected")
        if missed.pop("latency", None) is not None and bench.costs.latency is None:
            near = [(contender.choice, contender.timing.ratio) for contender in attempt.finalists]
            bench = corrected(bench, near, least=1.005)
        allowed |= {metric: min(allowed[metric], limits[metric] / max(off, 1.001)) for metric, off in missed.items()}
        fewer = replace(plan, trials=max(20, plan.trials // 4))
        try:
            attempt = _attempt(bench, allowed, limits, fewer, study=f"{study} round {rounds + 1}", progress=progress)
        except BudgetError:
            progress.note("with the corrected table nothing is within reach; going on with the nearest")
            break
        rounds += 1
    keeping, finalists, baselines = attempt.keeping, attempt.finalists, attempt.baselines
    racing = _racing(bench, keeping or finalists, baselines, limits)
    recovered = race(bench, racing, plan, progress)
    chosen = finish(bench, min(recovered, key=lambda contender: contender.divergence), plan, progress)
    return Found(budget, limits, chosen, tuple(recovered), tuple(baselines), attempt.dense, attempt.record, rounds)


def _leave_the_rest(bench: Workbench, limits: Mapping[Metric, float]) -> None:
    """Raises HelpedError where the search is shared and its latencies are those of another machine."""
    where, table = bench.run.engine.where(), bench.table
    if bench.run.board is not None and "latency" in limits and table is not None and table.where != where:
        raise HelpedError(
            f"the trials are done; the search goes on where its latencies were measured ({table.where}), which this "
            f"machine is not ({where})"
        )


def _affordable(model: nn.Module, finalists: int) -> int:
    """How many finalists are held at once: fewer of a large model, two at least."""
    return int(min(finalists, max(2, _FINALIST_BYTES // max(size_bytes(model), 1))))


def _racing(
    bench: Workbench, finalists: Sequence[Contender], baselines: Sequence[Contender], limits: Mapping[Metric, float]
) -> list[Contender]:
    """Finalists, and the best baseline that keeps the budget: one of them is chosen once all are recovered."""
    standing = [contender for contender in baselines if not misses(bench, contender, limits)]
    best = min(standing, key=lambda contender: contender.divergence, default=None)
    if best is None or any(best.choice == contender.choice for contender in finalists):
        return list(finalists)
    return [*finalists, best]


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
    _leave_the_rest(bench, limits)
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
    if task.table is not None:
        known = (*known, task.table.digest)
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
    return engine.climbs(bench.climber(schedule_of(plan)))


def _timed(
    bench: Workbench, problem: Problem, record: StudyRecord, finished: Sequence[Finished], *, plan: Plan,
    progress: Progress,
) -> tuple[list[Contender], list[Contender], Timing]:  # fmt: skip
    """Finalists and baselines really cut and timed beside the dense model, or told by a table of the device."""
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
        dense, timings = _timings(bench, [trial.choice for _, trial in labelled], ready)
        contenders = [
            Contender(
                label, trial.choice, candidate, timing, predicted(bench, trial.choice),
                _value(bench, trial, candidate, plan),
                bench.files.size(candidate.model, Weights.of(candidate)), memory_bytes=_memory(bench, model),
            )
            for (label, trial), candidate, model, timing in zip(labelled, candidates, ready, timings, strict=True)
        ]  # fmt: skip
        progress.step(len(labelled))
        return contenders[: len(chosen)], contenders[len(chosen) :], dense

    return bench.stages.timed("verify", work)


def _timings(
    bench: Workbench, choices: Sequence[Choice], models: Sequence[nn.Module]
) -> tuple[Timing, tuple[Timing, ...]]:
    """The dense model's time and those of `models`, made of `choices`: measured, or by the table that was given."""
    if bench.costs.latency is None:
        return bench.stopwatch.compare(models)
    dense = bench.costs.dense["latency"]
    times = [bench.costs.cost("latency", choice) for choice in choices]
    return Timing((dense,), (1.0,)), tuple(Timing((seconds,), (seconds / dense,)) for seconds in times)


def _value(bench: Workbench, trial: Finished, candidate: Candidate, plan: Plan) -> float:
    """The divergence of a candidate as it is: that of its trial, unless trials are scored after a recovery."""
    return divergence(candidate.model, bench.selection, bench.bank.norms) if plan.recover.trials else trial.value


def _memory(bench: Workbench, model: nn.Module) -> int | None:
    """Peak memory of a deployable model, measured in fresh processes, where a budget asks for it."""
    if bench.costs.memory is None:
        return None
    task = bench.subject.task
    found = bench.run.engine.measure(
        resident, model, bench.subject.example, runtime=runtime(task.target.runtime), target=task.target
    )
    return found.model_bytes
