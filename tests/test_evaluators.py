"""Evaluators: the contract, oracles, and what they say when shapes are wrong."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from autoprune import evaluators
from autoprune.errors import ConfigError, DataError
from autoprune.evaluators.average_precision import MeanAveragePrecision
from autoprune.evaluators.base import Evaluator
from autoprune.evaluators.divergence import DivergenceKind, divergence
from autoprune.evaluators.function import Function
from autoprune.evaluators.mae import MAE
from autoprune.evaluators.miou import ImageMeanIoU, MeanIoU
from autoprune.evaluators.mse import MSE
from autoprune.evaluators.perplexity import LARGEST, Perplexity
from autoprune.evaluators.psnr import LARGEST_DB, PSNR
from autoprune.evaluators.top_k import TopK, top1, top5
from autoprune.sections import LOWER_IS_BETTER, METRICS
from autoprune.testing import EvaluatorContract

torch.set_num_threads(1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def segmented(samples: int, *, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits (samples, classes, 5, 6) and class maps of which some positions do not count."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(classes, (samples, 5, 6), generator=generator)
    targets[:, 0, :3] = 255
    return torch.randn(samples, classes, 5, 6, generator=generator), targets


def spoken(samples: int, *, tokens: int, vocabulary: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits (samples, tokens, vocabulary) and next tokens; each sample has another number of them that count."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(vocabulary, (samples, tokens), generator=generator)
    for sample in range(samples):
        targets[sample, : sample % tokens] = -100
    return torch.randn(samples, tokens, vocabulary, generator=generator), targets


def detected(samples: int, *, boxes: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Objects of three classes in images of 100 by 100, and detections beside them, some in vain, some padding."""
    generator = torch.Generator().manual_seed(seed)
    corner = 60 * torch.rand(samples, boxes, 2, generator=generator)
    truth = torch.cat([corner, corner + 10 + 30 * torch.rand(samples, boxes, 2, generator=generator)], dim=2)
    labels = torch.randint(3, (samples, boxes, 1), generator=generator).float()
    moved = truth + 4 * torch.randn(samples, boxes, 4, generator=generator)
    scores = torch.rand(samples, boxes, 1, generator=generator)
    scores[:, -1] = 0.0
    targets = torch.cat([truth, labels], dim=2)
    targets[:, 0, 4] = -1.0
    return torch.cat([moved, scores, labels], dim=2), targets


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


class TestMAE(TestMSE):
    def make(self) -> Evaluator:
        return evaluators.evaluator("mae")


class TestPSNR(TestMSE):
    def make(self) -> Evaluator:
        return evaluators.evaluator("psnr")


class TestMeanIoU(EvaluatorContract):
    def make(self) -> Evaluator:
        return evaluators.evaluator("miou")

    def example(self) -> tuple[Tensor, Tensor]:
        return segmented(6, classes=4)


class TestImageMeanIoU(TestMeanIoU):
    def make(self) -> Evaluator:
        return evaluators.evaluator("miou_image")


class TestPerplexity(EvaluatorContract):
    def make(self) -> Evaluator:
        return evaluators.evaluator("perplexity")

    def example(self) -> tuple[Tensor, Tensor]:
        return spoken(5, tokens=7, vocabulary=9)


class TestMeanAveragePrecision(EvaluatorContract):
    def make(self) -> Evaluator:
        pytest.importorskip("pycocotools", reason="pip install 'autoprune[detection]'")
        return evaluators.evaluator("map")

    def example(self) -> tuple[Tensor, Tensor]:
        return detected(6)


class TestFunction(EvaluatorContract):
    def make(self) -> Evaluator:
        return Function(lambda outputs, _: outputs.abs().sum(dim=1), "size", higher_is_better=False)


def test_table_and_unknown_name() -> None:
    built = [name for name in evaluators.EVALUATORS if name != "map"]
    assert [evaluators.evaluator(name).name for name in built] == built
    assert {*built, "map"} == set(METRICS)
    senses = {name: evaluators.evaluator(name).higher_is_better for name in built}
    assert {name for name, sense in senses.items() if not sense} == set(LOWER_IS_BETTER)
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


# ---- mean absolute error, signal to noise ----------------------------------------------------------------------------


def test_mae_against_loop() -> None:
    outputs, targets = normal(5, 3), normal(5, 3, seed=1)
    pairs = zip(outputs.tolist(), targets.tolist(), strict=True)
    expected = [sum(abs(a - b) for a, b in zip(*pair, strict=True)) / 3 for pair in pairs]
    assert MAE().per_sample(outputs, targets).tolist() == pytest.approx(expected)
    assert MAE().per_sample(outputs[:, 0], targets[:, 0]).ndim == 1


@pytest.mark.parametrize("data_range", [1.0, 255.0])
def test_psnr_against_loop(data_range: float) -> None:
    outputs, targets = data_range * normal(4, 3, 2), data_range * normal(4, 3, 2, seed=1)
    noises = [sum((outputs[i] - targets[i]).double().flatten().square().tolist()) / 6 for i in range(4)]
    expected = [20 * math.log10(data_range) - 10 * math.log10(noise) for noise in noises]
    assert PSNR(data_range).per_sample(outputs, targets).tolist() == pytest.approx(expected)


