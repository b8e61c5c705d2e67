"""Whether two models do the same: the outputs that a cut must leave alone, and how near is near enough."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from autoprune.nest import Nested, first_tensor, tensors_of


def same_outputs(model: nn.Module, example: Tensor) -> Callable[[nn.Module, nn.Module], bool]:
    """A test of two models, both made of `model`: whether they give the same on `example`, within rounding of what
    `model` gives. Whatever one of them raises goes on to the caller.
    """
    with torch.no_grad():
        dense = _compared(model(example))
    tolerances = [1e-4 * float(tensor.abs().max().clamp_min(1e-3)) for tensor in dense]

    def same(one: nn.Module, other: nn.Module) -> bool:
        with torch.no_grad():
            pairs = zip(_compared(one(example)), _compared(other(example)), strict=True)
            return all(
                torch.allclose(first, second, rtol=1e-3, atol=tolerance, equal_nan=True)
                for (first, second), tolerance in zip(pairs, tolerances, strict=True)
            )

    return same


def _compared(output: Nested) -> list[Tensor]:
    """The tensors of a model's output that a cut must leave alone. Raises ModelError where there is none."""
    first_tensor(output)
    return [tensor for tensor in tensors_of(output) if tensor.is_floating_point() and tensor.numel()]
