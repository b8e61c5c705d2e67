"""Branches of a model: modules whose output is added to a stream that they read, and what serves nothing but them.

Seen on the tape of a forward pass: which operation adds what, what it depends on, and what is left to do once a branch
is gone. Knows no weights and no classes of blocks, and does not look at numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from autoprune.model.coupling import CONVOLUTIONS, NORMS
from autoprune.model.tape import Step, Tape, record

_ADDS = ("aten::add", "aten::add_")


@dataclass(frozen=True, slots=True)
class Branch:
    """A module that ends a branch, and the outermost modules beside it that nothing else needs."""

    name: str
    idle: tuple[str, ...]


def branches(model: nn.Module, example: Tensor) -> tuple[Branch, ...]:
    """The outermost modules with parameters whose output is added to what they read, in the order of the additions.

    A layer may be one (where a branch is no module of its own, its last layer stands for it), but for convolutions and
    batch norms: what these end is found as a whole block.
    """
    modules = {name: module for name, module in model.named_modules() if name and _has_parameters(module)}
    flow = _Flow(record(model, example, watched=tuple(modules), planned=True))
    found: dict[str, Branch] = {}
    for value, name in flow.added():
        if name not in found and not isinstance(modules[name], (*CONVOLUTIONS, *NORMS)):
            found[name] = Branch(name, _outermost(flow.idle_without(value, name)))
    return tuple(found.values())


def _has_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _outermost(names: set[str]) -> tuple[str, ...]:
    return tuple(sorted(name for name in names if not any(name.startswith(f"{other}.") for other in names)))


class _Flow:
    """What depends on what on a tape."""

    def __init__(self, tape: Tape) -> None:
        self._tape = tape
        self._makers: dict[int, list[Step]] = {}
        self._known: dict[int, set[int]] = {}
        for step in tape.steps:
            for value in _written(step):
                self._makers.setdefault(value, []).append(step)

    def added(self) -> Iterator[tuple[int, str]]:
        """Values that are added to something they depend on, each with the outermost module that hands it out."""
        seen: set[int] = set()
        for step in filter(self._is_sum, self._tape.steps):
            for ours, other in (step.reads, step.reads[::-1]):
                others = set(self._terms(other, step))
                for value, reader in self._terms(ours, step).items():
                    name = None if value in seen else self._handed_by(value, reader)
                    if name is not None and self._needed(value) & others:
                        seen.add(value)
                        yield value, name

    def idle_without(self, value: int, name: str) -> set[str]:
        """Modules outside `name` of which nothing is needed any more once nobody needs `value`."""
        needed = self._live(without=value)
        gone = {module for step in self._tape.steps if id(step) in self._baseline - needed for module in step.within}
        busy = {module for step in self._tape.steps if id(step) in needed for module in step.within}
        return {module for module in gone - busy if module != name and not module.startswith(f"{name}.")}

    def _handed_by(self, value: int, reader: Step) -> str | None:
        makers = self._makers.get(value, [])
        if not makers:
            return None
        outside = [module for module in makers[-1].within if module not in reader.within]
        return outside[0] if outside else None

    def _is_sum(self, step: Step) -> bool:
        """Whether a step adds two values of one size."""
        return step.name in _ADDS and len(step.reads) == 2 and len({self._tape.bytes[v] for v in step.reads}) == 1

    def _terms(self, value: int, reader: Step) -> dict[int, Step]:
        """`value`, which `reader` reads, and where it is a sum what it is the sum of; each with what reads it first."""
        found: dict[int, Step] = {}
        waiting = [(value, reader)]
        while waiting:
            term, by = waiting.pop()
            if term not in found:
                found[term] = by
                sums = filter(self._is_sum, self._makers.get(term, []))
                waiting += [(read, step) for step in sums for read in step.reads]
        return found

    def _needed(self, value: int) -> set[int]:
        """All values that `value` is made of, without itself."""
        if value not in self._known:
            self._known[value] = self._ancestors(value)
        return self._known[value]

    def _ancestors(self, value: int) -> set[int]:
        found: set[int] = set()
        waiting = [value]
        while waiting:
            for step in self._makers.get(waiting.pop(), []):
                waiting += [read for read in step.reads if read not in found]
                found.update(step.reads)
        return found - {value}

    @cached_property
    def _baseline(self) -> set[int]:
        return self._live(without=None)

    def _live(self, *, without: int | None) -> set[int]:
        """Steps (by identity) that what the model returns depends on, if nobody needs the value `without`."""
        steps: set[int] = set()
        known, waiting = {without}, list(self._tape.returned)
        while waiting:
            value = waiting.pop()
            if value in known:
                continue
            known.add(value)
            for step in self._makers.get(value, []):
                steps.add(id(step))
                waiting += step.reads
        return steps


def _written(step: Step) -> tuple[int, ...]:
    """Values that a step makes or, in place, changes."""
    if step.makes or not step.name.endswith("_"):
        return step.makes
    return step.reads[:1]
