"""Budgets: what a candidate may cost, as the user writes it (`5ms`, `50%`, `2x`, `300MMACs`, `2MB`, `60%params`).

Knows the grammar and how a limit relates to the dense model's cost. Knows nothing of how costs are measured.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Literal, get_args

from autoprune.errors import ConfigError, near_miss

Metric = Literal["latency", "macs", "params", "size", "memory"]
METRICS: tuple[Metric, ...] = get_args(Metric)

_SCALES: dict[str, tuple[Metric, float]] = {
    "s": ("latency", 1.0),
    "ms": ("latency", 1e-3),
    "us": ("latency", 1e-6),
    "macs": ("macs", 1.0),
    "kmacs": ("macs", 1e3),
    "mmacs": ("macs", 1e6),
    "gmacs": ("macs", 1e9),
    "params": ("params", 1.0),
    "kparams": ("params", 1e3),
    "mparams": ("params", 1e6),
    "b": ("size", 1.0),
    "kb": ("size", 1e3),
    "mb": ("size", 1e6),
    "gb": ("size", 1e9),
    "kib": ("size", 2.0**10),
    "mib": ("size", 2.0**20),
    "kbmemory": ("memory", 1e3),
    "mbmemory": ("memory", 1e6),
    "gbmemory": ("memory", 1e9),
    "mibmemory": ("memory", 2.0**20),
    "gibmemory": ("memory", 2.0**30),
}
_PATTERN = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*(%|x|[a-zµ]+)\s*([a-z]*)\s*", re.IGNORECASE)
_HELP = "write e.g. 5ms, 800us, 50% (of dense latency), 2x (speed-up), 300MMACs, 50%macs, 2MB, 60%params or 64MBmemory"

LONGEST = 100
"""Characters of one limit; on a long row of digits the expression above would take the square of its length."""
MOST_BUDGETS = 1000
"""Of one family: five texts of a thousand values each would be 10^15."""


@dataclass(frozen=True, slots=True)
class Limit:
    """One metric's upper limit: absolute (seconds, MACs, parameters, bytes) or a fraction of the dense model's cost."""

    metric: Metric
    value: float
    relative: bool
    text: str

    def resolve(self, dense: float) -> float:
        """The limit in the metric's own unit, given the dense model's cost in that unit."""
        return self.value * dense if self.relative else self.value


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits that hold together, at most one a metric. Empty means: as cheap as the accuracy floor allows."""

    limits: tuple[Limit, ...] = ()

    def __post_init__(self) -> None:
        metrics = [limit.metric for limit in self.limits]
        for metric in metrics:
            if metrics.count(metric) > 1:
                texts = ", ".join(limit.text for limit in self.limits if limit.metric == metric)
                raise ConfigError(f"budget: two limits on {metric} ({texts}) cannot both hold; keep the smaller")

    @property
    def text(self) -> str:
        """How the user wrote it, joined by ` + `."""
        return " + ".join(limit.text for limit in self.limits) or "none"

    def resolve(self, dense: Mapping[str, float]) -> dict[Metric, float]:
        """Limits in each metric's own unit, given the dense model's costs."""
        return {limit.metric: limit.resolve(dense[limit.metric]) for limit in self.limits}


def parse_limit(text: str) -> Limit:
    """One limit from its text. Raises ConfigError with the grammar when it cannot be read or is not positive."""
    match = _PATTERN.fullmatch(text) if len(text) <= LONGEST else None
    if match is None:
        raise ConfigError(f"budget: cannot read {text[:LONGEST]!r}; {_HELP}")
    number, unit, suffix = float(match[1]), match[2].lower().replace("µ", "u"), match[3].lower()
    if not 1e-100 < number < 1e100:  # neither it nor its inverse, in any unit, is infinite
        raise ConfigError(f"budget: {text!r} must be above zero and finite; {_HELP}")
    if unit in ("%", "x"):
        metric = suffix or "latency"
        if metric not in METRICS:
            raise ConfigError(f"budget: unknown metric {suffix!r} in {text!r}; {near_miss(metric, METRICS)}")
        fraction = number / 100 if unit == "%" else 1 / number
        return Limit(_metric(metric), fraction, relative=True, text=text.strip())
    if unit + suffix not in _SCALES:
        raise ConfigError(f"budget: unknown unit {match[2] + match[3]!r} in {text!r}; {_HELP}")
    name, scale = _SCALES[unit + suffix]
    return Limit(name, number * scale, relative=False, text=text.strip())


def parse_budgets(texts: Iterable[str]) -> tuple[Budget, ...]:
    """A family of budgets: `["3ms,5ms", "2MB"]` is (3 ms and 2 MB), (5 ms and 2 MB).

    Values of one metric in one text, joined by commas, are alternatives; several texts hold together.
    No text at all gives one empty budget.
    """
    alternatives = [[parse_limit(part) for part in text.split(",") if part.strip()] for text in texts]
    for text, limits in zip(texts, alternatives, strict=True):
        if not limits:
            raise ConfigError(f"budget: {text!r} is empty; {_HELP}")
    if math.prod(map(len, alternatives)) > MOST_BUDGETS:
        raise ConfigError(f"budget: more than {MOST_BUDGETS} budgets come of these texts; search for fewer at a time")
    return tuple(Budget(tuple(limits)) for limits in product(*alternatives))


def parse_fraction(text: str | float, *, key: str) -> float:
    """`1%`, `0.01` or `1e-2` as a fraction in [0, 1]. Raises ConfigError naming `key` otherwise."""
    raw = str(text).strip()
    try:
        value = float(raw[:-1]) / 100 if raw.endswith("%") else float(raw)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise ConfigError(f"{key}: {text!r} is not a share; write e.g. 1% or 0.01 (between 0 and 100%)")
    return value


def shown(metric: str, value: float) -> str:
    """A cost for people: `4.93 ms`, `62.7 M MACs`, `0.43 M params`, `1.7 MB`."""
    if metric == "latency":
        return f"{value * 1e3:.3g} ms"
    scale, prefix = next(((s, p) for s, p in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if value >= s), (1.0, ""))
    unit = {"macs": "MACs", "params": "params", "size": "B", "memory": "B memory"}[metric]
    return f"{value / scale:.3g} {prefix}{unit}"


def _metric(name: str) -> Metric:
    return next(metric for metric in METRICS if metric == name)
