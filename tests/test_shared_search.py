"""Searches that several processes and machines share through a database."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from networks import IMAGE, Residual, data_of, randomised
from optuna.storages import RDBStorage

from autoprune import api
from autoprune.config import Config, load_run, save_run, without_password
from autoprune.core.target import Target
from autoprune.engines.local import Local
from autoprune.errors import HelpedError
from autoprune.goal import Plan
from autoprune.searching.board import Board
from autoprune.verify import Stopwatch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _short_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Stopwatch.of
    monkeypatch.setattr(
        Stopwatch, "of", lambda *args, **kwargs: dataclasses.replace(made(*args, **kwargs), seconds_each=0.05, rounds=5)
    )


def searched(folder: Path, url: str, *, trials: int, budget: str) -> api.Outcome:
    model = randomised(Residual())
    calibration, validation = data_of(model, IMAGE)
    return api.search(
        model, calibration=calibration, validation=validation, budget=budget, target=Target("torch"), run=folder,
        plan=Plan(trials=trials, finalists=2, storage=url),
    )  # fmt: skip


def told(url: str) -> int:
    """Evaluated trials of the first search at 70 %; corrected tables may have been searched with after it."""
    storage = RDBStorage(url)
    (name,) = [study.study_name for study in storage.get_all_studies() if study.study_name.startswith("70% [")]
    trials = storage.get_all_trials(storage.get_study_id_from_name(name))
    return sum(trial.state.is_finished() and trial.values is not None for trial in trials)


def test_a_machine_that_is_not_the_target_helps_and_claims_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes the latencies that the target measured, adds trials to the same study, and leaves the rest."""
    url = f"sqlite:///{tmp_path}/study.db"
    outcome = searched(tmp_path / "target", url, trials=10, budget="70%")
    assert outcome.folder.name == "70pct"
    assert told(url) == 10
    monkeypatch.setattr(Local, "where", lambda self: "another machine")
    with pytest.raises(HelpedError, match="written where the latencies were measured"):
        searched(tmp_path / "helper", url, trials=16, budget="70%")
    assert not (tmp_path / "helper" / "70pct").exists()
    monkeypatch.undo()
    assert told(url) == 16, "the helper's six are in the target's study"
    searched(tmp_path / "target", url, trials=16, budget="70%")
    assert told(url) == 16, "and none of our own came to them"


def test_without_a_latency_every_machine_writes_its_own_policy(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    outcomes = [
        searched(tmp_path / name, url, trials=trials, budget="50%macs") for name, trials in (("a", 8), ("b", 12))
    ]
    assert [len(outcome.record.trials) for outcome in outcomes] == [8, 12]
    assert all((tmp_path / name / "50pctmacs" / "policy.yaml").is_file() for name in "ab")


def test_a_text_on_the_board_is_made_once(tmp_path: Path) -> None:
    """By whoever comes first; who is killed while making it is replaced."""
    url = f"sqlite:///{tmp_path}/board.db"
    code = f"""
import os, signal, sys
from autoprune.searching.board import Board
Board({url!r}).once("table x", lambda: os.kill(os.getpid(), signal.SIGKILL))
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode < 0, done.stderr
    notes: list[str] = []
    board = Board(url, note=notes.append)
    assert board.once("table x", lambda: "made") == ("made", True)
    assert board.once("table x", lambda: pytest.fail("is there")) == ("made", False)
    assert board.once("table y", lambda: "other") == ("other", True)


def test_others_wait_for_who_makes_a_text(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/board.db"
    code = f"""
import sys, time
from autoprune.searching.board import Board
def make():
    time.sleep(1.5)
    return sys.argv[1]
print(*Board({url!r}, note=lambda text: print(text, file=sys.stderr)).once("latency k", make))
"""
    Board(url)  # tables are there
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(n)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for n in range(3)
    ]
    found = [process.communicate(timeout=90) for process in processes]
    texts = [out.split() for out, _ in found]
    assert len({text[0] for text in texts}) == 1, found
    assert sorted(text[1] for text in texts) == ["False", "False", "True"]
    assert sum("another process measures it" in error for _, error in found) == 2


@pytest.mark.parametrize(
    ("url", "kept"),
    [
        ("postgresql://me:secret@host:5432/name", "postgresql://me@host:5432/name"),
        ("postgresql+psycopg2://me:s%40:x@host/name", "postgresql+psycopg2://me@host/name"),
        ("postgresql://me@host/name", "postgresql://me@host/name"),
        ("sqlite:////tmp/a.db", "sqlite:////tmp/a.db"),
    ],
)
def test_passwords_are_not_written_down(url: str, kept: str, tmp_path: Path) -> None:
    assert without_password(url) == kept
    config = Config.model_validate({"model": "a:b", "data": "a:c", "budget": "5ms", "search": {"storage": url}})
    save_run(config, tmp_path, tmp_path)
    assert "secret" not in (tmp_path / "run.json").read_text()
    assert load_run(tmp_path, {})[0].search.storage == kept


def test_a_run_whose_project_was_moved_is_resumed_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config.model_validate({"model": "a.py:b", "data": "a.py:c", "budget": "5ms"})
    save_run(config, tmp_path / "gone", tmp_path)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert load_run(tmp_path, {})[1] == here
