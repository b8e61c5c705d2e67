"""URLs, drivers and refusals: what is wrong with a database is said in one sentence, and never with the password."""

from __future__ import annotations

import importlib.util
import re
import socket
import time
from urllib.parse import quote

import pytest
import sqlalchemy
from database_trials import engine_of, study_of
from sqlalchemy.exc import OperationalError

from autoprune.errors import ConfigError, RunError
from autoprune.searching.database import Database
from autoprune.searching.database_place import is_transient, shown_url

pytest_plugins = ["postgres"]


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
        assert not any(
            secret in str(caught.value) for secret in ("wr0ng", wrong, "s3cr", quote(server.password, safe=""))
        )


def test_the_first_spelling_of_postgres_is_taken(server):
    Database(server.url().replace("postgresql://", "postgres://"))


def test_a_user_who_may_not_write(server):
    url = server.new_database()
    Database(url).close()
    engine = engine_of(url)
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text("DROP ROLE IF EXISTS reader"))
        connection.execute(sqlalchemy.text("CREATE ROLE reader LOGIN PASSWORD 'r3ader'"))
    engine.dispose()
    with pytest.raises(RunError, match="may not be written to"):
        Database(url.replace("tester:" + quote(server.password, safe=""), "reader:r3ader"))


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
