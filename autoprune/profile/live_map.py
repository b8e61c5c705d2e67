"""Which activations are alive at every step of a forward pass, as a function of a choice. Counted, never measured.

The bytes of each buffer are linear in the channels that every unit keeps: the slopes are the differences between the
dense model and models with one unit narrowed. A dropped block takes its steps away, and what it handed on is as large
as what it was given. (What is read both before and after a dropped block is counted twice there: never too little.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self, final

import numpy as np
from torch import Tensor, nn

from autoprune.core.space import Choice, Space
from autoprune.model.buffers import Buffers
from autoprune.model.tape import Tape, record
from autoprune.profile.arrange import Flags, Layouts, arranged
from autoprune.profile.widths import Array


@final
@dataclass(frozen=True, slots=True, eq=False)
class LiveMap:
    """B buffers over S steps, for the options of U units."""

    fixed: Array
    """(B,) bytes that no unit changes."""
    times: Array
    """(U, B) bytes for each channel that a unit keeps."""
    needed: Flags
    """(B, S) while a buffer is needed."""
    removes: Flags
    """(U, S) where dropping the block unit takes the step away."""
    lasting: Flags
    """(B,) the input and what is returned: the caller's."""
    layouts: Layouts | None
    """Of a runtime that plans its memory; None of one that does not."""

    @classmethod
    def of(cls, space: Space, build: Callable[[Choice], nn.Module], example: Tensor, *, planned: bool) -> Self:
        """The map of the models that `build` makes, on `example` (a batch of the target's size).

        `planned` for a runtime that plans memory, without for PyTorch itself. A unit whose narrowing changes what is
        run, and not only how wide, counts as if it saved nothing. Raises ModelError when a model does not run.
        """
        blocks = [unit.name for unit in space.units if unit.kind == "block"]
        tape = record(build(space.dense), example, watched=blocks, planned=planned)
        buffers = Buffers.of(tape, planned=planned)
        sizes = np.asarray(tape.bytes, dtype=np.float64)[list(buffers.values)]
        times = np.zeros((len(space.units), len(sizes)))
        for unit, entry in enumerate(space.entries):
            narrowest = entry.options[-1]
            if not entry.unit.narrows or narrowest.keep == entry.unit.width:
                continue
            choice = tuple(len(entry.options) - 1 if unit == place else 0 for place in range(len(space.entries)))
            cut = record(build(choice), example, planned=planned)
            if _program(cut) == _program(tape):
                saved = sizes - np.asarray(cut.bytes, dtype=np.float64)[list(buffers.values)]
                times[unit] = saved / (entry.unit.width - narrowest.keep)
        widths = np.asarray([unit.width for unit in space.units], dtype=np.float64)
        lasting = np.zeros(len(sizes), dtype=np.bool_)
        lasting[[buffers.input, *(buffers.holds[value] for value in tape.returned)]] = True
        removes = [[name in step.within for step in tape.steps] for name in space.names]
        return cls(
            fixed=sizes - widths @ times,
            times=times,
            needed=buffers.needed,
            removes=np.asarray(removes, dtype=np.bool_).reshape(len(space.names), len(tape.steps)),
            lasting=lasting,
            layouts=Layouts.of(tape, buffers) if planned else None,
        )

    def peak(self, kept: Array) -> Array:
        """Bytes (P,) alive at the fullest step, for the channels (P, U) that each unit keeps: 0 for a dropped block."""
        live = (self.fixed + kept @ self.times) @ self.needed
        fullest: Array = (live * self._there(kept)).max(axis=1, initial=0.0)
        return fullest

    def needs(self, kept: Array, *, block: int) -> Array:
        """Bytes (P,) that the runtime asks for: the peak; planned, what a plan with blocks of channels comes to."""
        if self.layouts is None:
            return self.peak(kept)
        there = self._there(kept)
        plain = (self.fixed + kept @ self.times) * (
            there.astype(np.float64) @ self.needed.T > 0
        )  # nothing for what only gone steps need
        sizes, copies, is_copied = self.layouts.in_blocks(plain, block)
        buffer, step, _ = self.layouts.reads
        # Each step has two moments: readers' copies are made in the first, and it runs in the second.
        starts = 2 * self.needed.argmax(axis=1) + 1
        ends = np.tile(2 * (self.needed.shape[1] - self.needed[:, ::-1].argmax(axis=1)) - 1, (len(kept), 1))
        for read in np.flatnonzero(self.layouts.is_last & is_copied.any(axis=0)):
            ends[:, buffer[read]] -= is_copied[:, read]
        own = ~self.lasting
        planned = arranged(
            np.hstack([sizes[:, own], copies * there[:, step]]),
            np.concatenate([starts[own], 2 * step]),
            np.hstack([ends[:, own], np.tile(2 * step + 1, (len(kept), 1))]),
        )
        total: Array = planned + sizes[:, self.lasting].sum(axis=1)
        return total

    def _there(self, kept: Array) -> Flags:
        """(P, S) which steps are left."""
        gone: Array = (kept == 0).astype(np.float64) @ self.removes
        there: Flags = gone == 0
        return there


@final
@dataclass(frozen=True, slots=True, eq=False)
class SizedMaps:
    """A live map for each size of the input that a choice may ask for."""

    unit: int
    """The unit that decides the size."""
    maps: Mapping[int, LiveMap]
    """By what it keeps."""

    @classmethod
    def of(cls, space: Space, build: Callable[[Choice], nn.Module], example: Tensor, *, planned: bool) -> Self:
        """The maps of a space with a `resolution` unit; see `LiveMap.of`."""
        unit = next(place for place, one in enumerate(space.units) if one.kind == "resolution")
        maps = {}
        for index, option in enumerate(space.entries[unit].options):

            def sized(choice: Choice, index: int = index) -> nn.Module:
                return build((*choice[:unit], index, *choice[unit + 1 :]))

            maps[option.keep] = LiveMap.of(space, sized, example, planned=planned)
        return cls(unit, maps)

    def needs(self, kept: Array, *, block: int) -> Array:
        """Bytes (P,) that the runtime asks for, as of the map of each choice's size."""
        total = np.zeros(len(kept))
        for side, live_map in self.maps.items():
            rows = kept[:, self.unit] == side
            if rows.any():
                total[rows] = live_map.needs(kept[rows], block=block)
        return total


def _program(tape: Tape) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    return [(step.name, step.reads, step.makes) for step in tape.steps]
