"""The interleaved clock, replayed with a fake clock: what disturbs a shared machine must not move a ratio."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest

from autoprune.profile.clock import MIN_ROUNDS, Timing, interleave


@dataclass
class FakeMachine:
    """A clock that moves only when something runs; `disturb` maps (time, run number) to a factor."""

    disturb: Callable[[float, int], float] = lambda time, run: 1.0
    time: float = 0.0
    runs: int = 0

    def now(self) -> float:
        return self.time

    def spend(self, seconds: float) -> None:
        self.time += seconds * self.disturb(self.time, self.runs)
        self.runs += 1


@dataclass
class FakeSession:
    machine: FakeMachine
    seconds: float
    invoked: list[float] = field(default_factory=list)

    def invoke(self) -> None:
        self.invoked.append(self.machine.time)
        self.machine.spend(self.seconds)


def sessions(machine: FakeMachine, *seconds: float) -> list[FakeSession]:
    return [FakeSession(machine, value) for value in seconds]


def test_quiet_machine_is_read_exactly() -> None:
    machine = FakeMachine()
    dense, half = interleave(sessions(machine, 0.004, 0.002), rounds=10, now=machine.now)
    assert dense.median == pytest.approx(0.004)
    assert [half.ratio, half.ratio_low, half.ratio_high] == pytest.approx([0.5] * 3)
    assert dense.ratio == 1.0
    assert dense.rounds == half.rounds == 10


def test_drift_by_two_cancels_in_the_ratio() -> None:
    machine = FakeMachine(disturb=lambda time, run: 1.0 + min(time, 1.0))  # 2x slower after one second
    dense, half = interleave(sessions(machine, 0.004, 0.002), rounds=60, now=machine.now)
    assert dense.p90 / dense.p10 > 1.5
    assert half.ratio == pytest.approx(0.5, rel=0.002)


def test_interference_spikes_do_not_move_the_result() -> None:
    spikes = np.random.default_rng(1).random(10_000) < 0.15
    machine = FakeMachine(disturb=lambda time, run: 20.0 if spikes[run] else 1.0)
    dense, pruned = interleave(sessions(machine, 0.004, 0.003), rounds=40, now=machine.now)
    assert dense.median == pytest.approx(0.004)
    assert pruned.ratio == pytest.approx(0.75)


def test_stops_when_the_time_is_spent_but_not_before_the_fewest_rounds() -> None:
    machine = FakeMachine()
    slow, _ = interleave(sessions(machine, 10.0, 10.0), rounds=50, seconds_budget=1.0, now=machine.now)
    assert slow.rounds == MIN_ROUNDS
    machine = FakeMachine()
    capped, _ = interleave(sessions(machine, 0.1, 0.1), rounds=500, seconds_budget=10.0, now=machine.now)
    assert MIN_ROUNDS < capped.rounds < 50
    assert machine.time == pytest.approx(10.0, abs=0.5)


def test_a_seed_gives_the_same_order_and_every_session_its_turn() -> None:
    def order(seed: int) -> list[list[float]]:
        machine = FakeMachine()
        made = sessions(machine, 1.0, 2.0, 3.0)
        interleave(made, rounds=8, burst=2, warmup=1, seconds_budget=1e9, seed=seed, now=machine.now)
        return [session.invoked for session in made]

    assert order(3) == order(3)
    assert order(3) != order(4)
    assert {len(invoked) for invoked in order(3)} == {1 + 8 * 2}


def test_a_timing_needs_rounds() -> None:
    with pytest.raises(ValueError, match="at least one round"):
        Timing((), ())
    with pytest.raises(ValueError, match="at least one session"):
        interleave([])
