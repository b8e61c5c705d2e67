"""The database that remembers trials: an Optuna study that any number of processes and machines share.

Plain Optuna (`RDBStorage`) and optuna-dashboard read the same tables. What differs from it: a trial is created in one
transaction and ended in one, 10,000 trials are read in six queries, a server that is briefly gone is waited for, and
nothing is written twice when only its answer was lost. Leans on the inside of Optuna 5's `storages/_rdb` and
`_cached_storage.py`; the tests compare every result with the plain storage's. Knows nothing of who runs a trial.
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
import json
import re
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import sqlalchemy
from optuna.distributions import (
    BaseDistribution,
    check_distribution_compatibility,
    distribution_to_json,
    json_to_distribution,
)
from optuna.exceptions import DuplicatedStudyError, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.storages._base import DEFAULT_STUDY_NAME_PREFIX
from optuna.storages._cached_storage import _CachedStorage
from optuna.storages._rdb import models
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import URL, ColumnElement, Connection, Table, make_url
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from autoprune.errors import AutopruneError, ConfigError, RunError, near_miss
from autoprune.searching.journal import Drafting, Ending
from autoprune.searching.patience import Patience

R = TypeVar("R")

TOKEN = "autoprune:asked"
"""System attribute of a trial: a random text by which the process that made it finds it when the answer was lost."""

OPENING_S = 5.0
"""How long a server that does not answer is waited for when a study is opened: it may be a wrong name."""

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

_STUDIES: Table = models.StudyModel.__table__
_TRIALS: Table = models.TrialModel.__table__
_PARAMS: Table = models.TrialParamModel.__table__
_VALUES: Table = models.TrialValueModel.__table__
_STEPS: Table = models.TrialIntermediateValueModel.__table__
_USER: Table = models.TrialUserAttributeModel.__table__
_SYSTEM: Table = models.TrialSystemAttributeModel.__table__

_UNFINISHED = (TrialState.RUNNING, TrialState.WAITING)

_FEW = 200
"""Trials whose ids are named one by one in a query."""


class Database(Drafting, _CachedStorage):
    """Optuna's storage in a database, with few transactions and with patience.

    Every operation is tried again for `patience_s` seconds while the server is gone; `note` is told when the waiting
    begins and when it is over. With `create`, missing tables are made; without, none. Raises ConfigError for a URL,
    driver, user or password that is wrong, and RunError for a database that does not answer or cannot be used.
    """

    def __init__(
        self,
        url: str,
        *,
        note: Callable[[str], None] | None = None,
        patience_s: float = 120.0,
        create: bool = True,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        place = _Place(url)
        told = None if note is None else (lambda text: note(place.without_secrets(text)))
        brief = Patience(min(patience_s, OPENING_S), told, clock, sleep)
        tables = _opened(place, brief, create=create)
        self._asked = _Asked(tables, place, Patience(patience_s, told, clock, sleep))
        super().__init__(cast(RDBStorage, self._asked))

    def end_trial(self, trial_id: int, ending: Ending) -> None:
        """Record the end of a trial in one transaction: attributes, intermediate values, state and value.

        Raises what Optuna raises for a trial that does not exist (KeyError) or has ended (UpdateFinishedTrialError);
        not for one that this very call ended, whose answer was lost, here or in a call before that raised RunError.
        """
        self._asked.end_trial(trial_id, ending)

    def close(self) -> None:
        """Give the connections back."""
        self._asked.close()


class _Asked:
    """Optuna's tables, asked again while the server is gone: what `_CachedStorage` takes for its backend."""

    def __init__(self, tables: _Tables, place: _Place, patience: Patience) -> None:
        self._tables = tables
        self._place = place
        self._patience = patience
        self._in_doubt: dict[int, tuple[Ending, datetime]] = {}

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """A method of Optuna's that may be done twice without harm: reads, and writes that set something."""
        if name.startswith("__"):
            raise AttributeError(name)
        method = getattr(self._tables, name)

        def ask(*args: Any, **kwargs: Any) -> Any:
            return self._until_answered(lambda: method(*args, **kwargs))

        return ask

    def create_new_study(self, directions: Sequence[StudyDirection], study_name: str | None = None) -> int:
        name = study_name or DEFAULT_STUDY_NAME_PREFIX + str(uuid.uuid4())
        tries = itertools.count()

        def work() -> int:
            again = next(tries) > 0
            try:
                return self._tables.create_new_study(directions, name)
            except DuplicatedStudyError:
                if not again:
                    raise
                return self._tables.get_study_id_from_name(name)

        return self._until_answered(work)

    def delete_study(self, study_id: int) -> None:
        tries = itertools.count()

        def work() -> None:
            again = next(tries) > 0
            try:
                self._tables.delete_study(study_id)
            except KeyError:
                if not again:
                    raise

        self._until_answered(work)

    def _create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> FrozenTrial:
        token, tries = uuid.uuid4().hex, itertools.count()
        return self._until_answered(
            lambda: self._tables.insert_trial(study_id, template_trial, token, again=next(tries) > 0)
        )

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        if state.is_finished():
            self.end_trial(trial_id, Ending(state, None if values is None else tuple(values)))
            return True
        if state == TrialState.RUNNING and values is None:
            started, tries = _now(), itertools.count()
            return self._until_answered(lambda: self._tables.claim(trial_id, started, again=next(tries) > 0))
        return self._until_answered(lambda: self._tables.set_trial_state_values(trial_id, state, values))

    def end_trial(self, trial_id: int, ending: Ending) -> None:
        earlier = self._in_doubt.get(trial_id)
        doubtful = earlier is not None and earlier[0] == ending
        completed = earlier[1] if earlier is not None and doubtful else _now()
        tries = itertools.count(1 if doubtful else 0)
        self._in_doubt[trial_id] = (ending, completed)
        try:
            self._until_answered(lambda: self._tables.end(trial_id, ending, completed, again=next(tries) > 0))
        except (KeyError, UpdateFinishedTrialError):
            del self._in_doubt[trial_id]
            raise
        del self._in_doubt[trial_id]  # after any other error it stays: the next call with this ending finds out

    def get_heartbeat_interval(self) -> int | None:
        return None

    def close(self) -> None:
        self._tables.scoped_session.remove()
        self._tables.engine.dispose()

    def _until_answered(self, work: Callable[[], R]) -> R:
        try:
            return self._patience.attempt(work, is_transient, what=self._place.shown)
        except (SQLAlchemyError, StorageInternalError) as error:
            raise self._place.refusal(error, waited_s=self._patience.seconds) from error


