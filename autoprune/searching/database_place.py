"""Where a database is, as the user named it: its URL and driver, and what a refusal of it means.

Knows how to show a URL without its password, which errors pass by themselves and what to do about the others. Does not
know what is in the database, and opens no connection.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from optuna.exceptions import StorageInternalError
from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from autoprune.errors import AutopruneError, ConfigError, RunError, near_miss

_SPELLINGS = {"postgres": "postgresql", "mariadb": "mysql"}
_DRIVERS = {
    "sqlite": {"pysqlite": "sqlite3"},
    "postgresql": {"psycopg2": "psycopg2", "psycopg": "psycopg"},
    "mysql": {"pymysql": "pymysql", "mysqldb": "MySQLdb"},
}
"""By kind of database: drivers and the module each needs, the preferred one first."""

_CONNECTING: dict[str, dict[str, str | int]] = {
    "sqlite": {"timeout": 30},
    "postgresql": {
        "connect_timeout": 10,
        "keepalives_idle": 30,
        "keepalives_interval": 10,
        "keepalives_count": 3,
        "tcp_user_timeout": 30_000,  # ms
    },
    "mysql": {"connect_timeout": 10, "read_timeout": 60, "write_timeout": 60},
}
"""So that a machine that is switched off is noticed within half a minute or so. What the URL says goes first."""


class Place:
    """A database as the user named it: how to connect to it, how to show it, and what its refusals mean.

    Raises ConfigError when it is not the URL of a database whose driver is installed.
    """

    def __init__(self, url: str) -> None:
        self.shown = shown_url(url)
        self._url = self._driven(_parsed(url))
        self._secrets = _secrets_of(self._url)
        self.kind = self._url.get_backend_name()
        if self.kind == "sqlite":
            self._check_file()

    @property
    def for_optuna(self) -> str:
        """With braces doubled: Optuna fills in its schema version by `str.format`."""
        return self._url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}")

    @property
    def connecting(self) -> dict[str, str | int]:
        """Arguments of the driver, those in the URL left out."""
        return {name: value for name, value in _CONNECTING[self.kind].items() if name not in self._url.query}

    @property
    def file(self) -> Path | None:
        """The file of an SQLite database."""
        return Path(self._url.database) if self.kind == "sqlite" and self._url.database else None

    def without_secrets(self, text: str) -> str:
        """`text` with the password replaced by stars."""
        for secret in self._secrets:
            text = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", "***", text)
        return text

    def refusal(self, error: Exception, *, waited_s: float = 0.0) -> AutopruneError:
        """What a refusal of the database means and what to do."""
        cause = error.__cause__ if isinstance(error, StorageInternalError) and error.__cause__ else error
        said = cause.orig if isinstance(cause, DBAPIError) and cause.orig is not None else cause
        text = self.without_secrets((str(said).strip() or type(said).__name__).splitlines()[0])
        for pattern, kind, advice in _REFUSALS:
            if re.search(pattern, text, re.IGNORECASE):
                return kind(f"{self.shown}: {advice} ({text})")
        if is_transient(error):
            waited = f" within {waited_s:g} s" if waited_s else ""
            return RunError(
                f"{self.shown}: the database did not answer{waited} ({text}); see that it runs and can be reached from "
                "here. Everything recorded before is kept: start the same command again and it goes on from there"
            )
        return RunError(
            f"{self.shown}: the database refused ({text}). Everything recorded before is kept: put right what it says "
            "and start the same command again"
        )

    def _driven(self, url: URL) -> URL:
        """With a driver that is installed."""
        name, _, driver = url.drivername.partition("+")
        kind = _SPELLINGS.get(name, name)
        if kind not in _DRIVERS:
            raise ConfigError(
                f"{self.shown}: {name!r} is no kind of database that a study can be kept in; allowed: "
                f"{', '.join(sorted(_DRIVERS))}; {near_miss(name, [*_DRIVERS, *_SPELLINGS])}"
            )
        drivers = _DRIVERS[kind]
        if driver and driver not in drivers:
            raise ConfigError(
                f"{self.shown}: the driver {driver!r} is not supported; allowed for {kind}: {', '.join(drivers)}; or "
                f"leave it out: {kind}://..."
            )
        wanted = [driver] if driver else list(drivers)
        installed = [known for known in wanted if importlib.util.find_spec(drivers[known]) is not None]
        if not installed:
            raise ConfigError(
                f"{self.shown}: the driver {' or '.join(wanted)} is not installed; install one: "
                f"pip install 'autoprune[{kind}]'"
            )
        return url.set(drivername=f"{kind}+{installed[0]}")

    def _check_file(self) -> None:
        database = self._url.database or ""
        if database in {"", ":memory:"} or "mode=memory" in database or self._url.query.get("mode") == "memory":
            raise ConfigError(
                f"{self.shown}: a database in memory cannot be shared or resumed; name a file: sqlite:///study.db"
            )
        path = Path(database)
        if not database.startswith("file:") and not path.parent.is_dir():
            raise ConfigError(f"{self.shown}: there is no folder {str(path.parent)!r}; make it, or choose another")


_REFUSALS: tuple[tuple[str, type[AutopruneError], str], ...] = (
    (
        r"authentication failed|no password supplied|access denied for user|no pg_hba\.conf|role .* does not exist",
        ConfigError,
        "the server refuses the user or the password: check both, in the URL or in ~/.pgpass; characters such as @ : / "
        "in a password are written %40 %3A %2F",
    ),
    (
        r"^.*database .*does not exist|unknown database",
        ConfigError,
        "there is no such database on the server: make it first (createdb NAME), or check its name",
    ),
    (
        r"no such table|relation .* does not exist|table .* doesn't exist",
        RunError,
        "there is no study in it yet; start the search first",
    ),
    (
        r"permission denied|readonly database|command denied|read-only",
        RunError,
        "it may not be written to: grant this user the right to create tables and to write, or use another",
    ),
    (r"disk is full|no space left|disk full", RunError, "its disk is full; free some space on the server"),
    (r"file is not a database|malformed", RunError, "the file is no SQLite database, or damaged; choose another file"),
)

_GONE_STATES = ("08", "40", "57P", "53300", "55P03", "25006")
"""SQLSTATEs: connection, rolled back for a deadlock, shut down, too many clients, lock, a standby that takes over."""

_GONE_CODES = frozenset({1040, 1053, 1205, 1213, 2002, 2003, 2006, 2013, 2055, 4031})
"""The same in MySQL's numbers."""

