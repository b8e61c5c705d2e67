"""Least squares: what the remaining weights of a layer become when some of its inputs go. Pure functions of tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from autoprune.definite import damped_cholesky, mean_diagonal

DAMPING = 1e-4


def least_squares(weight: Tensor, moments: Tensor, kept: Tensor, *, damping: float = DAMPING) -> Tensor:
    """The weights on the kept inputs that best reproduce the layer's outputs (arXiv:1707.06168, section 3.1).

    V = argmin E||W x - V x_K||^2 + damping * mean(diag M) * ||V - W_K||^2, so that the error never exceeds that of
    plain selection, and keeping everything returns `weight`.

    `weight` is (outputs, inputs), `moments` E[x x^T] (inputs, inputs) float64, `kept` the indices of the columns that
    stay, in the order in which they are wanted. Returns (outputs, len(kept)) of the dtype of `weight`, computed in
    float64. Raises DataError when `moments` is not finite.
    """
    kept = kept.to(torch.int64)
    gone = torch.ones(weight.shape[1], dtype=torch.bool)
    gone[kept] = False
    if not gone.any() or not len(kept):
        return weight[:, kept]
    full = moments.to(torch.float64)
    dense = weight.to(torch.float64)
    # V (M_KK + ridge) = W M_:K + ridge W_K; with V = W_K + U only what the gone columns did is left on the right.
    factor = damped_cholesky(full[kept][:, kept], damping * mean_diagonal(full))
    owed = dense[:, gone] @ full[gone][:, kept]
    return (dense[:, kept] + torch.cholesky_solve(owed.T, factor).T).to(weight.dtype)


def reconstruction_error(weight: Tensor, moments: Tensor, kept: Tensor, new_weight: Tensor) -> Tensor:
    """E (W x - V x_K)^2 of each output, (outputs,) float64. Shapes as in `least_squares`; `new_weight` is V."""
    difference = weight.to(torch.float64).clone()
    difference[:, kept.to(torch.int64)] -= new_weight.to(torch.float64)
    error = (difference @ moments.to(torch.float64) * difference).sum(dim=1)
    return error.clamp(min=0.0)  # rounding can take a zero below it
