"""A user's own function as an evaluator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor

from autoprune.errors import AutopruneError, DataError
from autoprune.nest import Nested, first_tensor, tensors_of

Scorer = Callable[[Any, Tensor], Tensor | float]
"""Takes all that the model returns, and the targets."""


@final
class Function:
    """Wraps `f(outputs, targets)` that returns one value for each sample, or one for the whole batch.

    `outputs` is what the model returns, with its tuples, lists and dicts. A single value is given to every sample of
    the batch: the mean is right, the spread within a batch is lost.
    """

    __slots__ = ("function", "higher_is_better", "name")

    def __init__(self, function: Scorer, name: str, *, higher_is_better: bool) -> None:
        self.function = function
        self.name: str = name
        self.higher_is_better: bool = higher_is_better

    def per_sample(self, outputs: Nested, targets: Tensor) -> Tensor:
        """What the function says of each sample, (samples,) float64. Raises DataError on another shape."""
        first = first_tensor(outputs)
        if first.ndim < 1 or targets.ndim < 1 or len(first) != len(targets):
            raise DataError(
                f"{self.name}: outputs are {tuple(first.shape)} and targets {tuple(targets.shape)}; "
                "expected the same number of samples in both"
            )
        values = self._called(outputs, targets)
        if values.ndim == 0:
            return values.repeat(len(first))
        if values.shape != (len(first),):
            raise DataError(
                f"{self.name}: the function returned {tuple(values.shape)} for outputs {tuple(first.shape)}; "
                f"expected ({len(first)},), one value for each sample, or a single number"
            )
        return values

    def _called(self, outputs: Nested, targets: Tensor) -> Tensor:
        """What the function returns, float64. Raises DataError that says what it was given when it fails."""
        try:
            return torch.as_tensor(self.function(outputs, targets)).detach().to(torch.float64)
        except AutopruneError:
            raise
        except Exception as error:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors_of(outputs))
            kind = "a tensor" if isinstance(outputs, Tensor) else f"a {type(outputs).__name__} of tensors"
            raise DataError(
                f"{self.name}: the function failed on {kind} {shapes} and targets {tuple(targets.shape)}: "
                f"{type(error).__name__}: {error}"
            ) from error
