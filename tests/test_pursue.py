"""What is done where a prediction was too high: budget is left, so the table is corrected and the search repeated."""

from types import SimpleNamespace
from typing import Any

import pytest

from autoprune.pursue import _Attempt, _either, _wasted

DENSE_S = 10e-3
BENCH: Any = SimpleNamespace(costs=SimpleNamespace(dense={"latency": DENSE_S}))
LIMIT = {"latency": 5e-3}


def contender(place: int, *, predicted_ms: float, measured_ms: float, divergence: float = 1.0) -> Any:
    timing = SimpleNamespace(ratio=measured_ms * 1e-3 / DENSE_S)
    predicted = {"latency": predicted_ms * 1e-3}
    return SimpleNamespace(choice=(place,), predicted=predicted, timing=timing, divergence=divergence)


def attempt(finalists: list[Any], keeping: list[Any] | None = None) -> _Attempt:
    return _Attempt(keeping if keeping is not None else finalists, finalists, [], Any, Any)  # type: ignore[arg-type]


@pytest.mark.parametrize(("predicted_ms", "measured_ms", "wasted"), [
    (4.95, 4.0, True),  # at the limit, and a fifth faster than thought
    (4.95, 4.9, False),  # as thought
    (4.0, 3.2, False),  # faster than thought, but it did not stop at the limit
    (4.95, 5.5, False),  # slower: another matter
])  # fmt: skip
def test_budget_that_is_left_is_seen(predicted_ms: float, measured_ms: float, *, wasted: bool) -> None:
    found = _wasted(
        BENCH, attempt([contender(i, predicted_ms=predicted_ms, measured_ms=measured_ms) for i in range(3)]), LIMIT
    )
    assert (found is not None) == wasted
    assert found is None or found == pytest.approx(measured_ms / predicted_ms)


def test_the_best_of_two_attempts_go_on() -> None:
    first = [contender(i, predicted_ms=4.9, measured_ms=4, divergence=d) for i, d in enumerate((0.3, 0.5))]
    second = [contender(i, predicted_ms=4.9, measured_ms=5, divergence=d) for i, d in ((1, 0.5), (2, 0.1), (3, 0.2))]
    both = _either(attempt(first), attempt(second, keeping=second[2:]))
    assert [each.choice for each in both.finalists] == [(2,), (3,), (0,)]
    assert [each.choice for each in both.keeping] == [(3,), (0,), (1,)]
