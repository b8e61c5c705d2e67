"""What reading one file has found so far: wishes, what is not understood, and all that is wrong with it, told at once.

Knows how values of foreign files are checked. Does not know any format.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final, final

from autoprune.core.pattern import percent
from autoprune.errors import PolicyError, listed
from autoprune.importers.base import Amount, Found, Side, Wanted, Zeros
from autoprune.problems import given

MOST_TOLD: Final = 20
"""Problems of a file that are told; of more, how many there are."""
MOST_COUNTED: Final = 100_000
"""Problems after which no more is read: a file of 10 MB has room for five million, which take half a minute."""
NAME_LENGTH: Final = 300

_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,4})?", re.ASCII)


@final
class Reading:
    """Collects; `found` ends it."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._wanted: list[Wanted] = []
        self._unmapped: list[str] = []
        self._notes: list[str] = []
        self._problems: list[str] = []
        self._untold = 0

    def want(
        self, layer: str, amount: Amount, where: str, *, side: Side = "outputs", types: tuple[str, ...] = (),
        dims: int | None = None,
    ) -> None:  # fmt: skip
        """Something is asked of a layer."""
        self._wanted.append(Wanted(layer, amount, where, side, types, dims))

    def leave(self, where: str, why: str) -> None:
        """A part of the file cannot be understood, which is no fault of it."""
        self._unmapped.append(f"{where}: {why}")

    def note(self, text: str) -> None:
        """Something was taken for something; told once."""
        if text not in self._notes:
            self._notes.append(text)

    def wrong(self, where: str, value: object, allowed: str) -> None:
        """A part of the file is damaged. Raises PolicyError with all problems where they are very many."""
        if len(self._problems) < MOST_TOLD:  # a file of 10 MB may have five million, which would fill the memory
            self._problems.append(f"{where}: given {given(value)}, allowed: {allowed}")
        else:
            self._untold += 1
            if self._untold >= MOST_COUNTED:
                self.found()

    def found(self) -> Found:
        """All of it. Raises PolicyError with all problems, if there are some."""
        if self._problems:
            told = [*self._problems, f"and {self._untold} more"] if self._untold else self._problems
            raise PolicyError(f"{self._name}:\n{listed(told)}")
        return Found(tuple(self._wanted), tuple(self._unmapped), tuple(self._notes))

    def layer(self, value: object, where: str) -> str | None:
        """A layer's name, or None where that is none."""
        if isinstance(value, str) and 0 < len(value) <= NAME_LENGTH and value.isprintable():
            return value
        self.wrong(where, value, f"the name of a layer (a text of up to {NAME_LENGTH} letters)")
        return None

    def layers(self, value: object, where: str) -> tuple[str, ...]:
        """The names in a list."""
        if not isinstance(value, Sequence) or isinstance(value, str):
            self.wrong(where, value, "a list of layers' names")
            return ()
        names = (self.layer(each, f"{where}[{place}]") for place, each in enumerate(value))
        return tuple(name for name in names if name is not None)

    def mapping(self, value: object, where: str, allowed: str) -> Mapping[str, object]:
        """A mapping with texts as keys; empty where it is none."""
        if isinstance(value, dict):
            return value
        self.wrong(where, value, allowed)
        return {}

    def share(self, value: object, where: str, *, whole: bool = False) -> float | None:
        """A share from a number or a text such as `0.42` or `42%`: below 1, or with `whole` up to 1."""
        number = number_of(value)
        if number is not None and 0 <= number <= 1 and (whole or number < 1):
            return number
        self.wrong(where, value, f"a share such as 0.42 or 42%, 0 or more and {'not above' if whole else 'below'} 1")
        return None

    def zeros(
        self, share: float, where: str, *, block: tuple[int, int] | None = None, parts: int | None = None
    ) -> Zeros | None:
        """A share of a layer's weights (of each of its parts), or of their blocks (outputs, inputs), as a pattern."""
        written = percent(share)
        try:
            return Zeros(f"{block[0]}x{block[1]} {written}" if block else written, parts)
        except ValueError:
            self.wrong(where, share, "a share whose last weight stays")
            return None


def number_of(value: object) -> float | None:
    """A finite number from a number or its text, per cent or not; None where it is none."""
    if isinstance(value, str):
        text = value.strip()
        bare = text.removesuffix("%").rstrip()
        if len(text) > 50 or not _NUMBER.fullmatch(bare):
            return None
        number = float(bare) / (100 if text.endswith("%") else 1)
    elif isinstance(value, int | float) and not isinstance(value, bool) and -1e15 < value < 1e15:
        number = float(value)
    else:
        return None
    return number if -1e15 < number < 1e15 else None
