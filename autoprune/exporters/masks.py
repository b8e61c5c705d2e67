"""Masks, as tools take them that prune layer by layer: conv and linear layers alone, and shares that count exactly.

Knows the cut model in the dense model's shapes. Does not know any tool.
"""

from __future__ import annotations

import math

from torch import Tensor

from autoprune.exporters.base import Resolved
from autoprune.exporters.dense_shape import in_place, parameter_masks


def layer_masks(resolved: Resolved, *, gone: bool) -> dict[str, Tensor]:
    """By parameter of a convolution or linear layer that is not whole, bool, in its dense shape. Norms have none: what
    reads a removed channel does not count. With `gone` the layers of dropped blocks, and their norms, are all False.
    """
    found = {}
    for name, mask in parameter_masks(resolved).items():
        layer = resolved.layers.get(name.rpartition(".")[0])
        if layer is not None and (gone if layer.gone else len(layer.shape) > 1):
            found[name] = mask
    return found


def dense_state(resolved: Resolved) -> dict[str, Tensor]:
    """The dense model's state with the cut model's final values where they stay, and its own elsewhere."""
    final = resolved.model.state_dict()
    return {
        name: in_place(resolved, name) if name in final else dense
        for name, dense in resolved.dense.state_dict().items()
    }


def share(part: int, of: int) -> float:
    """`part / of`, so that a tool that takes `int(share * of)` takes just as many."""
    found = part / of
    return found if int(found * of) == part else math.nextafter(found, 1.0)


def zeros(mask: Tensor) -> float:
    """The share of False in a mask."""
    return share(int((~mask).sum()), mask.numel())
