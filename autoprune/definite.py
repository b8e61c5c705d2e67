"""Factors of second moments: positive semi-definite as measured, definite with a ridge."""

from __future__ import annotations

import torch
from torch import Tensor

from autoprune.errors import DataError

ATTEMPTS = 8


def mean_diagonal(moments: Tensor) -> float:
    """The mean input power; 1 when every input is zero, so that a ridge made of it is never zero."""
    mean = float(moments.diagonal().mean())
    return mean if mean != 0.0 else 1.0


def damped_cholesky(matrix: Tensor, ridge: float) -> Tensor:
    """The lower Cholesky factor of `matrix` + ridge * I, with ten times the ridge each time that is not definite."""
    identity = torch.eye(len(matrix), dtype=matrix.dtype)
    floor = torch.finfo(matrix.dtype).eps * mean_diagonal(matrix)
    for _ in range(ATTEMPTS):
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(matrix + ridge * identity)
        if not failed and bool(factor.isfinite().all()):
            return factor
        ridge = max(10.0 * ridge, floor)
    raise DataError(
        "a layer's input second moments are not finite or far from positive semi-definite; "
        "check the calibration data and the model's activations for NaN and infinity"
    )
