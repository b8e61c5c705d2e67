"""What a forward pass shows of a model's modules: inputs, outputs, and which module feeds which.

Knows hooks and nothing of pruning. Every hook is removed, also when the forward fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Hook = Callable[[Tensor, Tensor], Tensor | None]
"""Called with a module's first tensor input and its output; what it returns, if anything, replaces the output."""


@contextmanager
def watching(model: nn.Module, hooks: Mapping[str, Hook]) -> Iterator[None]:
    """Call `hooks[name](input, output)` after each forward of that module, for the time of the block."""
    modules = dict(model.named_modules())
    handles = []

    def attach(module: nn.Module, hook: Hook) -> None:
        def call(_module: nn.Module, inputs: tuple[object, ...], output: object) -> Tensor | None:
            if inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
                return hook(inputs[0], output)
            return None

        handles.append(module.register_forward_hook(call))

    try:
        for name, hook in hooks.items():
            attach(modules[name], hook)
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True, slots=True)
class Call:
    """One call of one module: its first input and its output, with how often each had been written to in place."""

    name: str
    inputs: Tensor
    output: Tensor
    input_version: int
    output_version: int


def calls(model: nn.Module, example: Tensor) -> tuple[Call, ...]:
    """Every call of a module with one tensor in and one out, in the order in which calls end. Tensors keep identity."""
    seen: list[Call] = []

    def recorder(name: str) -> Hook:
        return lambda x, y: seen.append(Call(name, x, y, x._version, y._version))

    hooks = {name: recorder(name) for name, _ in model.named_modules()}
    with torch.no_grad(), watching(model, hooks):
        model(example)
    return tuple(seen)


def largest_activation(model: nn.Module, example: Tensor) -> int:
    """Bytes of the largest output of any module, for one sample."""
    shown = calls(model, example[:1])
    return max((call.output.numel() * call.output.element_size() for call in shown), default=1)