class _Tables(RDBStorage):
    """Optuna's tables, read and written with few queries; each method is one transaction, with SQLAlchemy's errors.

    `again` says that an earlier attempt failed and may have been written nevertheless.
    """

    def __init__(self, place: _Place, *, create: bool) -> None:
        self._json: dict[str, BaseDistribution] = {}
        self._known: dict[tuple[int, str], BaseDistribution] = {}
        options = {"pool_pre_ping": True, "connect_args": place.connecting}
        super().__init__(place.for_optuna, options, skip_table_creation=not create)

    def insert_trial(self, study_id: int, template: FrozenTrial | None, token: str, *, again: bool) -> FrozenTrial:
        """A new trial as `template` says, with the token among its system attributes. Raises KeyError for no study."""
        with self.engine.begin() as connection:
            # Whoever holds this lock numbers trials; an earlier attempt that still goes on is waited for.
            locked = sqlalchemy.select(_STUDIES.c.study_id).where(_STUDIES.c.study_id == study_id).with_for_update()
            if connection.execute(locked).first() is None:
                raise KeyError(models.NOT_FOUND_MSG)
            earlier = self._made_before(connection, study_id, token) if again else None
            if earlier is not None:
                return earlier
            trial = copy.deepcopy(template) if template is not None else _blank()
            trial.system_attrs = {**trial.system_attrs, TOKEN: token}
            trial.datetime_start = _local(_utc(trial.datetime_start))
            trial.datetime_complete = _local(_utc(trial.datetime_complete))
            trial._trial_id, trial.number = _numbered(connection, study_id, trial)
            self._insert_params(connection, study_id, trial)
            _insert(connection, _USER, _attr_rows(trial._trial_id, trial.user_attrs))
            _insert(connection, _SYSTEM, _attr_rows(trial._trial_id, trial.system_attrs))
            _insert(connection, _VALUES, _value_rows(trial._trial_id, trial.values))
            _insert(connection, _STEPS, _step_rows(trial._trial_id, trial.intermediate_values))
        self._known.update({(study_id, name): known for name, known in trial.distributions.items()})
        return trial

    def claim(self, trial_id: int, started: datetime, *, again: bool) -> bool:
        """Turn a waiting trial into a running one; whether it was this call that did. Raises as Optuna does."""
        with self.engine.begin() as connection:
            change = (
                sqlalchemy.update(_TRIALS)
                .where(_TRIALS.c.trial_id == trial_id, _TRIALS.c.state == TrialState.WAITING)
                .values(state=TrialState.RUNNING, datetime_start=started)
            )
            if connection.execute(change).rowcount > 0:
                return True
            trial = self._one(connection, trial_id)
            self.check_trial_is_updatable(trial_id, trial.state)
            return again and self._same_time(trial.datetime_start, started)

    def end(self, trial_id: int, ending: Ending, completed: datetime, *, again: bool) -> None:
        """Write an ending, unless the trial has ended: then raise, or not when it was an earlier attempt at this."""
        with self.engine.begin() as connection:
            change = (
                sqlalchemy.update(_TRIALS)
                .where(_TRIALS.c.trial_id == trial_id, _TRIALS.c.state.in_(_UNFINISHED))
                .values(state=ending.state, datetime_complete=completed)
            )
            if connection.execute(change).rowcount == 0:
                trial = self._one(connection, trial_id)
                if not (again and self._same_time(trial.datetime_complete, completed) and _tells(trial, ending)):
                    raise UpdateFinishedTrialError(f"Trial#{trial.number} has already finished and can not be updated.")
                return
            self._upsert(connection, _USER, ("trial_id", "key"), _attr_rows(trial_id, ending.user_attrs))
            self._upsert(connection, _SYSTEM, ("trial_id", "key"), _attr_rows(trial_id, ending.system_attrs))
            self._upsert(connection, _VALUES, ("trial_id", "objective"), _value_rows(trial_id, ending.values))
            self._upsert(connection, _STEPS, ("trial_id", "step"), _step_rows(trial_id, ending.steps))

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """As Optuna's."""
        with self.engine.connect() as connection:
            return self._one(connection, trial_id)

    def _get_trials(
        self,
        study_id: int,
        states: Container[TrialState] | None,
        included_trial_ids: set[int],
        trial_id_greater_than: int,
    ) -> list[FrozenTrial]:
        condition: ColumnElement[bool] = _TRIALS.c.study_id == study_id
        if trial_id_greater_than > -1:
            newer = _TRIALS.c.trial_id > trial_id_greater_than
            older = [number for number in included_trial_ids if number <= trial_id_greater_than]
            condition &= sqlalchemy.or_(_TRIALS.c.trial_id.in_(older), newer) if older else newer
        with self.engine.connect() as connection:
            trials = self._read(connection, condition)
            if not trials:
                known = connection.execute(sqlalchemy.select(1).where(_STUDIES.c.study_id == study_id)).first()
                if known is None:
                    raise KeyError(models.NOT_FOUND_MSG)
        return trials if states is None else [trial for trial in trials if trial.state in states]

    def _one(self, connection: Connection, trial_id: int) -> FrozenTrial:
        found = self._read(connection, _TRIALS.c.trial_id == trial_id)
        if not found:
            raise KeyError(models.NOT_FOUND_MSG)
        return found[0]

    def _read(self, connection: Connection, condition: ColumnElement[bool]) -> list[FrozenTrial]:
        """The trials for which `condition` holds, by id: one query for them and one for each kind of what they have."""
        columns = ("trial_id", "number", "state", "datetime_start", "datetime_complete")
        query = sqlalchemy.select(*(_TRIALS.c[name] for name in columns)).where(condition).order_by(_TRIALS.c.trial_id)
        rows = connection.execute(query).all()
        if not rows:
            return []
        few = [row[0] for row in rows] if len(rows) <= _FEW else None
        params = _rows_of(
            connection, condition, few, _PARAMS, "param_id", "param_name", "param_value", "distribution_json"
        )
        values = _rows_of(connection, condition, few, _VALUES, "objective", "value", "value_type")
        steps = _rows_of(connection, condition, few, _STEPS, "step", "intermediate_value", "intermediate_value_type")
        user = _rows_of(connection, condition, few, _USER, "key", "value_json")
        system = _rows_of(connection, condition, few, _SYSTEM, "key", "value_json")
        value_of = models.TrialValueModel.stored_repr_to_value
        step_of = models.TrialIntermediateValueModel.stored_repr_to_intermediate_value
        trials = []
        for trial_id, number, state, started, completed in rows:
            named = [(name, raw, self._distribution(text)) for _, name, raw, text in sorted(params[trial_id])]
            told = [value_of(value, kind) for _, value, kind in sorted(values[trial_id], key=lambda row: row[0])]
            trials.append(
                FrozenTrial(
                    number=number,
                    state=state,
                    value=None,
                    values=told or None,
                    datetime_start=_local(started),
                    datetime_complete=_local(completed),
                    params={name: distribution.to_external_repr(raw) for name, raw, distribution in named},
                    distributions={name: distribution for name, _, distribution in named},
                    user_attrs={key: json.loads(text) for key, text in user[trial_id]},
                    system_attrs={key: json.loads(text) for key, text in system[trial_id]},
                    intermediate_values={step: step_of(value, kind) for step, value, kind in steps[trial_id]},
                    trial_id=trial_id,
                )
            )
        return trials

    def _distribution(self, text: str) -> BaseDistribution:
        if text not in self._json:
            self._json[text] = json_to_distribution(text)
        return self._json[text]

    def _insert_params(self, connection: Connection, study_id: int, trial: FrozenTrial) -> None:
        """Raises ValueError for a parameter whose distribution is another kind than in an earlier trial, as Optuna."""
        of_study = (
            sqlalchemy.select(_PARAMS.c.param_name, _PARAMS.c.distribution_json)
            .join(_TRIALS, _TRIALS.c.trial_id == _PARAMS.c.trial_id)
            .where(_TRIALS.c.study_id == study_id)
        )
        if any((study_id, name) not in self._known for name in trial.params):
            latest = (
                sqlalchemy.select(sqlalchemy.func.max(_TRIALS.c.trial_id))
                .where(_TRIALS.c.study_id == study_id, _TRIALS.c.trial_id < trial._trial_id)
                .scalar_subquery()
            )
            for name, text in connection.execute(of_study.where(_TRIALS.c.trial_id == latest)):
                self._known[study_id, name] = self._distribution(text)
        rows = []
        for name, value in trial.params.items():
            distribution = trial.distributions[name]
            known = self._known.get((study_id, name))
            if known is None:
                row = connection.execute(of_study.where(_PARAMS.c.param_name == name).limit(1)).first()
                known = distribution if row is None else self._distribution(row[1])
            check_distribution_compatibility(known, distribution)
            rows.append(
                {
                    "trial_id": trial._trial_id,
                    "param_name": name,
                    "param_value": distribution.to_internal_repr(value),
                    "distribution_json": distribution_to_json(distribution),
                }
            )
        _insert(connection, _PARAMS, rows)

    def _made_before(self, connection: Connection, study_id: int, token: str) -> FrozenTrial | None:
        marked = (
            sqlalchemy.select(_SYSTEM.c.trial_id)
            .join(_TRIALS, _TRIALS.c.trial_id == _SYSTEM.c.trial_id)
            .where(_TRIALS.c.study_id == study_id, _SYSTEM.c.key == TOKEN, _SYSTEM.c.value_json == json.dumps(token))
        )
        found = connection.execute(marked).first()
        return None if found is None else self._one(connection, found[0])

    def _upsert(
        self, connection: Connection, table: Table, unique: tuple[str, ...], rows: list[dict[str, Any]]
    ) -> None:
        if not rows:
            return
        changed = [name for name in rows[0] if name not in unique]
        if self.engine.name == "mysql":
            into_mysql = mysql.insert(table).values(rows)
            connection.execute(
                into_mysql.on_duplicate_key_update({name: into_mysql.inserted[name] for name in changed})
            )
            return
        insert = postgresql.insert if self.engine.name == "postgresql" else sqlite.insert
        into = insert(table).values(rows)
        connection.execute(
            into.on_conflict_do_update(index_elements=unique, set_={name: into.excluded[name] for name in changed})
        )

    def _same_time(self, stored: datetime | None, ours: datetime) -> bool:
        """MySQL keeps whole seconds."""
        if stored is None:
            return False
        tolerance = timedelta(seconds=1 if self.engine.name == "mysql" else 0)
        return abs(cast(datetime, _utc(stored)) - ours) <= tolerance


