from __future__ import annotations

import numpy as np
import pytest
from search_problems import every_choice, toy_problem, toy_space

from autoprune.searching.baselines import global_magnitude, uniform


@pytest.mark.parametrize("coupling", [0.0, 1.0])
def test_uniform_is_the_widest_common_share_that_fits(coupling):
    problem, _ = toy_problem(toy_space((2, 1), 5, methods=("l2", "obs")), coupling=coupling)
    choice = uniform(problem, method="obs")
    assert choice is not None
    assert problem.fits(choice)
    options = [entry.options[index] for entry, index in zip(problem.space.entries, choice, strict=True)]
    channels = [o for o, e in zip(options, problem.space.entries, strict=True) if e.unit.narrows]
    blocks = [o for o, e in zip(options, problem.space.entries, strict=True) if e.unit.kind == "block"]
    assert all(option.method == "keep" for option in blocks)
    assert {option.method for option in channels} == {"obs"}
    assert len({option.keep for option in channels}) == 1
    wider = tuple(
        index - 2 if entry.unit.narrows else index for entry, index in zip(problem.space.entries, choice, strict=True)
    )
    if min(wider) >= 0:
        assert not problem.fits(wider)


def test_baselines_are_none_when_nothing_fits_and_dense_when_all_does():
    space = toy_space((2,), 3)
    impossible, _ = toy_problem(space, share=0.01)
    easy, _ = toy_problem(space, share=1.0)
    scores = {name: np.arange(1.0, 17.0).tolist() for name in space.names}
    assert uniform(impossible, method="l2") is None
    assert global_magnitude(impossible, scores) is None
    assert uniform(easy, method="l2") == space.dense
    assert global_magnitude(easy, scores) == space.dense


def test_global_magnitude_takes_from_units_with_many_small_channels():
    problem, _ = toy_problem(toy_space((), 3, alone=3), share=0.9)
    flat, steep = [1.0] * 16, [8.0] * 4 + [0.01] * 12
    names = problem.space.names
    choice = global_magnitude(problem, {names[0]: flat, names[1]: steep, names[2]: flat})
    assert choice is not None
    assert problem.fits(choice)
    assert choice[1] > choice[0]
    assert choice[1] > choice[2]


def test_global_magnitude_does_not_care_about_a_units_scale():
    problem, _ = toy_problem(toy_space((1,), 4, alone=3), share=0.6)
    rng = np.random.default_rng(0)
    scores = {
        entry.unit.name: rng.gamma(2.0, size=entry.unit.width) for entry in problem.space.entries if entry.unit.narrows
    }
    scaled = {name: 100.0 * (1 + index) * values for index, (name, values) in enumerate(scores.items())}
    choice = global_magnitude(problem, scores)
    assert choice == global_magnitude(problem, scaled)
    assert choice is not None
    everything = every_choice(problem.space)
    assert problem.fits_each(everything).any()
