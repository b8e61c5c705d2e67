"""Which norm layer follows which layer: a convolution's mean error is a following norm's to mend."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from autoprune.model.coupling import CONVOLUTIONS, NORMS
from autoprune.model.observe import calls
from autoprune.nest import tensors_of


def norms_after(model: nn.Module, example: Tensor) -> dict[str, str]:
    """Layer name -> name of the batch norm that reads its output directly, and that nothing else reads."""
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
    if not follows or _alone(model, example, follows):
        return follows
    return {layer: norm for layer, norm in follows.items() if _alone(model, example, {layer: norm})}


def _alone(model: nn.Module, example: Tensor, follows: Mapping[str, str]) -> bool:
    """Whether the model makes the same when only the norms see what their layers make: then nothing else reads it."""
    made: dict[str, Tensor] = {}

    def distorts(layer: str) -> Callable[[nn.Module, object, Tensor], Tensor]:
        def after(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
            made[layer] = output
            return 1 - 2 * output

        return after

    def restores(layer: str) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        # A norm that reads something else, too, is told apart: it then reads what it should not.
        return lambda _module, read: (made.pop(layer) if layer in made else 1 - 2 * read[0],)

    with torch.no_grad():
        wanted = tensors_of(model(example))
        with ExitStack() as handles:
            for layer, norm in follows.items():
                handles.enter_context(_removed(model.get_submodule(layer).register_forward_hook(distorts(layer))))
                handles.enter_context(_removed(model.get_submodule(norm).register_forward_pre_hook(restores(layer))))
            found = tensors_of(model(example))
    return all(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in zip(found, wanted, strict=True))


@contextmanager
def _removed(handle: RemovableHandle) -> Iterator[None]:
    """Takes a hook away when the block ends."""
    try:
        yield
    finally:
        handle.remove()


def norm_scale(norm: nn.Module) -> Tensor:
    """What a batch norm in evaluation multiplies each channel by, (channels,), float64."""
    if not isinstance(norm, NORMS) or norm.running_var is None:
        raise TypeError("a batch norm with running statistics is needed")
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    return scale * norm.weight.detach().double() if norm.affine else scale


def tails_of(model: nn.Module, norms: Mapping[str, str], example: Tensor) -> dict[str, int]:
    """What makes the output of each convolution or linear layer: the norm that follows it, or the layer itself; with
    the number of its weights. Outputs that another module reads too are left out: they are no branch of their own.
    A module that hands on what it reads, as dropout does in evaluation, does not count.
    """
    modules = dict(model.named_modules())
    seen = calls(model, example)
    read = {(id(call.inputs), call.input_version) for call in seen if call.output is not call.inputs}
    alone = {call.name for call in seen if (id(call.output), call.output_version) not in read}
    sizes: dict[str, int] = {}
    for name, layer in modules.items():
        if isinstance(layer, (*CONVOLUTIONS, nn.Linear)):
            tail = norms.get(name, name)
            if tail in alone:
                sizes[tail] = layer.weight.numel()
    return sizes
