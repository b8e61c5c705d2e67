"""What an evaluator is: a number for a model's outputs against the truth."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Evaluator(Protocol):
    """A metric over samples. `higher_is_better` gives its sense; `per_sample` keeps the spread measurable."""

    name: str
    higher_is_better: bool

    def per_sample(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """One float64 value for each sample, (samples,); the metric is their mean. Raises DataError on wrong shapes."""
        ...
