"""What can be dropped in depth, found by what it does and not by how it is called: residual blocks and their branches.

A block whose output is its input once all its own parameters are zero adds to a shortcut: what remains without it is
the shortcut. A branch is added to a stream that it reads, and is zero once its parameters are: what remains is nothing.
Each stand-in is tried in the whole model before it is believed.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from autoprune.model.branches import branches
from autoprune.model.compare import agree
from autoprune.model.observe import Call, Hook, calls, watching
from autoprune.nest import tensors_of
from autoprune.rebuilding import Dropped, replace_module

Rest = Literal["identity", "relu", "zero"]
"""What stays of a dropped module: its input, its input after the activation that followed the addition, or nothing."""

Constant = None | bool | int | float | str
Further = tuple[Constant, ...] | None
"""What a module returns after its first tensor; None where it returns nothing but that tensor."""


@dataclass(frozen=True, slots=True)
class StandIn:
    """What is put in the place of one module."""

    name: str
    rest: Rest
    further: Further = None


@dataclass(frozen=True, slots=True)
class Block:
    """A droppable module, the layers that go with it, and what stays in its place."""

    name: str
    layers: tuple[str, ...]
    rest: Rest
    further: Further = None
    idle: tuple[StandIn, ...] = ()
    """Modules outside it that serve nothing else, such as the norm before a branch: they go, too."""

    @property
    def stand_ins(self) -> tuple[StandIn, ...]:
        """All modules that are replaced, and by what."""
        return StandIn(self.name, self.rest, self.further), *self.idle


def put(model: nn.Module, stand_ins: Collection[StandIn]) -> None:
    """Replace modules of our own copy, in place."""
    for each in stand_ins:
        replace_module(model, each.name, Dropped(each.rest, each.further))


def is_within(name: str, other: str) -> bool:
    """Whether a module is another one or inside it."""
    return name == other or name.startswith(f"{other}.")


def outermost(blocks: Collection[Block]) -> tuple[Block, ...]:
    """Those of `blocks` that do not go with another one of them anyway."""
    return tuple(
        block for block in blocks if not any(block is not other and _holds(other, block.layers) for other in blocks)
    )


def home_of(blocks: Collection[Block], layers: Collection[str]) -> str | None:
    """The innermost of `blocks` that takes all of `layers` away."""
    around = [block for block in blocks if set(layers) <= set(block.layers)]
    return min(around, key=lambda block: len(block.layers)).name if around else None


def parent_of(blocks: Collection[Block], block: Block) -> str | None:
    """The block that takes `block` away, if there is one."""
    return home_of([other for other in blocks if _holds(other, block.layers)], block.layers)


def parts_of(blocks: Collection[Block]) -> dict[str, tuple[str, ...]]:
    """For each of `blocks` what goes with it, part by part: its branches where they are all there is to it, in order,
    else itself.
    """
    parts = {}
    for block in blocks:
        inside = [other for other in blocks if _holds(block, other.layers)]
        whole = {layer for other in inside for layer in other.layers} == set(block.layers)
        parts[block.name] = tuple(other.name for other in inside) if whole else (block.name,)
    return parts


def _holds(block: Block, layers: Collection[str]) -> bool:
    return set(layers) < set(block.layers)


def droppable_blocks(model: nn.Module, example: Tensor) -> tuple[Block, ...]:
    """The innermost residual blocks of `model` and the branches in and outside them, in execution order (of their
    ends). A branch that is all there is to its block is not named. `example` is a batch the model accepts.
    """
    seen = calls(model, example)
    counts = Counter(call.name for call in seen)
    once = {call.name: call for call in seen if call.name and counts[call.name] == 1}
    whole = _tested(model, example, _residual(model, once))
    parts = _tested(model, example, _added(model, example, once, tuple(block.name for block in whole)))
    parts = tuple(part for part in parts if not any(set(part.layers) == set(block.layers) for block in whole))
    order = {name: place for place, name in enumerate(once)}
    return tuple(sorted((*whole, *parts), key=lambda block: order[block.name]))


def _residual(model: nn.Module, once: Mapping[str, Call]) -> tuple[Block, ...]:
    found: dict[str, Block] = {}
    for name, call in once.items():  # inner modules end before outer ones
        module = model.get_submodule(name)
        if not _is_candidate(module, call) or any(is_within(inner, name) for inner in found):
            continue
        rest = _rest(module, call)
        if rest is not None:
            found[name] = Block(name, _layers(model, name), rest, _further(call))
    return tuple(found.values())


def _added(model: nn.Module, example: Tensor, once: Mapping[str, Call], blocks: Sequence[str]) -> tuple[Block, ...]:
    """The innermost branches."""
    found = []
    seen = branches(model, example)
    taken = {*blocks, *(branch.name for branch in seen)}
    for branch in seen:
        names = (branch.name, *branch.idle)
        holds = any(is_within(other, name) for other in taken - {branch.name} for name in names)
        if holds or any(name not in once or not _is_plain(once[name]) for name in names):
            continue
        if _is_zero(model.get_submodule(branch.name), once[branch.name]):
            layers = tuple(layer for name in names for layer in _layers(model, name))
            idle = tuple(StandIn(name, "identity", _further(once[name])) for name in branch.idle)
            found.append(Block(branch.name, layers, "zero", _further(once[branch.name]), idle))
    return tuple(found)


def _is_candidate(module: nn.Module, call: Call) -> bool:
    inside = any(True for child in module.children()) and any(True for _ in module.parameters())
    alike = call.inputs.shape == call.output.shape and call.inputs.is_floating_point()
    return inside and alike and _is_plain(call)


def _is_plain(call: Call) -> bool:
    """Whether it returned a tensor, or a tuple that begins with one."""
    is_tuple = type(call.returned) is tuple and len(call.returned) > 0 and call.returned[0] is call.output
    return call.returned is call.output or is_tuple


def _further(call: Call) -> Further:
    """Constants as they were returned; None for what is computed: whether that is missed is tried."""
    if not isinstance(call.returned, tuple):
        return None
    return tuple(each if isinstance(each, bool | int | float | str) else None for each in call.returned[1:])


def _layers(model: nn.Module, name: str) -> tuple[str, ...]:
    """The module and all inside it that have parameters of their own."""
    inside = model.get_submodule(name).named_modules(prefix=name)
    return tuple(path for path, layer in inside if any(True for _ in layer.parameters(recurse=False)))


def _rest(module: nn.Module, call: Call) -> Rest | None:
    """What `module` does when all its parameters are zero, if that is to hand its input on."""
    seen = list(_hollow_outputs(module, call))
    if seen and all(torch.equal(output, given) for given, output in seen):
        return "identity"
    if seen and all(torch.equal(output, functional.relu(given)) for given, output in seen):
        never_negative = bool((call.inputs >= 0).all())  # it comes from a ReLU: a second one changes nothing
        return "identity" if never_negative else "relu"
    return None


def _is_zero(module: nn.Module, call: Call) -> bool:
    seen = list(_hollow_outputs(module, call))
    return bool(seen) and not any(output.any() for _, output in seen)


def _hollow_outputs(module: nn.Module, call: Call) -> Iterator[tuple[Tensor, Tensor]]:
    """What `module` makes of what it was given once all its parameters are zero, and of the opposite: a second look at
    what the first may have hidden. Nothing where it cannot be called again.
    """
    hollow = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in hollow.parameters():
            parameter.zero_()
        for layer in hollow.modules():
            mean = getattr(layer, "running_mean", None)
            if isinstance(mean, Tensor):
                mean.zero_()
        for given in (call.inputs, call.inputs.neg() if call.inputs.is_floating_point() else call.inputs):
            # All else is copied: a cache among it would be written to.
            args, kwargs = copy.deepcopy((call.args, dict(call.kwargs)), {id(call.inputs): given.clone()})
            try:
                made = tensors_of(hollow(*args, **kwargs))
            except Exception:  # noqa: BLE001 (whatever a foreign forward raises: it is none that we can replace)
                return
            if not made:
                return
            yield given, made[0]


def _tested(model: nn.Module, example: Tensor, blocks: Sequence[Block]) -> tuple[Block, ...]:
    """Those whose stand-ins do in the whole model what they should. All at once: two forwards when all is well."""
    same = _drop_check(model, example)
    if same(blocks):
        return tuple(blocks)
    tried = ((block, replace(block, idle=(), layers=_layers(model, block.name))) for block in blocks)
    sound = [next((form for form in forms if same((form,))), None) for forms in tried]
    found = [block for block in sound if block is not None]
    while found and not same(found):
        found.pop()
    return tuple(found)


def _drop_check(model: nn.Module, example: Tensor) -> Callable[[Sequence[Block]], bool]:
    """A test of blocks: the model without them must make what it makes when their outputs are overwritten."""
    hooks: dict[Rest, Hook] = {
        "identity": lambda given, _made: given,
        "relu": lambda given, _made: functional.relu(given),
        "zero": lambda _given, made: torch.zeros_like(made),
    }

    def same(blocks: Sequence[Block]) -> bool:
        if not blocks:
            return True
        with torch.no_grad():
            with watching(model, {block.name: hooks[block.rest] for block in blocks}):
                wanted = model(example)
            shorter = copy.deepcopy(model)
            put(shorter, [each for block in blocks for each in block.stand_ins])
            try:
                found = shorter(example)
            except Exception:  # noqa: BLE001 (a foreign forward that misses something of what was dropped)
                return False
        return agree(found, wanted, least=1e-3)

    return same
