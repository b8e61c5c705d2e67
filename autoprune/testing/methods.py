"""The contract of methods, and the random units that it is tried on."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

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
