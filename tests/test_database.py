"""Studies in databases against plain Optuna's storage: SQLite always, PostgreSQL where there is a server to start."""

from __future__ import annotations

import importlib.util
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from urllib.parse import quote

import optuna
import pytest
import sqlalchemy
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import DuplicatedStudyError, UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import OperationalError

from autoprune.errors import ConfigError, RunError
from autoprune.searching.database import TOKEN, Database, is_transient, shown_url
from autoprune.searching.journal import DRAFT_ID, Ending

PASSWORD = "s3cr:t@/{}%+é"
"""Everything that a URL must have quoted."""


class Server:
    """A throw-away PostgreSQL cluster on a free port of this machine, run by a user that is not root."""

    def __init__(self, binaries: Path, folder: Path) -> None:
        self.binaries, self.folder = binaries, folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.user: list[str] = []
        if os.geteuid() == 0:
            name = next(name for name in ("postgres", "nobody") if user_exists(name))
            runner = ["runuser", "-u", name, "--"] if shutil.which("runuser") else ["setpriv", f"--reuid={name}", "--"]
            self.user = runner
            shutil.chown(folder, name)
        secret = folder / "password"
        secret.write_text(PASSWORD, encoding="utf-8")
        self.call("initdb", "-D", "data", "-U", "tester", "-A", "scram-sha-256", "--pwfile", "password", "-E", "UTF8")
        settings = f"port = {self.port}\nlisten_addresses = '127.0.0.1'\nunix_socket_directories = ''\nfsync = off\n"
        with (folder / "data" / "postgresql.conf").open("a", encoding="utf-8") as file:
            file.write(settings)

    def call(self, program: str, *arguments: str) -> None:
        command = [*self.user, str(self.binaries / program), *arguments]
        with (self.folder / "log").open("ab") as log:
            done = subprocess.run(command, cwd=self.folder, stdout=log, stderr=log, timeout=60, check=False)
        assert done.returncode == 0, (self.folder / "log").read_text()

    def start(self) -> None:
        self.call("pg_ctl", "-D", "data", "-w", "-l", "server.log", "start")

    def stop(self, mode: str = "fast") -> None:
        self.call("pg_ctl", "-D", "data", "-w", "-m", mode, "stop")

    def url(self, database: str = "postgres", password: str = PASSWORD) -> str:
        return f"postgresql://tester:{quote(password, safe='')}@127.0.0.1:{self.port}/{database}"

    def new_database(self) -> str:
        name = f"study{time.monotonic_ns()}"
        engine = sqlalchemy.create_engine(Database(self.url())._asked._place.for_optuna.replace("{{", "{"))
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(sqlalchemy.text(f"CREATE DATABASE {name}"))
        engine.dispose()
        return self.url(name)


def user_exists(name: str) -> bool:
    return subprocess.run(["id", name], capture_output=True, check=False).returncode == 0


def postgres_binaries() -> Path | None:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
    on_path = shutil.which("pg_ctl")
    return found[-1].parent if found else (Path(on_path).resolve().parent if on_path else None)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    binaries = postgres_binaries()
    if binaries is None:
        pytest.skip("there is no PostgreSQL server (pg_ctl) on this machine")
    if not (importlib.util.find_spec("psycopg2") or importlib.util.find_spec("psycopg")):
        pytest.skip("there is no driver for PostgreSQL: pip install psycopg2-binary")
    folder = Path(subprocess.check_output(["mktemp", "-d", "/tmp/autoprune-postgres-XXXXXX"], text=True).strip())
    running = Server(binaries, folder)
    running.start()
    yield running
    running.stop("immediate")
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'study.db'}"
    return request.getfixturevalue("server").new_database()


