"""What an evaluator is: a number for a model's outputs against the truth."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor


class Evaluator(Protocol):
    """A metric over samples. `higher_is_better` gives its sense; `per_sample` keeps the spread measurable.

    `outputs` is the first tensor that the model returns; a `Function` gets all that it returns.
    """

    name: str
    higher_is_better: bool

    def per_sample(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """One float64 value for each sample, (samples,); the metric is their mean. Raises DataError on wrong shapes."""
        ...


@runtime_checkable
class Pooled(Protocol):
    """An evaluator whose metric is not the mean over samples but is made from all of them together (perplexity, IoU).

    `per_sample` then gives the same metric of each sample alone; its spread is taken for the metric's.
    """

    def total(self, outputs: Tensor, targets: Tensor) -> float:
        """The metric of all samples together. Raises what `per_sample` raises."""
        ...
