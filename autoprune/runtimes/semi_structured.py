"""Linear layers whose weights keep 2 of 4 inputs, on the sparse tensor cores of NVIDIA GPUs.

Convolutions are not among what torch runs there, and 32-bit floats have no such kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.sparse import to_sparse_semi_structured

PRECISIONS = (torch.float16, torch.bfloat16)
_ROWS, _COLUMNS = 32, 64
"""Multiples that both of torch's backends take."""


def is_two_of_four(weight: Tensor) -> bool:
    """Whether of every four neighbouring inputs of `weight` (outputs, inputs) at most two are not zero."""
    if weight.ndim != 2 or weight.shape[1] % 4:
        return False
    return bool(((weight != 0).view(len(weight), -1, 4).sum(2) <= 2).all())


def fits_kernels(weight: Tensor) -> bool:
    """Whether torch's kernels take a weight of this shape and type."""
    shaped = weight.ndim == 2 and weight.shape[0] % _ROWS == 0 and weight.shape[1] % _COLUMNS == 0
    return shaped and weight.dtype in PRECISIONS


def use_sparse_kernels(model: nn.Module) -> tuple[str, ...]:
    """Let the linear layers of `model` (our own copy, on the GPU) that keep 2 of 4 run so; which they are.

    `torch.sparse.to_sparse_semi_structured`, for inference alone (arXiv:2104.08378 on the hardware).
    """
    found = []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and fits_kernels(layer.weight) and is_two_of_four(layer.weight):
            sparse = to_sparse_semi_structured(layer.weight.detach().contiguous())
            layer.weight = nn.Parameter(sparse, requires_grad=False)
            found.append(name)
    return tuple(found)
