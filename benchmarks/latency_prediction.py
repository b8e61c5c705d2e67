"""Predicted against measured latency over random whole policies that the table never saw.

    python benchmarks/latency_prediction.py --folder PATH_OF_THE_DATA --model resnet56 --batch 1 [--run RUN]

All models are timed interleaved with the dense one. Prints a line a policy, the median and the worst relative error.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from tempfile import mkdtemp

import numpy as np

from autoprune.bank.stitch import shape_only
from autoprune.core.target import Target
from autoprune.costing import Stages, measured_costs
from autoprune.data import as_data
from autoprune.engines.local import Local
from autoprune.evaluators import evaluator
from autoprune.profile.draw import draw
from autoprune.progress import Silent
from autoprune.run import Run
from autoprune.runtimes import runtime
from autoprune.spaces import load_space
from autoprune.subject import Task, subject_of
from autoprune.verify import Stopwatch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="folder with zoo.py, its weights and data")
    parser.add_argument("--model", default="resnet56")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--policies", type=int, default=20)
    parser.add_argument("--seed", type=int, default=12345)
    parser.add_argument("--run", type=Path, default=None, help="run folder to take the table from")
    asked = parser.parse_args()
    sys.path.insert(0, str(asked.folder))
    import zoo  # noqa: PLC0415 (lies where the user says)

    data = as_data(zoo.data(asked.model, "train"), zoo.data(asked.model, "val"))
    target = Target(batch=asked.batch)
    model = getattr(zoo, asked.model)()
    task = Task(model, asked.model, data, evaluator("top1"), target, load_space("cnn-channels", Path()))
    subject = subject_of(task, Silent())
    folder = asked.run or Path(mkdtemp())
    run = Run(folder, Local())
    space, costs, table = measured_costs(subject, run, latency=True, stages=Stages(), progress=Silent())
    choices = draw(space, asked.policies, np.random.default_rng(asked.seed))
    models = [shape_only(subject.model, subject.anatomy, space.options_of(choice)) for choice in choices]
    watch = Stopwatch.of(subject.model, runtime(target.runtime), target, example=subject.example)
    _, timings = watch.compare(models, seed=asked.seed)
    predicted = [costs.cost("latency", choice) / costs.dense["latency"] for choice in choices]
    errors = [abs(p / timing.ratio - 1) for p, timing in zip(predicted, timings, strict=True)]
    for share, timing, error in zip(predicted, timings, errors, strict=True):
        print(f"predicted {share:.4f}  measured {timing.ratio:.4f}  error {100 * error:.2f} %")
    print(f"median {100 * np.median(errors):.2f} %, worst {100 * max(errors):.2f} %, {len(errors)} policies")
    print(
        json.dumps({"median": float(np.median(errors)), "worst": max(errors), "block": table and table.channel_block})
    )


if __name__ == "__main__":
    main()
