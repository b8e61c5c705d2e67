"""What one candidate evaluation costs against the bare forward passes it needs, interleaved in one run.

    python benchmarks/evaluation_cost.py --folder PATH_OF_THE_DATA --model resnet56

Bare: the same cut model run over the recalibration and the selection batches in evaluation mode, nothing else. Prints
the median ratio with its spread over policies.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import torch

from autoprune.core.target import Target
from autoprune.costing import Stages, measured_costs
from autoprune.data import as_data
from autoprune.engines.local import Local
from autoprune.evaluators import evaluator
from autoprune.progress import Silent
from autoprune.run import Run
from autoprune.searching.scorer import Scorer
from autoprune.spaces import load_space
from autoprune.subject import Task, subject_of
from autoprune.workbench import Workbench, prepare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="folder with zoo.py, its weights and data")
    parser.add_argument("--model", default="resnet56")
    parser.add_argument("--policies", type=int, default=12)
    parser.add_argument("--run", type=Path, default=None, help="run folder to take the bank from")
    asked = parser.parse_args()
    sys.path.insert(0, str(asked.folder))
    import zoo  # noqa: PLC0415 (lies where the user says)

    torch.set_num_threads(torch.get_num_threads())
    data = as_data(zoo.data(asked.model, "train"), zoo.data(asked.model, "val"))
    task = Task(
        getattr(zoo, asked.model)(), asked.model, data, evaluator("top1"), Target(), load_space("cnn-channels", Path())
    )
    bench = workbench(task, asked.run or Path(mkdtemp()))
    ratios = [ratio(bench, seed) for seed in range(asked.policies)]
    low, middle, high = np.quantile(ratios, [0.1, 0.5, 0.9])
    print(
        f"evaluation over bare forwards: median {middle:.3f}, 10-90 % {low:.3f} to {high:.3f}, {len(ratios)} policies"
    )
    print(json.dumps({"median": middle, "p10": low, "p90": high, "ratios": ratios}))


def workbench(task: Task, folder: Path) -> Workbench:
    stages, progress = Stages(), Silent()
    subject = subject_of(task, progress)
    run = Run(folder, Local())
    space, costs, table = measured_costs(subject, run, latency=False, stages=stages, progress=progress)
    return prepare(subject, space, costs, table, run=run, stages=stages, progress=progress)


def ratio(bench: Workbench, seed: int) -> float:
    """Seconds of one full evaluation over seconds of the bare forward passes of the same cut model."""
    rng = np.random.default_rng(seed)
    choice = bench.space.normal(tuple(int(rng.integers(0, size)) for size in bench.space.sizes))
    model = bench.stitcher.build(bench.space.options_of(choice), recalibrate=False).model
    batches = [*bench.stitcher.anchor.batches, *bench.selection.batches]

    def bare() -> float:
        start = time.perf_counter()
        with torch.no_grad():
            for batch in batches:
                model(batch)
        return time.perf_counter() - start

    def whole() -> float:
        scorer = Scorer(bench.stitcher, bench.space, bench.selection)
        start = time.perf_counter()
        scorer(choice, None)
        return time.perf_counter() - start

    pairs = [(whole(), bare()) for _ in range(3)]
    return float(np.median([a / b for a, b in pairs]))


if __name__ == "__main__":
    main()
