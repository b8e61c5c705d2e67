"""Optuna's tables in a database, read and written with few queries: the SQL, one transaction for each method.

A trial is created in one transaction and ended in one, and 10,000 trials are read in six queries. Leans on the inside
of Optuna 5's `storages/_rdb`; the tests compare every result with the plain storage's. Knows no patience: a server that
is gone raises SQLAlchemy's errors.
"""

from __future__ import annotations

import copy
import json
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import sqlalchemy
from optuna.distributions import (
    BaseDistribution,
    check_distribution_compatibility,
    distribution_to_json,
    json_to_distribution,
)
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import ColumnElement, Connection, Table
from sqlalchemy.dialects import mysql, postgresql, sqlite

from autoprune.errors import RunError
from autoprune.searching.database_place import Place
from autoprune.searching.journal import Ending, blank_trial

TOKEN = "autoprune:asked"
"""System attribute of a trial: a random text by which the process that made it finds it when the answer was lost."""

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


class Tables(RDBStorage):
    """Optuna's tables, read and written with few queries; each method is one transaction, with SQLAlchemy's errors.

    `again` says that an earlier attempt failed and may have been written nevertheless.
    """

    def __init__(self, place: Place, *, create: bool) -> None:
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
            trial = copy.deepcopy(template) if template is not None else blank_trial(-1, -1)
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


def _utc(local: datetime | None) -> datetime | None:
    return None if local is None else local.astimezone(UTC).replace(tzinfo=None)


def _local(stored: datetime | None) -> datetime | None:
    return None if stored is None else stored.replace(tzinfo=UTC).astimezone().replace(tzinfo=None)