def test_psnr_stays_finite() -> None:
    images = torch.ones(3, 2, 2)
    outputs = torch.stack([images[0], torch.full((2, 2), torch.nan), torch.full((2, 2), 1e30)])
    assert PSNR().per_sample(outputs, images).tolist() == [LARGEST_DB, -LARGEST_DB, -LARGEST_DB]
    with pytest.raises(ConfigError, match=r"above 0, not 0\.0"):
        PSNR(0.0)


@pytest.mark.parametrize("name", ["mae", "psnr"])
def test_nothing_is_broadcast(name: str) -> None:
    with pytest.raises(DataError, match=rf"{name}: .*\(4, 1\).*\(4,\).*same shape"):
        evaluators.evaluator(name).per_sample(torch.zeros(4, 1), torch.zeros(4))


# ---- intersection over union -----------------------------------------------------------------------------------------


def naive_iou(found: list[int], truth: list[int], classes: int) -> float:
    pairs = [(f, t) for f, t in zip(found, truth, strict=True) if t != 255]
    shares = []
    for label in range(classes):
        both = sum(f == t == label for f, t in pairs)
        either = sum(label in pair for pair in pairs)
        if either:
            shares.append(both / either)
    return sum(shares) / len(shares)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(0, 999))
def test_iou_against_loop(classes: int, seed: int) -> None:
    outputs, targets = segmented(3, classes=classes, seed=seed)
    found, truth = outputs.argmax(1).flatten(1).tolist(), targets.flatten(1).tolist()
    expected = [naive_iou(f, t, classes) for f, t in zip(found, truth, strict=True)]
    assert ImageMeanIoU().per_sample(outputs, targets).tolist() == pytest.approx(expected)
    assert MeanIoU().per_sample(outputs, targets).tolist() == pytest.approx(expected)
    whole = naive_iou(outputs.argmax(1).flatten().tolist(), targets.flatten().tolist(), classes)
    assert MeanIoU().total(outputs, targets) == pytest.approx(whole)


def test_iou_against_torchmetrics() -> None:
    metrics = pytest.importorskip("torchmetrics.classification")
    outputs, targets = segmented(8, classes=5)
    theirs = metrics.MulticlassJaccardIndex(num_classes=5, ignore_index=255)(outputs, targets)
    assert MeanIoU().total(outputs, targets) == pytest.approx(float(theirs), abs=1e-6)


def test_iou_of_the_truth_itself_and_of_nothing() -> None:
    _, targets = segmented(2, classes=3)
    right = torch.nn.functional.one_hot(targets.clamp(max=2), 3).movedim(-1, 1).float()
    assert MeanIoU().total(right, targets) == 1.0
    assert MeanIoU().total(torch.full_like(right, torch.nan), targets) == 0.0


