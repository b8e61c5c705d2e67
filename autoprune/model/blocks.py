"""Residual blocks that can be dropped, found by what they do and not by how they are called.

A block whose output is its input once all its own parameters are zero adds to a shortcut: what remains without it is
the shortcut. Needs no tracing and no class names.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from autoprune.model.observe import Call, calls

Rest = Literal["identity", "relu"]
"""What stays of a dropped block: its input, or its input after the activation that followed the addition."""


@dataclass(frozen=True, slots=True)
class Block:
    """A droppable module, the layers inside it, and what stays in its place."""

    name: str
    layers: tuple[str, ...]
    rest: Rest


class Dropped(nn.Module):
    """Stands where a block was: hands its first input on."""

    def __init__(self, rest: Rest) -> None:
        super().__init__()
        self.rest = rest

    def forward(self, x: Tensor, *_: object, **__: object) -> Tensor:
        """`x`, after the block's last activation where that changed it."""
        return functional.relu(x) if self.rest == "relu" else x


def droppable_blocks(model: nn.Module, example: Tensor) -> tuple[Block, ...]:
    """The innermost residual blocks of `model`, in execution order. `example` is a batch the model accepts."""
    seen = calls(model, example)
    counts = Counter(call.name for call in seen)
    modules = dict(model.named_modules())
    found: dict[str, Rest] = {}
    for call in seen:  # inner modules end before outer ones
        module = modules[call.name]
        if call.name == "" or counts[call.name] > 1 or not _is_candidate(module, call):
            continue
        if any(name.startswith(f"{call.name}.") for name in found):
            continue
        rest = _rest(module, call)
        if rest is not None:
            found[call.name] = rest
    return tuple(Block(name, _layers(modules[name], name), rest) for name, rest in found.items())


def _is_candidate(module: nn.Module, call: Call) -> bool:
    inside = any(True for child in module.children()) and any(True for _ in module.parameters())
    return inside and call.inputs.shape == call.output.shape and call.inputs.is_floating_point()


def _layers(module: nn.Module, name: str) -> tuple[str, ...]:
    own = [(child, layer) for child, layer in module.named_modules() if child]
    return tuple(f"{name}.{child}" for child, layer in own if any(True for _ in layer.parameters(recurse=False)))


def _rest(module: nn.Module, call: Call) -> Rest | None:
    """What `module` does when all its parameters are zero, if that is to hand its input on."""
    hollow = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in hollow.parameters():
            parameter.zero_()
        for layer in hollow.modules():
            mean = getattr(layer, "running_mean", None)
            if isinstance(mean, Tensor):
                mean.zero_()
        try:
            output = hollow(call.inputs)
        except TypeError:  # needs more than its first input: not a block we can replace
            return None
        changed = call.inputs.clone().neg_()  # a second look at what the first one may have hidden
        again = hollow(changed)
    if torch.equal(output, call.inputs) and torch.equal(again, changed):
        return "identity"
    if torch.equal(output, functional.relu(call.inputs)) and torch.equal(again, functional.relu(changed)):
        never_negative = bool((call.inputs >= 0).all())  # it comes from a ReLU: a second one changes nothing
        return "identity" if never_negative else "relu"
    return None
