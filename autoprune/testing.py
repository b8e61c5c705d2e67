"""Contract tests for plug-ins: subclass one in a test file, give `make()`, and pytest runs the rest.

    class TestMyMethod(MethodContract):
        def make(self):
            return MyMethod()

Plain asserts, so that importing this needs no test framework. What a plug-in computes is for its own tests to check.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from autoprune.errors import DataError
from autoprune.evaluators.base import Evaluator, Pooled
from autoprune.methods.base import Activity, Consumer, Method, Need, UnitView

NEEDS: tuple[Need, ...] = ("moments", "activity", "gradients")


def example_view(
    width: int,
    *,
    columns: Sequence[int] = (4,),
    producers: int = 1,
    norms: int = 1,
    needs: Collection[Need] = NEEDS,
    seed: int = 0,
) -> UnitView:
    """A unit of random numbers with one consumer for each of `columns`; only statistics in `needs` are there."""
    generator = torch.Generator().manual_seed(seed)
    return UnitView(
        name="example",
        width=width,
        producers=tuple(_normal(generator, width, 3 + 2 * index) for index in range(producers)),
        norm_scales=tuple(_normal(generator, width).abs() for _ in range(norms)),
        consumers=tuple(
            example_consumer(width, count, generator=generator, moments="moments" in needs) for count in columns
        ),
        activity=_example_activity(width, generator) if "activity" in needs else None,
        taylor=_normal(generator, width).square() if "gradients" in needs else None,
    )


def example_consumer(width: int, columns: int, *, generator: torch.Generator, moments: bool = True) -> Consumer:
    """A layer of five outputs whose inputs are correlated."""
    inputs = width * columns
    samples = _normal(generator, 3 * inputs + 8, inputs) @ _normal(generator, inputs, inputs)
    return Consumer(
        name=f"consumer of {columns}",
        weight=_normal(generator, 5, width, columns),
        moments=samples.T @ samples / len(samples) if moments else None,
        scale=_normal(generator, 5).abs(),
    )


def _example_activity(width: int, generator: torch.Generator) -> Activity:
    """Sixty samples of four classes after a ReLU, so that some channels are often zero."""
    targets = torch.arange(60) % 4
    centres = _normal(generator, 4, width)
    raw = (centres[targets][:, None] + _normal(generator, 60, 7, width)).clamp(min=0.0)  # (samples, positions, width)
    return Activity(
        mean_abs=raw.mean(dim=(0, 1)),
        mean_square=raw.square().mean(dim=(0, 1)),
        zero_share=(raw == 0).to(torch.float64).mean(dim=(0, 1)),
        per_sample=raw.mean(dim=1),
        targets=targets,
    )


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def view_tensors(view: UnitView) -> list[Tensor]:
    """Every tensor that `view` holds."""
    found: list[Tensor | None] = [*view.producers, *view.norm_scales, view.taylor]
    for consumer in view.consumers:
        found += [consumer.weight, consumer.moments, consumer.scale]
    if view.activity is not None:
        activity = view.activity
        found += [activity.mean_abs, activity.mean_square, activity.zero_share, activity.per_sample, activity.targets]
    return [tensor for tensor in found if tensor is not None]


def assert_permutation(order: Tensor, width: int) -> None:
    """`order` names each of `width` channels once, as int64 on the CPU."""
    assert order.dtype == torch.int64, f"the removal order is {order.dtype}; expected int64"
    assert order.device.type == "cpu", f"the removal order is on {order.device}; expected the CPU"
    assert order.shape == (width,), f"the removal order is {tuple(order.shape)}; expected ({width},)"
    assert sorted(order.tolist()) == list(range(width)), f"not a permutation of {width} channels: {order.tolist()}"


class MethodContract:
    """What every method must do. A subclass gives `make`."""

    def make(self) -> Method:
        """A fresh method."""
        raise NotImplementedError("give make(), which returns the method to test")

    def view(self, width: int = 8, *, columns: Sequence[int] = (1, 4), producers: int = 2, norms: int = 1) -> UnitView:
        """A unit with just the statistics that the method says it needs; all others are None."""
        needs = self.make().needs
        return example_view(width, columns=columns, producers=producers, norms=norms, needs=needs)

    def order(self, view: UnitView, *, seed: int = 0) -> Tensor:
        """The removal order that a fresh method gives for `view`."""
        return self.make().removal_order(view, torch.Generator().manual_seed(seed))

    def test_describes_itself(self) -> None:
        """Name, version and needs are of the right types; needs are known ones."""
        method = self.make()
        assert isinstance(method.name, str), "a method's name is a str"
        assert method.name, "a method's name is not empty"
        assert isinstance(method.version, int), "a method's version is an int"
        assert isinstance(method.needs, frozenset), "a method's needs are a frozenset"
        assert method.needs <= set(NEEDS), f"unknown needs {set(method.needs) - set(NEEDS)}; known: {NEEDS}"

    def test_order_is_a_permutation(self) -> None:
        """Whatever the width and whichever statistics are there beside the needed ones."""
        for width in (2, 3, 8, 17):
            assert_permutation(self.order(self.view(width)), width)
        assert_permutation(self.order(example_view(8)), 8)

    def test_order_is_the_same_for_the_same_generator(self) -> None:
        """Chance comes from the generator only; torch's own is not touched."""
        before = torch.get_rng_state()
        first, second = self.order(self.view()), self.order(self.view())
        assert torch.equal(first, second), f"two runs differ: {first.tolist()} and {second.tolist()}"
        assert torch.equal(torch.get_rng_state(), before), "the method used torch's global generator"

    def test_view_is_untouched(self) -> None:
        """All tensors are bit-identical afterwards."""
        view = self.view()
        before = [tensor.clone() for tensor in view_tensors(view)]
        self.order(view)
        same = [torch.equal(old, new) for old, new in zip(before, view_tensors(view), strict=True)]
        assert all(same), "the method wrote to the view"

    def test_width_one(self) -> None:
        """A unit of one channel has one order."""
        assert self.order(self.view(1)).tolist() == [0]

    def test_one_and_several_layers(self) -> None:
        """Any number of producers, norm layers and consumers."""
        for producers, norms, columns in ((1, 0, (1,)), (1, 1, (9,)), (3, 2, (1, 4, 9))):
            view = self.view(6, producers=producers, norms=norms, columns=columns)
            assert_permutation(self.order(view), 6)

    def test_equal_channels(self) -> None:
        """Channels of zeros, all alike: still a permutation, and no NaN trips it."""
        view = self.view(4)
        for tensor in view_tensors(view):
            tensor.zero_()
        assert_permutation(self.order(view), 4)


