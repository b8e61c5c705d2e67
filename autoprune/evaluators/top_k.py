"""Top-k accuracy of a classifier."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from autoprune.errors import ConfigError, DataError


@final
class TopK:
    """Share of samples whose label is among the k largest outputs; equal outputs rank by index, NaN is a miss."""

    __slots__ = ("k", "name")

    higher_is_better: bool = True

    def __init__(self, k: int) -> None:
        if k < 1:
            raise ConfigError(f"top-k accuracy needs k >= 1, not {k}")
        self.k = k
        self.name: str = f"top{k}"

    def per_sample(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """1.0 for a hit, 0.0 for a miss, (samples,) float64, from logits (samples, classes) and labels (samples,).

        Raises DataError on other shapes, labels that are not integers, and labels out of range.
        """
        self._check(outputs, targets)
        labels = targets.to(torch.int64)[:, None]
        own = outputs.gather(1, labels)  # (samples, 1)
        earlier = torch.arange(outputs.shape[1], device=outputs.device) < labels
        rank = ((outputs > own) | ((outputs == own) & earlier)).sum(dim=1)
        return ((rank < self.k) & ~outputs.isnan().any(dim=1)).to(torch.float64)

    def _check(self, outputs: Tensor, targets: Tensor) -> None:
        """Raises DataError unless these are logits (samples, classes) and labels that exist."""
        given = f"{self.name}: outputs are {tuple(outputs.shape)} and targets {tuple(targets.shape)}"
        if outputs.ndim != 2 or targets.ndim != 1 or len(outputs) != len(targets):
            raise DataError(f"{given}; expected (samples, classes) and (samples,)")
        if targets.is_floating_point() or targets.is_complex():
            raise DataError(f"{self.name}: targets are {targets.dtype}; expected integer class labels")
        classes = outputs.shape[1]
        if classes < self.k:
            raise DataError(f"{given}; expected at least {self.k} classes: use top1, or check the model's last layer")
        if not len(targets):
            return
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= classes:
            wrong = low if low < 0 else high
            raise DataError(f"{self.name}: label {wrong} but {classes} classes; expected labels 0 to {classes - 1}")


def top1() -> TopK:
    """Plain accuracy."""
    return TopK(1)


def top5() -> TopK:
    """The label is among the five largest outputs."""
    return TopK(5)