def template(number: int = 0, **more) -> FrozenTrial:
    fields = {
        "number": number,
        "state": TrialState.RUNNING,
        "value": None,
        "datetime_start": datetime(2026, 1, 2, 3, 4, 5, 678901),
        "datetime_complete": None,
        "params": {"b": number % 5, "a": 0.25, "kind": "two"},
        "distributions": {
            "b": IntDistribution(0, 4),
            "a": FloatDistribution(0.0, 1.0),
            "kind": CategoricalDistribution(("one", "two")),
        },
        "user_attrs": {"origin": "é", "cost.macs": 1.5, "none": None, "list": [1, {"x": True}]},
        "system_attrs": {"constraints:budget": -0.5},
        "intermediate_values": {},
        "trial_id": DRAFT_ID,
    }
    return FrozenTrial(**{**fields, **more})


ENDINGS = [
    Ending(TrialState.COMPLETE, (0.5,), {"samples": 8}, {"constraints:late": 1.0}),
    Ending(TrialState.PRUNED, (9.0,), {}, {}, {16: 9.0, 8: float("inf")}),
    Ending(TrialState.FAIL, None, {"reason": "why not", "origin": "overwritten"}),
    Ending(TrialState.COMPLETE, (float("-inf"),)),
    Ending(TrialState.COMPLETE, (1 / 3,), {"text": "x" * 5000}),
]


def comparable(trial: FrozenTrial) -> dict:
    system = {key: value for key, value in trial.system_attrs.items() if key != TOKEN}
    return {
        "number": trial.number,
        "state": trial.state,
        "values": trial.values,
        "started": trial.datetime_start,
        "complete": trial.datetime_complete is not None,
        "params": list(trial.params.items()),
        "distributions": trial.distributions,
        "user": trial.user_attrs,
        "system": system,
        "steps": trial.intermediate_values,
    }


def plain(url: str) -> RDBStorage:
    return RDBStorage(Database(url)._asked._place.for_optuna)


def study_of(storage) -> int:
    return storage.create_new_study([StudyDirection.MINIMIZE], "search")


def test_the_same_trials_as_plain_optuna(url, tmp_path):
    ours, theirs = Database(url), RDBStorage(f"sqlite:///{tmp_path / 'plain.db'}")
    mine, other = study_of(ours), study_of(theirs)
    for number, ending in enumerate(ENDINGS):
        trial = ours.create_new_trial(mine, template(number))
        ours.end_trial(trial, ending)
        trial = theirs.create_new_trial(other, template(number))
        for key, value in ending.user_attrs.items():
            theirs.set_trial_user_attr(trial, key, value)
        for key, value in ending.system_attrs.items():
            theirs.set_trial_system_attr(trial, key, value)
        for step, value in ending.steps.items():
            theirs.set_trial_intermediate_value(trial, step, value)
        theirs.set_trial_state_values(trial, ending.state, ending.values)
    whole = template(7, state=TrialState.COMPLETE, value=2.5, intermediate_values={3: 1.0}, datetime_complete=now())
    for storage, study in ((ours, mine), (theirs, other)):
        storage.create_new_trial(study)
        storage.create_new_trial(study, whole)
        storage.create_new_trial(study, template(8, state=TrialState.WAITING, datetime_start=None))
    blank = len(ENDINGS)
    expected, found = theirs.get_all_trials(other), ours.get_all_trials(mine)
    found[blank].datetime_start = expected[blank].datetime_start  # each its own now
    assert [comparable(trial) for trial in found] == [comparable(trial) for trial in expected]
    assert ours.get_best_trial(mine).number == theirs.get_best_trial(other).number


def now() -> datetime:
    return datetime.now()


def test_plain_optuna_reads_the_same_and_so_does_another_of_ours(url):
    storage = Database(url)
    study = study_of(storage)
    for number, ending in enumerate(ENDINGS):
        trial = storage.create_new_trial(study, template(number))
        assert storage.get_trial(trial) == plain(url).get_trial(trial)
        storage.end_trial(trial, ending)
        assert storage.get_trial(trial) == plain(url).get_trial(trial)
        finished = storage.get_trial(trial)
        assert abs(finished.datetime_complete - datetime.now()) < timedelta(seconds=30)
    storage.create_new_trial(study, template(9))
    storage.create_new_trial(study)
    everything = plain(url).get_all_trials(study)
    assert storage.get_all_trials(study) == everything
    assert Database(url).get_all_trials(study, deepcopy=False) == everything
    states = (TrialState.RUNNING,)
    assert Database(url).get_all_trials(study, states=states) == plain(url).get_all_trials(study, states=states)
    reader = plain(url)
    assert optuna.load_study(study_name="search", storage=reader).trials == everything