@pytest.mark.parametrize(
    ("outputs", "targets", "message"),
    [
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 8, 8, dtype=torch.int64), r"\(2, 8, 8\).*scale its logits up"),
        (torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), r"\(samples, classes, \.\.\.\)"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 4), "torch.float32; expected integer classes"),
        (torch.zeros(1, 3, 2), torch.tensor([[0, 3]]), "target 3 but 3 classes; expected 0 to 2, or 255"),
        (torch.zeros(2, 3, 2), torch.tensor([[0, 1], [255, 255]]), "in sample 1 nothing counts"),
    ],
)
def test_iou_says_what_is_wrong(outputs: Tensor, targets: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        MeanIoU().total(outputs, targets)


# ---- perplexity ------------------------------------------------------------------------------------------------------


def naive_perplexity(logits: Tensor, targets: Tensor) -> float:
    nats = [
        math.log(sum(math.exp(value) for value in row)) - row[token]
        for row, token in zip(logits.flatten(0, -2).tolist(), targets.flatten().tolist(), strict=True)
        if token != -100
    ]
    return math.exp(sum(nats) / len(nats))


def test_perplexity_against_loop() -> None:
    logits, targets = spoken(4, tokens=5, vocabulary=6)
    assert Perplexity().total(logits, targets) == pytest.approx(naive_perplexity(logits, targets))
    expected = [naive_perplexity(logits[i], targets[i]) for i in range(4)]
    assert Perplexity().per_sample(logits, targets).tolist() == pytest.approx(expected)
    assert sum(expected) / 4 != pytest.approx(Perplexity().total(logits, targets))  # tokens are counted, not samples


def test_perplexity_against_torchmetrics() -> None:
    metrics = pytest.importorskip("torchmetrics.text")
    logits, targets = spoken(6, tokens=8, vocabulary=11)
    theirs = metrics.Perplexity(ignore_index=-100)(logits, targets)
    assert Perplexity().total(logits, targets) == pytest.approx(float(theirs), rel=1e-5)


def test_perplexity_of_chance_is_the_vocabulary_and_stays_finite() -> None:
    targets = torch.arange(6).reshape(2, 3)
    assert Perplexity().total(torch.zeros(2, 3, 6), targets) == pytest.approx(6.0)
    sure_and_wrong = 1e6 * torch.nn.functional.one_hot((targets + 1) % 6, 6).float()
    assert Perplexity().total(sure_and_wrong, targets) == pytest.approx(LARGEST)
    assert Perplexity().total(torch.full((2, 3, 6), torch.nan), targets) == pytest.approx(LARGEST)


def test_perplexity_says_what_is_wrong() -> None:
    with pytest.raises(DataError, match=r"\(samples, tokens, vocabulary\) and \(samples, tokens\)"):
        Perplexity().total(torch.zeros(2, 3, 6), torch.zeros(2, 6, dtype=torch.int64))
    with pytest.raises(DataError, match=r"target 6 but 6 classes.*or -100"):
        Perplexity().total(torch.zeros(1, 1, 6), torch.tensor([[6]]))


# ---- detection -------------------------------------------------------------------------------------------------------


def test_map_of_the_truth_itself_and_of_nothing() -> None:
    pytest.importorskip("pycocotools", reason="pip install 'autoprune[detection]'")
    _, targets = detected(4)
    found = torch.cat([targets[:, :, :4], torch.ones(4, 5, 1), targets[:, :, 4:]], dim=2)
    ours = MeanAveragePrecision()
    assert ours.total(found, targets) == pytest.approx(1.0)
    assert ours.per_sample(found, targets).tolist() == pytest.approx([1.0] * 4)
    found[:, :, 4] = 0.0
    assert ours.total(found, targets) == 0.0
    targets[:, :, 4] = -1.0
    assert ours.per_sample(found, targets).tolist() == [1.0] * 4


def test_map_against_loop() -> None:
    pytest.importorskip("pycocotools", reason="pip install 'autoprune[detection]'")
    outputs, targets = detected(12)
    ours = MeanAveragePrecision()
    assert ours.total(outputs, targets) == pytest.approx(naive_map(outputs, targets))
    assert 0.05 < ours.total(outputs, targets) < 0.95


def naive_map(outputs: Tensor, targets: Tensor) -> float:
    """COCO's average precision, written out: 101 recalls, ten thresholds, each truth taken once, best score first."""
    values = []
    for label in sorted({int(row[4]) for rows in targets.tolist() for row in rows if row[4] >= 0}):
        truths = [[row[:4] for row in rows if row[4] == label] for rows in targets.tolist()]
        found = [
            (row[4], image, row[:4])
            for image, rows in enumerate(outputs.tolist())
            for row in rows
            if row[5] == label and row[4] > 0
        ]
        found.sort(key=lambda entry: -entry[0])
        for step in range(10):
            values.append(naive_precision(found, truths, 0.5 + 0.05 * step))
    return sum(values) / len(values)


def naive_precision(
    found: list[tuple[float, int, list[float]]], truths: list[list[list[float]]], threshold: float
) -> float:
    taken: set[tuple[int, int]] = set()
    points = []
    for rank, (_, image, box) in enumerate(found, start=1):
        free = [
            (overlap(box, other), place) for place, other in enumerate(truths[image]) if (image, place) not in taken
        ]
        share, place = max(free, default=(0.0, -1))
        if share >= threshold:
            taken.add((image, place))
        points.append((len(taken) / sum(map(len, truths)), len(taken) / rank))
    wanted = [index / 100 for index in range(101)]
    return sum(max((p for recall, p in points if recall >= least - 1e-9), default=0.0) for least in wanted) / 101


def overlap(one: list[float], other: list[float]) -> float:
    width = max(0.0, min(one[2], other[2]) - max(one[0], other[0]))
    height = max(0.0, min(one[3], other[3]) - max(one[1], other[1]))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return width * height / (sum(areas) - width * height)


def test_map_says_what_is_wrong() -> None:
    pytest.importorskip("pycocotools", reason="pip install 'autoprune[detection]'")
    with pytest.raises(DataError, match=r"\(2, 4, 5\).*expected \(samples, boxes, 6\).*write a function"):
        MeanAveragePrecision().total(torch.zeros(2, 4, 5), torch.zeros(2, 4, 5))


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("pycocotools", "pycocotools.coco"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=r"metric: map needs .*pip install 'autoprune\[detection\]'"):
        evaluators.evaluator("map")


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


def test_function_gets_all_that_the_model_returns() -> None:
    outputs = {"boxes": normal(4, 2), "scores": normal(4, 3)}
    asked = Function(lambda out, _: out["scores"].sum(dim=1), "scores", higher_is_better=True)
    assert asked.per_sample(outputs, torch.zeros(4)).tolist() == pytest.approx(outputs["scores"].sum(dim=1).tolist())


def test_function_that_fails_says_on_what() -> None:
    broken = Function(lambda out, _: out.argmax(1), "a.py:f", higher_is_better=True)
    with pytest.raises(DataError, match=r"a\.py:f: the function failed on a tuple of tensors \(4, 2\), \(4,\).*argmax"):
        broken.per_sample((torch.zeros(4, 2), torch.zeros(4)), torch.zeros(4))
