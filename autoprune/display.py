"""How long work is shown: bars on a terminal, plain lines elsewhere, JSON lines for programs, nothing when quiet.

The only place that imports rich beside report/text.py. Knows no model and no search.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from types import TracebackType
from typing import Literal, Protocol, Self

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from autoprune.progress import Progress as Listener
from autoprune.progress import Silent, TrialSeen

Mode = Literal["auto", "quiet", "json"]
Clock = Callable[[], float]
LINE_EVERY_S = 10.0


class Display(Listener, Protocol):
    """A listener that also shows results, and that is open while work goes on."""

    def show(self, view: RenderableType) -> None:
        """A table or sentence for people."""
        ...

    def result(self, content: Mapping[str, object]) -> None:
        """The final records, for programs."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def make_display(mode: Mode, *, clock: Clock = time.monotonic) -> Display:
    """Bars when standard error is a terminal, else lines, unless `mode` asks for less."""
    if mode == "json":
        return JsonLines()
    if mode == "quiet":
        return Quiet()
    console = Console(stderr=True)
    return Bars(console) if console.is_terminal else Lines(console, clock=clock)


def fail(message: str, *, mode: Mode, kind: str, exit_code: int) -> None:
    """An error, on standard error; for programs as a JSON line on standard output too."""
    if mode == "json":
        _json_line({"event": "error", "kind": kind, "message": message, "exit_code": exit_code})
    text = Text("error: ", style="bold red") + Text(message, style="not bold")
    Console(stderr=True, soft_wrap=True).print(text)


class _Shell:
    """What all displays share: nothing to open or close, no result for programs."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to close."""

    def show(self, view: RenderableType) -> None:
        """Print to standard output."""
        Console().print(view)

    def result(self, content: Mapping[str, object]) -> None:
        """Nothing: people have seen the tables."""


class Quiet(_Shell, Silent):
    """Shows nothing at all; errors are told by `fail`."""

    def show(self, view: RenderableType) -> None:
        """Nothing."""


class JsonLines(_Shell):
    """One JSON object a line on standard output; the result is the last one."""

    def phase(self, name: str, steps: int | None = None) -> None:
        """A phase begins."""
        _json_line({"event": "phase", "name": name, "steps": steps})

    def step(self, done: int = 1) -> None:
        """Too fine for a line."""

    def trial(self, seen: TrialSeen) -> None:
        """A trial is finished."""
        _json_line({"event": "trial", **asdict(seen)})

    def note(self, text: str) -> None:
        """Something worth a line."""
        _json_line({"event": "note", "text": text})

    def show(self, view: RenderableType) -> None:
        """Nothing: programs read the result."""

    def result(self, content: Mapping[str, object]) -> None:
        """The final records."""
        _json_line({"event": "result", **content})


class Lines(_Shell):
    """One line a phase, and one about every ten seconds for its steps or trials."""

    def __init__(self, console: Console, *, clock: Clock = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._started = clock()
        self._last_line = clock()
        self._phase, self._done = "", 0
        self._steps: int | None = None

    def phase(self, name: str, steps: int | None = None) -> None:
        """A phase begins."""
        self._print(f"{name} ({steps} steps)" if steps else name)
        self._last_line = self._started = self._clock()
        self._phase, self._done, self._steps = name, 0, steps

    def step(self, done: int = 1) -> None:
        """Steps are finished; a line when the last is some seconds old."""
        self._done += done
        now = self._clock()
        if now - self._last_line >= LINE_EVERY_S:
            self._last_line = now
            self._print(f"  {self._phase} {self._done}/{self._steps or '?'}, {now - self._started:.0f} s")

    def trial(self, seen: TrialSeen) -> None:
        """A trial is finished; a line when the last is some seconds old, or the search is."""
        now = self._clock()
        if now - self._last_line < LINE_EVERY_S and seen.done < seen.total:
            return
        self._last_line = now
        self._print(f"  trial {seen.done}/{seen.total}: {standing(seen)}, {now - self._started:.0f} s")

    def note(self, text: str) -> None:
        """Something worth a line."""
        self._print(f"note: {text}")

    def _print(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)


class Bars(_Shell):
    """Live bars, one a phase; finished ones stay as a record."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._task: TaskID | None = None
        self._bars = Progress(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description:<12}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[standing]}", style="dim"),
            console=console,
        )

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the bars as they are; the last is finished unless something failed."""
        if kind is None:
            self._finish()
        self._bars.stop()

    def phase(self, name: str, steps: int | None = None) -> None:
        """A phase begins; the one before is done."""
        self._finish()
        self._task = self._bars.add_task(name, total=steps, standing="")

    def step(self, done: int = 1) -> None:
        """Move the bar."""
        if self._task is not None:
            self._bars.advance(self._task, done)

    def trial(self, seen: TrialSeen) -> None:
        """Move the bar to this trial and say who leads."""
        if self._task is not None:
            self._bars.update(self._task, total=seen.total, completed=seen.done, standing=standing(seen))

    def note(self, text: str) -> None:
        """A line above the bars."""
        self._console.print(Text(f"note: {text}", style="dim"))

    def _finish(self) -> None:
        if self._task is None:
            return
        task = next(task for task in self._bars.tasks if task.id == self._task)
        done = max(task.completed, 1)
        self._bars.update(self._task, total=done, completed=done)


def standing(seen: TrialSeen) -> str:
    """`best 0.278, best baseline 0.298 (-6.7%)`."""
    best = f"best {seen.best:.4g}"
    if seen.best_baseline is None:
        return best
    gap = f" ({(seen.best / seen.best_baseline - 1):+.1%})" if seen.best_baseline > 0 else ""
    return f"{best}, best baseline {seen.best_baseline:.4g}{gap}"


def _json_line(content: Mapping[str, object]) -> None:
    print(json.dumps(_finite(content), ensure_ascii=False), flush=True)


def _finite(value: object) -> object:
    """NaN and infinity are not JSON; null is."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
