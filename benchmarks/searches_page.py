"""A page of what searches found: one row a run folder's outcome, from the evidence that it holds.

    autoprune search --budget 50%        # in a folder for each model, default settings
    python benchmarks/searches_page.py FOLDER... --write docs/searches.md

Each FOLDER names its row and is searched for `outcome.json` files; `-` where no baseline is within the budget.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Sequence
from pathlib import Path

import torch

from autoprune.core.outcome import OutcomeRecord
from autoprune.core.policy import Measured
from autoprune.runtimes import runtime

SHARES = ("top1", "top5", "miou", "miou_image", "map")
HEAD = """# Searches

What searches with default settings found on trained models with public weights (see `benchmarks/searches_page.py`).
{runtime} {version}, one thread of {machine}; torch {torch}. No training. Each policy was chosen on one part of the
validation data and scored on the other; `±` is one standard error. Latencies are measured in turns with the dense
model. `uniform` is the best uniform policy within the budget, `baseline` the best of all, refitted ones among them.

| {columns} |
|---|---|---|{numbers}
"""
COLUMNS = (
    "model", "budget, batch", "metric", "dense", "**searched**", "uniform", "baseline", "predicted", "verified",
    "minutes",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--write", type=Path, default=None, help="where the page goes; none: it is printed")
    asked = parser.parse_args()
    found = [(folder.name, path) for folder in asked.folders for path in sorted(folder.rglob("outcome.json"))]
    if not found:
        raise SystemExit("no outcome.json in these folders: run `autoprune search` there first")
    page = page_of([(name, OutcomeRecord.model_validate_json(path.read_text("utf-8"))) for name, path in found])
    if asked.write is None:
        print(page)
    else:
        asked.write.write_text(page, encoding="utf-8")


def page_of(named: Sequence[tuple[str, OutcomeRecord]]) -> str:
    outcomes = [outcome for _, outcome in named]
    head = HEAD.format(
        runtime="ONNX Runtime", version=runtime("onnxruntime").version(), torch=torch.__version__.partition("+")[0],
        machine=platform.machine(), columns=" | ".join(COLUMNS), numbers="---:|" * (len(COLUMNS) - 3),
    )  # fmt: skip
    rows = "\n".join(row(name, outcome) for name, outcome in named)
    compared = [(o, best) for o in outcomes if (best := best_of(o, refitted=False)) is not None]
    won = sum(better(o, o.chosen, best) for o, best in compared)
    near = sum(not better(o, o.chosen, best) and within(o, best) for o, best in compared)
    alone = len(outcomes) - len(compared)
    verdict = (
        f"\n\n{len(outcomes)} searches, {sum(o.met for o in outcomes)} met their budget. "
        f"Against the best uniform policy within the budget: better in {won} of {len(compared)}, "
        f"within one standard error of it in {near} more; in {alone} none was so cheap.\n"
    )
    return head + rows + verdict


def row(name: str, outcome: OutcomeRecord) -> str:
    dense, chosen = outcome.dense, outcome.chosen
    target = outcome.policy.target
    assert dense.latency_ms is not None
    assert chosen.latency_ms is not None
    predicted = f"{chosen.predicted_ms:.3g} ms" if chosen.predicted_ms is not None else "-"
    cells = (
        name,
        f"{outcome.budget}, {target.batch if target else 1}",
        outcome.metric,
        score(outcome, dense),
        f"**{score(outcome, chosen)}**",
        score(outcome, best_of(outcome, refitted=False)),
        score(outcome, best_of(outcome, refitted=True)),
        predicted,
        f"{chosen.latency_ms.median:.3g} ms ({100 * (chosen.ratio or 0):.1f} %)",
        f"{sum(outcome.seconds.values()) / 60:.1f}",
    )
    return f"| {' | '.join(cells)} |"


def best_of(outcome: OutcomeRecord, *, refitted: bool) -> Measured | None:
    """The best baseline within the budget: uniform ones that were not refitted, or all."""
    limit = max(outcome.chosen.ratio or 1.0, share_of(outcome.budget))
    named = [
        measured
        for name, measured in outcome.baselines.items()
        if (refitted or (name.startswith("uniform") and "refitted" not in name)) and (measured.ratio or 9.0) <= limit
    ]
    sign = 1 if outcome.higher_is_better else -1
    return max(named, key=lambda measured: sign * measured.score.value if measured.score else -1e300, default=None)


def share_of(budget: str) -> float:
    return float(budget.rstrip("%")) / 100 if budget.endswith("%") else 0.0


def better(outcome: OutcomeRecord, one: Measured, other: Measured) -> bool:
    assert one.score is not None
    assert other.score is not None
    gain = one.score.value - other.score.value
    return gain > 0 if outcome.higher_is_better else gain < 0


def within(outcome: OutcomeRecord, other: Measured) -> bool:
    assert outcome.chosen.score is not None
    assert other.score is not None
    return abs(outcome.chosen.score.value - other.score.value) <= max(outcome.chosen.score.stderr, other.score.stderr)


def score(outcome: OutcomeRecord, measured: Measured | None) -> str:
    if measured is None or measured.score is None:
        return "-"
    value = measured.score
    if outcome.metric in SHARES:
        return f"{100 * value.value:.2f} ± {100 * value.stderr:.2f} %"
    return f"{value.value:.3f} ± {value.stderr:.3f}"


if __name__ == "__main__":
    main()
