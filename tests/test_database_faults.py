"""Databases that go away, are busy, or answer too late: nothing is lost and nothing is written twice."""

from __future__ import annotations

import random
import threading
import time

import pytest
import sqlalchemy
from database_trials import ENDINGS, engine_of, plain, study_of, template, worker
from optuna.distributions import IntDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState
from sqlalchemy.exc import OperationalError

from autoprune.errors import RunError
from autoprune.searching.database import Database

pytest_plugins = ["postgres"]


class LostAnswers:
    """After each write that succeeds, the connection breaks once before the answer arrives."""

    def __init__(self, storage: Database, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]) -> None:
        self.lost: list[str] = []
        tables = storage._asked._tables
        for name in names:
            monkeypatch.setattr(tables, name, self.losing(name, getattr(tables, name)))

    def losing(self, name: str, method):
        def work(*arguments, **options):
            result = method(*arguments, **options)
            if self.lost.count(name) < 1:
                self.lost.append(name)
                raise OperationalError("commit", {}, Exception("server closed"), connection_invalidated=True)
            return result

        return work


def test_a_lost_answer_writes_nothing_twice(url, monkeypatch):
    notes: list[str] = []
    storage = Database(url, note=notes.append, sleep=lambda seconds: None)
    names = ("create_new_study", "insert_trial", "end", "claim", "delete_study", "_set_trial_param")
    lost = LostAnswers(storage, monkeypatch, names)
    study = study_of(storage)
    trial = storage.create_new_trial(study, template(state=TrialState.WAITING))
    assert storage.set_trial_state_values(trial, TrialState.RUNNING)
    storage.set_trial_param(trial, "c", 1.0, IntDistribution(0, 3))
    storage.end_trial(trial, ENDINGS[1])
    trials = plain(url).get_all_trials(study)
    assert [known._trial_id for known in trials] == [trial]
    assert trials[0].intermediate_values == ENDINGS[1].steps
    assert trials == storage.get_all_trials(study)
    with pytest.raises(UpdateFinishedTrialError):
        storage.end_trial(trial, ENDINGS[1])
    storage.delete_study(study)
    assert plain(url).get_all_studies() == []
    assert sorted(lost.lost) == sorted(names)
    assert len(notes) == 2 * len(names)


def test_an_ending_whose_answer_never_came_may_be_told_again(url, monkeypatch):
    storage = Database(url, patience_s=0)
    study = study_of(storage)
    trial, other = (storage.create_new_trial(study, template(number)) for number in range(2))
    LostAnswers(storage, monkeypatch, ("end",))
    with pytest.raises(RunError, match="did not answer"):
        storage.end_trial(trial, ENDINGS[0])
    storage.end_trial(trial, ENDINGS[0])
    with pytest.raises(UpdateFinishedTrialError):
        storage.end_trial(trial, ENDINGS[0])
    storage.end_trial(other, ENDINGS[0])


def test_another_process_that_ended_it_first_is_not_taken_for_us(url, monkeypatch):
    """The same ending by another process: ours failed before it was written."""
    mine, theirs = Database(url, sleep=lambda seconds: None), Database(url)
    study = study_of(mine)
    trial = mine.create_new_trial(study, template())
    original = mine._asked._tables.end
    failures = []

    def fails_first(*arguments, **options):
        if not failures:
            failures.append(1)
            theirs.end_trial(trial, ENDINGS[0])
            raise OperationalError("update", {}, Exception("server closed"), connection_invalidated=True)
        return original(*arguments, **options)

    monkeypatch.setattr(mine._asked._tables, "end", fails_first)
    with pytest.raises(UpdateFinishedTrialError):
        mine.end_trial(trial, ENDINGS[0])


def test_a_locked_file_is_waited_for(tmp_path):
    url = f"sqlite:///{tmp_path / 'study.db'}?timeout=0"
    notes: list[str] = []
    storage = Database(url, note=notes.append)
    study = study_of(storage)
    other = sqlalchemy.create_engine(url).connect()
    other.execute(sqlalchemy.text("BEGIN EXCLUSIVE"))
    threading.Timer(0.5, other.close).start()
    trial = storage.create_new_trial(study, template())
    storage.end_trial(trial, ENDINGS[0])
    assert len(notes) == 2
    assert "locked" in notes[0]


def numbers(url: str) -> list[int]:
    return [trial.number for trial in plain(url).get_all_trials(1)]


LONG = {"each": 250, "pause_s": 0.0, "outages_s": [3, 3]}
SHORT = {"each": 40, "pause_s": 0.06, "outages_s": [1]}


@pytest.mark.parametrize(
    ("mode", "work"),
    [
        ("immediate", SHORT),
        pytest.param("fast", LONG, marks=pytest.mark.slow),
        pytest.param("immediate", LONG, marks=pytest.mark.slow),
    ],
    ids=["immediate-short", "fast-long", "immediate-long"],
)
def test_a_server_that_is_restarted_loses_and_repeats_nothing(server, mode, work):
    """Two processes ask and tell while it is stopped, stays away for some seconds, and is started again."""
    url = server.new_database()
    Database(url).close()
    each = work["each"]
    workers = [worker(url, str(name), each, work["pause_s"]) for name in range(2)]
    progress = [process.stdout for process in workers]
    for stream in progress:
        assert stream is not None
        assert [stream.readline() for _ in range(5)][-1] == "4\n"
    for outage_s in work["outages_s"]:
        server.stop(mode)
        time.sleep(outage_s)
        server.start()
        time.sleep(1)
    assert any(process.poll() is None for process in workers)
    for process in workers:
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
    trials = plain(url).get_all_trials(1)
    told = sorted(trial.user_attrs["worker"] for trial in trials)
    assert told == sorted(f"{name}.{number}" for name in range(2) for number in range(each))
    assert [trial.number for trial in trials] == list(range(2 * each))
    assert all(trial.state.is_finished() for trial in trials)
    assert Database(url).get_all_trials(1) == trials


def test_connections_that_are_cut_at_any_moment(server):
    """Every backend is ended again and again while trials are told: answers are lost, nothing else."""
    url = server.new_database()
    notes: list[str] = []
    storage = Database(url, note=notes.append)
    study = study_of(storage)
    done = threading.Event()
    pauses = random.Random(1)

    def cutting() -> None:
        killer = engine_of(server.url())
        with killer.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            name = url.rpartition("/")[2]
            kill = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"
            while not done.wait(pauses.uniform(0.03, 0.3)):
                connection.execute(sqlalchemy.text(kill))
        killer.dispose()

    thread = threading.Thread(target=cutting)
    thread.start()
    try:
        for number in range(150):
            trial = storage.create_new_trial(study, template(number))
            storage.end_trial(trial, ENDINGS[number % len(ENDINGS)])
    finally:
        done.set()
        thread.join()
    assert numbers(url) == list(range(150))
    assert notes
    assert len(notes) % 2 == 0
    assert not any("s3cr" in note for note in notes)


def test_patience_that_ends_says_how_to_go_on(server):
    url = server.new_database()
    notes: list[str] = []
    storage = Database(url, note=notes.append, patience_s=1)
    study = study_of(storage)
    trial = storage.create_new_trial(study, template())
    server.stop()
    try:
        with pytest.raises(RunError, match=r"did not answer within 1 s .*is kept.*same command") as told:
            storage.end_trial(trial, ENDINGS[0])
    finally:
        server.start()
    assert "s3cr" not in str(told.value) + str(notes)
    assert "\n" not in str(told.value)
    assert len(notes) == 1
    storage.end_trial(trial, ENDINGS[0])
    assert storage.get_trial(trial).state == TrialState.COMPLETE
