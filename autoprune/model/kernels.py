"""Kernels of convolutions: which can be cut to their middle, and cutting one. In our own copies only.

A kernel of side k that becomes one of side s loses (k - s) / 2 taps on each side, and the layer as much padding, so
that every output reads the middle of what it read. Elastic kernel sizes: arXiv:1908.09791, section 3.2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autoprune.model.coupling import CONVOLUTIONS

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
LEAST, SMALLEST = 5, 3
"""The least side of a kernel that is cut, and of one that is left."""


def cut_sizes(layer: nn.Module) -> tuple[int, ...]:
    """The sides that the kernel of `layer` may be cut to, largest first; none for what is no such convolution.

    Only kernels of one odd side of `LEAST` or more, without dilation, and as far as there is padding to go with it.
    """
    if not isinstance(layer, CONVOLUTIONS):
        return ()
    sides = set(layer.kernel_size)
    side = max(sides)
    if len(sides) > 1 or side % 2 == 0 or side < LEAST or set(layer.dilation) != {1}:
        return ()
    least = side - 2 * min(layer._reversed_padding_repeated_twice, default=0)
    return tuple(range(side - 2, max(SMALLEST, least) - 1, -2))


def middle(sides: tuple[int, ...], size: int) -> Tensor:
    """The flat positions in a kernel of `sides` of those that its middle of side `size` keeps, ascending."""
    places = torch.arange(int(torch.tensor(sides).prod())).reshape(sides)
    for axis, side in enumerate(sides):
        places = places.narrow(axis, (side - size) // 2, size)
    return places.flatten()


def cropped(weight: Tensor, size: int) -> Tensor:
    """The middle, of side `size`, of the kernels of `weight` (outputs, inputs, *sides)."""
    for axis in range(2, weight.ndim):
        weight = weight.narrow(axis, (weight.shape[axis] - size) // 2, size)
    return weight


def resize(layer: Convolution, size: int) -> None:
    """Tell `layer` that its kernel is of side `size` now; its weight is the caller's to set."""
    lost = (layer.kernel_size[0] - size) // 2
    if not isinstance(layer.padding, str):
        layer.padding = tuple(each - lost for each in layer.padding)
    layer._reversed_padding_repeated_twice = [each - lost for each in layer._reversed_padding_repeated_twice]
    layer.kernel_size = tuple(size for _ in layer.kernel_size)
