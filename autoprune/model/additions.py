"""Where a model adds a branch to a shortcut: seen while it runs, whatever its code looks like. No tracing."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from autoprune.model.observe import watching

_ADDS = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__, Tensor.__radd__}

Seen = Callable[[str, Tensor, Tensor], None]
"""Called with the layer whose output enters an addition, that output (as it was before), and the sum."""


class _Adds(TorchFunctionMode):
    """Reports additions of two tensors of one shape, one of which a watched layer made."""

    def __init__(self, made: Mapping[int, tuple[str, Tensor]], seen: Seen) -> None:
        super().__init__()
        self._made = made
        self._seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, then tell about it if it is an addition."""
        maker = self._maker(args) if func in _ADDS else None
        branch = maker[1].clone() if maker is not None and func in (Tensor.add_, Tensor.__iadd__) else None
        result = func(*args, **(kwargs or {}))
        if maker is not None:
            self._seen(maker[0], maker[1] if branch is None else branch, result)
        return result

    def _maker(self, args: Any) -> tuple[str, Tensor] | None:
        tensors = [arg for arg in args[:2] if isinstance(arg, Tensor)]
        if len(tensors) != 2 or tensors[0].shape != tensors[1].shape:
            return None
        found = [self._made[id(tensor)] for tensor in tensors if id(tensor) in self._made]
        return found[-1] if found else None  # the later one is the branch; a projected shortcut came before


@contextmanager
def watching_additions(model: nn.Module, layers: Collection[str], seen: Seen) -> Iterator[None]:
    """Call `seen` for every addition that one of `layers` enters directly, for the time of the block."""
    made: dict[int, tuple[str, Tensor]] = {}

    def maker(name: str) -> Callable[[Tensor, Tensor], None]:
        def made_by(_inputs: Tensor, output: Tensor) -> None:
            made[id(output)] = (name, output)  # held, so that no other tensor takes its identity

        return made_by

    def start(_inputs: Tensor, _output: Tensor) -> None:
        made.clear()

    hooks = {name: maker(name) for name in layers} | {"": start}
    with watching(model, hooks), _Adds(made, seen):
        yield


@dataclass(frozen=True, slots=True)
class Chain:
    """An addition's layer, and the layer of the last addition of the blocks dropped right after it (or the same)."""

    layer: str
    last: str


def addition_chains(
    model: nn.Module, example: Tensor, *, layers: Collection[str], dropped: Mapping[str, Collection[str]]
) -> tuple[Chain, ...]:
    """For each of `layers` that enters an addition of the dense `model`: where its sum stands when blocks are gone.

    `dropped` maps a dropped block to its layers. The sum after layer A, handed through dropped blocks B and C,
    takes the place of C's sum.
    """
    order: list[str] = []
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def note(name: str) -> Callable[[Tensor, Tensor], None]:
        def noted(before: Tensor, after: Tensor) -> None:
            inputs[name], outputs[name] = before, after

        return noted

    containers = {
        name: note(name) for name, module in model.named_modules() if name and any(True for _ in module.children())
    }
    with (
        torch.no_grad(),
        watching(model, containers),
        watching_additions(model, layers, lambda n, _b, _s: order.append(n)),
    ):
        model(example)
    chains = []
    for layer in order:
        if any(layer in inside for inside in dropped.values()):
            continue
        last, block = layer, _innermost(layer, outputs)
        while block is not None:
            after = next((b for b in dropped if b in inputs and inputs[b] is outputs[block]), None)
            entering = [name for name in order if after is not None and name in dropped[after]]
            if after is None or not entering:
                break
            last, block = entering[-1], after
        chains.append(Chain(layer, last))
    return tuple(chains)


def _innermost(layer: str, containers: Mapping[str, Tensor]) -> str | None:
    around = [name for name in containers if layer.startswith(f"{name}.")]
    return max(around, key=len, default=None)