def test_what_others_write_is_seen_while_trials_run(url):
    first, second = Database(url), Database(url)
    study = study_of(first)
    trials = [first.create_new_trial(study, template(number)) for number in range(6)]
    assert len(second.get_all_trials(study)) == 6
    for trial in (trials[4], trials[1]):
        first.end_trial(trial, ENDINGS[0])
        assert second.get_all_trials(study) == plain(url).get_all_trials(study)
    second.set_trial_user_attr(trials[0], "from", "second")
    assert first.get_all_trials(study)[0].user_attrs["from"] == "second"
    assert first.get_all_trials(study, deepcopy=False)[1] is first.get_all_trials(study, deepcopy=False)[1]


def test_drafts_are_collected_and_other_attributes_written(url):
    storage = Database(url)
    study = study_of(storage)
    trial = storage.create_new_trial(study, template())
    with storage.drafting() as draft:
        storage.set_trial_system_attr(DRAFT_ID, "sampler", 1)
        storage.set_trial_user_attr(DRAFT_ID, "user", 2)
        storage.set_trial_user_attr(trial, "written", 3)
    assert (draft.system_attrs, draft.user_attrs) == ({"sampler": 1}, {"user": 2})
    assert storage.get_trial(trial).user_attrs["written"] == 3
    with pytest.raises(KeyError):
        storage.set_trial_user_attr(DRAFT_ID, "user", 2)


def commits(storage: Database) -> list[int]:
    counted: list[int] = []
    sqlalchemy.event.listen(storage._asked._tables.engine, "commit", lambda connection: counted.append(1))
    return counted


def test_one_transaction_when_asked_and_one_when_told(url):
    storage = Database(url)
    study = study_of(storage)
    counted = commits(storage)
    trial = storage.create_new_trial(study, template())
    assert len(counted) == 1
    storage.end_trial(trial, ENDINGS[1])
    assert len(counted) == 2


def test_it_raises_what_optuna_raises(url):
    storage = Database(url)
    study = study_of(storage)
    trial = storage.create_new_trial(study, template())
    storage.end_trial(trial, ENDINGS[0])
    for again in (ENDINGS[0], ENDINGS[2]):
        with pytest.raises(UpdateFinishedTrialError):
            storage.end_trial(trial, again)
    with pytest.raises(UpdateFinishedTrialError):
        storage.set_trial_state_values(trial, TrialState.FAIL)
    with pytest.raises(UpdateFinishedTrialError):
        storage.set_trial_state_values(trial, TrialState.RUNNING)
    with pytest.raises(UpdateFinishedTrialError):
        storage.set_trial_user_attr(trial, "late", 1)
    with pytest.raises(KeyError):
        storage.end_trial(trial + 99, ENDINGS[0])
    with pytest.raises(KeyError):
        storage.create_new_trial(study + 99, template())
    with pytest.raises(KeyError):
        storage.get_all_trials(study + 99)
    with pytest.raises(KeyError):
        storage.get_trial(trial + 99)
    with pytest.raises(DuplicatedStudyError):
        study_of(storage)
    other = {"distributions": {"b": FloatDistribution(0, 4)}, "params": {"b": 1.0}}
    for fresh in (storage, Database(url)):
        with pytest.raises(ValueError, match="Cannot set different distribution kind"):
            fresh.create_new_trial(study, template(**other))
    assert len(storage.get_all_trials(study)) == 1  # nothing is left of the refused ones


def test_a_waiting_trial_is_taken_by_one(url):
    first, second = Database(url), Database(url)
    study = study_of(first)
    trial = first.create_new_trial(study, template(state=TrialState.WAITING))
    assert first.set_trial_state_values(trial, TrialState.RUNNING)
    assert not second.set_trial_state_values(trial, TrialState.RUNNING)
    assert second.set_trial_state_values(trial, TrialState.COMPLETE, [1.0])
    assert first.get_trial(trial).values == [1.0]


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


