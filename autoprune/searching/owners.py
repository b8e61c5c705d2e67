"""Who runs a trial, and whether it is still alive: processes that share a study and may be killed at any moment.

Knows processes of this machine, and heartbeats that others write into the study. Clocks of two machines are never
compared. Does not know what becomes of a dead owner's trial.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.exceptions import OptunaError
from optuna.study import Study

from autoprune.errors import AutopruneError

EVERY_S = 15.0
"""How often a process says that it is alive."""

SILENCE_S = 60.0
"""How long a process of another machine may be silent before it counts as dead."""

_OWN_BEATS = 4
"""So many of our own heartbeats must be recorded since another's last one: else the storage was gone, not the other."""

_FRESH_S = 1.0
"""What was read of all heartbeats is good for so long; many owners are asked about in a row."""

_PROC = Path("/proc")
_QUERY, _STILL_ACTIVE = 0x1000, 259
"""Windows: the right to ask about a process, and what it says of one that runs."""


@dataclass(frozen=True, slots=True)
class Owner:
    """A process: the machine (or container) it is on, its id there, and when it started, in that machine's terms."""

    host: str
    pid: int
    started: str

    @property
    def text(self) -> str:
        """As it is recorded: `host:pid:started`."""
        return f"{self.host}:{self.pid}:{self.started}"

    @property
    def key(self) -> str:
        """The study's user attribute that holds its heartbeat."""
        return f"alive:{self.text}"

    @classmethod
    def parse(cls, text: str) -> Owner | None:
        """The owner that `text` names; None when it names none."""
        parts = text.rsplit(":", 2)
        if len(parts) != 3 or not parts[0] or not parts[1].isascii() or not parts[1].isdigit():
            return None
        if not 0 < int(parts[1]) < 1 << 31:
            return None
        return cls(parts[0], int(parts[1]), parts[2])


def this_process() -> Owner:
    """The process that asks; after a fork, the child."""
    return _process(os.getpid())


class Watch:
    """Judges whether owners of a study's trials are alive, by what it sees between one look and the next."""

    def __init__(
        self,
        study: Study,
        *,
        silence_s: float = SILENCE_S,
        clock: Callable[[], float] = time.monotonic,
        me: Owner | None = None,
    ) -> None:
        self._study = study
        self._silence_s = silence_s
        self._clock = clock
        self._me = me or this_process()
        self._seen: dict[str, _Seen] = {}
        self._attrs: Mapping[str, Any] = {}
        self._read_at: float | None = None

    def alive(self, owner: Owner) -> bool:
        """Whether the process still runs.

        On this machine the system knows. On another one its heartbeat tells: it is dead when there is none at the
        first look, or when it has not changed for `silence_s` of our clock.
        """
        if owner.host == self._me.host:
            return _runs(owner)
        now = self._clock()
        attrs = self._heartbeats(now)
        counter, ours = attrs.get(owner.key), _count(attrs.get(self._me.key))
        if counter is None:
            self._seen.pop(owner.text, None)
            return False
        seen = self._seen.get(owner.text)
        if seen is None or seen.counter != counter:
            self._seen[owner.text] = _Seen(counter, now, ours)
            return True
        if now - seen.at_s < self._silence_s:
            return True
        return ours is not None and ours - (seen.ours or 0) < _OWN_BEATS  # ours did not get through either

    def _heartbeats(self, now: float) -> Mapping[str, Any]:
        if self._read_at is None or now - self._read_at >= _FRESH_S:
            self._attrs, self._read_at = self._study.user_attrs, now
        return self._attrs


@dataclass(frozen=True, slots=True)
class _Seen:
    """A heartbeat when it last changed: its counter, when that was seen, and our own counter then."""

    counter: Any
    at_s: float
    ours: int | None


class Heartbeat:
    """Says every `every_s` seconds, in a thread of its own, that this process is alive.

    The first beat is recorded before `start` returns, so that no trial is seen whose owner seems dead; if that fails,
    `start` raises. Later ones that fail are left out. `stop` takes the heartbeat back, so that others need not wait.
    """

    def __init__(
        self,
        study: Study,
        *,
        owner: Owner | None = None,
        every_s: float = EVERY_S,
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        self._study = study
        self._owner = owner or this_process()
        self._every_s = every_s
        self._stopped = threading.Event()
        self._sleep = sleep or self._stopped.wait
        self._count = 0
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin. Raises what the storage raises."""
        if self._thread is not None:
            return
        self._stopped.clear()
        self._beat()
        self._thread = threading.Thread(target=self._run, name="autoprune-heartbeat", daemon=True)
        self._thread.start()

    def stop(self, *, patience_s: float = 2.0) -> None:
        """End. A thread that waits for a storage which is gone is left behind after `patience_s`; it ends by itself."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._stopped.set()
        thread.join(patience_s)

    def __enter__(self) -> Heartbeat:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _run(self) -> None:
        while True:
            self._sleep(self._every_s)
            if self._stopped.is_set():
                break
            self._safely(self._beat)
        self._safely(lambda: self._study.set_user_attr(self._owner.key, None))

    def _beat(self) -> None:
        self._study.set_user_attr(self._owner.key, self._count + 1)
        self._count += 1

    def _safely(self, work: Callable[[], None]) -> None:
        try:
            work()
        except (AutopruneError, OptunaError, OSError, ValueError, KeyError):
            return  # the storage is gone; the next beat may get through


def _count(counter: Any) -> int | None:
    return counter if isinstance(counter, int) else None


@functools.cache
def _process(pid: int) -> Owner:
    return Owner(_host(), pid, _started(pid) or f"{time.time():.0f}")


@functools.cache
def _host() -> str:
    """The machine's name and a mark of what its process ids are good in: this boot, and this container."""
    name = socket.gethostname().replace(":", "-") or "unknown"
    mark = _boot() + _container()
    return f"{name}-{hashlib.sha256(mark.encode()).hexdigest()[:8]}" if mark else name


def _boot() -> str:
    try:
        return (_PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def _container() -> str:
    try:
        return os.readlink(_PROC / "self/ns/pid")
    except OSError:
        return ""


def _runs(owner: Owner) -> bool:
    """Whether there is a process of that id which started then; one that has ended and waits for its parent is dead."""
    try:
        fields = _stat(owner.pid)
    except OSError:
        return _exists(owner.pid)  # no /proc, or one that hides others' processes
    return fields[0] not in {"Z", "X"} and fields[19] == owner.started


def _started(pid: int) -> str | None:
    """In ticks of the machine's clock since it was booted."""
    try:
        return _stat(pid)[19]
    except OSError:
        return None


def _stat(pid: int) -> list[str]:
    """From the state on: the third field of proc(5), behind the command's name, which may hold anything."""
    text = (_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    return text.rpartition(")")[2].split()


if sys.platform == "win32":

    def _exists(pid: int) -> bool:
        """`os.kill` would not ask here but press Control-C."""
        handle = ctypes.windll.kernel32.OpenProcess(_QUERY, 0, pid)
        code = ctypes.c_ulong()
        answered = ctypes.windll.kernel32.GetExitCodeProcess(handle, ctypes.byref(code))
        ctypes.windll.kernel32.CloseHandle(handle)
        return bool(handle) and (not answered or code.value == _STILL_ACTIVE)

else:

    def _exists(pid: int) -> bool:
        try:
            os.kill(pid, 0)
        except PermissionError:
            return True
        except OSError:
            return False
        return True
