"""Accuracy floors: how much worse a metric may get, as the user writes it (`1%`, `0.5`, `0.5dB`). Knows the grammar and
which metrics are shares; knows nothing of how metrics are computed.

One rule: a percentage is points where the metric is a share (`1%` of top1 is 0.01), and a part of the dense model's
value everywhere else (`5%` of a perplexity of 4 is 0.2). A plain number is in the metric's own unit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from autoprune.core.budget import LONGEST, parse_fraction
from autoprune.errors import ConfigError

SHARES: Final = ("top1", "top5", "miou", "miou_image", "map")
"""Metrics from 0 to 1."""
_UNITS: Final = {"psnr": "dB"}
"""How a metric's own unit is written; all others have none."""
_NUMBER = re.compile(r"\s*([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?)\s*(%|[a-z]*)\s*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Drop:
    """How much worse a metric may get: `amount` in its own unit, or, if `relative`, as a part of the dense value."""

    amount: float
    relative: bool = False


@dataclass(frozen=True, slots=True)
class Floor:
    """The worst that `metric` may become: `worst` itself, or a drop from the dense model's. Neither: anything goes."""

    metric: str = "top1"
    higher_is_better: bool = True
    drop: Drop | None = None
    worst: float | None = None
    """The least value allowed, or the largest where less is better."""

    @property
    def text(self) -> str:
        """As the user would write it; empty when anything goes."""
        parts = [self._drop_text(self.drop)] if self.drop is not None else []
        if self.worst is not None:
            parts.append(f"{'at least' if self.higher_is_better else 'at most'} {self._amount(self.worst)}")
        return " + ".join(parts)

    @property
    def record(self) -> dict[str, float]:
        """As a policy file keeps it; `recorded` reads it."""
        kept: dict[str, float] = {}
        if self.drop is not None:
            kept["max_relative_drop" if self.drop.relative else "max_drop"] = self.drop.amount
        if self.worst is not None:
            kept["min_accuracy" if self.higher_is_better else "max_loss"] = self.worst
        return kept

    def shortfall(self, value: float, dense: float) -> float:
        """By how much `value` is worse than the floor, in the metric's own unit; zero or less when it holds."""
        sign = 1.0 if self.higher_is_better else -1.0
        short = [-math.inf]
        if self.drop is not None:
            allowed = self.drop.amount * (abs(dense) if self.drop.relative else 1.0)
            short.append(sign * (dense - value) - allowed)
        if self.worst is not None:
            short.append(sign * (self.worst - value))
        return max(short)

    def _drop_text(self, drop: Drop) -> str:
        name = "max drop" if self.higher_is_better else "max rise"
        if drop.relative:
            return f"{name} {100 * drop.amount:g} % of the dense value"
        return (
            f"{name} {100 * drop.amount:g} points" if self.metric in SHARES else f"{name} {self._amount(drop.amount)}"
        )

    def _amount(self, value: float) -> str:
        unit = _UNITS.get(self.metric)
        return f"{value:g} {unit}" if unit else f"{value:g}"


def floor_of(
    metric: str, *, higher_is_better: bool, max_drop: str | float | None = None,
    min_accuracy: str | float | None = None, max_loss: str | float | None = None,
) -> Floor:  # fmt: skip
    """The floor that a user wrote. Raises ConfigError for what cannot be read or is for metrics of the other sense."""
    check_sense(metric, higher_is_better=higher_is_better, min_accuracy=min_accuracy, max_loss=max_loss)
    key, value = ("min_accuracy", min_accuracy) if higher_is_better else ("max_loss", max_loss)
    drop = None if max_drop is None else parse_drop(max_drop, metric)
    return Floor(metric, higher_is_better, drop, None if value is None else parse_worst(value, metric, key=key))


def recorded(record: Mapping[str, float], metric: str, *, higher_is_better: bool) -> Floor:
    """The floor that a policy file keeps. Raises ConfigError where it is for metrics of the other sense."""
    least, most = record.get("min_accuracy"), record.get("max_loss")
    check_sense(metric, higher_is_better=higher_is_better, min_accuracy=least, max_loss=most)
    drop = Drop(record["max_drop"]) if "max_drop" in record else None
    if "max_relative_drop" in record:
        drop = Drop(record["max_relative_drop"], relative=True)
    return Floor(metric, higher_is_better, drop, least if higher_is_better else most)


def check_sense(metric: str, *, higher_is_better: bool, min_accuracy: object, max_loss: object) -> None:
    """Raises ConfigError for a bound on the wrong side."""
    if not higher_is_better and min_accuracy is not None:
        raise ConfigError(
            f"min_accuracy is for metrics where more is better; with {metric} give a budget or max_drop, or max_loss, "
            "the largest value allowed"
        )
    if higher_is_better and max_loss is not None:
        raise ConfigError(
            f"max_loss is for metrics where less is better; with {metric} give a budget or max_drop, or min_accuracy, "
            "the least value allowed"
        )


def parse_drop(value: str | float, metric: str) -> Drop:
    """`1%`, `0.01`, `0.5dB`. Raises ConfigError that says what `metric` takes."""
    if metric in SHARES:
        return Drop(parse_fraction(value, key="max_drop"))
    unit = _UNITS.get(metric, "")
    number, suffix = _parts(value)
    if number is None or number < 0 or suffix not in ("", "%", unit.lower()):
        raise ConfigError(
            f"max_drop: {value!r} is no drop of {metric}; write e.g. 5% (of the dense model's value) or 0.5{unit} (in "
            "its own unit)"
        )
    return Drop(number / 100, relative=True) if suffix == "%" else Drop(number)


def parse_worst(value: str | float, metric: str, *, key: str) -> float:
    """`0.92`, `92%`, `30dB`, `12.5`. Raises ConfigError that names `key` and says what `metric` takes."""
    if metric in SHARES:
        return parse_fraction(value, key=key)
    unit = _UNITS.get(metric, "")
    number, suffix = _parts(value)
    if number is None or suffix not in ("", unit.lower()):
        raise ConfigError(f"{key}: {value!r} is no value of {metric}; write a number such as 12.5{unit}")
    return number


def _parts(value: str | float) -> tuple[float | None, str]:
    """The number and what follows it, in small letters; no number where it cannot be read or is not finite."""
    text = str(value)
    match = _NUMBER.fullmatch(text) if len(text) <= LONGEST else None
    number = float(match[1]) if match else math.inf
    return (number, match[2].lower()) if match and math.isfinite(number) else (None, "")