class EvaluatorContract:
    """What every evaluator must do. A subclass gives `make`, and `example` where it does not score a classifier."""

    def make(self) -> Evaluator:
        """A fresh evaluator."""
        raise NotImplementedError("give make(), which returns the evaluator to test")

    def example(self) -> tuple[Tensor, Tensor]:
        """Outputs and targets that the evaluator accepts, at least four samples: here logits and labels."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(12, 7, generator=generator), torch.arange(12) % 7

    def test_describes_itself(self) -> None:
        """Name and sense are of the right types."""
        evaluator = self.make()
        assert isinstance(evaluator.name, str), "an evaluator's name is a str"
        assert evaluator.name, "an evaluator's name is not empty"
        assert isinstance(evaluator.higher_is_better, bool), "higher_is_better is a bool"

    def test_one_finite_value_for_each_sample(self) -> None:
        """(samples,), float64, finite, without a graph."""
        outputs, targets = self.example()
        values = self.make().per_sample(outputs, targets)
        assert values.shape == (len(outputs),), f"values are {tuple(values.shape)}; expected ({len(outputs)},)"
        assert values.dtype == torch.float64, f"values are {values.dtype}; expected float64"
        assert bool(values.isfinite().all()), "values are not finite"

    def test_inputs_are_untouched_and_values_repeat(self) -> None:
        """The same values twice, and inputs bit-identical afterwards."""
        outputs, targets = self.example()
        before = outputs.clone(), targets.clone()
        evaluator = self.make()
        first, second = evaluator.per_sample(outputs, targets), evaluator.per_sample(outputs, targets)
        assert torch.equal(first, second), "two runs differ"
        assert torch.equal(outputs, before[0]), "the evaluator wrote to the outputs"
        assert torch.equal(targets, before[1]), "the evaluator wrote to the targets"

    def test_a_sample_is_scored_alone(self) -> None:
        """How samples are put into batches changes nothing."""
        outputs, targets = self.example()
        evaluator = self.make()
        whole = evaluator.per_sample(outputs, targets)
        parts = [evaluator.per_sample(outputs[part], targets[part]) for part in (slice(0, 3), slice(3, None))]
        assert torch.allclose(whole, torch.cat(parts)), "values depend on the other samples of the batch"

    def test_the_total_of_one_sample_is_its_value(self) -> None:
        """Where the metric is not the mean over samples, it is a finite number, and one sample's is that sample's."""
        outputs, targets = self.example()
        evaluator = self.make()
        if isinstance(evaluator, Pooled):
            whole, one = evaluator.total(outputs, targets), evaluator.total(outputs[:1], targets[:1])
            assert math.isfinite(whole), f"the total is {whole}"
            assert math.isclose(one, float(evaluator.per_sample(outputs[:1], targets[:1])), abs_tol=1e-9)

    def test_sample_counts_that_differ_are_an_error(self) -> None:
        """A DataError, not a silent broadcast."""
        outputs, targets = self.example()
        try:
            self.make().per_sample(outputs, targets[:-1])
        except DataError:
            return
        raise AssertionError(f"{len(outputs)} outputs and {len(targets) - 1} targets were accepted; expected DataError")
