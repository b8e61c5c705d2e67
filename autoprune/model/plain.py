"""Which modules of a model are opaque, and the copy in which plain ones stand in for them.

Opaque is what computes with weights that no layer of its own holds: attention of `nn.MultiheadAttention`, the layers
and directions of a recurrent network, a linear layer whose weight lies the other way round, a weight that is computed
from its norm. Which they are and how they are
used is seen in runs of the model; that the copy computes the same is checked in another.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._pytree import tree_map_only

from autoprune.model.compare import agree
from autoprune.model.plain_modules import stand_in
from autoprune.nest import Nested, tensors_of

Kinds = Mapping[str, tuple[str, ...]]
"""Module -> the kind of plain module that stands in for it, and how it is used."""


@dataclass(frozen=True, slots=True)
class Plain:
    """A model without opaque modules, as far as that goes."""

    model: nn.Module
    kinds: Kinds
    refused: tuple[str, ...] = ()
    """Modules that stay opaque, because the model did not compute the same without them."""


def plain_copy(model: nn.Module, example: Tensor) -> Plain:
    """A copy of `model` in evaluation mode with plain modules where there were opaque ones. `example` is a batch."""
    copied = copy.deepcopy(model).eval()
    kinds = _kinds(copied, example)
    if not kinds:
        return Plain(copied, {})
    with _slow_attention(), torch.no_grad():
        wanted = copied(example)
        made = _replaced(copied, kinds)
        if _agrees(made, example, wanted):
            return Plain(made, kinds)
        sound = {n: how for n, how in kinds.items() if _agrees(_replaced(copied, {n: how}), example, wanted)}
        return Plain(_replaced(copied, sound), sound, tuple(name for name in kinds if name not in sound))


def _replaced(model: nn.Module, kinds: Kinds) -> nn.Module:
    made = copy.deepcopy(model)
    stand_in(made, dict(kinds))
    return made


def _agrees(model: nn.Module, example: Tensor, wanted: Nested) -> bool:
    try:
        return agree(model(example), wanted, least=1.0)
    except Exception:  # noqa: BLE001 (a foreign forward that looks into the module raises anything: it stays opaque)
        return False


def _kinds(model: nn.Module, example: Tensor) -> dict[str, tuple[str, ...]]:
    """Every opaque module that a plain one can stand in for."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    kinds: dict[str, tuple[str, ...]] = {}
    for name, module in model.named_modules():
        if not name or any(owners[id(parameter)] > 1 for parameter in module.parameters()):
            continue
        if type(module) is nn.MultiheadAttention and module.bias_k is None and not module.add_zero_attn:
            kinds[name] = ("attention",)
        elif _is_many(module):
            kinds[name] = ("recurrent",)
        elif _has_weight_norm(module):
            kinds[name] = ("weight norm",)
        elif _is_transposed(module):
            kinds[name] = ("transposed",)
    return _used(model, example, kinds)


def _is_many(module: nn.Module) -> bool:
    """Whether a recurrent module holds several, of one width."""
    if type(module) not in (nn.LSTM, nn.GRU, nn.RNN) or not isinstance(module, nn.RNNBase):
        return False
    return module.proj_size == 0 and (module.num_layers > 1 or module.bidirectional)


def _has_weight_norm(module: nn.Module) -> bool:
    if parametrize.is_parametrized(module):
        held = module.parametrizations
        assert isinstance(held, nn.ModuleDict)
        return list(held) == ["weight"] and [type(each) for each in held["weight"].children()] == [_WeightNorm]
    return any(isinstance(hook, WeightNorm) and hook.name == "weight" for hook in module._forward_pre_hooks.values())


def _is_transposed(module: nn.Module) -> bool:
    """Whether a module computes x W + b with its own weight (inputs, outputs) and nothing else."""
    own = dict(module.named_parameters())
    weight, bias = own.get("weight"), own.get("bias")
    if weight is None or weight.ndim != 2 or not set(own) <= {"weight", "bias"} or isinstance(module, nn.Linear):
        return False
    if any(True for _ in module.buffers()) or any(True for _ in module.children()):
        return False
    if not weight.is_floating_point() or (bias is not None and bias.shape != weight.shape[1:]):
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, weight.shape[0], generator=generator).to(weight)
    wanted = x @ weight + (0 if bias is None else bias)
    try:
        with torch.no_grad():
            made = copy.deepcopy(module)(x)
            return isinstance(made, Tensor) and made.shape == wanted.shape and torch.allclose(made, wanted, atol=1e-5)
    except Exception:  # noqa: BLE001 (whatever a foreign module raises on such an input: it is no linear layer)
        return False


def _used(model: nn.Module, example: Tensor, kinds: Kinds) -> dict[str, tuple[str, ...]]:
    """`kinds` with how attention is used: on one tensor alone (`fused`), with weights that nobody reads (`silent`).

    Recurrent modules that are given states, or packed sequences, or whose states are read, are not among them.
    """
    modules = dict(model.named_modules())
    calls: dict[str, list[tuple[Any, Mapping[str, Any]]]] = {
        name: [] for name, how in kinds.items() if how[0] in ("attention", "recurrent")
    }

    def note(name: str) -> Any:
        return lambda _module, args, kwargs: calls[name].append((args, kwargs))

    with _slow_attention(), torch.no_grad():
        handles = [modules[name].register_forward_pre_hook(note(name), with_kwargs=True) for name in calls]
        try:
            wanted = model(example) if calls else None
        finally:
            for handle in handles:
                handle.remove()
        all_unread = _are_unread(model, [modules[name] for name in calls], example, wanted)
        uses: dict[str, tuple[str, ...]] = {}
        for name, how in kinds.items():
            unread = name in calls and (all_unread or _are_unread(model, [modules[name]], example, wanted))
            if how[0] == "attention":
                fused = bool(modules[name]._qkv_same_embed_dim) and all(_is_of_one(*call) for call in calls[name])
                uses[name] = (*how, *(["fused"] if fused else []), *(["silent"] if unread else []))
            elif how[0] != "recurrent" or (unread and all(_is_plain_call(*call) for call in calls[name])):
                uses[name] = how
    return uses


def _is_plain_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a recurrent module got a tensor and no state."""
    given = [*args, *(value for value in kwargs.values() if value is not None)]
    return len([value for value in given if value is not None]) == 1 and isinstance(given[0], Tensor)


def _is_of_one(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether query, key and value are one tensor."""
    given = dict(zip(("query", "key", "value"), args, strict=False)) | dict(kwargs)
    return given["query"] is given["key"] is given["value"]


def _are_unread(model: nn.Module, modules: Sequence[nn.Module], example: Tensor, wanted: Nested) -> bool:
    """Whether the model computes the same whatever `modules` return beside their output: attention weights, states."""

    def spoil(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        return output[0], tree_map_only(Tensor, lambda beside: torch.full_like(beside, math.nan), output[1])

    handles = [module.register_forward_hook(spoil) for module in modules]
    try:
        pairs = zip(tensors_of(model(example)), tensors_of(wanted), strict=True) if modules else ()
        return all(torch.equal(one.isnan(), other.isnan()) for one, other in pairs)
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _slow_attention() -> Iterator[None]:
    """Encoder layers run their modules, for the time of the block."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
