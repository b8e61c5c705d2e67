"""Evaluations that are no models: they compute, sleep, fail and die in known ways, wherever they are sent."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from autoprune.core.space import Choice
from autoprune.engines.base import Best, Ended, Job, Lanes, Score
from autoprune.errors import DataError


def value_of(choice: Choice) -> float:
    return float(sum((index + 1) * option for index, option in enumerate(choice)))


@dataclass(frozen=True)
class Scripted:
    """What to do by the first number of the choice: 0 score, 1 raise, 2 a user's mistake, 3 die each time, 4 die once
    (a file in `folder` remembers), 5 sleep. Scores say which process gave them.
    """

    folder: Path
    sleep_s: float = 0.0

    def __call__(self, choice: Choice, best: Best | None) -> Score:
        kind = choice[0]
        if kind == 1:
            raise ZeroDivisionError("no such share")
        if kind == 2:
            raise DataError("the data is gone")
        if kind == 3 or (kind == 4 and self._first_time(choice)):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60.0 if kind == 5 else self.sleep_s)
        attrs = {"pid": os.getpid(), "best": None if best is None else best.value, "threads": torch.get_num_threads()}
        return Score(value_of(choice), 8, attrs=attrs, seen=np.full(8, value_of(choice)))

    def _first_time(self, choice: Choice) -> bool:
        mark = self.folder / "-".join(map(str, choice))
        try:
            mark.touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


@dataclass(frozen=True)
class Heavy:
    """Carries a tensor that every process shares; the score says what memory the process has for itself."""

    ballast: torch.Tensor

    def __call__(self, choice: Choice, best: Best | None) -> Score:
        total = float(self.ballast[:: 1 << 12].double().sum())  # touches every page
        return Score(total, 1, attrs={"own_bytes": own_bytes(), "pid": os.getpid()})


def own_bytes() -> int:
    """Memory of this process that it shares with no other."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def all_done(lanes: Lanes, choices: Sequence[Choice], *, limit_s: float = 120.0) -> dict[int, Ended]:
    """Every choice as a job, as many at once as there are lanes; by number."""
    ended: dict[int, Ended] = {}
    waiting = list(enumerate(choices))
    until = time.monotonic() + limit_s
    while len(ended) < len(choices):
        assert time.monotonic() < until, f"only {sorted(ended)} of {len(choices)} ended"
        while waiting and lanes.idle() > 0:
            number, choice = waiting.pop(0)
            lanes.start(Job(number, choice, Best(0.5)))
        found = lanes.wait(1.0)
        if found is not None:
            assert found.number not in ended, "a job ends once"
            ended[found.number] = found
    return ended


def assert_the_contract(lanes: Lanes, *, workers: int, dies: bool = True) -> None:
    """What any lanes must do; `evaluate` is Scripted. With `dies`, workers are processes that may be killed."""
    until = time.monotonic() + 60
    while lanes.idle() < workers:  # actors need a moment to have a place
        lanes.wait(0.5)
        assert time.monotonic() < until
    assert lanes.wait(0.0) is None, "nothing was started"
    choices = [(0, n) for n in range(9)] + [(1, 0), (2, 0)] + ([(4, 1), (4, 2), (3, 0)] if dies else []) + [(0, 50)]
    ended = all_done(lanes, choices)
    for number, choice in enumerate(choices):
        one = ended[number]
        if choice[0] in (0, 4):
            assert one.score is not None
            assert one.error is None
            assert (one.score.value, one.score.samples) == (value_of(choice), 8)
            assert one.score.attrs["best"] == 0.5
            assert one.score.seen is not None
            assert one.score.seen.tolist() == [value_of(choice)] * 8
            assert one.lost == (choice[0] == 4), choice
        else:
            assert one.score is None
    assert isinstance(ended[9].error, ZeroDivisionError)
    assert str(ended[9].error) == "no such share"
    assert isinstance(ended[10].error, DataError)
    if dies:
        assert "3 workers" in str(ended[13].error), "given up after two retries"
        assert ended[13].lost == 3
    assert lanes.idle() <= workers


def assert_cancel_is_quick(lanes: Lanes) -> None:
    """A long job is given up, and the lanes go on."""
    while lanes.idle() < 1:
        lanes.wait(0.5)
    lanes.start(Job(7, (5, 0), None))
    assert lanes.wait(0.2) is None
    start = time.monotonic()
    lanes.cancel()
    ended = all_done(lanes, [(0, 1), (0, 2)])
    assert {one.score.value for one in ended.values() if one.score is not None} == {2.0, 4.0}
    assert time.monotonic() - start < 40, "it would sleep for a minute"


Making = Callable[[Path], Lanes]
