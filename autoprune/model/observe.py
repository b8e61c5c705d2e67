"""What a forward pass shows of a model's modules: inputs, outputs, and which module feeds which.

Knows hooks and nothing of pruning. Every hook is removed, also when the forward fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from autoprune.nest import tensors_of

Hook = Callable[[Tensor, Tensor], Tensor | None]
"""Called with a module's first tensor input and the first tensor of its output; what it returns, if anything, replaces
that tensor."""
_Raw = Callable[["Call"], Tensor | None]


@dataclass(frozen=True, slots=True)
class Call:
    """One call of one module: the first tensor it was given (the stream, also where it is handed by keyword) and the
    first it returned, with how often each had been written to in place; and all that is needed to call it again.
    """

    name: str
    inputs: Tensor
    output: Tensor
    input_version: int
    output_version: int
    args: tuple[object, ...]
    kwargs: Mapping[str, object]
    returned: object
    """Everything it returned: `output`, or what holds it."""


@contextmanager
def watching(model: nn.Module, hooks: Mapping[str, Hook]) -> Iterator[None]:
    """Call `hooks[name](input, output)` after each forward of that module, for the time of the block."""

    def plain(hook: Hook) -> _Raw:
        return lambda call: hook(call.inputs, call.output)

    with _watching_calls(model, {name: plain(hook) for name, hook in hooks.items()}):
        yield


@contextmanager
def _watching_calls(model: nn.Module, hooks: Mapping[str, _Raw]) -> Iterator[None]:
    modules = dict(model.named_modules())
    handles = []

    def attach(name: str, hook: _Raw) -> None:
        def called(_module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], returned: object) -> object:
            given, made = stream_of(args, kwargs), _first(returned)
            if given is None or made is None:
                return None
            new = hook(Call(name, given, made, given._version, made._version, args, kwargs, returned))
            return None if new is None else with_first(returned, new)

        handles.append(modules[name].register_forward_hook(called, with_kwargs=True))

    try:
        for name, hook in hooks.items():
            attach(name, hook)
        yield
    finally:
        for handle in handles:
            handle.remove()


def stream_of(args: tuple[object, ...], kwargs: Mapping[str, object]) -> Tensor | None:
    """The first tensor that a module is given: by position, else by keyword."""
    return next((given for given in (*args, *kwargs.values()) if isinstance(given, Tensor)), None)


def with_first(returned: object, new: Tensor) -> object:
    """What a module returned, with `new` in the place of its first tensor."""
    first = _first(returned)
    return tree_map(lambda leaf: new if leaf is first else leaf, returned)


def _first(returned: object) -> Tensor | None:
    if isinstance(returned, Tensor):
        return returned
    return next(iter(tensors_of(returned)), None)


def calls(model: nn.Module, example: Tensor) -> tuple[Call, ...]:
    """Every call of a module with a tensor in and one out, in the order in which calls end. Tensors keep identity."""
    seen: list[Call] = []
    with torch.no_grad(), _watching_calls(model, {name: seen.append for name, _ in model.named_modules()}):
        model(example)
    return tuple(seen)


def largest_activation(model: nn.Module, example: Tensor) -> int:
    """Bytes of the largest output of any module, for one sample."""
    shown = calls(model, example[:1])
    return max((call.output.numel() * call.output.element_size() for call in shown), default=1)
