"""What a short fine-tuning adds to a refit: divergence and metric before, after each, at shares of the MACs.

    python benchmarks/finetune.py --folder PATH_OF_THE_DATA --model resnet20 --shares 0.5 0.3
    python benchmarks/finetune.py --folder PATH_OF_THE_DATA --model digits_vit --space vit --shares 0.5

Policies are uniform pruning and the one that the reconstruction prior asks for. Trained on up to 2,048 train samples;
the divergence is that on the selection half of the val samples, the metric (top-1, or perplexity) on all of them. Each
number of steps is a training of its own, with a schedule of that length.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from evaluation_cost import workbench

from autoprune.bank.stitch import Candidate
from autoprune.core.space import Choice
from autoprune.core.target import Target
from autoprune.data import as_data
from autoprune.evaluators import evaluator
from autoprune.recover.finetune import FineTune, Schedule
from autoprune.recover.lesson import Lesson
from autoprune.recover.refit import refit
from autoprune.searching.baselines import uniform
from autoprune.searching.fit import solve_fit
from autoprune.searching.problem import Problem
from autoprune.spaces import load_space
from autoprune.subject import Task, batches_of
from autoprune.workbench import Workbench


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="folder with zoo.py, its weights and data")
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--space", default="cnn-channels")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.3], help="of the dense model's MACs")
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 300])
    parser.add_argument("--rates", type=float, nargs="+", default=[Schedule(1).learning_rate])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--run", type=Path, default=None, help="run folder to take the bank from")
    asked = parser.parse_args()
    if not (asked.folder / "zoo.py").exists():
        print(f"skipped: {asked.folder} holds no zoo.py, so there are no trained models to measure")
        return
    sys.path.insert(0, str(asked.folder))
    import zoo  # noqa: PLC0415 (lies where the user says)

    torch.set_num_threads(asked.threads)
    val = zoo.data(asked.model, "val")
    task = Task(
        getattr(zoo, asked.model)(), asked.model, as_data(zoo.data(asked.model, "train"), val),
        evaluator(zoo.metric(asked.model)), Target(), load_space(asked.space, Path()),
    )  # fmt: skip
    bench = workbench(task, asked.run or Path(mkdtemp()))
    inputs = torch.cat(batches_of(bench.subject, task.data.calibration_inputs))
    lesson = Lesson.of(bench.subject.model, inputs, bench.selection.heads)
    dense = zoo.evaluate(bench.subject.model, asked.model, *val)
    print(f"{asked.model}, dense {dense:.4f} {zoo.metric(asked.model)}, {len(inputs)} samples to train on")
    print(f"{'MACs':>5} {'policy':<8} {'what':<32} {'divergence':>10} {'metric':>8} {'seconds':>8}")

    def line(share: float, policy: str, what: str, candidate: Candidate, seconds: float) -> None:
        divergence = float(bench.selection.divergences(candidate.model).mean())
        metric = zoo.evaluate(candidate.model, asked.model, *val)
        print(f"{share:>5.0%} {policy:<8} {what:<32} {divergence:>10.4f} {metric:>8.4f} {seconds:>8.1f}", flush=True)

    schedules = [Schedule(steps, learning_rate=rate) for rate in asked.rates for steps in asked.steps]
    for share in asked.shares:
        for policy, choice in policies(bench, share).items():
            for what, candidate, seconds in recovered(bench, lesson, choice, schedules):
                line(share, policy, what, candidate, seconds)


def policies(bench: Workbench, share: float) -> dict[str, Choice]:
    """Those that keep to a share of the MACs."""
    problem = Problem(bench.space, bench.costs, {"macs": share * bench.costs.dense["macs"]}, bench.priors)
    pairs = {(o.compensate, o.method) for e in bench.space.entries if e.unit.narrows for o in e.options[1:]}
    even = (uniform(problem, method=method, compensate=compensate) for compensate, method in sorted(pairs))
    found = {
        "uniform": next((choice for choice in even if choice is not None), None),
        "prior": solve_fit(problem, problem.structure.padded(bench.priors["reconstruction"], 0.0)),
    }
    return {name: choice for name, choice in found.items() if choice is not None}


def recovered(bench: Workbench, lesson: Lesson, choice: Choice, schedules: Sequence[Schedule]) -> Any:
    """Step by step: what was done, the candidate, and the seconds that it took."""
    options = bench.space.options_of(choice)
    yield "cut and mended", bench.stitcher.build(options), 0.0
    start = time.perf_counter()
    candidate = bench.stitcher.build(options)
    done = refit(bench.thorough, candidate, edits=bench.stitcher.edited_layers(options))
    candidate = replace(candidate, edits={**candidate.edits, **done.edits})
    yield "+ refit", candidate, time.perf_counter() - start
    for schedule in schedules:
        start = time.perf_counter()
        training = FineTune(lesson, candidate, schedule=schedule, seed=0)
        training.advance(schedule.steps)
        what = f"+ {training.done} steps at {schedule.learning_rate:g}" + (" (stopped)" if training.stopped else "")
        yield what, training.result(), time.perf_counter() - start


if __name__ == "__main__":
    main()
