from __future__ import annotations

import errno
import json
import os
import threading
import time
from pathlib import Path

import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import TrialState

from autoprune.errors import RunError
from autoprune.searching.journal import Ending, TrialJournal
from autoprune.searching.patience import LONGEST_DELAY_S, Patience, briefly_gone


class Hours:
    """A clock that goes on only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pauses: list[float] = []
        self.notes: list[str] = []

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds

    def patience(self, seconds: float = 30.0) -> Patience:
        return Patience(seconds, self.notes.append, lambda: self.now, self.sleep)


def failing(times: int, code: int = errno.ESTALE):
    calls = []

    def work() -> int:
        calls.append(0)
        if len(calls) <= times:
            raise OSError(code, os.strerror(code))
        return len(calls)

    return work


def test_work_that_succeeds_is_done_once_and_nobody_waits():
    hours = Hours()
    assert hours.patience().attempt(failing(0), briefly_gone) == 1
    assert hours.pauses == hours.notes == []


def test_it_waits_ever_longer_and_says_so_twice():
    hours = Hours()
    assert hours.patience(60).attempt(failing(9), briefly_gone, what="the disk") == 10
    assert hours.pauses == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, LONGEST_DELAY_S, LONGEST_DELAY_S, LONGEST_DELAY_S]
    assert len(hours.notes) == 2
    assert hours.notes[0].startswith("the disk: gone (")
    assert hours.notes[1] == "the disk: back; going on"


def test_it_gives_up_when_the_time_is_over_and_not_before():
    hours = Hours()
    with pytest.raises(OSError, match="Stale"):
        hours.patience(12).attempt(failing(100), briefly_gone)
    assert hours.now == pytest.approx(12)
    assert len(hours.notes) == 1  # the error itself says how it ended


def test_other_errors_and_no_patience_are_immediate():
    hours = Hours()
    with pytest.raises(OSError, match="space"):
        hours.patience().attempt(failing(1, errno.ENOSPC), briefly_gone)
    with pytest.raises(OSError, match="Stale"):
        hours.patience(0).attempt(failing(1), briefly_gone)
    assert hours.pauses == hours.notes == []

    def then_full() -> int:
        raise OSError(errno.ENOSPC if hours.pauses else errno.EIO, "no")

    with pytest.raises(OSError, match=f"Errno {errno.ENOSPC}"):
        hours.patience().attempt(then_full, briefly_gone)
    assert len(hours.pauses) == 1


def test_threads_that_wait_together_say_so_once():
    notes: list[str] = []
    together = threading.Barrier(3)
    patience = Patience(30, notes.append, sleep=lambda seconds: together.wait(10) and None)
    threads = [threading.Thread(target=patience.attempt, args=(failing(2), briefly_gone)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(notes) == 2


def test_what_hides_the_first_error_does_not_deceive():
    def released(code: int) -> Exception:
        try:
            try:
                raise OSError(code, "write")
            finally:
                try:
                    raise FileNotFoundError("the lock")
                except OSError:
                    raise RuntimeError("did not possess lock")  # noqa: B904
        except RuntimeError as error:
            return error

    assert briefly_gone(released(errno.EIO))
    assert not briefly_gone(released(errno.ENOSPC))
    assert not briefly_gone(ValueError("no file at all"))


class Journal:
    """A journal with one running trial, and a second copy of how its appends are written."""

    def __init__(self, folder: Path, hours: Hours) -> None:
        self.path = folder / "study.journal"
        self.storage = TrialJournal(self.path, mend=True, patience=hours.patience())
        self.study = self.storage.create_new_study([StudyDirection.MINIMIZE], "search")

    def running(self) -> int:
        return self.storage.create_new_trial(self.study)

    def lines(self) -> list[dict]:
        return [json.loads(line) for line in self.path.read_text().splitlines()]

    def agrees(self) -> bool:
        plain = JournalStorage(JournalFileBackend(str(self.path)))
        return plain.get_all_trials(self.study) == self.storage.get_all_trials(self.study)


ENDING = Ending(TrialState.COMPLETE, (0.5,), {"samples": 8, "why": "é"}, {"sys": [1]}, {3: 0.25})


@pytest.fixture
def hours() -> Hours:
    return Hours()


@pytest.fixture
def journal(tmp_path: Path, hours: Hours) -> Journal:
    return Journal(tmp_path, hours)


def test_a_folder_that_goes_away_and_comes_back(journal, tmp_path):
    trial = journal.running()
    away = tmp_path.with_name(tmp_path.name + "-away")
    tmp_path.rename(away)
    notes: list[str] = []
    patient = Patience(30, notes.append)
    journal.storage._backend._patience = patient
    threading.Timer(0.7, lambda: away.rename(tmp_path)).start()
    start = time.monotonic()
    journal.storage.end_trial(trial, ENDING)
    assert time.monotonic() - start > 0.6
    assert len(notes) == 2
    assert len(journal.lines()) == 2 + 5
    assert journal.agrees()


def test_an_empty_folder_where_the_file_was_gets_no_new_file(journal, hours, tmp_path):
    trial = journal.running()
    away = tmp_path / "away"
    journal.path.rename(away)
    hours.sleep = lambda seconds: away.rename(journal.path)
    journal.storage._backend._patience = hours.patience()
    journal.storage.end_trial(trial, ENDING)
    assert journal.agrees()
    assert len(journal.lines()) == 2 + 5


@pytest.mark.parametrize("written", [0, 1, 40, 150, 260, 10_000])
@pytest.mark.parametrize("others", [False, True])
def test_a_failed_append_is_finished_not_repeated(journal, hours, monkeypatch, written, others):
    """The file system takes a part of the payload and then fails, at any byte; others may write before we retry."""
    trial, other = journal.running(), journal.running()
    original = JournalFileBackend.append_logs
    failures = []

    def partly(self, logs):
        if failures or not isinstance(self, type(journal.storage._backend)):
            return original(self, logs)
        failures.append(logs)
        payload = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode()
        with journal.path.open("ab") as file:
            file.write(payload[:written])
        raise OSError(errno.EIO, "Input/output error")

    second = TrialJournal(journal.path, mend=False)

    def sleep(seconds):
        hours.pauses.append(seconds)
        if others:
            second.set_trial_user_attr(other, "meanwhile", len(hours.pauses))

    monkeypatch.setattr(JournalFileBackend, "append_logs", partly)
    journal.storage._backend._patience = Patience(30, None, lambda: 0.0, sleep)
    if others:
        failures.append(None)
        second.set_trial_user_attr(other, "before", 0)
        failures.clear()
    journal.storage.end_trial(trial, ENDING)
    told = [line for line in journal.lines() if line["op_code"] in {6, 7, 8, 9} and line["trial_id"] == trial]
    assert len(told) == 5
    ended = journal.storage.get_trial(trial)
    assert (ended.values, ended.user_attrs, ended.intermediate_values) == ([0.5], dict(ENDING.user_attrs), {3: 0.25})
    assert journal.agrees()


def test_the_same_line_twice_on_purpose_stays_two(journal):
    journal.storage.set_study_user_attr(journal.study, "alive", 1)
    journal.storage.set_study_user_attr(journal.study, "alive", 1)
    assert len(journal.lines()) == 3


def test_half_a_line_of_a_killed_process_does_not_spoil_the_next_append(journal):
    trial = journal.running()
    with journal.path.open("ab") as file:
        file.write(b'{"op_code":8,"wor')
    journal.storage.end_trial(trial, ENDING)
    assert journal.agrees()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_full_disk_is_told_at_once_and_leaves_whole_lines(journal, hours, monkeypatch, code):
    trial = journal.running()

    def full(self, logs):
        with journal.path.open("ab") as file:
            file.write(b'{"op_code":8,"wor')
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patched:
        patched.setattr(JournalFileBackend, "append_logs", full)
        with pytest.raises(RunError, match=r"study\.journal: the trial cannot be recorded") as caught:
            journal.storage.end_trial(trial, ENDING)
    assert "waited" not in str(caught.value)
    assert hours.pauses == []
    assert len(journal.lines()) == 2
    journal.storage.end_trial(trial, ENDING)
    assert journal.agrees()


def test_a_folder_that_stays_away_ends_in_one_sentence(journal, hours, tmp_path):
    trial = journal.running()
    tmp_path.rename(tmp_path.with_name(tmp_path.name + "-gone"))
    with pytest.raises(RunError, match=r"there is no such file.*waited 30 s.*recorded before is kept.*goes on") as told:
        journal.storage.end_trial(trial, ENDING)
    assert str(journal.path) in str(told.value)
    assert hours.now == pytest.approx(30)
    with pytest.raises(RunError, match="the study cannot be read"):
        journal.storage.get_trial(trial)


def test_reading_goes_on_at_the_line_it_was_at(journal, hours, monkeypatch):
    for _ in range(6):
        journal.storage.end_trial(journal.running(), ENDING)
    original = JournalFileBackend.read_logs
    broken = []

    def interrupted(self, log_number_from):
        for count, entry in enumerate(original(self, log_number_from)):
            if count == 5 and len(broken) < 4:
                broken.append(log_number_from)
                raise OSError(errno.ESTALE, "Stale file handle")
            yield entry

    monkeypatch.setattr(JournalFileBackend, "read_logs", interrupted)
    again = TrialJournal(journal.path, mend=False, patience=hours.patience())
    assert broken == [0, 5, 10, 15]
    monkeypatch.undo()
    assert again.get_all_trials(journal.study) == journal.storage.get_all_trials(journal.study)
