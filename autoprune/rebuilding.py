"""What is done to a dense model's modules and tensors so that they hold a pruned model's state. Needs torch alone.

Scripts that are written beside pruned models and exports carry the text of this file: nothing of autoprune is in it.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTHS = ("num_features", "num_channels", "num_parameters")  # of norms and slopes


class Dropped(nn.Module):
    """Hands the first tensor it is given on, after the activation that stayed; or a zero."""

    def __init__(self, rest: str, further: tuple[object, ...] | None) -> None:
        super().__init__()
        self.rest = rest
        self.further = further

    def forward(self, *args: object, **kwargs: object) -> object:
        """The tensor, or a tuple of it and what the module returned besides."""
        x = next(given for given in (*args, *kwargs.values()) if isinstance(given, Tensor))
        if self.rest == "zero":
            x = x.new_zeros(())
        elif self.rest == "relu":
            x = torch.relu(x)
        return x if self.further is None else (x, *self.further)


def replace_module(network: nn.Module, name: str, module: nn.Module) -> None:
    """Put another module in a place."""
    parent, _, child = name.rpartition(".")
    network.get_submodule(parent).register_module(child, module)


def halves(layer: Any, rank: int) -> nn.Sequential:
    """A layer as two, the first to `rank` channels."""
    biased = layer.bias is not None
    if isinstance(layer, nn.Linear):
        first: nn.Module = nn.Linear(layer.in_features, rank, bias=False)
        return nn.Sequential(first, nn.Linear(rank, layer.out_features, bias=biased))
    window = {key: getattr(layer, key) for key in ("stride", "padding", "dilation", "padding_mode")}
    first = type(layer)(layer.in_channels, rank, layer.kernel_size, bias=False, **window)
    return nn.Sequential(first, type(layer)(rank, layer.out_channels, 1, bias=biased))


def shrink(layer: Any, window: tuple[int, ...]) -> None:
    """Give a convolution a smaller kernel about the middle of its own."""
    lost = (layer.kernel_size[0] - window[0]) // 2
    if lost:
        if not isinstance(layer.padding, str):
            layer.padding = tuple(each - lost for each in layer.padding)
        layer._reversed_padding_repeated_twice = [each - lost for each in layer._reversed_padding_repeated_twice]
        layer.kernel_size = window


def fit(layer: Any, name: str, state: dict[str, Tensor], made: dict[Tensor, tuple[nn.Parameter, Tensor]]) -> None:
    """Give one layer the shapes of the stored tensors. `made`: new parameters by old; shared ones stay so."""
    before = f"{name}." if name else ""
    weight = state.get(f"{before}weight", state.get(f"{before}running_mean"))
    if weight is not None:
        set_widths(layer, weight)
    for key, tensor in list(layer.named_parameters(recurse=False)):
        stored = state[before + key]
        if tensor.shape != stored.shape:
            new, same = made.setdefault(tensor, (nn.Parameter(torch.empty_like(stored)), stored))
            setattr(layer, key, new if torch.equal(same, stored) else nn.Parameter(torch.empty_like(stored)))
    for key, tensor in list(layer.named_buffers(recurse=False)):
        kept = state.get(before + key)  # none where a module makes it itself
        if kept is not None and tensor.shape != kept.shape:
            setattr(layer, key, torch.empty_like(kept))
    if isinstance(layer, nn.RNNBase):
        read, own = layer.get_parameter("weight_ih_l0"), layer.get_parameter("weight_hh_l0")
        layer.input_size, layer.hidden_size = read.shape[1], own.shape[1]


def set_widths(layer: Any, weight: Tensor) -> None:
    """Tell a layer the widths that its new weight has."""
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        shrink(layer, tuple(weight.shape[2:]))
        if layer.groups == layer.in_channels == layer.out_channels > 1:
            layer.groups = layer.in_channels = weight.shape[0]
        else:
            layer.in_channels = weight.shape[1] * layer.groups
        layer.out_channels = weight.shape[0]
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = weight.shape
    elif isinstance(layer, (nn.LayerNorm, nn.RMSNorm)):
        layer.normalized_shape = tuple(weight.shape)
    elif isinstance(layer, nn.Embedding):
        layer.embedding_dim = weight.shape[1]
    for attribute in WIDTHS:
        if isinstance(getattr(layer, attribute, None), int):
            setattr(layer, attribute, weight.shape[0])


def set_number(module: nn.Module, path: str, value: int) -> None:
    """Write an integer that the forward pass of our own copy reads: an attribute, or one step inside it.

    What holds it may be shared with other modules (a configuration is): this one gets a copy of its own.
    """
    name, _, key = path.partition(".")
    if not key:
        setattr(module, name, value)
        return
    held = copy.copy(getattr(module, name))
    if isinstance(held, tuple):
        held = (*held[: int(key)], value, *held[int(key) + 1 :])
    elif isinstance(held, list):
        held[int(key)] = value
    elif isinstance(held, dict):
        held[key] = value
    else:
        setattr(held, key, value)
    setattr(module, name, held)


def nearest(values: Tensor, scale: float, zero: float) -> Tensor:
    """The values of an 8-bit grid."""
    return torch.fake_quantize_per_tensor_affine(values, scale, int(zero), 0, 255)


def reshaped(network: nn.Module, surgery: dict[str, Any], state: dict[str, Tensor]) -> nn.Module:
    """`network`, in place, with the modules and shapes that `surgery` says, and with `state` in them."""
    for name, (rest, further) in surgery["dropped"].items():
        replace_module(network, name, Dropped(rest, further))
    for name, rank in surgery["split"].items():
        replace_module(network, name, halves(network.get_submodule(name), rank))
    for name, values in surgery["numbers"].items():
        for attribute, value in values.items():
            set_number(network.get_submodule(name), attribute, value)
    made: dict[Tensor, tuple[nn.Parameter, Tensor]] = {}
    for name, layer in network.named_modules():
        fit(layer, name, state, made)
    network.load_state_dict(state)
    size = surgery["resized"]
    if size:
        network.register_forward_pre_hook(
            lambda _network, inputs: (
                functional.interpolate(inputs[0], size=size, mode="bilinear", antialias=True),
                *inputs[1:],
            )
        )
    for name, (tail, *grids) in surgery["rounded"].items():
        reads, makes = grids[:2], grids[2:]
        network.get_submodule(name).register_forward_pre_hook(
            lambda _layer, inputs, reads=reads: (nearest(inputs[0], *reads), *inputs[1:])
        )
        network.get_submodule(tail).register_forward_hook(
            lambda _layer, _inputs, output, makes=makes: nearest(output, *makes)
        )
    return network.eval()


def sliced(state: dict[str, Tensor], surgery: dict[str, Any]) -> dict[str, Tensor]:
    """A dense model's state as the pruned one's: what is cut of each tensor, without what goes with dropped blocks."""
    return {name: kept_of(tensor, name, surgery) for name, tensor in state.items() if name not in surgery["gone"]}


def kept_of(tensor: Tensor, name: str, surgery: dict[str, Any]) -> Tensor:
    """What stays of one tensor: positions along its dimensions, and the middle of a kernel."""
    left = tensor
    for dim, kept in surgery["slices"].get(name, ()):
        left = left.index_select(dim, torch.tensor(kept, device=tensor.device))
    layer, _, key = name.rpartition(".")
    if key == "weight" and layer in surgery["kernels"]:
        left = cropped(left, surgery["kernels"][layer])
    return left.contiguous()


def cropped(weight: Tensor, size: int) -> Tensor:
    """The middle, of side `size`, of the kernels of `weight` (outputs, inputs, *sides)."""
    for axis in range(2, weight.ndim):
        weight = weight.narrow(axis, (weight.shape[axis] - size) // 2, size)
    return weight
