"""The file that remembers trials: Optuna's journal, written once when a trial begins and once when it ends.

A plain `JournalStorage` reads the same file, and so does optuna-dashboard. What differs from it is speed alone:
parameters of a new trial are written together, all that is known of a finished one is appended together, and each
distinct distribution is parsed once. Leans on the inside of Optuna 5's `storages/journal/_storage.py`; the tests
compare every result with the plain storage's. A folder that is briefly gone is waited for.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Container, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from optuna.distributions import BaseDistribution, json_to_distribution
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.storages.journal._file import BaseJournalFileLock, get_lock_file
from optuna.storages.journal._storage import JournalOperation, JournalStorageReplayResult
from optuna.trial import FrozenTrial, TrialState

from autoprune.errors import RunError
from autoprune.files import cause
from autoprune.searching.patience import Patience, briefly_gone, first_os_error

DRAFT_ID = -1
"""The id of a trial that is being put together and is not in the journal yet."""

_LOCK_GRACE_S = 5
"""A lock older than this belongs to a killed process."""

PATIENCE = Patience(30.0)
"""How long a journal whose folder is gone is waited for, unless the caller says otherwise."""


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


def blank_trial(number: int, trial_id: int) -> FrozenTrial:
    """A running trial of which nothing is known yet."""
    return FrozenTrial(
        number=number, state=TrialState.RUNNING, value=None, datetime_start=datetime.now(), datetime_complete=None,
        params={}, distributions={}, user_attrs={}, system_attrs={}, intermediate_values={}, trial_id=trial_id,
    )  # fmt: skip


class Drafting(BaseStorage):
    """Put before one of Optuna's storages among the bases: what a sampler says of a draft is collected, not written."""

    _drafted: Draft | None = None

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
            super().set_trial_user_attr(trial_id, key, value)  # type: ignore[safe-super]

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        """As Optuna's, except that a draft's attributes are collected."""
        if trial_id == DRAFT_ID and self._drafted is not None:
            self._drafted.system_attrs[key] = value
        else:
            super().set_trial_system_attr(trial_id, key, value)  # type: ignore[safe-super]


class TrialJournal(Drafting, JournalStorage):
    """Optuna's journal storage in one file, with few writes.

    Whoever takes part in the run mends a half-written last line; a mere reader must not, as it may be being written
    just now.
    """

    def __init__(self, path: Path, *, mend: bool, patience: Patience = PATIENCE) -> None:
        lock = JournalFileOpenLock(str(path), grace_period=_LOCK_GRACE_S)
        if mend and has_half_line(path):
            with get_lock_file(lock):  # nobody is writing it now
                mend_tail(path)
        super().__init__(_File(path, lock, patience))

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """As Optuna's; without copies of trials and of all states, a list that costs what has changed."""
        if deepcopy or states is not None:
            return super().get_all_trials(study_id, deepcopy, states)
        with self._thread_lock:
            self._sync_with_backend()
            assert isinstance(self._replay_result, _Replay)
            return self._replay_result.listed(study_id)

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
    """The journal file: a folder that is briefly gone is waited for; a write that fails says which file it was."""

    def __init__(self, path: Path, lock: JournalFileOpenLock, patience: Patience) -> None:
        super().__init__(str(path), lock_obj=lock)
        self._where = path
        self._patience = patience

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append, each line once. Raises RunError naming the file and the cause; what was recorded before stays."""
        append = _Append(self._where, self._lock, logs, at_least=next(reversed(self._log_number_offset.values())))

        def work() -> None:
            rest = append.missing()
            if rest:
                super(_File, self).append_logs(rest)

        try:
            self._patience.attempt(work, briefly_gone, what=str(self._where))
        except (OSError, RuntimeError) as error:
            append.tidy()
            if first_os_error(error) is None:
                raise
            raise self._refusal("the trial cannot be recorded", error) from error

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        """As Optuna's; goes on at the line it was at when the file was gone for a while."""
        number = log_number_from
        logs: Iterator[dict[str, Any]] | None = None

        def following() -> dict[str, Any] | None:
            nonlocal logs
            if logs is None:
                logs = super(_File, self).read_logs(number)
            try:
                return next(logs, None)
            except OSError:
                logs = None
                raise

        while True:
            try:
                entry = self._patience.attempt(following, briefly_gone, what=str(self._where))
            except OSError as error:
                if briefly_gone(error):
                    raise self._refusal("the study cannot be read", error) from error
                raise
            if entry is None:
                return
            number += 1
            yield entry

    def _refusal(self, what: str, error: Exception) -> RunError:
        known = first_os_error(error)
        text = f"{self._where}: {what}: {error if known is None else cause(known)}"
        if briefly_gone(error):
            text += (
                f" (waited {self._patience.seconds:g} s); everything recorded before is kept: once the folder is back, "
                "start the search again and it goes on from there"
            )
        return RunError(text)


