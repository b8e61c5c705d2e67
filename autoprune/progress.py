"""What long work tells whoever watches: phases, steps, trials. Says nothing about how it is shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class TrialSeen:
    """One finished trial, for the display: its number, and how many are `done`; trials that run at the same time end in
    any order. `divergence` is None when it failed or was pruned early.
    """

    number: int
    done: int
    total: int
    origin: str
    divergence: float | None
    best: float
    best_baseline: float | None


class Progress(Protocol):
    """A listener. Every method returns at once and never raises."""

    def phase(self, name: str, steps: int | None = None) -> None:
        """A phase begins: `calibrate`, `bank`, `profile`, `search`, `verify`, ... with its number of steps if known."""
        ...

    def step(self, done: int = 1) -> None:
        """`done` more steps of the current phase are finished."""
        ...

    def trial(self, seen: TrialSeen) -> None:
        """A trial is finished."""
        ...

    def note(self, text: str) -> None:
        """Something worth a line: reused a bank, a unit was protected, the machine drifts."""
        ...


class Silent:
    """Listens to nothing."""

    def phase(self, name: str, steps: int | None = None) -> None:
        """Ignore."""

    def step(self, done: int = 1) -> None:
        """Ignore."""

    def trial(self, seen: TrialSeen) -> None:
        """Ignore."""

    def note(self, text: str) -> None:
        """Ignore."""
