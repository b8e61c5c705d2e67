"""Which norm layer follows which layer: a convolution's mean error is a following norm's to mend."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from autoprune.model.coupling import CONVOLUTIONS, NORMS
from autoprune.model.observe import calls


def norms_after(model: nn.Module, example: Tensor) -> dict[str, str]:
    """Layer name -> name of the batch norm that reads its output directly."""
    modules = dict(model.named_modules())
    maker: dict[int, str] = {}
    follows: dict[str, str] = {}
    seen = calls(model, example)  # keeps every tensor alive, so that identities stay distinct
    for call in seen:
        module = modules[call.name]
        if isinstance(module, (*CONVOLUTIONS, nn.Linear)):
            maker[id(call.output)] = call.name
        elif isinstance(module, NORMS) and id(call.inputs) in maker:
            follows[maker[id(call.inputs)]] = call.name
    return follows


def norm_scale(norm: nn.Module) -> Tensor:
    """What a batch norm in evaluation multiplies each channel by, (channels,), float64."""
    if not isinstance(norm, NORMS) or norm.running_var is None:
        raise TypeError("a batch norm with running statistics is needed")
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    return scale * norm.weight.detach().double() if norm.affine else scale


def tails_of(model: nn.Module, norms: Mapping[str, str], example: Tensor) -> dict[str, int]:
    """What makes the output of each convolution or linear layer: the norm that follows it, or the layer itself; with
    the number of its weights. Outputs that another module reads too are left out: they are no branch of their own.
    """
    modules = dict(model.named_modules())
    seen = calls(model, example)
    read = {(id(call.inputs), call.input_version) for call in seen}
    alone = {call.name for call in seen if (id(call.output), call.output_version) not in read}
    sizes: dict[str, int] = {}
    for name, layer in modules.items():
        if isinstance(layer, (*CONVOLUTIONS, nn.Linear)):
            tail = norms.get(name, name)
            if tail in alone:
                sizes[tail] = layer.weight.numel()
    return sizes
