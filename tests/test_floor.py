"""Accuracy floors: what each metric takes, what is refused, and that a policy file keeps them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoprune.core.floor import SHARES, Drop, Floor, floor_of, recorded
from autoprune.errors import ConfigError
from autoprune.evaluators import evaluator
from autoprune.sections import LOWER_IS_BETTER, METRICS

SENSES = {name: name not in LOWER_IS_BETTER for name in METRICS} | {"m.py:score": True, "m.py:loss": False}


@pytest.mark.parametrize(
    ("metric", "given", "wanted"),
    [
        ("top1", "1%", Drop(0.01)),
        ("top1", 0.01, Drop(0.01)),
        ("map", "1e-2", Drop(0.01)),
        ("perplexity", "5%", Drop(0.05, relative=True)),
        ("perplexity", "150 %", Drop(1.5, relative=True)),
        ("perplexity", 0.5, Drop(0.5)),
        ("mse", "1e-4", Drop(1e-4)),
        ("psnr", "0.5dB", Drop(0.5)),
        ("psnr", "0.5 db", Drop(0.5)),
        ("psnr", "2%", Drop(0.02, relative=True)),
        ("m.py:score", "2%", Drop(0.02, relative=True)),
    ],
)
def test_a_percentage_is_points_of_a_share_and_relative_elsewhere(metric: str, given: object, wanted: Drop) -> None:
    floor = floor_of(metric, higher_is_better=SENSES[metric], max_drop=given)  # type: ignore[arg-type]
    assert floor.drop == wanted


@pytest.mark.parametrize(
    ("metric", "given"),
    [
        ("top1", 2),
        ("top1", "0.5dB"),
        ("psnr", "0.5ms"),
        ("mse", "0.5dB"),
        ("mae", -0.1),
        ("perplexity", "nan"),
        ("perplexity", "1e999"),
        ("m.py:loss", "five"),
    ],
)
def test_what_is_no_drop_says_what_is_one(metric: str, given: object) -> None:
    with pytest.raises(ConfigError, match=r"max_drop: .*write e\.g\. (1%|5%)"):
        floor_of(metric, higher_is_better=SENSES[metric], max_drop=given)  # type: ignore[arg-type]


def test_bounds_are_in_the_metrics_own_unit() -> None:
    assert floor_of("top1", higher_is_better=True, min_accuracy="92%").worst == 0.92
    assert floor_of("psnr", higher_is_better=True, min_accuracy="30dB").worst == 30
    assert floor_of("perplexity", higher_is_better=False, max_loss=12.5).worst == 12.5
    assert floor_of("m.py:score", higher_is_better=True, min_accuracy="-3").worst == -3
    for metric, sense, key in (
        ("top1", True, "min_accuracy"),
        ("mse", False, "max_loss"),
        ("psnr", True, "min_accuracy"),
    ):
        with pytest.raises(ConfigError, match=rf"{key}: '9x'"):
            floor_of(metric, higher_is_better=sense, **{key: "9x"})  # type: ignore[arg-type]


@pytest.mark.parametrize("metric", SENSES)
def test_a_bound_on_the_wrong_side_is_refused(metric: str) -> None:
    sense = SENSES[metric]
    wrong, right = ("max_loss", "min_accuracy") if sense else ("min_accuracy", "max_loss")
    with pytest.raises(ConfigError, match=rf"{wrong} is for metrics where .*{right}"):
        floor_of(metric, higher_is_better=sense, **{wrong: 0.5})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=wrong):
        recorded({wrong: 0.5}, metric, higher_is_better=sense)


@given(
    st.sampled_from(sorted(SENSES)), st.floats(0, 1), st.booleans(), st.none() | st.floats(0, 1),
    st.floats(-50, 50), st.floats(-50, 50),
)  # fmt: skip
def test_a_record_judges_as_the_floor_does(
    metric: str, drop: float, relative: bool, worst: float | None, value: float, dense: float
) -> None:
    floor = Floor(metric, SENSES[metric], Drop(drop, relative), worst)
    again = recorded(floor.record, metric, higher_is_better=SENSES[metric])
    assert again == floor
    assert again.shortfall(value, dense) == floor.shortfall(value, dense)


@given(st.floats(0, 40), st.floats(0, 40), st.floats(0, 1))
def test_less_is_better_is_the_mirror_of_more_is_better(value: float, dense: float, drop: float) -> None:
    for relative in (False, True):
        more, less = (Floor("m.py:f", sense, Drop(drop, relative)) for sense in (True, False))
        assert more.shortfall(value, dense) == pytest.approx(less.shortfall(-value, -dense))


def test_shortfalls_by_hand() -> None:
    rise = floor_of("perplexity", higher_is_better=False, max_drop="5%")
    assert rise.shortfall(4.19, 4.0) < 0 < rise.shortfall(4.21, 4.0)
    both = floor_of("top1", higher_is_better=True, max_drop="2%", min_accuracy=0.9)
    assert both.shortfall(0.90, 0.91) == pytest.approx(0, abs=1e-9)
    assert both.shortfall(0.95, 0.99) == pytest.approx(0.02)
    assert both.shortfall(0.85, 0.86) == pytest.approx(0.05)
    assert Floor().text == ""
    assert Floor().shortfall(0.0, 1.0) <= 0


def test_shares_lie_between_zero_and_one_and_more_is_better() -> None:
    assert set(SHARES) <= set(METRICS) - set(LOWER_IS_BETTER) - {"psnr"}
    assert all(evaluator(name).higher_is_better for name in SHARES if name != "map")