WORKER = """
import sys
sys.path.insert(0, sys.argv[2])
from test_database import Database, ENDINGS, optuna, template
storage = Database(sys.argv[1])
try:
    study = optuna.create_study(storage=storage, study_name="search")
except optuna.exceptions.DuplicatedStudyError:
    study = optuna.load_study(storage=storage, study_name="search")
for number in range(int(sys.argv[4])):
    one = template(number)
    one.user_attrs["worker"] = f"{sys.argv[3]}.{number}"
    trial = storage.create_new_trial(study._study_id, one)
    storage.end_trial(trial, ENDINGS[number % len(ENDINGS)])
    study.set_user_attr(f"alive:{sys.argv[3]}", number)
    storage.get_all_trials(study._study_id, deepcopy=False)
    print(number, flush=True)
"""


def worker(url: str, name: str, trials: int) -> subprocess.Popen:
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": str(tests.parent)}
    command = [sys.executable, "-c", WORKER, url, str(tests), name, str(trials)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_processes_share_a_new_database(url):
    """They start together, so they make the tables and the study at the same moment."""
    count, each = 3, 20
    workers = [worker(url, str(name), each) for name in range(count)]
    for process in workers:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    trials = plain(url).get_all_trials(1)
    assert [trial.number for trial in trials] == list(range(count * each))
    expected = {f"{name}.{number}" for name in range(count) for number in range(each)}
    assert {trial.user_attrs["worker"] for trial in trials} == expected
    assert all(trial.state.is_finished() for trial in trials)
    assert Database(url).get_all_trials(1) == trials


def test_ten_thousand_trials_are_quick_to_ask_for(url):
    storage = Database(url)
    study = study_of(storage)
    names = [f"layer{number}" for number in range(30)]
    last = template(params=dict.fromkeys(names, 3), distributions={name: IntDistribution(0, 9) for name in names})
    storage.end_trial(storage.create_new_trial(study, last), ENDINGS[0])
    multiply(storage, 10_000)
    times = {}

    def timed(name: str, work) -> object:
        start = time.perf_counter()
        result = work()
        times[name] = round(time.perf_counter() - start, 4)
        return result

    again = Database(url)
    trials = timed("open_s", lambda: again.get_all_trials(study, deepcopy=False))
    assert len(trials) == 10_000
    queries: list[str] = []
    engine = again._asked._tables.engine
    sqlalchemy.event.listen(engine, "before_cursor_execute", lambda *told: queries.append(told[2]))
    timed("ask_again_s", lambda: again.get_all_trials(study, deepcopy=False))
    assert len(queries) == 2
    trial = timed("create_s", lambda: again.create_new_trial(study, last))
    assert timed("after_one_more_s", lambda: again.get_all_trials(study, deepcopy=False))[-1].number == 10_000
    timed("end_s", lambda: again.end_trial(trial, ENDINGS[0]))
    timed("after_its_end_s", lambda: again.get_all_trials(study, deepcopy=False))
    late = trials[-300]._trial_id
    expected = plain(url)._get_trials(study, None, set(), late)
    assert again.get_all_trials(study, deepcopy=False)[-300:] == expected
    print(f"\n10,000 trials of 30 parameters, {url.partition(':')[0]}: {times}")


def multiply(storage: Database, count: int) -> None:
    """Copies of the one trial that is there."""
    with storage._asked._tables.engine.begin() as connection:
        metadata = sqlalchemy.MetaData()
        metadata.reflect(connection)
        first = connection.execute(sqlalchemy.select(metadata.tables["trials"])).mappings().one()
        copies = [{**first, "number": number, "trial_id": first["trial_id"] + number} for number in range(1, count)]
        connection.execute(sqlalchemy.insert(metadata.tables["trials"]), copies)
        if connection.engine.name == "postgresql":
            top = first["trial_id"] + count
            connection.execute(sqlalchemy.text(f"SELECT setval('trials_trial_id_seq', {top})"))
        for name in ("trial_params", "trial_values", "trial_user_attributes", "trial_system_attributes"):
            table = metadata.tables[name]
            key = next(iter(table.primary_key.columns)).name
            columns = [column for column in table.columns if column.name not in {key, "trial_id"}]
            trials = metadata.tables["trials"]
            kept = (
                sqlalchemy.select(trials.c.trial_id, *columns)
                .select_from(trials.join(table, table.c.trial_id == first["trial_id"]))
                .where(trials.c.trial_id > first["trial_id"])
            )
            into = sqlalchemy.insert(table).from_select(["trial_id", *(column.name for column in columns)], kept)
            connection.execute(into)


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("postgresql://u:pw@host/db", "postgresql://u:***@host/db"),
        ("postgresql+psycopg2://u:p@w@host:5432/db", "postgresql+psycopg2://u:***@host:5432/db"),
        ("mysql://u:p/w:x@host/db", "mysql://u:***@host/db"),
        ("postgresql://:pw@host/db", "postgresql://:***@host/db"),
        ("u:pw@host/db", "u:***@host/db"),
        ("postgresql://host/db?user=u&password=pw&x=1", "postgresql://host/db?user=u&password=***&x=1"),
        ("postgresql://u@host/db", "postgresql://u@host/db"),
        ("postgresql://host:5432/db", "postgresql://host:5432/db"),
        ("sqlite:///C:/a@b.db", "sqlite:///C:/a@b.db"),
    ],
)
def test_a_url_is_shown_without_its_password(given, shown):
    assert shown_url(given) == shown


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("study.db", "is no database URL; allowed: postgresql://"),
        ("u:hidden@host/db", "is no database URL"),
        ("postgresql://u:hid@hidden@host/db", "%40"),
        ("postgresql://u:hid/hidden@host/db", "does not answer|did not answer|resolve|translate|is no database URL"),
        ("postgresql://u:hidden@host:port/db", "is no database URL"),
        ("oracle://u:hidden@host/db", "'oracle' is no kind of database.*allowed: mysql, postgresql, sqlite"),
        ("postgre://u:hidden@host/db", "did you mean .*'postgres"),
        ("postgresql+asyncpg://u:hidden@host/db", "the driver 'asyncpg' is not supported; allowed for postgresql"),
        ("sqlite://", "a database in memory cannot be shared"),
        ("sqlite:///:memory:", "a database in memory cannot be shared"),
        ("sqlite:////nowhere/at/all/study.db", "there is no folder '/nowhere/at/all'; make it"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused_in_one_sentence(given, told):
    with pytest.raises((ConfigError, RunError)) as caught:
        Database(given, patience_s=0)
    assert re.search(told, str(caught.value)), str(caught.value)
    assert "hidden" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["postgresql", "mysql"])
