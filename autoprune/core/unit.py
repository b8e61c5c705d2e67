"""Units and what can be done to them: the vocabulary of a decision. No weights, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

Kind = Literal["channels", "heads", "ffn", "block", "weights", "kernel", "resolution"]
NARROWED: Final = ("channels", "heads", "ffn")
"""Kinds of units of which some channels may go: attention heads and feed-forward features are such channels, too."""

Compensate = Literal["none", "least_squares"]
Bits = Literal[3, 4, 5, 6, 8, 16, 32]
"""How a layer's weights are stored: integers of so many bits with one scale an output, halves (16) or floats."""

InputBits = Literal[8, 32]
"""What a layer computes with: integers of 8 bits, its weights and what it reads, or floats."""

Form = Literal["float", "low_rank", "integer", "2:4"]
"""In what form a layer is there, as far as that may decide what it costs to run. Stored integers do not, and zeros
do where a runtime has kernels for their pattern; elsewhere that form is as good as `float`."""

SizeOf = Literal["onnx", "packed", "plain"]
"""What is counted as a model's size: its ONNX file, the packed file, or the bytes of its tensors."""


@dataclass(frozen=True, slots=True)
class Unit:
    """The smallest thing a policy decides about.

    A `channels` unit is named by the root layer of a group of coupled channels and has `width` of them; so are a
    `heads` unit of attention heads and an `ffn` unit of features that lie between linear layers (a feed-forward part).
    A `block` unit is named by its module and has width 1; a `weights` unit is named by one layer's weight
    (`fc1.weight`) and has `width` of them, the same number for each of `outputs`. A `kernel` unit is named by one
    convolution's kernel (`conv.kernel`), whose side is `width` and may become one of `sizes`; so is the one
    `resolution` unit, whose side is the height of the model's input images, and which touches all layers and names
    none. `layers` are all layers it touches; `parent` is the block unit whose removal makes this unit moot: the
    innermost one, which may have a parent itself.
    """

    name: str
    kind: Kind
    width: int
    layers: tuple[str, ...]
    parent: str | None = None
    outputs: int = 1
    sizes: tuple[int, ...] = ()

    @property
    def narrows(self) -> bool:
        """Whether it has channels (heads, features) of which some may go."""
        return self.kind in NARROWED


@dataclass(frozen=True, slots=True)
class Option:
    """One thing done to one unit: `method` chooses which `keep` of its channels stay, `compensate` mends the rest.

    The method `keep` leaves the unit as it is; the method `drop` removes a block (keep 0). Of a `weights` unit the
    `keep` weights stay that `pattern` leaves (`2:4`, `70%`, ...; empty: all, method `dense`), stored in `bits`. The
    method `low_rank` makes two layers of one, with `rank` channels between them and `keep` weights in both. With
    `inputs` of 8 bits, what the layer reads and makes is rounded too, and it computes in integers. Of a `kernel` unit
    the method `center` leaves the middle, of side `keep`; of a `resolution` unit the method `resize` has the model
    shrink its input to that height.
    """

    method: str
    keep: int
    compensate: Compensate = "none"
    pattern: str = ""
    bits: Bits = 32
    rank: int = 0
    inputs: InputBits = 32

    @property
    def form(self) -> Form:
        """In what form the layer of a `weights` unit is there."""
        if self.rank:
            return "low_rank"
        if self.inputs == 8:
            return "integer"
        return "2:4" if self.pattern == "2:4" and self.bits >= 16 else "float"

    @property
    def label(self) -> str:
        """A short name, unique within a unit: `obs+least_squares:12`, `sparsegpt 2:4 int8`, `low_rank 8`."""
        if self.rank:
            return f"{self.method} {self.rank}"
        if self.pattern or self.bits < 32:
            stored = "" if self.bits == 32 else "half" if self.bits == 16 else f"int{self.bits}"
            parts = (self.method, self.pattern, f"{stored} arithmetic" if self.inputs == 8 else stored)
            return " ".join(part for part in parts if part)
        return f"{self.method}{'+' + self.compensate if self.compensate != 'none' else ''}:{self.keep}"


def keep_all(unit: Unit) -> Option:
    """The option that leaves `unit` as it is; every unit has it."""
    return Option("keep", unit.width)


DROP = Option("drop", 0)
LOW_RANK = "low_rank"
"""The method that splits a layer in two."""
CENTER = "center"
"""The method that cuts a convolution's kernel to its middle."""
RESIZE = "resize"
"""The method that has a model resize its input."""
