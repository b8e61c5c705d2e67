"""Kernels of convolutions: which can be cut to their middle, and which of their taps that is.

A kernel of side k that becomes one of side s loses (k - s) / 2 taps on each side, and the layer as much padding, so
that every output reads the middle of what it read. Elastic kernel sizes: arXiv:1908.09791, section 3.2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autoprune.model.coupling import CONVOLUTIONS

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
