"""The grammar of budgets."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoprune.core.budget import Budget, parse_budgets, parse_fraction, parse_limit, shown
from autoprune.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "metric", "value", "relative"),
    [
        ("5ms", "latency", 5e-3, False),
        ("800us", "latency", 8e-4, False),
        ("800 µs", "latency", 8e-4, False),
        ("0.5 s", "latency", 0.5, False),
        ("50%", "latency", 0.5, True),
        ("64MBmemory", "memory", 64e6, False),
        ("1.5 MiB memory", "memory", 1.5 * 2**20, False),
        ("80%memory", "memory", 0.8, True),
        ("2x", "latency", 0.5, True),
        ("4xmacs", "macs", 0.25, True),
        ("60% params", "params", 0.6, True),
        ("300MMACs", "macs", 3e8, False),
        ("300 M MACs", "macs", 3e8, False),
        ("2MB", "size", 2e6, False),
        ("2MiB", "size", 2 * 2**20, False),
        ("1e6params", "params", 1e6, False),
    ],
)
def test_limits(text: str, metric: str, value: float, relative: bool) -> None:
    limit = parse_limit(text)
    assert (limit.metric, limit.relative) == (metric, relative)
    assert math.isclose(limit.value, value)


@pytest.mark.parametrize(
    "text", ["", "ms", "5", "0ms", "-5ms", "5 parsecs", "50%latte", "5ms 5ms", "nan ms", "1e999x9"]
)
def test_bad_limits_are_refused_with_the_grammar(text: str) -> None:
    with pytest.raises(ConfigError, match="budget: "):
        parse_limit(text)


@given(st.floats(1e-3, 1e6), st.sampled_from(["s", "ms", "us", "MMACs", "kparams", "MB", "%", "x", "%macs"]))
def test_a_written_limit_resolves_to_what_was_written(number: float, unit: str) -> None:
    limit = parse_limit(f"{number!r}{unit}")
    resolved = limit.resolve(8.0)
    assert resolved > 0
    assert (math.isclose(resolved, limit.value * 8)) if limit.relative else resolved == limit.value


@given(st.text(max_size=12))
def test_any_text_is_a_limit_or_a_config_error(text: str) -> None:
    try:
        limit = parse_limit(text)
    except ConfigError:
        return
    assert limit.value > 0


def test_a_family_is_the_product_of_alternatives() -> None:
    budgets = parse_budgets(["3ms,5ms", "2MB"])
    assert [budget.text for budget in budgets] == ["3ms + 2MB", "5ms + 2MB"]
    assert budgets[1].resolve({"latency": 1.0, "size": 1.0}) == {"latency": 5e-3, "size": 2e6}
    assert parse_budgets([]) == (Budget(),)


@pytest.mark.parametrize("texts", [["5ms", "3ms"], [","], ["5ms", "50%"]])
def test_budgets_that_cannot_hold_together(texts: list[str]) -> None:
    with pytest.raises(ConfigError):
        parse_budgets(texts)


@given(st.floats(0, 1))
def test_fractions_read_both_ways(value: float) -> None:
    assert parse_fraction(repr(value), key="max_drop") == value
    assert math.isclose(parse_fraction(f"{value * 100!r}%", key="max_drop"), min(value, 1), abs_tol=1e-12)


@pytest.mark.parametrize("text", ["", "two", "101%", "-1%", "nan", "1.5"])
def test_bad_fractions_name_their_key(text: str) -> None:
    with pytest.raises(ConfigError, match="max_drop"):
        parse_fraction(text, key="max_drop")


def test_costs_for_people() -> None:
    assert shown("latency", 4.93e-3) == "4.93 ms"
    assert shown("macs", 62.7e6) == "62.7 MMACs"
    assert shown("size", 512) == "512 B"
