"""The input columns of a layer: what each row of its weight matrix is multiplied with, at sampled positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from autoprune.model.coupling import CONVOLUTIONS, is_depthwise, is_matrix


def moments_shape(layer: nn.Module, inputs: Tensor) -> tuple[int, int]:
    """How many matrices the second moments of the inputs of `layer` are, and the columns of each: all that its outputs
    could read together (channels times kernel area, or features), and of a depthwise layer each channel's alone.
    """
    if not isinstance(layer, CONVOLUTIONS):
        return 1, int(inputs.shape[-1])
    area = int(torch.tensor(layer.kernel_size).prod())
    return (layer.groups, area) if is_depthwise(layer) else (1, layer.in_channels * area)


def is_solvable(layer: nn.Module, max_columns: int) -> bool:
    """Whether a layer's weights are one matrix of at most `max_columns` columns: not grouped, not too wide."""
    return is_matrix(layer) and layer.weight[0].numel() <= max_columns


def positions_of(layer: nn.Module, output: Tensor) -> int:
    """Output positions of one sample."""
    if isinstance(layer, CONVOLUTIONS):
        return output[0, 0].numel()
    return output[0].numel() // output.shape[-1]


def sampled_patches(layer: nn.Module, inputs: Tensor, chosen: Tensor) -> Tensor:
    """Input columns (samples * chosen, columns) of `layer` at flat output positions `chosen`, channel-major.

    `inputs` is (N, C, ...) for a convolution and (N, ..., features) for a linear layer.
    """
    if not isinstance(layer, CONVOLUTIONS):
        return inputs.reshape(inputs.shape[0], -1, inputs.shape[-1])[:, chosen].reshape(-1, inputs.shape[-1])
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    windows = functional.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode)
    space = windows.ndim - 2
    for axis in range(space):
        reach = (layer.kernel_size[axis] - 1) * layer.dilation[axis] + 1
        windows = windows.unfold(2 + axis, reach, layer.stride[axis])
    places = torch.unravel_index(chosen, windows.shape[2 : 2 + space])
    index: Any = (slice(None), slice(None), *places)
    picked = windows[index]  # (N, C, chosen, reach...)
    index = (..., *(slice(None, None, step) for step in layer.dilation))
    picked = picked[index]
    return picked.transpose(1, 2).reshape(picked.shape[0] * len(chosen), -1)


def sampled_outputs(layer: nn.Module, output: Tensor, chosen: Tensor) -> Tensor:
    """`output` of `layer` at flat positions `chosen`, (samples * chosen, outputs)."""
    if isinstance(layer, CONVOLUTIONS):
        return output.flatten(2)[:, :, chosen].transpose(1, 2).reshape(-1, output.shape[1])
    return output.reshape(output.shape[0], -1, output.shape[-1])[:, chosen].reshape(-1, output.shape[-1])
