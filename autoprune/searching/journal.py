"""The file that remembers trials: Optuna's journal, written once when a trial begins and once when it ends.

A plain `JournalStorage` reads the same file, and so does optuna-dashboard. What differs from it is speed alone:
parameters of a new trial are written together, all that is known of a finished one is appended together, and each
distinct distribution is parsed once. Leans on the inside of Optuna 5's `storages/journal/_storage.py`; the tests
compare every result with the plain storage's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from optuna.distributions import BaseDistribution, json_to_distribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.storages.journal._storage import JournalOperation, JournalStorageReplayResult
from optuna.trial import FrozenTrial, TrialState

from autoprune.errors import RunError
from autoprune.files import cause

DRAFT_ID = -1
"""The id of a trial that is being put together and is not in the journal yet."""

_LOCK_GRACE_S = 5
"""A lock older than this belongs to a killed process."""


@dataclass(slots=True)
class Draft:
    """What a sampler says of a trial before it exists."""

    user_attrs: dict[str, Any] = field(default_factory=dict)
    system_attrs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Ending:
    """All that is told of a trial when it ends. `values` is None for a failed trial."""

    state: TrialState
    values: tuple[float, ...] | None
    user_attrs: Mapping[str, Any] = field(default_factory=dict)
    system_attrs: Mapping[str, Any] = field(default_factory=dict)
    steps: Mapping[int, float] = field(default_factory=dict)
    """Intermediate values by step."""


class TrialJournal(JournalStorage):
    """Optuna's journal storage in one local file, with few writes.

    Whoever owns the run mends a half-written last line; a mere reader must not, as it may be being written just now.
    """

    def __init__(self, path: Path, *, mend: bool) -> None:
        if mend:
            mend_tail(path)
        self._drafted: Draft | None = None
        lock = JournalFileOpenLock(str(path), grace_period=_LOCK_GRACE_S)
        super().__init__(_File(path, lock))

    @contextmanager
    def drafting(self) -> Iterator[Draft]:
        """While this holds, attributes that a sampler sets on the trial `DRAFT_ID` are collected, not written."""
        self._drafted = Draft()
        try:
            yield self._drafted
        finally:
            self._drafted = None

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        """As Optuna's, except that a draft's attributes are collected."""
        if trial_id == DRAFT_ID and self._drafted is not None:
            self._drafted.user_attrs[key] = value
        else:
            super().set_trial_user_attr(trial_id, key, value)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        """As Optuna's, except that a draft's attributes are collected."""
        if trial_id == DRAFT_ID and self._drafted is not None:
            self._drafted.system_attrs[key] = value
        else:
            super().set_trial_system_attr(trial_id, key, value)

    def end_trial(self, trial_id: int, ending: Ending) -> None:
        """Record the end of a trial in one append: attributes, intermediate values, then state and value.

        Raises what Optuna raises for a trial that does not exist (KeyError) or has ended (UpdateFinishedTrialError).
        """
        entries: list[tuple[JournalOperation, dict[str, Any]]] = [
            (JournalOperation.SET_TRIAL_USER_ATTR, {"user_attr": {key: value}})
            for key, value in ending.user_attrs.items()
        ]
        entries += [
            (JournalOperation.SET_TRIAL_SYSTEM_ATTR, {"system_attr": {key: value}})
            for key, value in ending.system_attrs.items()
        ]
        entries += [
            (JournalOperation.SET_TRIAL_INTERMEDIATE_VALUE, {"step": step, "intermediate_value": value})
            for step, value in ending.steps.items()
        ]
        now = datetime.now(tz=UTC).isoformat(timespec="microseconds")
        values = None if ending.values is None else list(ending.values)
        last = {"state": ending.state, "values": values, "datetime_complete": now}
        entries.append((JournalOperation.SET_TRIAL_STATE_VALUES, last))
        worker = self._replay_result.worker_id
        with self._thread_lock:
            self._backend.append_logs(
                [{"op_code": code, "worker_id": worker, "trial_id": trial_id, **fields} for code, fields in entries]
            )
            self._sync_with_backend()

    def _sync_with_backend(self) -> None:
        if not isinstance(self._replay_result, _Replay):  # the first call, from the constructor
            self._replay_result = _Replay(self._worker_id_prefix)
        super()._sync_with_backend()


class _File(JournalFileBackend):
    """The journal file; a write that fails says which file it was."""

    def __init__(self, path: Path, lock: JournalFileOpenLock) -> None:
        super().__init__(str(path), lock_obj=lock)
        self._where = path

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append. Raises RunError naming the file and the cause; what was recorded before stays."""
        try:
            super().append_logs(logs)
        except OSError as error:
            raise RunError(f"{self._where}: the trial cannot be recorded: {cause(error)}") from error


class _Replay(JournalStorageReplayResult):
    """Optuna's replay, with every distinct distribution parsed once: 60 parameters a trial are the same 60."""

    def __init__(self, worker_id_prefix: str) -> None:
        super().__init__(worker_id_prefix)
        self._parsed: dict[str, BaseDistribution] = {}

    def _apply_create_trial(self, log: dict[str, Any]) -> None:
        count = len(self._trials)
        super()._apply_create_trial({**log, "distributions": {}, "params": {}})
        if len(self._trials) == count or "distributions" not in log:
            return
        distributions = {name: self._distribution(text) for name, text in log["distributions"].items()}
        trial: FrozenTrial = self._trials[count]
        trial.params = {name: distributions[name].to_external_repr(raw) for name, raw in log["params"].items()}
        trial.distributions = distributions

    def _distribution(self, text: str) -> BaseDistribution:
        if text not in self._parsed:
            self._parsed[text] = json_to_distribution(text)
        return self._parsed[text]


def mend_tail(path: Path) -> bool:
    """Cut off a last line that a killed process left half-written; whether there was one.

    Optuna skips such a line until something is appended to it, and then cannot read the file any more.
    """
    if not path.exists():
        return False
    with path.open("r+b") as file:
        end = file.seek(0, 2)
        keep, block = end, 1 << 16
        while keep > 0:
            start = max(0, keep - block)
            file.seek(start)
            newline = file.read(keep - start).rfind(b"\n")
            keep = start + newline + 1 if newline >= 0 else start
            if newline >= 0:
                break
        if keep == end:
            return False
        file.truncate(keep)
        return True
