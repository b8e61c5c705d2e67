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


def nested_errors(weight: Tensor, moments: Tensor, order: Tensor, *, solved: bool) -> Tensor:
    """The squared error of each output as inputs go one after the other, (outputs, inputs + 1): none gone first.

    `order` (inputs,) says which goes when. With `solved`, what is left is solved anew each time by least squares; one
    Cholesky factor serves all: with what stays longest first, an input is a sum of white ones, L z, of which the first
    are known while theirs stay. Without, weights stay as they are. `weight` (outputs, inputs), `moments` E[x x^T].
    """
    if solved:
        last_first = order.flip(0)
        ordered = moments[last_first][:, last_first].to(torch.float64)
        factor = damped_cholesky(ordered, DAMPING * mean_diagonal(ordered))
        added = (weight[:, last_first].to(torch.float64) @ factor).square().flip(1)
    else:
        ordered, sorted_weight = moments[order][:, order].to(torch.float64), weight[:, order].to(torch.float64)
        pairs = 2 * ordered.triu(1) + ordered.diagonal().diag()
        added = sorted_weight * (sorted_weight @ pairs)
    return _from_none(added)


def gone_alone(weight: Tensor, order: Tensor) -> Tensor:
    """The same where inputs are independent and of power one, and weights stay as they are."""
    return _from_none(weight[:, order].to(torch.float64).square())


def _from_none(added: Tensor) -> Tensor:
    """What each input adds as it goes, summed up: (outputs, inputs + 1)."""
    errors = torch.zeros(added.shape[0], added.shape[1] + 1, dtype=torch.float64)
    errors[:, 1:] = added.cumsum(1).clamp_min(0.0)
    return errors