class _Place:
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


def _opened(place: _Place, patience: Patience, *, create: bool) -> _Tables:
    """The tables, made when they are missing. Processes that make them at the same moment get into each other's way."""
    if not create and place.file is not None and not place.file.exists():
        raise RunError(f"{place.shown}: there is no study in it yet; start the search first")
    tries = itertools.count()

    def made_meanwhile(error: Exception) -> bool:
        cause = error.__cause__ if isinstance(error, StorageInternalError) else error
        return isinstance(cause, IntegrityError) or "already exists" in str(cause)

    def work() -> _Tables:
        while True:
            try:
                return _Tables(place, create=create)
            except (SQLAlchemyError, StorageInternalError) as error:
                if not made_meanwhile(error) or next(tries) >= 20:
                    raise
                patience.sleep(0.1)

    try:
        return patience.attempt(work, is_transient, what=place.shown)
    except (SQLAlchemyError, StorageInternalError) as error:
        raise place.refusal(error, waited_s=patience.seconds) from error
    except RuntimeError as error:  # Optuna's check of the schema
        raise RunError(
            f"{place.shown}: its tables were made by another version of Optuna; bring the older side up to date: "
            "`pip install -U optuna` here, or `optuna storage upgrade --storage URL` once for the database"
        ) from error


def _numbered(connection: Connection, study_id: int, trial: FrozenTrial) -> tuple[int, int]:
    """Id and number of a trial's new row. Inserting comes first: SQLite has no other lock than that."""
    row = {
        "study_id": study_id,
        "state": trial.state,
        "datetime_start": _utc(trial.datetime_start),
        "datetime_complete": _utc(trial.datetime_complete),
    }
    key = connection.execute(sqlalchemy.insert(_TRIALS).values(row)).inserted_primary_key
    if key is None:
        raise RunError("the database did not say which trial it made")
    count = sqlalchemy.select(sqlalchemy.func.count()).where(
        _TRIALS.c.study_id == study_id, _TRIALS.c.trial_id < key[0]
    )
    number = int(connection.execute(count).scalar_one())
    connection.execute(sqlalchemy.update(_TRIALS).where(_TRIALS.c.trial_id == key[0]).values(number=number))
    return int(key[0]), number


