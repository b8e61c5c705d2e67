"""The driver of a search that test_ray_faults.py kills and starts again: the same command each time, the same study.

Ends with 0 when the study holds so many trials, with the code of an AutopruneError where one ended it.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from search_problems import divergence, toy_problem, toy_space

from autoprune.core.space import Choice
from autoprune.engines.base import Best, Score
from autoprune.engines.local import Here
from autoprune.engines.ray.engine import RayEngine
from autoprune.engines.settings import EngineSettings, RaySettings
from autoprune.errors import AutopruneError
from autoprune.progress import TrialSeen
from autoprune.searching.loop import Effort, run_search
from autoprune.searching.problem import Problem
from autoprune.searching.samplers import sampler_by_name
from autoprune.searching.study import StudyRecord, open_study

RETRIES = 3
SLEEPS_S = (0.1, 0.3)


def the_problem() -> tuple[Problem, NDArray[np.float64]]:
    return toy_problem(toy_space((2, 2, 2), 4), seed=1, coupling=0.5)


def the_study(path: Path, *, claim: bool) -> StudyRecord:
    problem, _ = the_problem()
    return open_study(path, problem, sampler=sampler_by_name("budget", problem, seed=0), claim=claim)


@dataclass(frozen=True)
class Diary:
    """Scores a choice, and writes down in `path`, which is only ever appended to, when it begins and when it ends."""

    path: Path
    problem: Problem
    truth: NDArray[np.float64]
    scale: float = 1.0

    def __call__(self, choice: Choice, best: Best | None) -> Score:
        self._write("began", choice)
        time.sleep(self.scale * self.sleep_s(choice))
        value = divergence(self.problem, self.truth, choice)
        self._write("ended", choice)
        return Score(value, 8, attrs={"pid": os.getpid()}, seen=np.full(8, value))

    @staticmethod
    def sleep_s(choice: Choice) -> float:
        """The same each time, and another for each choice."""
        least, most = SLEEPS_S
        return least + (most - least) * (zlib.crc32(bytes(choice)) % 1000) / 1000

    def _write(self, event: str, choice: Choice) -> None:
        line = f"{event} {os.getpid()} {','.join(map(str, choice))}\n"
        with self.path.open("a") as file:
            file.write(line)  # in one write, as the file is closed at once


class Aloud:
    """Tells the test what the user would be told."""

    def phase(self, name: str, steps: int | None = None) -> None:
        print(f"phase {name}", flush=True)

    def step(self, done: int = 1) -> None:
        pass

    def trial(self, seen: TrialSeen) -> None:
        print(f"{time.strftime('%X')} trial {seen.number}: {seen.done} of {seen.total}", flush=True)

    def note(self, text: str) -> None:
        print(f"{time.strftime('%X')} note {text}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="holds the study and the diary")
    parser.add_argument("trials", type=int)
    parser.add_argument("--engine", choices=("ray", "here"), default="ray")
    parser.add_argument("--address")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--scale", type=float, default=1.0)
    given = parser.parse_args()
    print("started", flush=True)
    problem, truth = the_problem()
    evaluate = Diary(given.folder / "diary.txt", problem, truth, given.scale)
    record = the_study(given.folder / "study.journal", claim=True)
    effort = Effort(given.trials, retries=RETRIES)
    try:
        if given.engine == "here":
            run_search(problem, record, Here(evaluate), effort, progress=Aloud())
            return 0
        asked = RaySettings(address=given.address)
        engine = RayEngine(EngineSettings("ray", given.workers, RETRIES, asked), given.folder, Aloud())
        try:
            run_search(problem, record, engine.lanes(evaluate), effort, progress=Aloud())
        finally:
            print(f"{time.strftime('%X')} closing", flush=True)
            engine.close()
    except AutopruneError as error:
        print(f"error: {error}", flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