_GONE_TEXTS = re.compile(r"locked|busy|disk i/o error|unable to open database file", re.IGNORECASE)
"""The same in SQLite's words."""


def is_transient(error: Exception) -> bool:
    """Whether a database is gone, or busy, just now, and the same may succeed later."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    if not isinstance(cause, DBAPIError) or isinstance(cause, IntegrityError):
        return isinstance(cause, PoolTimeoutError)
    if cause.connection_invalidated:
        return True
    text = str(cause.orig)
    if any(re.search(pattern, text, re.IGNORECASE) for pattern, _, _ in _REFUSALS) and "read-only" not in text:
        return False
    return _says_gone(cause.orig, text, connecting=isinstance(cause, OperationalError))


def _says_gone(origin: BaseException | None, text: str, *, connecting: bool) -> bool:
    """What the driver's own error says of it."""
    module = type(origin).__module__.partition(".")[0]
    if module == "sqlite3":
        return _GONE_TEXTS.search(text) is not None
    if module in {"pymysql", "MySQLdb"}:
        return bool(origin is not None and origin.args and origin.args[0] in _GONE_CODES)
    state = getattr(origin, "pgcode", None) or getattr(origin, "sqlstate", None)  # psycopg2's name and psycopg's
    return connecting if state is None else str(state).startswith(_GONE_STATES)  # none: there was no connection yet


def shown_url(url: str) -> str:
    """A URL fit for messages: its password, wherever it is, is replaced by stars."""
    scheme = re.match(r"[\w+.-]+://", url)
    start = scheme.end() if scheme else 0
    shown = url
    if not url.startswith("sqlite"):
        shown = url[:start] + re.sub(r"(?s)^([^:@]*):(.*)@", r"\1:***@", url[start:])
    return re.sub(r"(?i)([?&](?:password|passwd|sslpassword|passfile)=)[^&]*", r"\1***", shown)


def _parsed(url: str) -> URL:
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        parsed = None
    if parsed is None or "@" in (parsed.host or ""):
        raise ConfigError(
            f"{shown_url(url)}: is no database URL; allowed: postgresql://user:password@host/database, "
            "mysql://user:password@host/database, sqlite:///file.db; characters such as @ : / in a password are "
            "written %40 %3A %2F"
        )
    return parsed


def _secrets_of(url: URL) -> list[str]:
    options = [url.query.get(name) for name in ("password", "passwd", "sslpassword")]
    texts = [url.password, *(each for option in options for each in ([option] if isinstance(option, str) else []))]
    return [str(text) for text in texts if text]
