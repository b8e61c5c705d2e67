"""Evaluators: the contract, oracles, and what they say when shapes are wrong."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from autoprune import evaluators
from autoprune.errors import ConfigError, DataError
from autoprune.evaluators.base import Evaluator
from autoprune.evaluators.divergence import DivergenceKind, divergence
from autoprune.evaluators.function import Function
from autoprune.evaluators.mse import MSE
from autoprune.evaluators.top_k import TopK, top1, top5
from autoprune.testing import EvaluatorContract

torch.set_num_threads(1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- the contract --------------------------------------------------------------------------------------------------


class TestTop1(EvaluatorContract):
    def make(self) -> Evaluator:
        return evaluators.evaluator("top1")


class TestTop5(EvaluatorContract):
    def make(self) -> Evaluator:
        return evaluators.evaluator("top5")


class TestMSE(EvaluatorContract):
    def make(self) -> Evaluator:
        return evaluators.evaluator("mse")

    def example(self) -> tuple[Tensor, Tensor]:
        return normal(6, 2, 3), normal(6, 2, 3, seed=1)


class TestFunction(EvaluatorContract):
    def make(self) -> Evaluator:
        return Function(lambda outputs, _: outputs.abs().sum(dim=1), "size", higher_is_better=False)


def test_table_and_unknown_name() -> None:
    assert {name: evaluators.evaluator(name).name for name in evaluators.EVALUATORS} == {
        name: name for name in evaluators.EVALUATORS
    }
    with pytest.raises(ConfigError, match="'top1'"):
        evaluators.evaluator("top11")


# ---- top k ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 5])
def test_top_k_against_sklearn(k: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    outputs, targets = normal(50, 8), torch.arange(50) % 8
    found = float(TopK(k).per_sample(outputs, targets).mean())
    expected = metrics.top_k_accuracy_score(targets.numpy(), outputs.numpy(), k=k, labels=list(range(8)))
    assert found == pytest.approx(float(expected))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 999))
def test_top_k_against_sorting_with_ties(k: int, extra: int, seed: int) -> None:
    outputs = normal(10, k + extra, seed=seed).round()  # rounded: many ties
    targets = torch.arange(10) % (k + extra)
    expected = []
    for row, label in zip(outputs.tolist(), targets.tolist(), strict=True):
        best = sorted(range(len(row)), key=lambda index, row=row: (-row[index], index))[:k]  # type: ignore[misc]
        expected.append(float(label in best))
    assert TopK(k).per_sample(outputs, targets).tolist() == expected


def test_a_collapsed_model_scores_no_better_than_chance() -> None:
    targets = torch.arange(20) % 10
    assert float(top1().per_sample(torch.zeros(20, 10), targets).mean()) == pytest.approx(0.1)
    assert float(top1().per_sample(torch.full((20, 10), torch.nan), targets).mean()) == 0.0


@pytest.mark.parametrize(
    ("outputs", "targets", "message"),
    [
        (torch.zeros(4, 10), torch.zeros(3, dtype=torch.int64), r"\(4, 10\).*\(3,\).*\(samples, classes\)"),
        (torch.zeros(4, 10), torch.zeros(4, 10), r"\(4, 10\).*\(4, 10\).*\(samples,\)"),
        (torch.zeros(4), torch.zeros(4, dtype=torch.int64), r"\(4,\).*expected \(samples, classes\)"),
        (torch.zeros(4, 10), torch.zeros(4), "torch.float32.*integer class labels"),
        (torch.zeros(2, 10), torch.tensor([3, 12]), "label 12 but 10 classes.*0 to 9"),
        (torch.zeros(2, 10), torch.tensor([3, -1]), "label -1 but 10 classes"),
        (torch.zeros(2, 3), torch.tensor([0, 1]), r"\(2, 3\).*at least 5 classes"),
    ],
)
def test_top_k_says_what_is_wrong(outputs: Tensor, targets: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        top5().per_sample(outputs, targets)


def test_top_k_needs_a_positive_k() -> None:
    with pytest.raises(ConfigError, match="not 0"):
        TopK(0)


# ---- mean squared error --------------------------------------------------------------------------------------------


def test_mse_against_loop() -> None:
    outputs, targets = normal(5, 3), normal(5, 3, seed=1)
    pairs = zip(outputs.tolist(), targets.tolist(), strict=True)
    expected = [sum((a - b) ** 2 for a, b in zip(*pair, strict=True)) / 3 for pair in pairs]
    assert MSE().per_sample(outputs, targets).tolist() == pytest.approx(expected)
    flat = MSE().per_sample(outputs[:, 0], targets[:, 0])
    assert flat.tolist() == pytest.approx((outputs[:, 0] - targets[:, 0]).square().tolist())


def test_mse_does_not_broadcast() -> None:
    with pytest.raises(DataError, match=r"\(4, 1\).*\(4,\).*same shape"):
        MSE().per_sample(torch.zeros(4, 1), torch.zeros(4))


# ---- divergence ----------------------------------------------------------------------------------------------------


def naive_kl(dense: list[float], candidate: list[float]) -> float:
    def softmax(logits: list[float]) -> list[float]:
        powers = [math.exp(logit - max(logits)) for logit in logits]
        return [power / sum(powers) for power in powers]

    pairs = zip(softmax(dense), softmax(candidate), strict=True)
    return sum(p * math.log(p / q) for p, q in pairs)


def test_kl_against_loop() -> None:
    dense, candidate = normal(6, 4), normal(6, 4, seed=1)
    pairs = zip(dense.tolist(), candidate.tolist(), strict=True)
    found = divergence(dense, candidate, "kl")
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx([naive_kl(*pair) for pair in pairs])


def test_kl_stands_large_and_infinite_logits() -> None:
    dense = torch.tensor([[1000.0, 0.0], [0.0, -torch.inf], [0.0, 0.0]])
    found = divergence(dense, torch.tensor([[0.0, 1000.0], [0.0, 0.0], [0.0, -torch.inf]]), "kl").tolist()
    assert found == pytest.approx([1000.0, math.log(2.0), math.inf])


def test_kl_over_positions_is_their_mean() -> None:
    dense, candidate = normal(2, 4, 3), normal(2, 4, 3, seed=1)
    flat = [divergence(dense[:, :, position], candidate[:, :, position], "kl") for position in range(3)]
    torch.testing.assert_close(divergence(dense, candidate, "kl"), torch.stack(flat).mean(dim=0))


def test_relative_squares_against_loop() -> None:
    dense, candidate = normal(5, 3), normal(5, 3, seed=1)
    energy = sum(value**2 for row in dense.tolist() for value in row) / 5
    pairs = zip(dense.tolist(), candidate.tolist(), strict=True)
    expected = [sum((a - b) ** 2 for a, b in zip(*pair, strict=True)) / energy for pair in pairs]
    assert divergence(dense, candidate, "mse").tolist() == pytest.approx(expected)
    assert divergence(7.0 * dense, 7.0 * candidate, "mse").tolist() == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["kl", "mse"])
def test_divergence_of_equals_is_zero_and_of_nan_infinite(kind: DivergenceKind) -> None:
    dense = normal(3, 4)
    assert divergence(dense, dense, kind).tolist() == [0.0] * 3
    broken = dense.clone()
    broken[1, 2] = torch.nan
    assert divergence(dense, broken, kind).tolist() == [0.0, math.inf, 0.0]


@pytest.mark.parametrize("kind", ["kl", "mse"])
def test_divergence_says_what_is_wrong(kind: DivergenceKind) -> None:
    with pytest.raises(DataError, match=r"\(3, 4\).*\(3, 5\).*expected the same shape"):
        divergence(torch.zeros(3, 4), torch.zeros(3, 5), kind)


# ---- a user's function ---------------------------------------------------------------------------------------------


def test_function_per_sample_and_scalar() -> None:
    outputs, targets = normal(4, 2), torch.zeros(4)
    each = Function(lambda out, _: out.sum(dim=1), "sum", higher_is_better=True)
    assert each.per_sample(outputs, targets).tolist() == pytest.approx(outputs.sum(dim=1).tolist())
    for whole in (lambda *_: 0.25, lambda *_: torch.tensor(0.25)):
        values = Function(whole, "whole", higher_is_better=True).per_sample(outputs, targets)
        assert values.tolist() == [0.25] * 4


def test_function_of_another_shape_is_an_error() -> None:
    wrong = Function(lambda out, _: out, "wrong", higher_is_better=True)
    with pytest.raises(DataError, match=r"wrong: .*\(4, 2\).*expected \(4,\)"):
        wrong.per_sample(torch.zeros(4, 2), torch.zeros(4))
