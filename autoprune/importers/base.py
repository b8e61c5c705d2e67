"""What an importer is: it reads what another tool wrote and says which layers that asks to be made smaller, and how.

Knows texts alone. Does not know any tool, nor any model: whether a layer exists, and which unit it belongs to, is found
out later (`mapping`). What cannot be understood is told, never guessed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, Protocol

from autoprune.core.pattern import parse_pattern

Side = Literal["outputs", "inputs"]

PREFIXES: Final = ("module.", "model.", "backbone.", "architecture.", "_orig_mod.")
"""What tools and wrappers put before a layer's name; taken off only where the model knows the rest and not the whole.
"""


@dataclass(frozen=True, slots=True)
class Share:
    """A share of a layer's channels goes."""

    removed: float
    down: bool = False
    """Whether the tool rounds the number that goes down; else to the nearest."""
    run: int = 1
    """So many channels in a row go together, and a share of those runs."""

    def __post_init__(self) -> None:
        if not 0 <= self.removed < 1 or self.run < 1:
            raise ValueError(f"a share of {self.removed}, {self.run} in a row, is not 0 or more and below 1")

    def stays(self, full: int) -> float:
        """Of `full` channels, before that is rounded to what can stay."""
        return full - int(self.removed * (full // self.run)) * self.run if self.down else full * (1 - self.removed)


@dataclass(frozen=True, slots=True)
class Count:
    """So many of a layer's channels stay, of as many as the tool saw."""

    keep: int
    of: int

    def __post_init__(self) -> None:
        if not 1 <= self.keep <= self.of:
            raise ValueError(f"{self.keep} of {self.of} channels cannot stay")


@dataclass(frozen=True, slots=True)
class Exactly:
    """These channels go, counted among those that are left when this is done: what a file asks before comes first."""

    removed: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.removed or min(self.removed) < 0 or len(set(self.removed)) < len(self.removed):
            raise ValueError("indices must be different ones, 0 or more")


@dataclass(frozen=True, slots=True)
class Zeros:
    """Weights inside a layer become zero by a pattern (`70%`, `2:4`, `4x1 50%`)."""

    pattern: str
    parts: int | None = None
    """The share is of each of so many equal parts of the weight, as it lies in memory; None: of the whole."""

    def __post_init__(self) -> None:
        parse_pattern(self.pattern)


@dataclass(frozen=True, slots=True)
class Dropped:
    """A whole block goes."""


Amount = Share | Count | Exactly | Zeros | Dropped


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a file asks of one layer."""

    layer: str
    """A module's or a tensor's name, as the tool wrote it."""
    amount: Amount
    where: str
    """The line or the key in the file."""
    side: Side = "outputs"
    """Whose channels a share, a count or indices are of."""
    types: tuple[str, ...] = ()
    """Classes of layers that alone are meant; the tool passes over others. Empty: any."""
    dims: int | None = None
    """How many dimensions the layer's weight must have for this to mean what it does here; None: any."""

    @property
    def names(self) -> tuple[str, ...]:
        """What the layer may be called in the model, the name as written first."""
        found, rest = [self.layer], self.layer
        while (prefix := next((each for each in PREFIXES if rest.startswith(each)), None)) is not None:
            rest = rest.removeprefix(prefix)
            found.append(rest)
        return tuple(found)

    @property
    def said(self) -> str:
        """Place and name, as it is told."""
        return f"{self.where}: {self.layer}"


@dataclass(frozen=True, slots=True)
class Found:
    """What a file asks for, in its order; what of it cannot be understood; and what was taken for what."""

    wanted: tuple[Wanted, ...]
    unmapped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class Importer(Protocol):
    """Reads the files of one tool. Stateless."""

    name: str
    """What follows `--from`."""
    about: str
    """What it reads, in a line."""

    def read(self, content: bytes, *, name: str) -> Found:
        """What `content` asks for. Raises PolicyError with `name`, line or key, what was given and what is allowed."""
        ...
