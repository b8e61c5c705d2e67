"""One layer as two: the first to few channels, the second, of kernel size 1, to all outputs. In our own copy only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from autoprune.model.coupling import CONVOLUTIONS, is_matrix


def factor_layer(model: nn.Module, name: str, rank: int) -> nn.Sequential:
    """Replace the layer `name` of `model` (our own copy) by two with `rank` channels between; weights as they fall.

    The bias, where the layer has one, is the second's. Parameters are `name.0.weight`, `name.1.weight`, `name.1.bias`.
    """
    layer = model.get_submodule(name)
    assert is_matrix(layer)
    like = layer.weight
    first, second = _two(layer, rank)
    for part in (first, second):
        part.to(device=like.device, dtype=like.dtype)
    if layer.bias is not None:
        assert second.bias is not None
        second.bias.data = layer.bias.detach().clone()
    pair = nn.Sequential(first, second).train(layer.training).requires_grad_(like.requires_grad)
    parent, _, child = name.rpartition(".")
    model.get_submodule(parent).register_module(child, pair)
    return pair


def _two(layer: nn.Module, rank: int) -> tuple[nn.Module, nn.Module]:
    biased = layer.bias is not None
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features, rank, bias=False), nn.Linear(rank, layer.out_features, bias=biased)
    assert isinstance(layer, CONVOLUTIONS)
    make: Any = type(layer)  # of one, two or three dimensions, which its sizes have, too
    window = {key: getattr(layer, key) for key in ("stride", "padding", "dilation", "padding_mode")}
    first = make(layer.in_channels, rank, layer.kernel_size, bias=False, **window)
    return first, make(rank, layer.out_channels, 1, bias=biased)


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