class _Append:
    """One append, which may take several attempts: knows which of its lines a failed one has left in the file."""

    def __init__(self, path: Path, lock: BaseJournalFileLock, logs: list[dict[str, Any]], *, at_least: int) -> None:
        self._path, self._lock, self._logs = path, lock, logs
        self._at_least = at_least
        self._start: int | None = None

    def missing(self) -> list[dict[str, Any]]:
        """The entries still to be written. A half-written line at the end is cut off first.

        Raises OSError when the file is not there, or is another one: an empty folder where a network folder was.
        """
        if self._path.stat().st_size < self._at_least:
            raise OSError(errno.ESTALE, "the file is shorter than what was read from it")
        if has_half_line(self._path):
            with get_lock_file(self._lock):  # nobody is writing it now
                mend_tail(self._path)
        if self._start is None:
            self._start = self._path.stat().st_size
            return self._logs
        return self._logs[self._written(self._start) :]

    def tidy(self) -> None:
        """After a failure for good: take the half-written line away, if the file lets itself be shortened."""
        try:
            if has_half_line(self._path):
                with get_lock_file(self._lock):
                    mend_tail(self._path)
        except (OSError, RuntimeError):
            return

    def _written(self, start: int) -> int:
        """How many of our lines are there: they follow each other, if perhaps with others' lines between."""
        with self._path.open("rb") as file:
            file.seek(start)
            found = iter(file.read().split(b"\n"))
        done = 0
        for log in self._logs:
            line = json.dumps(log, separators=(",", ":")).encode("utf-8")  # as Optuna's backend writes it
            if line not in found:  # moves on to behind it
                break
            done += 1
        return done


class _Replay(JournalStorageReplayResult):
    """Optuna's replay, with every distinct distribution parsed once: 60 parameters a trial are the same 60."""

    def __init__(self, worker_id_prefix: str) -> None:
        super().__init__(worker_id_prefix)
        self._parsed: dict[str, BaseDistribution] = {}
        self._listed: dict[int, list[FrozenTrial]] = {}  # by study, as it was when last asked for
        self._changed: set[int] = set()  # trials since

    def listed(self, study_id: int) -> list[FrozenTrial]:
        """All trials of a study in order of number: a new list of the same trials."""
        ids = self._study_id_to_trial_ids[self.get_study(study_id)._study_id]
        known = self._listed.setdefault(study_id, [])
        known.extend(self._trials[trial_id] for trial_id in ids[len(known) :])
        for trial_id in self._changed:
            trial = self._trials[trial_id]
            listed = self._listed.get(self._trial_id_to_study_id[trial_id], [])
            if trial.number < len(listed):  # else it is still to come, as it is now
                listed[trial.number] = trial
        self._changed.clear()
        return known.copy()

    def apply_logs(self, logs: Iterable[dict[str, Any]]) -> None:
        """As Optuna's, remembering which trials change."""

        def noted() -> Iterator[dict[str, Any]]:
            for log in logs:
                yield log
                if "trial_id" in log and log["trial_id"] in self._trials:
                    self._changed.add(log["trial_id"])

        super().apply_logs(noted())

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


def has_half_line(path: Path) -> bool:
    """Whether the file does not end with the end of a line."""
    if not path.exists():
        return False
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


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
