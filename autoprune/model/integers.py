"""Layers that compute in integers: what they read and make is rounded to 8 bits, as the runtime will round it.

A model in which layers do so is an ordinary one with hooks that round; `deployed` makes of it what a runtime fuses.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self, final

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from autoprune.model.coupling import is_matrix
from autoprune.model.flow import norm_scale
from autoprune.model.fold import fold_norms

LEVELS = 255


@dataclass(frozen=True, slots=True)
class Grid:
    """The values that 8 bits without sign can hold: scale * (code - zero), codes 0 to 255."""

    scale: float
    zero: int

    def __post_init__(self) -> None:
        if not (0 < self.scale < float("inf") and 0 <= self.zero <= LEVELS):
            raise ValueError(f"no grid has the scale {self.scale} and its zero at {self.zero}")

    @classmethod
    def over(cls, low: float, high: float) -> Self:
        """The grid that spans `low` to `high`, and zero exactly."""
        low, high = min(low, 0.0), max(high, 0.0)
        scale = max((high - low) / LEVELS, 1e-12)
        return cls(scale, min(LEVELS, max(0, round(-low / scale))))

    def rounded(self, values: Tensor) -> Tensor:
        """The nearest values of the grid; those beyond it are clipped."""
        if torch.compiler.is_exporting():  # torch.export has no such operator for a free batch
            codes = torch.round(values * (1 / self.scale) + self.zero).clamp(0, LEVELS)
            return (codes - self.zero) * self.scale
        return torch.fake_quantize_per_tensor_affine(values, self.scale, self.zero, 0, LEVELS)


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """How one layer computes in integers: what it reads, and what `tail` (its norm, or itself) hands on."""

    tail: str
    inputs: Grid
    outputs: Grid

    @property
    def numbers(self) -> tuple[float, float, float, float]:
        """Scale and zero of what it reads, and of what it makes."""
        return self.inputs.scale, self.inputs.zero, self.outputs.scale, self.outputs.zero

    @classmethod
    def of(cls, tail: str, numbers: Sequence[float]) -> Self:
        """The inverse of `numbers`. Raises ValueError for what are no grids."""
        if len(numbers) != 4:
            raise ValueError(f"{len(numbers)} numbers are no two grids")
        return cls(tail, Grid(numbers[0], int(numbers[1])), Grid(numbers[2], int(numbers[3])))


@final
class _Reads:
    """Rounds what a layer reads."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid

    def __call__(self, _layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (self.grid.rounded(inputs[0]), *inputs[1:])


@final
class _Makes:
    """Rounds what a layer, or the norm after it, makes."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid

    def __call__(self, _layer: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return self.grid.rounded(output)


def compute_in_integers(model: nn.Module, layer: str, arithmetic: Arithmetic) -> None:
    """Let one layer of `model` (our own copy) round as if it computed in integers."""
    model.get_submodule(layer).register_forward_pre_hook(_Reads(arithmetic.inputs))
    model.get_submodule(arithmetic.tail).register_forward_hook(_Makes(arithmetic.outputs))


def integer_layers(model: nn.Module) -> tuple[str, ...]:
    """The layers of `model` that do."""
    return tuple(
        name for name, layer in model.named_modules()
        if any(isinstance(hook, _Reads) for hook in layer._forward_pre_hooks.values())
    )  # fmt: skip


@final
class _Codes(nn.Module):
    """A weight as multiples of scales, in a form that exporters know."""

    def __init__(self, scales: Tensor) -> None:
        super().__init__()
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", torch.zeros(len(scales), dtype=torch.int32))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight, rounded."""
        return torch.fake_quantize_per_channel_affine(weight, self.scales, self.zeros, 0, -128, 127)  # type: ignore[arg-type]


def deployed(model: nn.Module, norms: Mapping[str, str], scales: Mapping[str, Tensor] | None = None) -> nn.Module:
    """`model` as a runtime is to get it: norms of integer layers folded, integer weights marked; `model` itself where
    no layer computes in integers.

    `norms` (layer -> norm that reads it) are the model's; `scales` (layer -> (outputs,)) those of its integer weights,
    found from the largest weight where they are not known.
    """
    names = integer_layers(model)
    if not names:
        return model
    ready = copy.deepcopy(model)
    known = dict(scales or {})
    for name in names:
        layer = ready.get_submodule(name)
        assert is_matrix(layer)
        scale = known.get(name)
        scale = layer.weight.detach().flatten(1).abs().amax(1).clamp_min(1e-12) / 127 if scale is None else scale
        norm = ready.get_submodule(norms[name]) if name in norms else None
        factor = norm_scale(norm).abs().clamp_min(1e-12) if norm is not None else 1.0
        known[name] = (scale.double() * factor).float()
    fold_norms(ready, {name: norm for name, norm in norms.items() if name in names})
    for name in names:
        parametrize.register_parametrization(ready.get_submodule(name), "weight", _Codes(known[name]))
    return ready
