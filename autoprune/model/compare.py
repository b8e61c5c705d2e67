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


def agree(found: Nested, wanted: Nested, *, least: float) -> bool:
    """Whether two outputs of a model hold the same tensors within rounding: 1e-4 of each number, and 1e-5 of the
    largest finite one of its tensor, or of `least` where that is larger. NaN equals NaN.
    """
    one, other = tensors_of(found), tensors_of(wanted)
    alike = len(one) == len(other) and all(a.shape == b.shape for a, b in zip(one, other, strict=True))
    return alike and all(
        torch.allclose(a, b, rtol=1e-4, atol=1e-5 * max(_largest(b), least), equal_nan=True)
        for a, b in zip(one, other, strict=True)
    )


def _largest(tensor: Tensor) -> float:
    """Its largest finite number; zero where there is none."""
    finite = tensor[torch.isfinite(tensor)].abs()
    return float(finite.max()) if finite.numel() else 0.0


def _compared(output: Nested) -> list[Tensor]:
    """The tensors of a model's output that a cut must leave alone. Raises ModelError where there is none."""
    first_tensor(output)
    return [tensor for tensor in tensors_of(output) if tensor.is_floating_point() and tensor.numel()]
