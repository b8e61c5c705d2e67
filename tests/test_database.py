"""Studies in databases against plain Optuna's storage: SQLite always, PostgreSQL where there is a server to start."""

from __future__ import annotations

import time
from datetime import datetime, timedelta

import optuna
import pytest
import sqlalchemy
from database_trials import ENDINGS, comparable, plain, study_of, template, worker
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.exceptions import DuplicatedStudyError, UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from autoprune.errors import RunError
from autoprune.searching.database import Database
from autoprune.searching.journal import DRAFT_ID

pytest_plugins = ["postgres"]


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


@pytest.mark.parametrize("count", [1_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_many_trials_are_quick_to_ask_for(url, count):
    storage = Database(url)
    study = study_of(storage)
    names = [f"layer{number}" for number in range(30)]
    last = template(params=dict.fromkeys(names, 3), distributions={name: IntDistribution(0, 9) for name in names})
    storage.end_trial(storage.create_new_trial(study, last), ENDINGS[0])
    multiply(storage, count)
    times = {}

    def timed(name: str, work) -> object:
        start = time.perf_counter()
        result = work()
        times[name] = round(time.perf_counter() - start, 4)
        return result

    again = Database(url)
    trials = timed("open_s", lambda: again.get_all_trials(study, deepcopy=False))
    assert len(trials) == count
    queries: list[str] = []
    engine = again._asked._tables.engine
    sqlalchemy.event.listen(engine, "before_cursor_execute", lambda *told: queries.append(told[2]))
    timed("ask_again_s", lambda: again.get_all_trials(study, deepcopy=False))
    assert len(queries) == 2
    trial = timed("create_s", lambda: again.create_new_trial(study, last))
    assert timed("after_one_more_s", lambda: again.get_all_trials(study, deepcopy=False))[-1].number == count
    timed("end_s", lambda: again.end_trial(trial, ENDINGS[0]))
    timed("after_its_end_s", lambda: again.get_all_trials(study, deepcopy=False))
    late = trials[-300]._trial_id
    expected = plain(url)._get_trials(study, None, set(), late)
    assert again.get_all_trials(study, deepcopy=False)[-300:] == expected
    print(f"\n{count:,} trials of 30 parameters, {url.partition(':')[0]}: {times}")


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