def test_a_driver_that_is_not_installed(kind, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"is not installed; install one: pip install 'autoprune\[{kind}\]'") as told:
        Database(f"{kind}://u:hidden@host/db")
    assert "hidden" not in str(told.value)


def test_files_that_are_no_sqlite_database_or_may_not_be_written(tmp_path):
    text = tmp_path / "notes.db"
    text.write_text("this is no database, whatever its name says" * 100)
    with pytest.raises(RunError, match=r"notes\.db: the file is no SQLite database"):
        Database(f"sqlite:///{text}")
    with pytest.raises((RunError, ConfigError)):
        Database(f"sqlite:///{tmp_path}", patience_s=0)


def test_a_name_with_braces_is_taken_as_it_is(tmp_path):
    storage = Database(f"sqlite:///{tmp_path}/a{{b}}.db")
    study_of(storage)
    assert (tmp_path / "a{b}.db").exists()


def test_a_reader_makes_nothing(url, tmp_path):
    with pytest.raises(RunError, match="there is no study in it yet; start the search first"):
        Database(url, create=False)
    assert not (tmp_path / "study.db").exists()
    study = study_of(Database(url))
    assert Database(url, create=False).get_all_trials(study) == []


def test_tables_of_another_version_of_optuna(url):
    storage = Database(url)
    with storage._asked._tables.engine.begin() as connection:
        connection.execute(sqlalchemy.text("UPDATE alembic_version SET version_num = 'v9.9.9'"))
    with pytest.raises(RunError, match=r"another version of Optuna.*pip install -U optuna.*optuna storage upgrade"):
        Database(url)


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


