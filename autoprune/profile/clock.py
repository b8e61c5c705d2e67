"""Times several models in turns. Knows sessions that can be invoked and a clock; knows nothing of what they are.

Absolute times on shared machines drift by 2x within minutes. So models are timed in one loop of many short rounds, a
round's time is the least of a burst (interference only ever adds), and what counts is the ratio to the first session
within the same round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

SESSION_BYTES = 1_500_000_000
"""Weights of all sessions alive at once: what runtimes make of them takes about as much again."""
MIN_ROUNDS = 5
MIN_BURST = 2
LONG_BURST_S = 0.02
"""A burst is there to warm caches up again after another model ran; a slow model needs no more than this."""


class Invocable(Protocol):
    """What can be timed; a runtime's session is one."""

    def invoke(self) -> None:
        """Run once."""
        ...


def beside_the_dense(model_bytes: int, most: int) -> int:
    """How many models of so many bytes are timed together beside the dense one: `most`, fewer where they are large."""
    return int(min(most, max(1, SESSION_BYTES // max(model_bytes, 1) - 1)))


@dataclass(frozen=True, slots=True)
class Timing:
    """One session's seconds and its paired ratios to the first session, one of each a round."""

    seconds: tuple[float, ...]
    ratios: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.seconds or len(self.seconds) != len(self.ratios):
            raise ValueError("a timing needs at least one round, with a ratio for each")

    @property
    def rounds(self) -> int:
        """How many rounds were timed."""
        return len(self.seconds)

    @property
    def median(self) -> float:
        """Median seconds."""
        return _quantile(self.seconds, 0.5)

    @property
    def p10(self) -> float:
        """The seconds that one round in ten stays below."""
        return _quantile(self.seconds, 0.1)

    @property
    def p90(self) -> float:
        """The seconds that nine rounds in ten stay below."""
        return _quantile(self.seconds, 0.9)

    @property
    def ratio(self) -> float:
        """Median of the per-round ratios to the first session."""
        return _quantile(self.ratios, 0.5)

    @property
    def ratio_low(self) -> float:
        """10 % quantile of the per-round ratios."""
        return _quantile(self.ratios, 0.1)

    @property
    def ratio_high(self) -> float:
        """90 % quantile of the per-round ratios."""
        return _quantile(self.ratios, 0.9)


def interleave(
    sessions: Sequence[Invocable],
    *,
    rounds: int = 40,
    burst: int = 7,
    warmup: int = 3,
    seconds_budget: float = 20.0,
    seed: int = 0,
    now: Callable[[], float] = time.perf_counter,
) -> tuple[Timing, ...]:
    """Time `sessions` in turns; the first (the dense model) is what ratios are to. One Timing a session, in order.

    At most `rounds` rounds, each in an order shuffled by `seed`; no new round starts after `seconds_budget` (warm-up
    included) except to reach 5. A session runs `burst` times in a round (fewer when slow) and its least time counts.
    """
    if not sessions or rounds < 1 or burst < 1:
        raise ValueError("needs at least one session, one round and one run in a burst")
    start = now()
    for session in sessions:
        for _ in range(warmup):
            session.invoke()
    order = np.random.default_rng(seed)
    table: list[list[float]] = []  # (rounds, sessions) seconds
    for done in range(rounds):
        if done >= MIN_ROUNDS and now() - start > seconds_budget:
            break
        table.append(_round(sessions, order.permutation(len(sessions)).tolist(), burst, now))
    return tuple(
        Timing(tuple(row[index] for row in table), tuple(row[index] / row[0] for row in table))
        for index in range(len(sessions))
    )


def _round(sessions: Sequence[Invocable], order: Sequence[int], burst: int, now: Callable[[], float]) -> list[float]:
    least = [0.0] * len(sessions)
    for index in order:
        least[index] = _least(sessions[index], burst, now)
    return least


def _least(session: Invocable, burst: int, now: Callable[[], float]) -> float:
    start, least = now(), _timed(session, now)
    for done in range(1, burst):
        if done >= MIN_BURST and now() - start > LONG_BURST_S:
            break
        least = min(least, _timed(session, now))
    return least


def _timed(session: Invocable, now: Callable[[], float]) -> float:
    start = now()
    session.invoke()
    return now() - start


def _quantile(values: Sequence[float], share: float) -> float:
    return float(np.quantile(values, share))
