"""A choice that was really cut and timed, and its numbers: measured, counted, predicted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import nn

from autoprune.bank.stitch import Candidate
from autoprune.core.budget import Metric
from autoprune.core.policy import LatencyRecord, Measured, ScoreRecord
from autoprune.core.space import Choice
from autoprune.model.describe import macs_of
from autoprune.profile.clock import Timing
from autoprune.verify import latency_record, overruns, params
from autoprune.workbench import Workbench


@dataclass(frozen=True, slots=True)
class Contender:
    """A choice that was really cut and timed, and perhaps recovered."""

    label: str
    choice: Choice
    candidate: Candidate
    timing: Timing
    predicted: Mapping[str, float]
    divergence: float
    size_bytes: int
    recovery: str | None = None
    memory_bytes: int | None = None


def predicted(bench: Workbench, choice: Choice) -> dict[str, float]:
    """What the table and the counts say a choice costs."""
    metrics: list[Metric] = ["macs", "params", "size"]
    if "latency" in bench.costs.dense:
        metrics.append("latency")
    if bench.costs.memory is not None:
        metrics.append("memory")
    return {metric: bench.costs.cost(metric, choice) for metric in metrics}


def off_by(bench: Workbench, contender: Contender, metric: Metric) -> float:
    """Measured over predicted."""
    if metric == "latency":
        share = contender.predicted["latency"] / bench.costs.dense["latency"]
        return contender.timing.ratio / share if share else 1.0  # by a table that was given, there may be none
    return measured(bench, contender).costs[metric] / contender.predicted[metric]


def misses(bench: Workbench, contender: Contender, limits: Mapping[Metric, float]) -> bool:
    """Whether a contender's measured numbers miss a limit."""
    return bool(overruns(measured(bench, contender), limits))


def measured(bench: Workbench, contender: Contender, held_out: ScoreRecord | None = None) -> Measured:
    """A contender's numbers: latency from paired ratios and the dense reference, counts from the cut model itself."""
    model = contender.candidate.model
    predicted = contender.predicted.get("latency")
    return Measured(
        latency_ms=latency_of(bench, contender.timing),
        ratio=round(contender.timing.ratio, 5),
        predicted_ms=None if predicted is None else round(1e3 * predicted, 4),
        score=held_out,
        divergence=contender.divergence,
        macs=counted_macs(model, bench),
        params=params(model),
        size_bytes=contender.size_bytes,
        memory_bytes=contender.memory_bytes,
        recovery=contender.recovery,
    )


def latency_of(bench: Workbench, timing: Timing) -> LatencyRecord:
    """Milliseconds: ratios times the dense reference; by the table of a device that cannot be reached, of no run."""
    if bench.costs.latency is not None:
        ms = round(1e3 * timing.median, 9)
        return LatencyRecord(median=ms, p10=ms, p90=ms, runs=0)
    return latency_record(timing, reference_s=reference_latency(bench, timing))


def reference_latency(bench: Workbench, timing: Timing) -> float:
    """The dense latency that ratios are multiplied with: the table's, or what this timing saw of the dense model."""
    if bench.table is not None:
        return bench.table.dense_s
    return float(np.median([second / ratio for second, ratio in zip(timing.seconds, timing.ratios, strict=True)]))


def counted_macs(model: nn.Module, bench: Workbench) -> int:
    """Multiply-adds of one sample, counted on the model as it is."""
    return macs_of(model, bench.subject.task.data.validation_inputs[:1])
