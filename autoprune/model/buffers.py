"""Which values of a forward pass share memory, and for which steps each piece of memory is needed.

Knows order and sizes alone, no widths and no runtime but one: a plan by last use, as ONNX Runtime makes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from autoprune.model.tape import INPUT, Step, Tape

CONVOLUTION = "aten::convolution"
_NORMS = frozenset({"aten::native_batch_norm", "aten::_native_batch_norm_legit_no_training", "aten::cudnn_batch_norm"})
_SUMS = frozenset({"aten::add", "aten::add_"})


def is_elementwise(step: Step) -> bool:
    """Whether an operation can write over what it reads. In eval mode a batch norm can."""
    return step.is_pointwise or step.name in _NORMS


@dataclass(frozen=True, slots=True, eq=False)
class Buffers:
    """B pieces of memory and what of them is needed when, over S steps."""

    values: tuple[int, ...]
    """One value of each buffer: the first that lies in it. The input's is the first of all."""
    holds: tuple[int, ...]
    """Value -> its buffer; -1 where nobody reads the value."""
    needed: NDArray[np.bool_]
    """(B, S) from the step that makes a buffer to the last that reads it."""

    @property
    def input(self) -> int:
        """The buffer of what the caller hands in."""
        return self.holds[INPUT]

    @classmethod
    def of(cls, tape: Tape, *, planned: bool) -> Self:
        """Each value in memory of its own, freed after its last use; `planned`, it may lie where another was.

        An elementwise step then works in the memory of an input that is not read later. A sum of two such inputs is
        added where the older one lies, by the convolution that makes the other, which so needs no memory at all.
        """
        first, last = _lives(tape)
        owner = list(range(len(tape.bytes)))
        if planned:
            _share(tape, owner, list(last))
        owners = sorted({owner[value] for value, step in enumerate(last) if step >= 0})
        place = {value: index for index, value in enumerate(owners)}
        needed = np.zeros((len(owners), len(tape.steps)), dtype=np.bool_)
        for value, end in enumerate(last):
            if end >= 0:
                needed[place[owner[value]], first[value] : end + 1] = True
        holds = tuple(place[owner[value]] if end >= 0 else -1 for value, end in enumerate(last))
        return cls(tuple(owners), holds, needed)


def _lives(tape: Tape) -> tuple[list[int], list[int]]:
    """For each value the step that makes it and the last that reads it; -1 where nobody does."""
    first, last = [0] * len(tape.bytes), [-1] * len(tape.bytes)
    for position, step in enumerate(tape.steps):
        for value in step.makes:
            first[value] = position
        for value in step.reads:
            last[value] = position
    for value in (INPUT, *tape.returned):
        last[value] = len(tape.steps)
    return first, last


def _share(tape: Tape, owner: list[int], ends: list[int]) -> None:
    """Let values share memory: `owner` gives for each the first value of its buffer. `ends` is used up."""
    maker = {value: step.name for step in tape.steps for value in step.makes}
    for position, step in enumerate(tape.steps):
        if not (is_elementwise(step) and step.makes):
            continue
        made = step.makes[0]
        dying = sorted(
            {owner[value] for value in step.reads if ends[owner[value]] == position and _fits(tape, owner[value], made)}
        )
        if not dying:
            continue
        into, *others = dying
        if step.name in _SUMS and others and maker[others[-1]] == CONVOLUTION:
            owner[:] = [into if value == others[-1] else value for value in owner]
        owner[made], ends[into] = into, ends[made]


def _fits(tape: Tape, value: int, other: int) -> bool:
    return tape.bytes[value] == tape.bytes[other]
