"""A PostgreSQL server of our own for tests, where there is one to start, and the databases that tests run on.

Test files take its fixtures by `pytest_plugins = ["postgres"]`, so that all share one server.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
import sqlalchemy
from database_trials import engine_of


class Server:
    """A throw-away PostgreSQL cluster on a free port of this machine, run by a user that is not root."""

    password = "s3cr:t@/{}%+é"
    """Everything that a URL must have quoted."""

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
        secret.write_text(self.password, encoding="utf-8")
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

    def url(self, database: str = "postgres", password: str = password) -> str:
        return f"postgresql://tester:{quote(password, safe='')}@127.0.0.1:{self.port}/{database}"

    def new_database(self) -> str:
        name = f"study{time.monotonic_ns()}"
        engine = engine_of(self.url())
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
