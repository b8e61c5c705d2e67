"""Windows over a token stream: every token is scored once, with the context that lm-evaluation-harness gives it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoprune.errors import DataError
from autoprune.windows import windows


def rolling(tokens: list[int], prefix: int, length: int, context: int) -> list[tuple[list[int], list[int]]]:
    """What lm-evaluation-harness does: the tokens that a model sees, and those it has to predict, for each window."""
    first = tokens[:length]
    found = [([prefix, *first[:-1]], first)]
    done = len(first)
    while done < len(tokens):
        ahead = min(len(tokens) - done, length - context + 1)
        end = done + ahead
        found.append((tokens[end - length - 1 : end - 1], tokens[end - ahead : end]))
        done = end
    return found


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 40))
def test_windows_are_those_of_the_harness(length: int, stride: int, extra: int) -> None:
    stride = min(stride, length)
    tokens = list(range(100, 100 + length + extra))
    inputs, targets = windows(torch.tensor(tokens), length=length, stride=stride, prefix=7)
    expected = rolling(tokens, 7, length, length - stride + 1)
    assert inputs.dtype == targets.dtype == torch.int64
    assert len(inputs) == len(targets) == len(expected)
    for seen, wanted, (context, predicted) in zip(inputs.tolist(), targets.tolist(), expected, strict=True):
        padded = [*tokens[: length - len(context)], *context] if len(context) < length else context
        assert seen == padded or seen[: len(context)] == context
        assert wanted[-len(predicted) :] == predicted
        assert wanted[: -len(predicted)] == [-100] * (length - len(predicted))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 40))
def test_every_token_but_the_first_counts_once(length: int, stride: int, extra: int) -> None:
    tokens = torch.arange(length + extra)
    inputs, targets = windows(tokens, length=length, stride=min(stride, length))
    assert targets[targets != -100].tolist() == tokens[1:].tolist()
    scored = targets != -100
    assert torch.equal(targets[scored], inputs[scored] + 1)  # the next token of a stream that counts up


def test_windows_by_hand() -> None:
    inputs, targets = windows(torch.arange(8), length=4, stride=2)
    assert inputs.tolist() == [[0, 1, 2, 3], [2, 3, 4, 5], [3, 4, 5, 6]]
    assert targets.tolist() == [[1, 2, 3, 4], [-100, -100, 5, 6], [-100, -100, -100, 7]]
    assert windows(torch.arange(9), length=4)[1].tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]


@pytest.mark.parametrize(
    ("tokens", "length", "stride", "message"),
    [
        (torch.arange(9), 4, 5, "length 4 and stride 5; expected 1 <= stride <= length"),
        (torch.arange(9), 0, None, "length 0"),
        (torch.zeros(9), 4, 2, r"\(9,\) torch.float32; expected integers \(count,\)"),
        (torch.zeros(2, 9, dtype=torch.int64), 4, 2, r"\(2, 9\)"),
        (torch.arange(4), 4, 2, "4 tokens make no window of length 4; .*at most 3"),
    ],
)
def test_windows_say_what_is_wrong(tokens: torch.Tensor, length: int, stride: int | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        windows(tokens, length=length, stride=stride)
