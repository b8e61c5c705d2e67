"""Movement: a short fine-tune of a private copy, and which weights it draws away from zero or towards it."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from autoprune.errors import DataError
from autoprune.evaluators.divergence import class_dim
from autoprune.model.coupling import is_matrix
from autoprune.nest import first_tensor

_NO_CLASS = -100
"""What torch's cross-entropy leaves out."""
_STEPS = 32
_BATCH = 32
_RATE = 1e-3
_LONGEST_STEP = 1.0
"""Norm of all gradients together, beyond which they are scaled down."""


def loss_of(outputs: Tensor, wanted: Tensor) -> Tensor:
    """Cross-entropy for classes (int64; `class_dim` says where logits have them), else the squared error; summed.

    Labels that are no class are left out: they are what data sets mark as not to be counted (255, -100).
    """
    if wanted.dtype == torch.int64:
        logits = outputs.movedim(class_dim(outputs, wanted), 1)
        counted = (wanted >= 0) & (wanted < logits.shape[1])
        return functional.cross_entropy(logits, torch.where(counted, wanted, _NO_CLASS), reduction="sum")
    return (outputs - wanted.view_as(outputs)).square().sum()


def movement(
    model: nn.Module, layers: Sequence[str], *, batches: Sequence[Tensor], targets: Sequence[Tensor]
) -> dict[str, Tensor]:
    """For each of `layers` that is one matrix, - sum over steps of weight * gradient, in the weight's shape.

    Stochastic gradient descent with momentum on all parameters of a copy, norms with their statistics frozen
    (arXiv:2005.07683, equation 4): weights with high scores move away from zero. Raises DataError when the loss does
    not stay finite.
    """
    tuned = copy.deepcopy(model).eval().requires_grad_(True)
    weights = {name: layer.weight for name in layers if is_matrix(layer := tuned.get_submodule(name))}
    scores = {name: torch.zeros_like(weight, requires_grad=False) for name, weight in weights.items()}
    optimiser = torch.optim.SGD(tuned.parameters(), lr=_RATE, momentum=0.9)
    inputs = torch.split(torch.cat(tuple(batches))[: _STEPS * _BATCH], _BATCH)
    wanted = torch.split(torch.cat(tuple(targets))[: _STEPS * _BATCH], _BATCH)
    for some, classes in itertools.islice(itertools.cycle(zip(inputs, wanted, strict=True)), _STEPS):
        loss = loss_of(first_tensor(tuned(some)), classes) / len(some)
        if not bool(loss.isfinite()):
            raise DataError("method movement: the loss of its short fine-tune is not finite; leave the method out")
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(tuned.parameters(), _LONGEST_STEP)
        with torch.no_grad():
            for name, weight in weights.items():
                if weight.grad is not None:
                    scores[name] -= weight * weight.grad
        optimiser.step()
    return scores
