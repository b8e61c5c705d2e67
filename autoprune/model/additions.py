"""Where a model adds a branch to a shortcut: seen while it runs, whatever its code looks like. No tracing.

Knows which droppable part comes right after an addition, so that what is added there may stand in for it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from autoprune.model.blocks import Block, parts_of
from autoprune.model.observe import watching

_ADDS = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__, Tensor.__radd__}

Seen = Callable[[str, Tensor, Tensor], None]
"""Called with the layer whose output enters an addition, that output (as it was before), and the sum."""


@dataclass(frozen=True, slots=True)
class _Addition:
    """The layer whose output enters, that output (as it was before), what it is added to, and the sum."""

    layer: str
    branch: Tensor
    other: Tensor
    total: Tensor


@dataclass(frozen=True, slots=True)
class _Made:
    """What a layer put out, and how often that tensor had been written to by then."""

    layer: str
    output: Tensor
    version: int

    def is_unchanged(self) -> bool:
        """Whether nothing, such as an activation in place, has written to it since."""
        return self.output._version == self.version


class _Adds(TorchFunctionMode):
    """Reports additions of two tensors of one shape, one of which a watched layer made."""

    def __init__(self, made: Mapping[int, _Made], layers: Mapping[str, int], seen: Callable[[_Addition], None]) -> None:
        super().__init__()
        self._made = made
        self._layers = layers
        self._seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, then tell about it if it is an addition."""
        maker = self._maker(args) if func in _ADDS else None
        branch = maker.output.clone() if maker is not None and func in (Tensor.add_, Tensor.__iadd__) else None
        result = func(*args, **(kwargs or {}))
        if maker is not None:
            other = args[1] if args[0] is maker.output else args[0]
            self._seen(_Addition(maker.layer, maker.output if branch is None else branch, other, result))
        return result

    def _maker(self, args: Any) -> _Made | None:
        tensors = [arg for arg in args[:2] if isinstance(arg, Tensor)]
        if len(tensors) != 2 or tensors[0].shape != tensors[1].shape:
            return None
        found = [made for tensor in tensors if (made := self._made.get(id(tensor))) and made.is_unchanged()]
        return max(found, key=lambda made: self._layers[made.layer], default=None)


@contextmanager
def watching_additions(model: nn.Module, layers: Mapping[str, int], seen: Seen) -> Iterator[None]:
    """Call `seen` for every addition that one of `layers` enters directly, for the time of the block.

    `layers` gives each one's number of weights: where both summands are made by such layers (a projected shortcut), the
    larger one is the branch.
    """
    with _watching_all(model, layers, lambda entered: seen(entered.layer, entered.branch, entered.total)):
        yield


@contextmanager
def _watching_all(model: nn.Module, layers: Mapping[str, int], seen: Callable[[_Addition], None]) -> Iterator[None]:
    made: dict[int, _Made] = {}

    def maker(name: str) -> Callable[[Tensor, Tensor], None]:
        def made_by(_inputs: Tensor, output: Tensor) -> None:
            made[id(output)] = _Made(name, output, output._version)  # held: no other tensor takes its identity

        return made_by

    def start(_inputs: Tensor, _output: Tensor) -> None:
        made.clear()

    hooks = {name: maker(name) for name in layers} | {"": start}
    with watching(model, hooks), _Adds(made, layers, seen):
        yield


@dataclass(frozen=True, slots=True)
class Link:
    """The droppable part right after an addition (a block, or a branch of one), and the layer that enters that part's
    own last addition."""

    block: str
    layer: str


def links(
    model: nn.Module, example: Tensor, *, layers: Mapping[str, int], blocks: Collection[Block]
) -> dict[str, Link | None]:
    """Those of `layers` that enter an addition directly, in execution order, each with what of `blocks` follows it.

    Blocks that are all branches are taken apart. None where nothing droppable reads the sum next: where it is
    normalised before (post-norm), or is part of a longer sum.
    """
    sums: dict[str, _Addition] = {}
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def note(name: str) -> Callable[[Tensor, Tensor], None]:
        def noted(before: Tensor, after: Tensor) -> None:
            inputs[name], outputs[name] = before, after

        return noted

    def entered(addition: _Addition) -> None:
        sums[addition.layer] = addition

    containers = [name for name, module in model.named_modules() if name and any(True for _ in module.children())]
    hooks = {name: note(name) for name in containers}
    with torch.no_grad(), watching(model, hooks), _watching_all(model, layers, entered):
        model(example)
    names = {part for parts in parts_of(blocks).values() for part in parts}
    parts = [block for block in blocks if block.name in names]
    found: dict[str, Link | None] = dict.fromkeys(sums)
    for layer, addition in sums.items():
        handed = [outputs[name] for name in outputs if layer.startswith(f"{name}.")]
        for part in parts:
            last = next((name for name in reversed(sums) if name in part.layers), None)
            if last is None or last == layer or found[layer] is not None:
                continue
            if part.rest == "zero":
                follows = sums[last].other is addition.total
            else:
                read = inputs.get(part.name)
                follows = any(read is each for each in handed) and _is_sum(read, addition.total)
            found[layer] = Link(part.name, last) if follows else None
    return found


def _is_sum(read: Tensor | None, total: Tensor) -> bool:
    """Whether this is the sum, as it is or after a ReLU."""
    if read is None or read.shape != total.shape:
        return False
    return read is total or torch.equal(read, total) or torch.equal(read, total.relu())


def stand_in(found: Mapping[str, Link | None], layer: str, dropped: Collection[str]) -> str:
    """Whose sum of the dense model the sum after `layer` stands for, once the parts in `dropped` are gone."""
    link = found.get(layer)
    while link is not None and link.block in dropped:
        layer = link.layer
        link = found.get(layer)
    return layer
