"""Folding batch norms into the layers before them: the same function in fewer operations, for scoring alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from autoprune.model.coupling import CONVOLUTIONS, NORMS
from autoprune.model.flow import norm_scale


def fold_norms(model: nn.Module, norms: Mapping[str, str]) -> None:
    """Fold every norm of `norms` (layer -> norm that reads it directly) into its layer, in place: our own copy's."""
    modules = dict(model.named_modules())
    for name, norm_name in norms.items():
        layer, norm = modules.get(name), modules.get(norm_name)
        if not isinstance(layer, (*CONVOLUTIONS, nn.Linear)) or not isinstance(norm, NORMS):
            continue  # gone with a dropped block
        if norm.running_mean is None:
            continue
        scale = norm_scale(norm)
        bias = layer.bias.detach().double() if layer.bias is not None else torch.zeros_like(scale)
        shift = norm.bias.detach().double() if norm.affine else torch.zeros_like(scale)
        weight = layer.weight.detach()
        folded = weight.double() * scale.view(-1, *(1,) * (weight.ndim - 1))
        layer.weight = nn.Parameter(folded.to(weight.dtype), requires_grad=False)
        new_bias = shift + scale * (bias - norm.running_mean.double())
        layer.bias = nn.Parameter(new_bias.to(weight.dtype), requires_grad=False)
        parent, _, child = norm_name.rpartition(".")
        nothing = nn.Identity()
        nothing._forward_hooks = norm._forward_hooks  # what was done to its output goes on being done
        model.get_submodule(parent).register_module(child, nothing)
