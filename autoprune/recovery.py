"""Recovery of contenders: layers solved again, then fine-tuning; what is no better on the selection data is dropped.

Knows contenders and the plan. Where fine-tuning runs, and whether as a population, is the engine's to say.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from autoprune.bank.stitch import Candidate, Stitcher
from autoprune.contender import Contender
from autoprune.core.unit import Option
from autoprune.goal import Plan, Recover
from autoprune.progress import Progress
from autoprune.recover.course import Course, divergence, recovered
from autoprune.recover.finetune import Schedule
from autoprune.recover.refit import Reference, refit
from autoprune.storage import Weights
from autoprune.workbench import Workbench

_RACE = 4
"""Finalists get one in so many of the steps that the chosen one gets."""


def race(bench: Workbench, racing: Sequence[Contender], plan: Plan, progress: Progress) -> list[Contender]:
    """Contenders refitted, and fine-tuned for a while where the plan says so, scored again on all selection data:
    ranks before and after recovery differ.
    """
    mended = list(racing)
    if plan.refit:
        progress.phase("recover", len(racing))
        mended = bench.stages.timed("recover", lambda: list(_refitted(bench, racing, progress)))
    if plan.recover.steps:
        mended = bench.stages.timed("recover", lambda: _tuned(bench, mended, plan.recover, progress))
    return mended


def finish(bench: Workbench, chosen: Contender, plan: Plan, progress: Progress) -> Contender:
    """The chosen contender refitted on all calibration data, and fine-tuned to the end."""
    if plan.refit:
        chosen = bench.stages.timed("recover", lambda: _mended(bench, chosen, bench.thorough))
    if plan.recover.steps:
        chosen = bench.stages.timed("recover", lambda: _trained(bench, chosen, plan.recover, progress))
    return chosen


def schedule_of(plan: Recover) -> Schedule:
    """How long and how fast a fine-tuning is."""
    return Schedule(plan.steps, plan.learning_rate, batch=plan.batch)


def refitted(stitcher: Stitcher, options: Mapping[str, Option], reference: Reference) -> tuple[Candidate, int]:
    """The candidate of `options`, refitted, and how many layers were solved."""
    candidate = stitcher.build(options)
    found = refit(reference, candidate, edits=stitcher.edited_layers(options))
    return replace(candidate, edits={**candidate.edits, **found.edits}), found.layers


def _refitted(bench: Workbench, racing: Sequence[Contender], progress: Progress) -> Iterator[Contender]:
    for contender in racing:
        yield _mended(bench, contender, bench.quick)
        progress.step()


def _tuned(bench: Workbench, racing: Sequence[Contender], plan: Recover, progress: Progress) -> list[Contender]:
    """Contenders after a short fine-tuning each, all of them at once where the engine can."""
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
    return Course(
        bench.lesson(),
        contender.candidate,
        bench.selection,
        bench.bank.norms,
        schedule_of(plan),
        bench.subject.task.seed,
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
    candidate, layers = refitted(bench.stitcher, bench.space.options_of(contender.choice), reference)
    divergence = float(bench.selection.divergences(candidate.model).mean())
    if not divergence < contender.divergence:
        return contender
    return replace(
        contender, candidate=candidate, divergence=divergence, recovery=f"refit of {layers} layers",
        size_bytes=bench.files.size(candidate.model, Weights.of(candidate)),
    )  # fmt: skip
