"""A cut model seen in the dense model's shapes: which places of each tensor count, and the final values put there.

For formats that mask weights and take nothing away. Does not know any tool.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from autoprune.exporters.base import LayerCut, Resolved


def zeros_of(resolved: Resolved, layer: str) -> int:
    """How many weights of a layer are gone or zero, in its dense shape."""
    mask = resolved.mask(layer)
    return mask.numel() - int(mask.sum())


def sparsity_of(resolved: Resolved, cut: LayerCut) -> float:
    """The same as a share of all of the layer's weights."""
    return zeros_of(resolved, cut.name) / math.prod(cut.shape)


def sparse_layers(resolved: Resolved) -> list[LayerCut]:
    """Convolutions and linear layers (norms have one dimension) of which some weights are gone or zero, but not all."""
    weighty = [cut for cut in resolved.layers.values() if len(cut.shape) > 1 and not cut.gone]
    return [cut for cut in weighty if zeros_of(resolved, cut.name)]


def parameter_masks(resolved: Resolved) -> dict[str, Tensor]:
    """By parameter of the dense model: which of its places count, bool; parameters that count whole are left out.

    Masked so, biases and norms included, the dense model does what the cut one does: a removed channel is zero, and
    nothing reads it; a dropped block adds zero to its shortcut.
    """
    masks: dict[str, Tensor] = {}
    for cut in resolved.layers.values():
        module = resolved.dense.get_submodule(cut.name)
        for key, parameter in module.named_parameters(recurse=False):
            whole = key == "weight" and len(cut.shape) > 1
            masks[f"{cut.name}.{key}"] = resolved.mask(cut.name) if whole else _rows(cut, len(parameter))
    for name, parameter in resolved.dense.named_parameters():
        slices = resolved.surgery.slices.get(name, ())
        if name not in masks and slices:
            masks[name] = torch.zeros(parameter.shape, dtype=torch.bool)
            masks[name][_grid(parameter, slices)] = True
    return {name: mask for name, mask in masks.items() if not bool(mask.all())}


def in_place(resolved: Resolved, name: str) -> Tensor:
    """A tensor of the cut model's state, at its places in the dense shape; elsewhere the dense values."""
    dense = resolved.dense.state_dict()[name]
    final = resolved.model.state_dict()[name].detach()
    found: Tensor = dense.detach().clone()
    slices = dict(resolved.surgery.slices.get(name, ()))
    if resolved.surgery.kernels.get(name.removesuffix(".weight")):
        for dim, (whole, side) in enumerate(zip(dense.shape, final.shape, strict=True)):
            if dim > 1:
                slices[dim] = tuple(range((whole - side) // 2, (whole + side) // 2))
    found[_grid(dense, tuple(slices.items()))] = final
    return found


def _rows(cut: LayerCut, size: int) -> Tensor:
    if cut.gone:
        return torch.zeros(size, dtype=torch.bool)
    if cut.outputs is None:
        return torch.ones(size, dtype=torch.bool)
    mask = torch.zeros(size, dtype=torch.bool)
    mask[list(cut.outputs.positions)] = True
    return mask


def _grid(tensor: Tensor, slices: tuple[tuple[int, tuple[int, ...]], ...]) -> tuple[Tensor, ...]:
    """Indices of all places that stay, dimension by dimension."""
    if not tensor.ndim:
        return ()
    kept = dict(slices)
    sides = [torch.tensor(kept.get(dim, range(size))) for dim, size in enumerate(tensor.shape)]
    return torch.meshgrid(*sides, indexing="ij")
