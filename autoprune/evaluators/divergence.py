"""How far a candidate's outputs are from the dense model's. Needs no labels, only what shape they have.

A model may return several tensors: each floating one of the samples is a `Head`, and the divergence is the sum over
heads. Every head's part is relative: nats for logits, squared error over the dense head's mean squared norm for others,
so that none drowns another by its scale.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from autoprune.errors import DataError, ModelError
from autoprune.nest import has_samples

DivergenceKind = Literal["kl", "mse"]
MOST_EXACT = 2**16
"""Outputs of a sample up to which differences are taken in float64; of more (the logits of a language model) in
float32, which is three times as fast and summed in float64 all the same."""


@dataclass(frozen=True, slots=True)
class Head:
    """One tensor of the dense model's output, (samples, ...), and how a candidate's is compared with it."""

    index: int
    """Its place among the tensors of the output."""
    dense: Tensor
    class_dim: int | None
    """Where the classes of logits are; None: compared by relative squares."""
    energy: float
    """Mean squared norm of a dense sample, what squares are relative to; 1 for logits, and where all is zero."""

    def divergence(self, outputs: Tensor, *, start: int = 0) -> Tensor:
        """Of a candidate's `outputs` (samples, ...) from those of the dense model that begin at sample `start`.

        One value >= 0 for each sample, (samples,) float64; 0 where both agree, infinity where either is NaN.
        Raises DataError on another shape.
        """
        dense = self.dense[start : start + (len(outputs) if outputs.ndim else 1)]
        _check_same_shape(dense, outputs, kind="mse" if self.class_dim is None else "kl")
        exact = torch.float64 if outputs.numel() <= MOST_EXACT * len(dense) else torch.float32
        one, other, dim = dense.to(exact), outputs.to(exact), self.class_dim
        values = _squares(one, other) / self.energy if dim is None else _kl(one, other, dim)
        return values.nan_to_num(nan=torch.inf, posinf=torch.inf)


def class_dim(output: Tensor, targets: Tensor) -> int:
    """Where the classes of logits are that int64 `targets` (samples, positions...) name: 1 or the last dimension.

    Last where that leaves the targets' shape, (samples, positions..., classes), and 1 does not: sequence models. Else
    1, as in torch's cross-entropy, whatever the rest of the shape.
    """
    wanted, shape = tuple(targets.shape[1:]), tuple(output.shape[1:])
    return output.ndim - 1 if shape[:-1] == wanted != shape[1:] else 1


def heads_of(tensors: Sequence[Tensor], targets: Tensor, *, samples: int) -> tuple[Head, ...]:
    """What to compare of the `tensors` that the dense model returns for `samples` samples.

    Left out are integers, what is not (samples, ...), and, beyond the first head, what holds NaN or infinity. Where
    `targets` are int64 classes the first head is logits, and so is every other one that has as many classes where the
    targets' shape says they are; all others are compared by squares. Raises ModelError where nothing is left.
    """
    floating = [(i, t) for i, t in enumerate(tensors) if has_samples(t, samples) and t.is_floating_point()]
    if not floating:
        raise ModelError("the model returns no floating tensor of samples (samples, ...): there is nothing to compare")
    index, first = floating[0]
    if targets.is_floating_point() or first.ndim < 2:
        heads = [_by_squares(index, first)]
        classes = None
    else:
        place = class_dim(first, targets)
        heads = [Head(index, first, place, 1.0)]
        classes = first.shape[place]
    return (*heads, *_others(floating[1:], targets, classes))


def _others(floating: Sequence[tuple[int, Tensor]], targets: Tensor, classes: int | None) -> Iterator[Head]:
    for index, tensor in floating:
        if not bool(tensor.isfinite().all()):
            continue
        place = class_dim(tensor, targets)
        positions = tuple(size for dim, size in enumerate(tensor.shape) if dim not in (0, place))
        is_logits = tensor.ndim > 1 and positions == tuple(targets.shape[1:]) and tensor.shape[place] == classes
        yield Head(index, tensor, place, 1.0) if is_logits else _by_squares(index, tensor)


def _by_squares(index: int, dense: Tensor) -> Head:
    return Head(index, dense, None, _energy(dense.to(torch.float64)))


def total_divergence(heads: Sequence[Head], tensors: Sequence[Tensor], *, start: int = 0) -> Tensor:
    """The sum over `heads` for all the `tensors` that a candidate returns, (samples,) float64; see `Head.divergence`.

    Raises ModelError where the candidate returns fewer tensors than the dense model.
    """
    if heads[-1].index >= len(tensors):
        raise ModelError(
            f"the candidate returns {len(tensors)} tensor(s) where the dense model returns {heads[-1].index + 1} or "
            "more; a model must return the same structure for every input"
        )
    values = heads[0].divergence(tensors[heads[0].index], start=start)
    for head in heads[1:]:
        values = values + head.divergence(tensors[head.index], start=start)
    return values


def divergence(dense_outputs: Tensor, outputs: Tensor, kind: DivergenceKind) -> Tensor:
    """One value >= 0 for each sample, (samples,) float64; 0 where both agree, infinity where either is NaN.

    `kl`: KL(dense || candidate) in nats between the softmax over dimension 1 of logits (samples, classes, ...), mean
    over further positions. `mse`: squared error of outputs (samples, ...) over the mean squared norm of the dense
    outputs given (a mean over samples, so that one sample near zero does not decide all).
    Raises DataError on wrong shapes.
    """
    _check_same_shape(dense_outputs, outputs, kind=kind)
    head = _by_squares(0, dense_outputs) if kind == "mse" else Head(0, dense_outputs, 1, 1.0)
    return head.divergence(outputs)


def _check_same_shape(dense: Tensor, outputs: Tensor, *, kind: DivergenceKind) -> None:
    least = 2 if kind == "kl" else 1
    if dense.shape != outputs.shape or outputs.ndim < least:
        expected = "(samples, classes, ...)" if kind == "kl" else "(samples, ...)"
        raise DataError(
            f"divergence '{kind}': dense outputs are {tuple(dense.shape)} and the candidate's "
            f"{tuple(outputs.shape)}; expected the same shape {expected}"
        )


def _kl(dense: Tensor, candidate: Tensor, dim: int) -> Tensor:
    """Of logits (samples, ...) with classes in `dim`, (samples,)."""
    log_p = dense.log_softmax(dim=dim)
    log_q = candidate.log_softmax(dim=dim)
    p = log_p.exp()
    # A class of probability zero adds nothing, even where its logit is -inf.
    terms = torch.where(p == 0.0, torch.zeros_like(p), p * (log_p - log_q))
    totals = terms.sum(dim=dim, dtype=torch.float64)
    return totals.reshape(len(totals), -1).mean(dim=1).clamp(min=0.0)


def _squares(dense: Tensor, candidate: Tensor) -> Tensor:
    """(samples, ...) -> (samples,)."""
    return (dense - candidate).square().reshape(len(dense), -1).sum(dim=1, dtype=torch.float64)


def _energy(dense: Tensor) -> float:
    """Mean squared norm of the samples, 1 where it is zero."""
    energy = float(dense.square().reshape(len(dense), -1).sum(dim=1).mean())
    return energy if energy > 0 else 1.0