def test_a_server_that_is_not_there(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    notes: list[str] = []
    pauses: list[float] = []
    with pytest.raises(RunError, match=r"did not answer within 5 s .*refused.*start the same command again") as told:
        Database(f"postgresql://u:hidden@127.0.0.1:{port}/db", note=notes.append, sleep=ticking(pauses))
    assert "hidden" not in str(told.value) + str(notes)
    assert len(notes) == 1


def ticking(pauses: list[float]):
    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        time.sleep(seconds)

    return sleep


def test_users_passwords_and_databases_that_are_wrong(server):
    wrong = quote("wr0ng@pass", safe="")
    cases = {
        server.url(password="wr0ng@pass"): "refuses the user or the password",
        f"postgresql://nobody-here:{wrong}@127.0.0.1:{server.port}/postgres": "refuses the user or the password",
        f"postgresql://tester@127.0.0.1:{server.port}/postgres": "refuses the user or the password",
        server.url("nowhere"): "there is no such database on the server: make it first",
    }
    for given, told in cases.items():
        start = time.monotonic()
        with pytest.raises(ConfigError, match=told) as caught:
            Database(given)
        assert time.monotonic() - start < 3  # a mistake is not waited for
        assert not any(secret in str(caught.value) for secret in ("wr0ng", wrong, "s3cr", quote(PASSWORD, safe="")))


def test_the_first_spelling_of_postgres_is_taken(server):
    Database(server.url().replace("postgresql://", "postgres://"))


def numbers(url: str) -> list[int]:
    return [trial.number for trial in plain(url).get_all_trials(1)]


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_a_server_that_is_restarted_loses_and_repeats_nothing(server, mode):
    """Two processes ask and tell while it is stopped, stays away for three seconds, and is started again, twice."""
    url = server.new_database()
    Database(url).close()
    each = 250
    workers = [worker(url, str(name), each) for name in range(2)]
    progress = [process.stdout for process in workers]
    for stream in progress:
        assert stream is not None
        assert [stream.readline() for _ in range(20)][-1] == "19\n"
    for _ in range(2):
        server.stop(mode)
        time.sleep(3)
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
        killer = sqlalchemy.create_engine(Database(server.url())._asked._place.for_optuna.replace("{{", "{"))
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


def test_a_user_who_may_not_write(server):
    url = server.new_database()
    engine = sqlalchemy.create_engine(Database(url)._asked._place.for_optuna.replace("{{", "{"))
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text("DROP ROLE IF EXISTS reader"))
        connection.execute(sqlalchemy.text("CREATE ROLE reader LOGIN PASSWORD 'r3ader'"))
    engine.dispose()
    with pytest.raises(RunError, match="may not be written to"):
        Database(url.replace("tester:" + quote(PASSWORD, safe=""), "reader:r3ader"))


def test_which_errors_are_waited_for():
    class OriginError(Exception):
        pgcode: str | None = None

    def error(code: str | None, text: str = "text", kind=OperationalError):
        origin = OriginError(text)
        origin.pgcode = code
        return kind("select", {}, origin)

    waited = ["08006", "57P01", "57P03", "40P01", "40001", "53300", "55P03", "25006", None]
    assert all(is_transient(error(code)) for code in waited)
    assert not any(is_transient(error(code)) for code in ["53100", "42P01", "42501", "22001"])
    assert not is_transient(error(None, "password authentication failed for user"))
    assert not is_transient(error("40001", kind=sqlalchemy.exc.IntegrityError))
    assert not is_transient(ValueError("no database at all"))
