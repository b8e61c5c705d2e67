"""Patterns of zeros in a layer's weights: anywhere (`70%`), `2:4`, or in blocks (`4x1 50%`). Values, without torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

PatternKind = Literal["unstructured", "n:m", "block"]
_NM = re.compile(r"\s*(\d+)\s*:\s*(\d+)\s*")
_SHARE = re.compile(r"\s*(?:(\d+)\s*x\s*(\d+)\s+)?(\d*\.?\d+)\s*%\s*")
_LONGEST = 60
"""Characters; on a long row of digits the expressions above would take the square of its length."""
HELP = "write 70% (zeros anywhere), 2:4 (2 kept of 4 inputs), or 4x1 50% (half of the blocks of 4 outputs by 1 input)"


@dataclass(frozen=True, slots=True)
class Pattern:
    """Which weights go: the share `sparsity` of them, in groups or blocks where the kind says so.

    `n:m`: of each `columns` consecutive inputs `keep` stay, in every output and at every kernel position. `block`:
    whole blocks of `rows` outputs by `columns` inputs go.
    """

    kind: PatternKind
    sparsity: float
    keep: int = 1
    rows: int = 1
    columns: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"a sparsity of {100 * self.sparsity:g} % is not between 0 and 100 %; {HELP}")
        if min(self.keep, self.rows, self.columns) < 1:
            raise ValueError(f"a pattern's numbers must be 1 or more; {HELP}")

    @property
    def text(self) -> str:
        """As a user writes it; `parse_pattern` reads it back."""
        if self.kind == "n:m":
            return f"{self.keep}:{self.columns}"
        share = f"{100 * self.sparsity:g}%"
        return share if self.kind == "unstructured" else f"{self.rows}x{self.columns} {share}"


def percent(share: float) -> str:
    """A share as patterns have it, to a hundred millionth: `42%`, `70.008681%`."""
    return f"{100 * share:.6f}".rstrip("0").rstrip(".") + "%"


def parse_pattern(text: str) -> Pattern:
    """A pattern from its text. Raises ValueError with the grammar when it cannot be read."""
    if len(text) > _LONGEST:
        raise ValueError(f"pattern {text[:_LONGEST]!r}... cannot be read; {HELP}")
    found = _NM.fullmatch(text)
    if found is not None:
        keep, of = int(found[1]), int(found[2])
        if not 0 < keep < of:
            raise ValueError(f"pattern {text!r} keeps {keep} of {of}; {HELP}")
        return Pattern("n:m", 1 - keep / of, keep=keep, columns=of)
    found = _SHARE.fullmatch(text)
    if found is None:
        raise ValueError(f"pattern {text!r} cannot be read; {HELP}")
    sparsity = float(found[3]) / 100
    if found[1] is None:
        return Pattern("unstructured", sparsity)
    return Pattern("block", sparsity, rows=int(found[1]), columns=int(found[2]))