def _insert(connection: Connection, table: Table, rows: list[dict[str, Any]]) -> None:
    if rows:
        connection.execute(sqlalchemy.insert(table), rows)


def _rows_of(
    connection: Connection, condition: ColumnElement[bool], few: list[int] | None, table: Table, *names: str
) -> Mapping[int, list[tuple[Any, ...]]]:
    """By trial: what a table has of each."""
    columns = [table.c[name] for name in names]
    query = sqlalchemy.select(table.c.trial_id, *columns)
    if few is None:
        query = query.join(_TRIALS, _TRIALS.c.trial_id == table.c.trial_id).where(condition)
    else:  # spares the server a join, for which it may read whole tables
        query = query.where(table.c.trial_id.in_(few))
    found: dict[int, list[tuple[Any, ...]]] = defaultdict(list)
    for row in connection.execute(query):
        found[row[0]].append(tuple(row[1:]))
    return found


def _attr_rows(trial_id: int, attrs: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"trial_id": trial_id, "key": key, "value_json": json.dumps(value)} for key, value in attrs.items()]


def _value_rows(trial_id: int, values: Iterable[float] | None) -> list[dict[str, Any]]:
    rows = []
    for objective, told in enumerate(values or ()):
        value, kind = models.TrialValueModel.value_to_stored_repr(told)
        rows.append({"trial_id": trial_id, "objective": objective, "value": value, "value_type": kind})
    return rows


