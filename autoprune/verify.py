"""Verification: the only place that claims a number. Really cut, on the real runtime, beside the dense model.

Latency is measured interleaved with the dense model in one loop. Absolute times drift on shared machines, so a claim is
the paired ratio times the dense model's reference latency, and the raw times stand beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoprune.core.budget import Metric
from autoprune.core.policy import LatencyRecord, Measured, ScoreRecord
from autoprune.core.target import Target
from autoprune.data import Part
from autoprune.engines.base import Engine
from autoprune.engines.local import Local
from autoprune.evaluators.base import Evaluator, Pooled
from autoprune.evaluators.function import Function
from autoprune.nest import first_tensor
from autoprune.profile.clock import Timing, beside_the_dense, interleave
from autoprune.runtimes.base import Runtime
from autoprune.searching.scorer import outputs_of

_CHUNK = 7


@dataclass(frozen=True, slots=True)
class Stopwatch:
    """Times models on the target against the dense one, wherever the engine says that the target is."""

    runtime: Runtime
    target: Target
    example: Tensor
    model: nn.Module
    engine: Engine
    seconds_each: float = 2.0
    rounds: int = 60

    @classmethod
    def of(
        cls, model: nn.Module, runtime: Runtime, target: Target, *, example: Tensor, engine: Engine | None = None
    ) -> Stopwatch:
        """Against the dense `model`. `example` has the target's batch; without an engine it is this machine."""
        return cls(runtime, target, example, model, engine or Local())

    def compare(self, models: Sequence[nn.Module], *, seed: int = 0) -> tuple[Timing, tuple[Timing, ...]]:
        """Timings of the dense model and of `models`, all in turns (in chunks, to bound memory)."""
        return self.engine.measure(
            _compared, self.runtime, self.target, self.example, self.model, models, seed=seed, rounds=self.rounds,
            seconds_each=self.seconds_each,
        )  # fmt: skip

    def agreement(self, model: nn.Module) -> float:
        """Largest difference between the runtime's output and torch's, over the largest output."""
        session = self.runtime.load(model, self.example, self.target)
        with torch.no_grad():
            wanted = first_tensor(outputs_of(model, [self.example]))
        got = torch.from_numpy(session.run(self.example.numpy()))
        return float((got - wanted).abs().max() / wanted.abs().max().clamp_min(1e-6))


def _compared(
    runtime: Runtime, target: Target, example: Tensor, model: nn.Module, models: Sequence[nn.Module], *, seed: int,
    rounds: int, seconds_each: float,
) -> tuple[Timing, tuple[Timing, ...]]:  # fmt: skip
    reference = runtime.load(model, example, target)
    timings: list[Timing] = []
    dense: list[Timing] = []
    together = beside_the_dense(max(map(size_bytes, models), default=0), _CHUNK)
    for start in range(0, max(len(models), 1), together):
        chunk = [runtime.load(other, example, target) for other in models[start : start + together]]
        budget = seconds_each * (len(chunk) + 1)
        first, *others = interleave([reference, *chunk], rounds=rounds, seconds_budget=budget, seed=seed + start)
        dense.append(first)
        timings.extend(others)
    return _joined(dense), tuple(timings)


def _joined(timings: Sequence[Timing]) -> Timing:
    seconds = tuple(second for timing in timings for second in timing.seconds)
    return Timing(seconds, (1.0,) * len(seconds))


def latency_record(timing: Timing, *, reference_s: float | None = None) -> LatencyRecord:
    """Milliseconds. With `reference_s` the ratios to the dense model times its reference latency, else as read."""
    values = sorted(timing.seconds if reference_s is None else [ratio * reference_s for ratio in timing.ratios])

    def quantile(share: float) -> float:
        return round(1e3 * values[min(len(values) - 1, int(share * len(values)))], 4)

    return LatencyRecord(median=quantile(0.5), p10=quantile(0.1), p90=quantile(0.9), runs=len(values))


def score(model: nn.Module, evaluator: Evaluator, part: Part, *, batch: int) -> ScoreRecord:
    """The metric on `part`, with its standard error."""
    returned = outputs_of(model, torch.split(part.inputs, batch))
    if isinstance(evaluator, Function):
        values = evaluator.per_sample(returned, part.targets)
        value = float(values.mean())
    else:
        outputs = first_tensor(returned)
        values = evaluator.per_sample(outputs, part.targets)
        value = evaluator.total(outputs, part.targets) if isinstance(evaluator, Pooled) else float(values.mean())
    spread = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return ScoreRecord(value=round(value, 6), n=len(values), stderr=round(spread, 6))


def size_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers that a state dict of the model holds, shared ones once."""
    distinct = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in distinct.values())


def params(model: nn.Module) -> int:
    """Number of parameters, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def overruns(measured: Measured, limits: Mapping[Metric, float]) -> dict[Metric, float]:
    """For each missed limit by which factor: 1.04 is 4 % over. Empty when all are met."""
    costs = measured.costs
    return {metric: costs[metric] / limit for metric, limit in limits.items() if costs[metric] > limit}
