"""A user's own function as an evaluator."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

from autoprune.errors import DataError

Scorer = Callable[[Tensor, Tensor], Tensor | float]


@final
class Function:
    """Wraps `f(outputs, targets)` that returns one value for each sample, or one for the whole batch.

    A single value is given to every sample of the batch: the mean is right, the spread within a batch is lost.
    """

    __slots__ = ("function", "higher_is_better", "name")

    def __init__(self, function: Scorer, name: str, *, higher_is_better: bool) -> None:
        self.function = function
        self.name: str = name
        self.higher_is_better: bool = higher_is_better

    def per_sample(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """What the function says of each sample, (samples,) float64. Raises DataError on another shape."""
        if outputs.ndim < 1 or targets.ndim < 1 or len(outputs) != len(targets):
            raise DataError(
                f"{self.name}: outputs are {tuple(outputs.shape)} and targets {tuple(targets.shape)}; "
                "expected the same number of samples in both"
            )
        values = torch.as_tensor(self.function(outputs, targets)).detach().to(torch.float64)
        if values.ndim == 0:
            return values.repeat(len(outputs))
        if values.shape != (len(outputs),):
            raise DataError(
                f"{self.name}: the function returned {tuple(values.shape)} for outputs {tuple(outputs.shape)}; "
                f"expected ({len(outputs)},), one value for each sample, or a single number"
            )
        return values
