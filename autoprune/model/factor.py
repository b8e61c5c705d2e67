"""One layer as two: the first to few channels, the second, of kernel size 1, to all outputs. In our own copy only."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autoprune.model.coupling import is_matrix
from autoprune.rebuilding import halves, replace_module


def factor_layer(model: nn.Module, name: str, rank: int) -> nn.Sequential:
    """Replace the layer `name` of `model` (our own copy) by two with `rank` channels between; weights as they fall.

    The bias, where the layer has one, is the second's. Parameters are `name.0.weight`, `name.1.weight`, `name.1.bias`.
    """
    layer = model.get_submodule(name)
    assert is_matrix(layer)
    like = layer.weight
    pair = halves(layer, rank).to(device=like.device, dtype=like.dtype)
    if layer.bias is not None:
        pair[1].get_parameter("bias").data = layer.bias.detach().clone()
    pair.train(layer.training).requires_grad_(like.requires_grad)
    replace_module(model, name, pair)
    return pair


def low_rank(weight: Tensor, moments: Tensor, scale: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`first` (rank, columns) and `second` (outputs, rank) whose product is nearest to `weight` (outputs, columns) on
    inputs of these `moments` (columns, columns), outputs weighted by `scale` (outputs,); float64.

    The truncated singular value decomposition of S W L, where L L^T are the moments (arXiv:2403.07378, section 3.1).
    """
    values, vectors = torch.linalg.eigh(moments)
    root = values.clamp_min(0.0).sqrt()
    whitener = vectors * root  # L, up to a rotation
    inverse = torch.where(root > 1e-6 * root.amax(), 1 / root, 0.0)[:, None] * vectors.T
    weighted = torch.where(scale.abs() < 1e-6, 1e-6, scale.abs())
    left, singular, right = torch.linalg.svd(weighted[:, None] * weight @ whitener, full_matrices=False)
    size = singular[:rank].sqrt()
    first, second = size[:, None] * right[:rank] @ inverse, left[:, :rank] * size / weighted[:, None]
    missing = rank - len(size)
    if missing > 0:  # a layer cut to less than the rank
        first = torch.cat((first, first.new_zeros(missing, first.shape[1])))
        second = torch.cat((second, second.new_zeros(len(second), missing)), 1)
    return first, second
