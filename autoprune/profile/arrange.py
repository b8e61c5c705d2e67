"""How a runtime that plans its memory lays buffers out, for many choices at once. Arrays alone: no model, no widths.

ONNX Runtime fits each buffer, in the order in which they are made, into the smallest gap between those that are needed
then: what lies behind a gap that is too small stays there, so that more is asked for than is alive. On x86 it computes
images in blocks of 16 or 8 channels: widths are padded to whole blocks, and what anything else reads is copied. Which
kernels take blocks is told in `features.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from autoprune.model.buffers import CONVOLUTION, Buffers, is_elementwise
from autoprune.model.tape import Tape
from autoprune.profile.features import SMALL_BLOCK
from autoprune.profile.widths import Array

Flags = NDArray[np.bool_]
Index = NDArray[np.intp]
_PLAIN, _DECIDES = -1, -2  # readers that take no blocks, and convolutions, which look at their input's width
_BLOCKWISE = frozenset({"aten::max_pool2d_with_indices", "aten::avg_pool2d", "aten::mean", "aten::cat"})
"""Operations that work on blocks of channels where all widths are whole blocks."""


@dataclass(frozen=True, slots=True, eq=False)
class Layouts:
    """Who makes and who reads each of B buffers, as far as that decides whether it is laid out in blocks."""

    each: Array
    """(B,) bytes of one channel, of images; else 0."""
    convolved: tuple[tuple[int, int], ...]
    """(buffer, what the convolution that makes it reads)."""
    passed: tuple[tuple[int, tuple[int, ...], bool], ...]
    """(buffer, what the operation reads that makes it, whether it asks for whole blocks), in order."""
    reads: Index
    """(3, R) buffer read, step, and the buffer whose layout the reader takes: `_PLAIN` and `_DECIDES` for none."""
    is_last: Flags
    """(R,) whether no later step needs the buffer."""

    @classmethod
    def of(cls, tape: Tape, buffers: Buffers) -> Self:
        """The layouts that the dense model's pass leaves open."""
        channels = np.asarray([tape.channels[value] for value in buffers.values], dtype=np.float64)
        sizes = np.asarray([tape.bytes[value] for value in buffers.values], dtype=np.float64)
        convolved, passed, reads, made = [], [], [], {buffers.input}
        for position, step in enumerate(tape.steps):
            read = tuple(dict.fromkeys(buffers.holds[value] for value in step.reads))
            into = next((buffers.holds[value] for value in step.makes if buffers.holds[value] >= 0), _PLAIN)
            passes = bool(read) and (is_elementwise(step) or step.name in _BLOCKWISE)
            follows = _DECIDES if step.name == CONVOLUTION else into if passes else _PLAIN
            reads += [(buffer, position, follows) for buffer in read]
            if into in made or into == _PLAIN:
                continue
            made.add(into)
            if step.name == CONVOLUTION and read:
                convolved.append((into, read[0]))
            elif passes:
                passed.append((into, read, not is_elementwise(step)))
        table = np.asarray(reads, dtype=np.intp).reshape(-1, 3).T
        after = np.column_stack([buffers.needed, buffers.needed[:, -1:]])  # what is returned stays
        return cls(
            each=np.divide(sizes, channels, out=np.zeros_like(sizes), where=channels > 0),
            convolved=tuple(convolved),
            passed=tuple(passed),
            reads=table,
            is_last=~after[table[0], table[1] + 1],
        )

    def in_blocks(self, sizes: Array, block: int) -> tuple[Array, Array, Flags]:
        """Bytes of buffers (P, B) as laid out, and of copies (P, R) made for readers, and which reads (P, R) have one.

        `sizes` (P, B) are without blocks.
        """
        buffer, _, follows = self.reads
        if block == 1:
            return sizes, np.zeros((len(sizes), len(buffer))), np.zeros((len(sizes), len(buffer)), dtype=np.bool_)
        channels = np.rint(sizes / np.maximum(self.each, 1))
        padded = np.where(self.each > 0, np.ceil(channels / block) * block * self.each, sizes)
        blocked = self._blocked(channels, block)
        whole = (channels >= block) & (channels % SMALL_BLOCK == 0)
        wanted = np.where(follows == _DECIDES, whole[:, buffer], blocked[:, follows] & (follows >= 0))
        is_copied = (wanted != blocked[:, buffer]) & (self.each[buffer] > 0)
        copies = np.where(wanted, padded[:, buffer], sizes[:, buffer]) * is_copied
        return np.where(blocked, padded, sizes), copies, is_copied

    def _blocked(self, channels: Array, block: int) -> Flags:
        """Which buffers (P, B) are laid out in blocks."""
        blocked = np.zeros(channels.shape, dtype=np.bool_)
        for buffer, read in self.convolved:
            blocked[:, buffer] = (channels[:, read] < block) | (channels[:, read] % SMALL_BLOCK == 0)
        for buffer, reads, asks in self.passed:
            fine = blocked[:, reads] & (channels[:, reads] % block == 0) if asks else blocked[:, reads]
            blocked[:, buffer] = fine.all(axis=1)
        return blocked


def arranged(sizes: Array, starts: Index, ends: Index) -> Array:
    """Bytes (P,) of memory that holds N buffers of `sizes` (P, N), each needed from `starts` (N,) to `ends` (P, N).

    Best fit, in the order of the starts; of size 0 is what is not there.
    """
    rows, latest = np.arange(len(sizes)), ends.max(axis=0, initial=0)
    offsets, total = np.zeros(sizes.shape), np.zeros(len(sizes))
    before: list[int] = []
    for index in np.argsort(starts, kind="stable").tolist():
        size, start = sizes[:, index], starts[index]
        if not size.any():
            continue
        before = [other for other in before if latest[other] >= start]
        if before:
            alive = (ends[:, before] >= start) & (sizes[:, before] > 0)  # (P, K)
            lower = np.where(alive, offsets[:, before], np.inf)
            upper = np.where(alive, offsets[:, before] + sizes[:, before], 0.0)
            places = np.column_stack([np.zeros(len(sizes)), upper])  # (P, K + 1)
            above = np.where(lower[:, None] >= places[..., None], lower[:, None], np.inf).min(axis=2)
            spare = np.minimum(above, total[:, None]) - places - size[:, None]
            spare[spare < 0] = np.inf
            best = spare.argmin(axis=1)
            offsets[:, index] = np.where(np.isfinite(spare[rows, best]), places[rows, best], upper.max(axis=1))
        total = np.maximum(total, offsets[:, index] + size)
        before.append(index)
    return total
