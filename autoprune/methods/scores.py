"""Pieces that several methods share: one score out of many layers, and statistics that must be there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor

from autoprune.errors import DataError
from autoprune.methods.base import Need, UnitView

T = TypeVar("T")


def summed(scores: Iterable[Tensor], width: int) -> Tensor:
    """The sum of several layers' scores (width,), each divided by its own mean so that the layers count alike.

    Without it a layer with a large fan-in or large weights would decide alone. A layer of zeros adds nothing.
    """
    total = torch.zeros(width, dtype=torch.float64)
    for score in scores:
        mean = score.mean()
        total = total + (score / mean if mean > 0 else torch.zeros_like(total))
    return total


def needed(value: T | None, need: Need, view: UnitView) -> T:
    """`value`, or a DataError that says which statistic of which unit calibration did not collect."""
    if value is None:
        raise DataError(f"unit '{view.name}': calibration collected no {need}; calibrate again for this method's needs")
    return value
