"""Recovery in rounds, and trials that are scored after one: what engines train and climb."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from networks import IMAGE, Residual, assert_untouched, data_of, randomised, snapshot, workbench_of
from test_finetune import badly_pruned, lesson_of

from autoprune import api
from autoprune.core.target import Target
from autoprune.engines import freight
from autoprune.engines.base import train_here
from autoprune.goal import Plan, Recover
from autoprune.recover.course import Course, divergence, recovered
from autoprune.recover.finetune import Schedule
from autoprune.searching.climb import FEW, SHARES, Climber
from autoprune.workbench import Workbench

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return workbench_of(randomised(Residual()), IMAGE, tmp_path_factory.mktemp("bench"), calibration=256)


@pytest.fixture
def course(bench: Workbench) -> Course:
    schedule = Schedule(40, 3e-3)
    return Course(lesson_of(bench), badly_pruned(bench), bench.selection, bench.bank.norms, schedule, seed=0, rounds=4)


def test_the_state_of_the_best_round_is_kept(course: Course) -> None:
    untouched = snapshot(course.candidate.model)
    recovery, values = course.begin(), []
    while not recovery.over:
        values.append(recovery.round())
    assert len(values) == 4
    state = train_here(course)
    assert state is not None
    after = divergence(course.finished(state).model, course.selection, course.norms)
    assert after == pytest.approx(min(values))
    assert after < 0.8 * divergence(course.candidate.model, course.selection, course.norms)
    assert_untouched(course.candidate.model, untouched)


def test_a_candidate_that_training_makes_worse_stays_as_it_was(course: Course) -> None:
    wild = Course(
        course.lesson, course.candidate, course.selection, course.norms, Schedule(4, 50.0), seed=0, rounds=2
    )  # fmt: skip
    least, kept = recovered(wild, course.candidate)
    assert kept is course.candidate
    assert least == divergence(course.candidate.model, course.selection, course.norms)


def test_a_course_goes_on_elsewhere_as_it_would_have_here(course: Course) -> None:
    """Sent to another process after two rounds, with other hyperparameters."""
    here = course.begin()
    here.round()
    here.round()
    there = freight.unpack(freight.pack(course)).begin()
    there.load({name: tensor.clone() for name, tensor in here.state().items()})
    for recovery in (here, there):
        recovery.retune({"learning_rate": 1e-3, "weight_decay": 1e-5, "temperature": 3.0})
    assert here.round() == there.round()
    assert set(course.given) == set(course.ranges)


def test_a_climb_is_the_divergence_after_recovery(bench: Workbench) -> None:
    climber = Climber(bench.scorer, lesson_of(bench), Schedule(16, 1e-3), seed=0)
    choice = bench.space.normal(tuple(min(3, size - 1) for size in bench.space.sizes))
    rungs = list(climber.rungs(choice))
    assert len(rungs) == climber.height == 2 + len(SHARES)
    assert rungs[0].samples == min(len(bench.selection), rungs[0].samples) <= max(FEW + 128, len(bench.selection))
    assert [rung.attrs["recovery_steps"] for rung in rungs] == [0, 0, 2, 4, 8, 16]
    assert rungs[1].value == pytest.approx(bench.scorer(choice, None).value, rel=1e-5)
    last = climber(choice, None)
    assert last.value == rungs[-1].value < rungs[1].value
    assert last.seen is not None
    assert last.seen.mean() == pytest.approx(last.value)


def test_a_search_whose_trials_recover_is_another_study(tmp_path: Path) -> None:
    """Scores mean something else, so a search without recovery does not go on with them."""
    model = randomised(Residual())
    calibration, validation = data_of(model, IMAGE)
    state = copy.deepcopy(model.state_dict())
    counts = []
    for recover in (Recover(), Recover(8, batch=16, trials=True)):
        outcome = api.search(
            model, calibration=calibration, validation=validation, budget="50%macs", target=Target("torch"),
            run=tmp_path, plan=Plan(trials=6, finalists=2, recover=recover),
        )  # fmt: skip
        counts.append([trial.number for trial in outcome.record.trials])
    assert counts == [list(range(6)), list(range(6))]
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
