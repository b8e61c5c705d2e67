"""Trials to write into databases and to compare there; shared by the databases' tests."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import sqlalchemy
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import RDBStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Engine

from autoprune.searching.database_place import Place
from autoprune.searching.database_tables import TOKEN
from autoprune.searching.journal import DRAFT_ID, Ending


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
    return RDBStorage(Place(url).for_optuna)


def engine_of(url: str) -> Engine:
    return sqlalchemy.create_engine(Place(url).for_optuna.replace("{{", "{"))


def study_of(storage) -> int:
    return storage.create_new_study([StudyDirection.MINIMIZE], "search")


WORKER = """
import sys
import time
sys.path.insert(0, sys.argv[2])
import optuna
from database_trials import ENDINGS, template
from autoprune.searching.database import Database
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
    time.sleep(float(sys.argv[5]))
"""


def worker(url: str, name: str, trials: int, pause_s: float = 0.0) -> subprocess.Popen:
    """A process that asks for and tells so many trials, and prints the number of each when it is told."""
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": str(tests.parent)}
    command = [sys.executable, "-c", WORKER, url, str(tests), name, str(trials), str(pause_s)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
