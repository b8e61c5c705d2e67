"""The database that remembers trials: an Optuna study that any number of processes and machines share.

Plain Optuna (`RDBStorage`) and optuna-dashboard read the same tables. What differs from it: a server that is briefly
gone is waited for, and nothing is written twice when only its answer was lost. Leans on the inside of Optuna 5's
`_cached_storage.py`. Knows no SQL and no driver: `database_tables` and `database_place` do. Knows nothing of who runs
a trial.
"""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar, cast

from optuna.exceptions import DuplicatedStudyError, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.storages._base import DEFAULT_STUDY_NAME_PREFIX
from optuna.storages._cached_storage import _CachedStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from autoprune.errors import RunError
from autoprune.searching.database_place import Place, is_transient
from autoprune.searching.database_tables import Tables
from autoprune.searching.journal import Drafting, Ending
from autoprune.searching.patience import Patience

R = TypeVar("R")

OPENING_S = 5.0
"""How long a server that does not answer is waited for when a study is opened: it may be a wrong name."""


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
        place = Place(url)
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

    def __init__(self, tables: Tables, place: Place, patience: Patience) -> None:
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


def _opened(place: Place, patience: Patience, *, create: bool) -> Tables:
    """The tables, made when they are missing. Processes that make them at the same moment get into each other's way."""
    if not create and place.file is not None and not place.file.exists():
        raise RunError(f"{place.shown}: there is no study in it yet; start the search first")
    tries = itertools.count()

    def made_meanwhile(error: Exception) -> bool:
        cause = error.__cause__ if isinstance(error, StorageInternalError) else error
        return isinstance(cause, IntegrityError) or "already exists" in str(cause)

    def work() -> Tables:
        while True:
            try:
                return Tables(place, create=create)
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


def _now() -> datetime:
    """As Optuna's tables hold times: UTC, without saying so."""
    return datetime.now(tz=UTC).replace(tzinfo=None)
