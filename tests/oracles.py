"""What is true by definition: slow, plain, and what quicker code is held against."""

from __future__ import annotations

import torch
from torch import Tensor


def reconstruction_error(weight: Tensor, moments: Tensor, kept: Tensor, new_weight: Tensor) -> Tensor:
    """E (W x - V x_K)^2 of each output, (outputs,) float64. Shapes as in `least_squares`; `new_weight` is V."""
    difference = weight.to(torch.float64).clone()
    difference[:, kept.to(torch.int64)] -= new_weight.to(torch.float64)
    error = (difference @ moments.to(torch.float64) * difference).sum(dim=1)
    return error.clamp(min=0.0)  # rounding can take a zero below it
