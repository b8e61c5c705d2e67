"""Models that return more than one tensor: what is compared, how it adds up, and that nesting changes nothing."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from autoprune.core.unit import Option
from autoprune.data import Part
from autoprune.engines.base import Best
from autoprune.errors import DataError, ModelError
from autoprune.evaluators.divergence import class_dim, divergence, heads_of, total_divergence
from autoprune.evaluators.function import Function
from autoprune.evaluators.miou import MeanIoU
from autoprune.evaluators.top_k import top1
from autoprune.nest import Nested, first_tensor, joined, tensors_of
from autoprune.searching import scorer
from autoprune.searching.scorer import Selection, outputs_of
from autoprune.verify import score

torch.set_num_threads(1)

LABELS = torch.zeros(6, dtype=torch.int64)
VALUES = torch.zeros(6)
Two = namedtuple("Two", ["logits", "features"])
NESTS: list[Callable[[list[Tensor]], Nested]] = [
    tuple,
    list,
    lambda parts: {str(index): part for index, part in enumerate(parts)},
    lambda parts: (parts[0], parts[1:]),
    lambda parts: {"a": [parts[0]], "b": ({"c": parts[1]}, *parts[2:]), "none": None, "text": "as it is"},
]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- nests -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nest", NESTS)
def test_batches_join_to_the_whole(nest: Callable[[list[Tensor]], Nested]) -> None:
    parts = [normal(6, 4), normal(6, 2, 3), torch.arange(6)]
    batches = [nest([part[rows] for part in parts]) for rows in (slice(0, 4), slice(4, 6))]
    whole = joined(batches, [4, 2])
    assert all(torch.equal(one, other) for one, other in zip(tensors_of(whole), parts, strict=True))
    assert type(whole) is type(nest(parts))
    assert first_tensor(whole) is tensors_of(whole)[0]


def test_what_is_not_of_samples_is_the_first_batchs() -> None:
    batches = [(normal(4, 2), torch.tensor(3.0), normal(2, 4), 5), (normal(2, 2), torch.tensor(4.0), normal(2, 2), 6)]
    whole = joined(batches, [4, 2])
    assert isinstance(whole, tuple)
    assert (whole[0].shape, float(whole[1]), whole[2].shape, whole[3]) == ((6, 2), 3.0, (2, 4), 5)


def test_a_namedtuple_stays_one() -> None:
    whole = joined([Two(normal(2, 3), normal(2, 1))] * 2, [2, 2])
    assert isinstance(whole, Two)
    assert whole.logits.shape == (4, 3)


def test_another_structure_for_another_batch_is_an_error() -> None:
    with pytest.raises(DataError, match="another structure for another batch"):
        joined([(normal(2, 3),), [normal(2, 3)]], [2, 2])
    with pytest.raises(ModelError, match="without a tensor"):
        first_tensor({"nothing": None})


# ---- where the classes are -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "targets", "expected"),
    [
        ((8, 10), (8,), 1),  # a classifier
        ((8, 21, 4, 5), (8, 4, 5), 1),  # a segmentation
        ((8, 12, 50), (8, 12), 2),  # a language model
        ((8, 4, 5, 21), (8, 4, 5), 3),  # a segmentation, channels last
        ((8, 50, 12), (8, 12), 1),  # a language model whose logits lie as cross-entropy wants them
        ((8, 12, 12), (8, 12), 1),  # both would do: as cross-entropy has it
        ((8, 21, 2, 2), (8, 16, 16), 1),  # low resolution: nothing fits
        ((8, 12, 10), (8,), 1),
    ],
)
def test_where_classes_are(output: tuple[int, ...], targets: tuple[int, ...], expected: int) -> None:
    assert class_dim(torch.zeros(output), torch.zeros(targets, dtype=torch.int64)) == expected


def dims(tensors: list[Tensor], targets: Tensor) -> dict[int, int | None]:
    return {head.index: head.class_dim for head in heads_of(tensors, targets, samples=6)}


def test_which_tensors_are_compared_and_how() -> None:
    logits, features = normal(6, 4), normal(6, 9)
    assert dims([logits], LABELS) == {0: 1}
    assert dims([logits], VALUES) == {0: None}
    assert dims([logits, features, normal(6, 4)], LABELS) == {0: 1, 1: None, 2: 1}
    assert dims([logits, features, normal(6, 4)], VALUES) == {0: None, 1: None, 2: None}
    assert dims([normal(6)], LABELS) == {0: None}  # no classes: one number a sample
    assert dims([torch.arange(6), logits, torch.tensor(0.5), normal(2, 6)], LABELS) == {1: 1}
    assert dims([logits, torch.full((6, 3), -torch.inf)], LABELS) == {0: 1}  # a mask
    words = torch.zeros(6, 7, dtype=torch.int64)
    assert dims([normal(6, 7, 50), normal(6, 7, 16), normal(6, 7, 50)], words) == {0: 2, 1: None, 2: 2}
    maps = torch.zeros(6, 3, 3, dtype=torch.int64)
    assert dims([normal(6, 4, 3, 3), normal(6, 4, 3, 3), normal(6, 4, 2, 2)], maps) == {0: 1, 1: 1, 2: None}
    with pytest.raises(ModelError, match="no floating tensor of samples"):
        heads_of([torch.arange(6), torch.tensor(1.0)], LABELS, samples=6)


# ---- the sum over heads ----------------------------------------------------------------------------------------------


def test_the_sum_over_heads_is_that_of_each_alone() -> None:
    dense = [normal(6, 4), 1000 * normal(6, 9, seed=1), torch.arange(6), normal(6, 4, seed=2)]
    other = [normal(6, 4, seed=3), 1000 * normal(6, 9, seed=4), torch.arange(6) + 1, normal(6, 4, seed=5)]
    heads = heads_of(dense, LABELS, samples=6)
    expected = sum(divergence(dense[i], other[i], kind) for i, kind in ((0, "kl"), (1, "mse"), (3, "kl")))  # type: ignore[arg-type]
    torch.testing.assert_close(total_divergence(heads, other), expected)
    assert total_divergence(heads, dense).tolist() == [0.0] * 6
    parts = [total_divergence(heads, [tensor[rows] for tensor in other], start=rows.start) for rows in SPANS]
    torch.testing.assert_close(torch.cat(parts), expected)


SPANS = (slice(0, 1), slice(1, 5), slice(5, 6))


@settings(max_examples=30, deadline=None)
@given(st.floats(1e-3, 1e3), st.integers(0, 99))
def test_no_head_drowns_another_by_its_scale(factor: float, seed: int) -> None:
    dense, other = normal(6, 3, seed=seed), normal(6, 3, seed=seed + 100)
    plain = total_divergence(heads_of([dense, dense], VALUES, samples=6), [other, other])
    scaled = total_divergence(heads_of([dense, factor * dense], VALUES, samples=6), [other, factor * other])
    torch.testing.assert_close(scaled, plain, rtol=1e-4, atol=1e-6)


def test_logits_of_sequences_against_one_position_at_a_time() -> None:
    dense, other = normal(6, 5, 8), normal(6, 5, 8, seed=1)
    (head,) = heads_of([dense], torch.zeros(6, 5, dtype=torch.int64), samples=6)
    each = torch.stack([divergence(dense[:, t], other[:, t], "kl") for t in range(5)])
    torch.testing.assert_close(head.divergence(other), each.mean(dim=0))


def test_a_candidate_of_another_shape_or_number_is_an_error() -> None:
    heads = heads_of([normal(6, 4), normal(6, 2)], LABELS, samples=6)
    with pytest.raises(DataError, match=r"\(6, 2\).*\(6, 3\)"):
        total_divergence(heads, [normal(6, 4), normal(6, 3)])
    with pytest.raises(DataError, match=r"\(\)"):
        total_divergence(heads, [normal(6, 4), torch.tensor(1.0)])
    with pytest.raises(ModelError, match=r"1 tensor\(s\) where the dense model returns 2"):
        total_divergence(heads, [normal(6, 4)])


# ---- in the search ---------------------------------------------------------------------------------------------------


class Wrapped(nn.Module):
    """Logits and features, returned as `nest` says."""

    def __init__(self, nest: Callable[[list[Tensor]], Nested]) -> None:
        super().__init__()
        self.body, self.head, self.nest = nn.Linear(5, 8), nn.Linear(8, 4), nest

    def forward(self, x: Tensor) -> Nested:
        features = torch.relu(self.body(x))
        return self.nest([self.head(features), features, features.argmax(1)])


def twins(nest: Callable[[list[Tensor]], Nested]) -> tuple[Wrapped, Wrapped]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Wrapped(nest), Wrapped(nest)


@pytest.mark.parametrize("nest", NESTS)
def test_nesting_changes_no_divergence(nest: Callable[[list[Tensor]], Nested]) -> None:
    batches, targets = torch.split(normal(20, 5), 8), torch.zeros(20, dtype=torch.int64)
    values = []
    for wrapped in (nest, tuple):
        dense, other = twins(wrapped)
        selection = Selection.of(dense, batches, targets)
        assert selection.divergences(dense).tolist() == [0.0] * 20
        values.append(selection.divergences(other))
    assert torch.equal(*values)
    assert bool((values[0] > 0).all())


def test_the_first_samples_of_a_selection_are_scored_as_in_the_whole() -> None:
    dense, other = twins(tuple)
    inputs = normal(20, 5)
    selection = Selection.of(dense, torch.split(inputs, 8), torch.zeros(20))
    few = selection.first(torch.split(inputs[:11], 8))
    assert len(few) == 11
    torch.testing.assert_close(few.divergences(other), selection.divergences(other)[:11])


def test_a_selection_keeps_only_what_it_compares() -> None:
    dense, _ = twins(lambda parts: (parts[0], parts[2], torch.zeros(1000)))
    selection = Selection.of(dense, [normal(20, 5)], LABELS)
    assert [tuple(head.dense.shape) for head in selection.heads] == [(20, 4)]


class FakeStitcher:
    """Builds the model that a choice names."""

    def __init__(self, models: dict[str, nn.Module]) -> None:
        self.models = models
        self.norms: dict[str, str] = {}

    def build(self, options: dict[str, Option]) -> FakeStitcher:
        self.model = self.models[next(iter(options.values())).method]
        return self


class FakeSpace:
    def options_of(self, choice: tuple[str]) -> dict[str, Option]:
        return {"unit": Option(choice[0], 1)}


def test_early_stopping_compares_pairs_over_several_heads() -> None:
    dense, bad = twins(tuple)
    good = twins(tuple)[0]
    with torch.no_grad():
        good.head.bias += 0.01
    batches = torch.split(normal(1000, 5), 64)
    selection = Selection.of(dense, batches, torch.zeros(1000, dtype=torch.int64))
    asked = scorer.Scorer(FakeStitcher({"good": good, "bad": bad}), FakeSpace(), selection)  # type: ignore[arg-type]
    first = asked(("good",), None)  # type: ignore[arg-type]
    assert (first.samples, first.pruned) == (1000, False)
    assert first.seen is not None
    second = asked(("bad",), Best(first.value, first.seen))  # type: ignore[arg-type]
    assert (second.samples, second.pruned, second.seen) == (128, True, None)
    for best in (None, Best(first.value)):  # nothing to compare with, sample by sample
        whole = asked(("bad",), best)  # type: ignore[arg-type]
        assert (whole.samples, whole.pruned) == (1000, False)
    assert second.value == pytest.approx(float(selection.divergences(bad)[:128].mean()))


# ---- scores ----------------------------------------------------------------------------------------------------------


def test_built_in_metrics_get_the_first_tensor_and_functions_all() -> None:
    model, _ = twins(lambda parts: {"logits": parts[0], "features": parts[1]})
    inputs, targets = normal(20, 5), torch.arange(20) % 4
    part = Part(inputs, targets)
    logits = outputs_of(model, [inputs])["logits"]  # type: ignore[index]
    assert score(model, top1(), part, batch=6).value == pytest.approx(
        float((logits.argmax(1) == targets).float().mean())
    )
    asked = Function(lambda out, _: out["features"].sum(dim=1), "features", higher_is_better=True)
    features = outputs_of(model, [inputs])["features"]  # type: ignore[index]
    assert score(model, asked, part, batch=6).value == pytest.approx(float(features.sum(dim=1).mean()), abs=1e-5)


def test_a_pooled_metric_is_that_of_all_samples_and_its_spread_that_of_each() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, targets = normal(9, 3, 4, 4), torch.randint(3, (9, 4, 4), generator=generator)
    record = score(nn.Identity(), MeanIoU(), Part(inputs, targets), batch=4)
    values = MeanIoU().per_sample(inputs, targets)
    assert record.value == pytest.approx(MeanIoU().total(inputs, targets), abs=1e-6)
    assert record.value != pytest.approx(float(values.mean()), abs=1e-4)
    assert record.stderr == pytest.approx(float(values.std()) / 3, abs=1e-6)
