"""How a search recovers from a bad prior: harm measured one unit at a time, which is far too kind to dropped blocks.

    python benchmarks/bad_prior.py --folder PATH_OF_THE_DATA --model resnet56 --run RUN
    python benchmarks/bad_prior.py --folder PATH_OF_THE_DATA --kindness 0.1     # dropped blocks ten times too kind

The search gets this prior alone, neither the others nor any baseline to start from. Prints what the prior's own policy
and the best policy so far do, as trials go by: divergence on the selection part, blocks dropped, metric on the held-out
part; and uniform pruning at the same budget beside it. Nothing is refitted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp

import torch
from evaluation_cost import workbench

from autoprune.core.space import Choice
from autoprune.core.target import Target
from autoprune.core.unit import DROP
from autoprune.data import as_data
from autoprune.engines.local import Here
from autoprune.evaluators import evaluator
from autoprune.searching.baselines import uniform
from autoprune.searching.loop import Effort, Finished, run_search
from autoprune.searching.problem import Problem
from autoprune.searching.samplers import sampler_by_name
from autoprune.searching.scorer import Scorer, outputs_of
from autoprune.searching.study import open_study
from autoprune.spaces import load_space
from autoprune.subject import Task, batches_of
from autoprune.workbench import Workbench

BAD = "one_at_a_time"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="folder with zoo.py, its weights and data")
    parser.add_argument("--model", default="resnet56")
    parser.add_argument("--share", type=float, default=0.5, help="of the dense model's MACs")
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--kindness", type=float, default=1.0, help="factor on the harm of dropping a block")
    parser.add_argument("--run", type=Path, default=None, help="run folder to take the bank from")
    asked = parser.parse_args()
    sys.path.insert(0, str(asked.folder))
    import zoo  # noqa: PLC0415 (lies where the user says)

    data = as_data(zoo.data(asked.model, "train"), zoo.data(asked.model, "val"))
    task = Task(
        getattr(zoo, asked.model)(), asked.model, data, evaluator("top1"), Target(), load_space("cnn-channels", Path())
    )
    full = workbench(task, asked.run or Path(mkdtemp()))
    kinds = [unit.kind for unit in full.space.units]
    harms = [row * (asked.kindness if kind == "block" else 1.0)
             for row, kind in zip(full.priors[BAD], kinds, strict=True)]  # fmt: skip
    bench = replace(full, priors={BAD: harms})
    problem = Problem(bench.space, bench.costs, {"macs": asked.share * bench.costs.dense["macs"]}, bench.priors)
    sampler = sampler_by_name("budget", problem, seed=0)
    record = open_study(Path(mkdtemp()) / "study.journal", problem, sampler=sampler, name="bad prior")
    lanes = Here(Scorer(bench.stitcher, bench.space, bench.selection))
    finished = run_search(problem, record, lanes, Effort(asked.trials))
    told(bench, problem, finished)


def told(bench: Workbench, problem: Problem, finished: Sequence[Finished]) -> None:
    in_order = sorted(finished, key=lambda trial: trial.number)
    start = next(trial for trial in in_order if trial.origin.startswith("prior"))
    even = uniform(problem, method="obs", compensate="least_squares")
    assert even is not None
    print(f"{'what':<28} {'divergence':>10} {'blocks dropped':>14} {'top-1':>8}")
    line("the prior's own policy", bench, start.choice)
    for count in (25, 50, 100, 200):
        if count <= in_order[-1].number + 1:
            best = min((trial for trial in in_order if trial.number < count), key=lambda trial: trial.value)
            line(f"best of {count} trials", bench, best.choice)
    line("uniform, obs, least squares", bench, even)


def line(what: str, bench: Workbench, choice: Choice) -> None:
    options = bench.space.options_of(choice)
    model = bench.stitcher.build(options).model
    held = bench.subject.parts.held_out
    outputs = outputs_of(model, batches_of(bench.subject, held.inputs))
    assert isinstance(outputs, torch.Tensor)
    right = float((outputs.argmax(1) == held.targets).float().mean())
    dropped = list(options.values()).count(DROP)
    divergence = float(bench.selection.divergences(model).mean())
    print(f"{what:<28} {divergence:>10.4f} {dropped:>14} {100 * right:>7.2f}%")


if __name__ == "__main__":
    main()
