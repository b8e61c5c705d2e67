"""The report's four pictures. Knows what to draw from an outcome; how it is drawn is svg.py's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from autoprune.core.budget import parse_limit
from autoprune.core.outcome import OutcomeRecord, TrialRecord
from autoprune.core.policy import Measured
from autoprune.core.unit import NARROWED
from autoprune.errors import ConfigError
from autoprune.report import numbers
from autoprune.report.svg import Bar, Plot, Point, axis_over, bars

_Item = TypeVar("_Item")

PROGRESS_LEGEND = {"trial": "trial", "best": "best so far", "baseline": "baselines"}
TRADE_OFF_LEGEND = {"trial": "trial", "front": "front", "finalist": "finalists", "chosen": "chosen", "limit": "budget"}
PREDICTION_LEGEND = {"finalist": "finalists", "chosen": "chosen", "baseline-dot": "baselines", "diagonal": "exact"}
WIDTHS_LEGEND = {"bar": "kept", "bar-full": "removed", "dropped-full": "block dropped"}
MOST_POINTS = 4000
"""Trials drawn at most; a report of a very long search stays a small file."""


def progress(outcome: OutcomeRecord) -> str:
    """Divergence of every trial, the best so far, and the baselines across; nothing without trials."""
    scored = [(trial.number, trial.divergence) for trial in outcome.trials if trial.divergence is not None]
    if not scored:
        return ""
    lines = {name: model.divergence for name, model in outcome.baselines.items() if model.divergence is not None}
    plot = Plot(
        axis_over([number for number, _ in scored], "trial", write=_whole, pad=0.03),
        axis_over([*(value for _, value in scored), *lines.values()], "divergence", scale="log"),
        "divergence of every trial",
        width=1100,
        height=300,
    )
    lowest = min(lines.values(), default=0.0)
    for name, value in lines.items():
        plot.horizontal(value, css="baseline", label=numbers.label(name), below=len(lines) > 1 and value == lowest)
    shown = _thinned(scored)
    tips = [f"trial {number}: {numbers.digits(value)}" for number, value in shown]
    plot.points(shown, css="trial", radius=2.5, tips=tips)
    plot.line(_best_so_far(scored), css="best", steps=True)
    return plot.text


def trade_off(outcome: OutcomeRecord) -> str:
    """Predicted cost against divergence, with the Pareto front, finalists and the budget."""
    metric = _cost_metric(outcome)
    trials = [trial for trial in outcome.trials if trial.divergence is not None and metric in trial.costs]
    if not trials:
        return ""
    scale = 1e3 if metric == "latency" else 1.0
    points = [_point(trial, metric, scale) for trial in trials]
    verified = [(point, model) for model in outcome.finalists if (point := _verified(model, metric)) is not None]
    limit = _limit(outcome, metric, scale)
    chosen = _verified(outcome.chosen, metric)
    special = [point for point, _ in verified] + ([chosen] if chosen is not None else [])
    across = [x for x, _ in [*points, *special]] + ([limit] if limit is not None else [])
    plot = Plot(
        axis_over(across, f"predicted {_unit(metric)}", write=lambda value: _written(metric, value)),
        axis_over([y for _, y in [*points, *special]], "divergence", scale="log"),
        "predicted cost against divergence",
    )
    if limit is not None:
        plot.vertical(limit, css="limit")
    tips = [f"trial {trial.number} ({trial.origin})" for trial in _thinned(trials)]
    plot.points(_thinned(points), css="trial", radius=2.5, tips=tips)
    plot.line(pareto_front(points), css="front", steps=True)
    plot.points([point for point, _ in verified], css="finalist", radius=5)
    if chosen is not None:
        plot.points([chosen], css="chosen", radius=6, tips=["chosen"])
    return plot.text


def prediction(outcome: OutcomeRecord) -> str:
    """Predicted against measured latency of everything verified; nothing when latency was not measured."""
    finalists, baselines = _timed(outcome.finalists), _timed(list(outcome.baselines.values()))
    chosen = _timed([outcome.chosen])
    everything = [*finalists, *baselines, *chosen]
    if not everything:
        return ""
    values = [value for point in everything for value in point]
    axis = axis_over(values, "predicted ms", pad=0.15)
    plot = Plot(axis, axis_over(values, "measured ms", pad=0.15), "predicted against measured latency")
    plot.line([(axis.low, axis.low), (axis.high, axis.high)], css="diagonal")
    plot.points(baselines, css="baseline-dot", radius=4.5, tips=[numbers.label(name) for name in outcome.baselines])
    plot.points(finalists, css="finalist", radius=4.5)
    plot.points(chosen, css="chosen", radius=6, tips=["chosen"])
    return plot.text


def widths(outcome: OutcomeRecord) -> str:
    """What is kept of every unit, in the model's order; dropped blocks are outlined, others left out."""
    widest = max((unit.width for unit in outcome.units), default=1)
    rows = []
    for unit in outcome.units:
        if unit.keep == 0:
            rows.append(Bar(unit.name, 0, widest if unit.width == 1 else unit.width, "dropped", "dropped"))
        elif unit.kind in NARROWED:
            rows.append(Bar(unit.name, unit.keep, unit.width, f"{unit.keep} of {unit.width}"))
    return bars(rows, "width kept of every unit") if rows else ""


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in both coordinates, from left to right (both lower is better)."""
    front: list[Point] = []
    for point in sorted(points):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front


def _best_so_far(scored: Sequence[tuple[int, float]]) -> list[Point]:
    line: list[Point] = []
    for number, value in scored:
        if not line or value < line[-1][1]:
            line.append((number, value))
    return [*line, (scored[-1][0], line[-1][1])]


def _thinned(items: Sequence[_Item]) -> Sequence[_Item]:
    return items[:: -(-len(items) // MOST_POINTS)]


def _point(trial: TrialRecord, metric: str, scale: float) -> Point:
    return trial.costs[metric] * scale, trial.divergence if trial.divergence is not None else float("nan")


def _verified(model: Measured, metric: str) -> Point | None:
    costs = {"latency": model.predicted_ms, "macs": model.macs, "params": model.params, "size": model.size_bytes}
    costs["memory"] = model.memory_bytes
    cost = costs.get(metric)
    return None if cost is None or model.divergence is None else (float(cost), model.divergence)


def _timed(models: Sequence[Measured]) -> list[Point]:
    return [
        (model.predicted_ms, model.latency_ms.median)
        for model in models
        if model.predicted_ms is not None and model.latency_ms is not None and model.latency_ms.runs
    ]


def _cost_metric(outcome: OutcomeRecord) -> str:
    known = {name for trial in outcome.trials for name in trial.costs}
    return next((name for name in (*outcome.policy.budget, "latency", "macs") if name in known), "macs")


def _limit(outcome: OutcomeRecord, metric: str, scale: float) -> float | None:
    """The budget on the plot's axis, if the policy says it in a way that can be resolved."""
    dense = _verified(outcome.dense.model_copy(update={"divergence": 0.0}), metric)
    if metric == "latency" and outcome.dense.latency_ms is not None:
        dense = (outcome.dense.latency_ms.median, 0.0)
    text = outcome.policy.budget.get(metric)
    if text is None or dense is None:
        return None
    try:
        return parse_limit(text).resolve(dense[0] / scale) * scale
    except ConfigError:
        return None


def _unit(metric: str) -> str:
    return {"latency": "latency, ms", "macs": "MACs", "params": "parameters", "size": "size"}.get(metric, metric)


def _written(metric: str, value: float) -> str:
    return (
        f"{value:g}" if metric == "latency" else numbers.cost(metric, value).replace("MACs", "").replace("params", "")
    )


def _whole(value: float) -> str:
    return f"{value:.0f}" if value >= 0 and value == int(value) else ""
