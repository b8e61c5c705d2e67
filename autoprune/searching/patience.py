"""Waiting for a storage that is briefly gone: a server that restarts, a network folder that comes back.

Knows how long to wait, how often to try and whom to tell. What counts as briefly gone is the caller's to say, except
for files: `briefly_gone` names the errors by which a file system says so.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from autoprune.files import cause

R = TypeVar("R")

FIRST_DELAY_S = 0.1
"""The pause after the first failure; each later one is twice as long."""

LONGEST_DELAY_S = 5.0
"""No pause is longer, so that a storage that is back is noticed."""

_GONE = frozenset(
    {
        errno.ENOENT,
        errno.ESTALE,
        errno.EIO,
        errno.ENOTCONN,
        errno.ETIMEDOUT,
        errno.EAGAIN,
        errno.EBUSY,
        errno.ENOLCK,
        errno.EHOSTDOWN,
    }
)


@dataclass(slots=True)
class _Waiting:
    """How many threads wait at this moment; the first and the last of them say so."""

    count: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def begins(self) -> bool:
        with self.lock:
            self.count += 1
            return self.count == 1

    def ends(self) -> bool:
        with self.lock:
            self.count -= 1
            return self.count == 0


@dataclass(frozen=True, slots=True)
class Patience:
    """For how many seconds work is tried again, who is told (`note`), and the clock and the sleep to do it by."""

    seconds: float = 30.0
    note: Callable[[str], None] | None = None
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    _waiting: _Waiting = field(default_factory=_Waiting, init=False, repr=False, compare=False)

    def attempt(
        self, work: Callable[[], R], transient: Callable[[Exception], bool], *, what: str = "the record of the search"
    ) -> R:
        """What `work` returns; done again, ever more slowly, while it raises what is `transient`.

        `note` is called once when the waiting for `what` begins and once when it is over, however many threads wait.
        Raises the error itself when it is not transient, or when the time is over.
        """
        try:
            return work()
        except Exception as error:
            if self.seconds <= 0 or not transient(error):
                raise
            reason = _reason(error)
        return self._wait(work, transient, what, reason)

    def _wait(self, work: Callable[[], R], transient: Callable[[Exception], bool], what: str, reason: str) -> R:
        deadline, delay = self.clock() + self.seconds, FIRST_DELAY_S
        if self._waiting.begins():
            self._tell(f"{what}: gone ({reason}); waiting up to {self.seconds:g} s for it")
        back = False
        try:
            while True:
                self.sleep(min(delay, max(0.0, deadline - self.clock())))
                delay = min(2 * delay, LONGEST_DELAY_S)
                try:
                    result = work()
                except Exception as error:
                    if not transient(error):
                        back = True  # it answers, if with a refusal
                        raise
                    if self.clock() >= deadline:
                        raise
                else:
                    back = True
                    return result
        finally:
            if self._waiting.ends() and back:
                self._tell(f"{what}: back; going on")

    def _tell(self, text: str) -> None:
        if self.note is not None:
            self.note(text)


def briefly_gone(error: Exception) -> bool:
    """Whether a file system says that a folder is not there just now; a full disk or a lack of rights is not that."""
    causes = _os_errors(error)
    return bool(causes) and all(_code(known) in _GONE for known in causes)


def first_os_error(error: Exception) -> OSError | None:
    """The system's refusal that was met first: giving a lock back in a folder that is gone hides why it is gone."""
    causes = _os_errors(error)
    return causes[-1] if causes else None


def _os_errors(error: BaseException) -> list[OSError]:
    """The latest first."""
    found: list[BaseException] = []
    known: BaseException | None = error
    while known is not None and len(found) < 8:
        found.append(known)
        known = known.__cause__ or known.__context__
    return [each for each in found if isinstance(each, OSError)]


def _code(error: OSError) -> int | None:
    return errno.ENOENT if isinstance(error, FileNotFoundError) else error.errno


def _reason(error: Exception) -> str:
    refused = first_os_error(error)
    if refused is not None:
        return cause(refused)
    told = error.__cause__ or error
    text = str(told).strip() or type(told).__name__
    return text.splitlines()[0]