def _step_rows(trial_id: int, steps: Mapping[int, float]) -> list[dict[str, Any]]:
    rows = []
    for step, told in steps.items():
        value, kind = models.TrialIntermediateValueModel.intermediate_value_to_stored_repr(told)
        rows.append({"trial_id": trial_id, "step": step, "intermediate_value": value, "intermediate_value_type": kind})
    return rows


def _tells(trial: FrozenTrial, ending: Ending) -> bool:
    """Whether a finished trial holds all that an ending says."""
    return (
        trial.state == ending.state
        and list(trial.values or ()) == list(ending.values or ())
        and all(trial.user_attrs.get(key) == json.loads(json.dumps(each)) for key, each in ending.user_attrs.items())
        and set(ending.system_attrs) <= set(trial.system_attrs)
        and set(ending.steps) <= set(trial.intermediate_values)
    )


def _blank() -> FrozenTrial:
    return FrozenTrial(
        number=-1,
        state=TrialState.RUNNING,
        value=None,
        datetime_start=datetime.now(),
        datetime_complete=None,
        params={},
        distributions={},
        user_attrs={},
        system_attrs={},
        intermediate_values={},
        trial_id=-1,
    )


def _now() -> datetime:
    """As Optuna's tables hold times: UTC, without saying so."""
    return datetime.now(tz=UTC).replace(tzinfo=None)


def _utc(local: datetime | None) -> datetime | None:
    return None if local is None else local.astimezone(UTC).replace(tzinfo=None)


def _local(stored: datetime | None) -> datetime | None:
    return None if stored is None else stored.replace(tzinfo=UTC).astimezone().replace(tzinfo=None)
