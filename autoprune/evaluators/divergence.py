"""How far a candidate's outputs are from the dense model's. Needs no labels."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from autoprune.errors import DataError

DivergenceKind = Literal["kl", "mse"]


def divergence(dense_outputs: Tensor, outputs: Tensor, kind: DivergenceKind) -> Tensor:
    """One value >= 0 for each sample, (samples,) float64; 0 where both agree, infinity where either is NaN.

    `kl`: KL(dense || candidate) in nats between the softmax over dimension 1 of logits (samples, classes, ...), mean
    over further positions. `mse`: squared error of outputs (samples, ...) over the mean squared norm of the dense
    outputs given (a mean over samples, so that one sample near zero does not decide all).
    Raises DataError on wrong shapes.
    """
    least = 2 if kind == "kl" else 1
    if dense_outputs.shape != outputs.shape or outputs.ndim < least:
        expected = "(samples, classes, ...)" if kind == "kl" else "(samples, ...)"
        raise DataError(
            f"divergence '{kind}': dense outputs are {tuple(dense_outputs.shape)} and the candidate's "
            f"{tuple(outputs.shape)}; expected the same shape {expected}"
        )
    compare = _kl if kind == "kl" else _relative_squares
    values = compare(dense_outputs.to(torch.float64), outputs.to(torch.float64))
    return values.nan_to_num(nan=torch.inf, posinf=torch.inf)


def _kl(dense: Tensor, candidate: Tensor) -> Tensor:
    """(samples, classes, ...) -> (samples,)."""
    log_p = dense.log_softmax(dim=1)
    log_q = candidate.log_softmax(dim=1)
    p = log_p.exp()
    # A class of probability zero adds nothing, even where its logit is -inf.
    terms = torch.where(p == 0.0, torch.zeros_like(p), p * (log_p - log_q))
    totals = terms.sum(dim=1)
    return totals.reshape(len(totals), -1).mean(dim=1).clamp(min=0.0)


def _relative_squares(dense: Tensor, candidate: Tensor) -> Tensor:
    """(samples, ...) -> (samples,)."""
    samples = len(dense)
    energy = dense.square().reshape(samples, -1).sum(dim=1).mean()
    squares = (dense - candidate).square().reshape(samples, -1).sum(dim=1)
    return squares / torch.where(energy > 0, energy, 1.0)
