"""How a model is cut, as plain values: what a script needs to do it again without autoprune. No weights, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Slice = tuple[int, tuple[int, ...]]
"""A dimension of a tensor, and the positions along it that stay, ascending."""


@dataclass(frozen=True, slots=True)
class Surgery:
    """Everything that is done to a model's modules; its tensors' shapes follow from the state."""

    slices: Mapping[str, tuple[Slice, ...]] = field(default_factory=dict)
    """By tensor of the state dict; tensors that are not named stay whole, or go with a dropped block."""
    gone: tuple[str, ...] = ()
    """Tensors that go with dropped blocks."""
    dropped: Mapping[str, tuple[str, tuple[bool | int | float | str | None, ...] | None]] = field(default_factory=dict)
    """Module -> what stays of it (`zero`, `relu`, `identity`), and what it returns besides."""
    split: Mapping[str, int] = field(default_factory=dict)
    """Layer that is two now -> channels between them."""
    numbers: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Module -> integers that its forward reads, such as how many heads it has."""
    plain: Mapping[str, object] = field(default_factory=dict)
    """Module -> the kind of plain module that stands in for it, and how it is used."""
    resized: tuple[int, int] | None = None
    """Height and width that the model resizes its input to, where it does."""
    rounded: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    """Layer that computes in 8-bit integers -> what hands its output on, scale and zero of both grids."""
    kernels: Mapping[str, int] = field(default_factory=dict)
    """Layer -> the side of the middle of its kernel that stays."""
