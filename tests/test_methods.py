"""Methods: each keeps the contract, and each agrees with a naive loop or a brute-force oracle."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import reconstruction_error
from torch import Tensor

from autoprune import methods
from autoprune.errors import ConfigError, DataError
from autoprune.methods import compensate, mrmr, obs
from autoprune.methods.base import Consumer, Method, UnitView
from autoprune.testing import MethodContract, assert_permutation, example_view

torch.set_num_threads(1)

ASKING = {"taylor": "gradients", "activation": "activity", "mrmr": "activity", "obs": "moments"}


def order_of(name: str, view: UnitView, *, seed: int = 0) -> list[int]:
    order: list[int] = methods.method(name).removal_order(view, torch.Generator().manual_seed(seed)).tolist()
    return order


def lowest_first(scores: list[float]) -> list[int]:
    return sorted(range(len(scores)), key=lambda channel: scores[channel])


# ---- the contract --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(methods.METHODS))
class TestContract(MethodContract):
    @pytest.fixture(autouse=True)
    def _named(self, name: str) -> None:
        self.name = name

    def make(self) -> Method:
        return methods.method(self.name)

    def test_is_frozen_and_named_as_in_the_table(self) -> None:
        method = self.make()
        assert method.name == self.name
        with pytest.raises(AttributeError):
            method.name = "other"


def test_unknown_name_gives_the_nearest() -> None:
    with pytest.raises(ConfigError, match="'taylor'"):
        methods.method("tailor")


@pytest.mark.parametrize(("name", "need"), ASKING.items())
def test_missing_statistics_are_named(name: str, need: str) -> None:
    with pytest.raises(DataError, match=f"'example'.* no {need}"):
        order_of(name, example_view(4, needs=()))


# ---- naive loops ---------------------------------------------------------------------------------------------------


def naive_norms(view: UnitView, power: int) -> list[float]:
    totals = [0.0] * view.width
    for producer in view.producers:
        rows = [sum(abs(value) ** power for value in row) ** (1 / power) for row in producer.tolist()]
        mean = sum(rows) / len(rows)
        totals = [total + row / mean for total, row in zip(totals, rows, strict=True)]
    return totals


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 20), st.integers(1, 3), st.integers(0, 999))
def test_norms_against_loops(width: int, producers: int, seed: int) -> None:
    view = example_view(width, producers=producers, seed=seed, needs=(), columns=())
    assert order_of("l1", view) == lowest_first(naive_norms(view, 1))
    assert order_of("l2", view) == lowest_first(naive_norms(view, 2))


@pytest.mark.parametrize("name", ["l1", "l2", "fpgm"])
def test_a_larger_producer_does_not_outvote_another(name: str) -> None:
    view = example_view(9, producers=2)
    louder = replace(view, producers=(view.producers[0] * 1000.0, view.producers[1]))
    assert order_of(name, louder) == order_of(name, view)


def test_bn_scale_against_loop_and_its_fallback() -> None:
    view = example_view(10, norms=2)
    scores = [0.0] * 10
    for scale in view.norm_scales:
        for channel in range(10):
            scores[channel] += abs(float(scale[channel])) / float(scale.abs().mean())
    assert order_of("bn_scale", view) == lowest_first(scores)
    bare = replace(view, norm_scales=())
    assert order_of("bn_scale", bare) == order_of("l2", bare) != order_of("bn_scale", view)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 40), st.integers(1, 2), st.integers(0, 999))
def test_fpgm_against_loop(width: int, producers: int, seed: int) -> None:
    view = example_view(width, producers=producers, seed=seed, needs=(), columns=())
    totals = [0.0] * width
    for producer in view.producers:
        rows = producer.tolist()
        sums = [sum(math.dist(row, other) for other in rows) for row in rows]
        mean = sum(sums) / width
        totals = [total + (own / mean if mean else 0.0) for total, own in zip(totals, sums, strict=True)]
    order = order_of("fpgm", view)
    along = [totals[channel] for channel in order]
    assert along == pytest.approx(sorted(totals), rel=1e-6)  # two channels tie exactly: their order is free


def test_taylor_goes_by_its_score() -> None:
    view = replace(example_view(4), taylor=torch.tensor([3.0, 0.5, 2.0, 0.5], dtype=torch.float64))
    assert order_of("taylor", view) == [1, 3, 2, 0]


def test_activation_goes_by_zeros_then_by_strength() -> None:
    view = example_view(4)
    assert view.activity is not None
    activity = replace(
        view.activity,
        zero_share=torch.tensor([0.5, 0.9, 0.5, 0.0], dtype=torch.float64),
        mean_abs=torch.tensor([2.0, 9.0, 1.0, 0.1], dtype=torch.float64),
    )
    assert order_of("activation", replace(view, activity=activity)) == [1, 2, 0, 3]


def test_neuron_goes_by_what_its_consumers_would_miss() -> None:
    view = example_view(6, columns=(1, 9))
    assert view.activity is not None
    missed = [0.0] * 6
    for consumer in view.consumers:
        outputs, width, columns = consumer.weight.shape
        for channel in range(width):
            weights = [float(consumer.weight[o, channel, c]) * float(consumer.scale[o])
                       for o in range(outputs) for c in range(columns)]  # fmt: skip
            missed[channel] += sum(weight**2 for weight in weights) * float(view.activity.mean_square[channel])
    assert order_of("neuron", view) == sorted(range(6), key=missed.__getitem__)


def test_random_follows_its_generator() -> None:
    orders = {tuple(order_of("random", example_view(8), seed=seed)) for seed in range(10)}
    assert len(orders) > 1


# ---- minimum redundancy, maximum relevance -------------------------------------------------------------------------


def naive_eta_squared(values: list[float], targets: list[int]) -> float:
    mean = sum(values) / len(values)
    total = sum((value - mean) ** 2 for value in values)
    between = 0.0
    for label in set(targets):
        members = [value for value, target in zip(values, targets, strict=True) if target == label]
        between += len(members) * (sum(members) / len(members) - mean) ** 2
    return between / total


def naive_correlation(left: list[float], right: list[float]) -> float:
    mean_left, mean_right = sum(left) / len(left), sum(right) / len(right)
    shared = sum((a - mean_left) * (b - mean_right) for a, b in zip(left, right, strict=True))
    return shared / math.sqrt(
        sum((a - mean_left) ** 2 for a in left) * sum((b - mean_right) ** 2 for b in right),
    )


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 10), st.integers(0, 999))
def test_mrmr_against_naive_greedy(width: int, seed: int) -> None:
    view = example_view(width, seed=seed, columns=())
    assert view.activity is not None
    features, targets = view.activity.per_sample.T.tolist(), view.activity.targets.tolist()
    relevance = [naive_eta_squared(feature, targets) for feature in features]
    selected: list[int] = []
    while len(selected) < width:
        scores = {}
        for channel in set(range(width)) - set(selected):
            shared = [abs(naive_correlation(features[channel], features[other])) for other in selected]
            scores[channel] = relevance[channel] - (sum(shared) / len(shared) if shared else 0.0)
        selected.append(max(scores, key=lambda channel: scores[channel]))
    assert order_of("mrmr", view) == selected[::-1]


def test_mrmr_relevance_is_a_monotone_function_of_the_f_statistic() -> None:
    selection = pytest.importorskip("sklearn.feature_selection")
    view = example_view(6, columns=())
    assert view.activity is not None
    features, targets = view.activity.per_sample, view.activity.targets
    centred = features - features.mean(dim=0)
    eta = mrmr.correlation_ratio(centred / centred.norm(dim=0), targets)
    expected = selection.f_classif(features.numpy(), targets.numpy())[0]
    assert (eta / (1 - eta) * (60 - 4) / (4 - 1)).tolist() == pytest.approx(expected.tolist())


def test_mrmr_drops_constants_first_and_a_copy_before_its_original() -> None:
    view = example_view(5, columns=())
    assert view.activity is not None
    per_sample = view.activity.per_sample.clone()
    per_sample[:, 1] = 0.1  # constant, and not exactly representable
    best = order_of("mrmr", view)[-1]
    copy = (best + 2) % 5 if (best + 2) % 5 != 1 else (best + 3) % 5
    per_sample[:, copy] = per_sample[:, best]
    order = order_of("mrmr", replace(view, activity=replace(view.activity, per_sample=per_sample)))
    assert order[0] == 1
    assert order[-1] in (best, copy)
    assert order[-2] not in (best, copy)


# ---- optimal brain surgeon -----------------------------------------------------------------------------------------


def columns_of(channels: list[int], columns: int) -> Tensor:
    """The input columns of `channels`, channel-major."""
    return torch.tensor([channel * columns + offset for channel in channels for offset in range(columns)])


def brute_force_error(consumer: Consumer, kept: list[int]) -> float:
    """The damped least-squares error of keeping `kept`, solved at once and from scratch, over the dense energy."""
    assert consumer.moments is not None
    columns = consumer.weight.shape[2]
    weight = (consumer.weight * consumer.scale[:, None, None]).flatten(1)
    damping = compensate.DAMPING * consumer.moments.diagonal().mean()
    hessian = consumer.moments + damping * torch.eye(len(consumer.moments), dtype=torch.float64)
    inputs = columns_of(kept, columns)
    best = torch.zeros_like(weight)
    best[:, inputs] = torch.linalg.solve(hessian[inputs][:, inputs], hessian[inputs] @ weight.T).T
    difference = weight - best
    energy = (weight @ consumer.moments * weight).sum()
    return float((difference @ hessian * difference).sum() / energy)


def brute_force_order(view: UnitView) -> list[int]:
    alive, order = list(range(view.width)), []
    while len(alive) > 1:
        errors = {}
        for channel in alive:
            kept = [other for other in alive if other != channel]
            errors[channel] = sum(brute_force_error(consumer, kept) for consumer in view.consumers)
        order.append(min(errors, key=lambda channel: errors[channel]))
        alive.remove(order[-1])
    return order + alive


@pytest.mark.parametrize("columns", [(1,), (4,), (1, 4), (4, 9, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_obs_takes_the_best_channel_at_every_step(columns: tuple[int, ...], seed: int) -> None:
    view = example_view(6, columns=columns, seed=seed)
    assert order_of("obs", view) == brute_force_order(view)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 7), st.lists(st.integers(1, 4), min_size=1, max_size=2), st.integers(0, 999))
def test_obs_against_brute_force_on_any_shape(width: int, columns: list[int], seed: int) -> None:
    view = example_view(width, columns=columns, seed=seed)
    assert order_of("obs", view) == brute_force_order(view)


@pytest.mark.parametrize("columns", [1, 4])
def test_obs_compensates_as_least_squares_does(columns: int) -> None:
    consumer = example_view(6, columns=(columns,)).consumers[0]
    consumer = replace(consumer, scale=torch.ones(5, dtype=torch.float64))
    assert consumer.moments is not None
    dense = consumer.weight.flatten(1)
    energy = float((dense @ consumer.moments * dense).sum())
    layer, alive, spent = obs.start(consumer, consumer.moments), torch.arange(6), 0.0
    for position in (2, 0, 3):
        gone = torch.tensor([position])
        spent += float(obs.added_errors(layer)[position])
        layer, alive = obs.without_(layer, gone), obs.drop_(alive, gone, dim=0)
        assert spent == pytest.approx(brute_force_error(consumer, alive.tolist()))
    inputs = columns_of(alive.tolist(), columns)
    solved = compensate.least_squares(dense, consumer.moments, inputs)
    ours = layer.weight.flatten(1) * math.sqrt(energy)
    torch.testing.assert_close(ours, solved, rtol=1e-8, atol=1e-9)
    errors = [reconstruction_error(dense, consumer.moments, inputs, each) for each in (ours, solved)]
    torch.testing.assert_close(*errors)


def test_obs_removes_several_at_once_exactly() -> None:
    consumer = example_view(6, columns=(3,)).consumers[0]
    assert consumer.moments is not None
    results = []
    for steps in ([[1, 3]], [[3], [1]]):
        layer = obs.start(consumer, consumer.moments)
        for gone in steps:
            layer = obs.without_(layer, torch.tensor(gone))
        results.append(layer)
    at_once, stepwise = results
    torch.testing.assert_close(at_once.weight, stepwise.weight, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(at_once.inverse, stepwise.inverse, rtol=1e-8, atol=1e-10)


def test_dropping_moves_the_last_into_the_gaps() -> None:
    for gone, left in (
        ([1, 3], {0, 2, 4, 5}),
        ([0, 4, 5], {1, 2, 3}),
        ([5], {0, 1, 2, 3, 4}),
        ([0, 1, 2, 3, 4, 5], set()),
    ):
        assert set(obs.drop_(torch.arange(6), torch.tensor(gone), dim=0).tolist()) == left


@pytest.mark.parametrize("columns", [1, 4])
def test_obs_removes_a_duplicated_channel_for_nothing(columns: int) -> None:
    generator = torch.Generator().manual_seed(3)
    samples = torch.randn(500, 6, columns, generator=generator, dtype=torch.float64)
    samples[:, 4] = samples[:, 1]
    inputs = samples.flatten(1)
    moments = inputs.T @ inputs / 500
    consumer = replace(example_view(6, columns=(columns,)).consumers[0], moments=moments)
    view = replace(example_view(6), consumers=(consumer,))
    first = order_of("obs", view)[0]
    assert first in (1, 4)
    errors = obs.added_errors(obs.start(consumer, moments))
    assert float(errors[first]) < 1e-4
    assert float(errors[[0, 2, 3, 5]].min()) > 0.01


def test_obs_lets_consumers_count_alike() -> None:
    view = example_view(6, columns=(1, 4))
    one, two = view.consumers
    louder = replace(view, consumers=(replace(one, weight=one.weight * 1000.0), two))
    assert order_of("obs", louder) == order_of("obs", view)
    assert order_of("obs", replace(view, consumers=(one,))) != order_of("obs", view)


def test_obs_weighs_outputs_by_their_scale() -> None:
    view = example_view(6, columns=(4,), seed=1)
    only_first = torch.tensor([1.0, 0, 0, 0, 0], dtype=torch.float64)
    consumer = replace(view.consumers[0], scale=only_first)
    alone = replace(consumer, weight=consumer.weight[:1], scale=torch.ones(1, dtype=torch.float64))
    assert order_of("obs", replace(view, consumers=(consumer,))) == order_of("obs", replace(view, consumers=(alone,)))


def test_obs_in_shares_stays_close_to_one_by_one() -> None:
    consumer = example_view(40, columns=(2,)).consumers[0]
    assert consumer.moments is not None
    exact = obs.eliminate_([obs.start(consumer, consumer.moments)], 40)
    shared = obs.eliminate_([obs.start(consumer, consumer.moments)], 40, work=40**3)  # four at first
    assert_permutation(shared, 40)
    assert len(set(exact[:20].tolist()) & set(shared[:20].tolist())) >= 14
    halves = [brute_force_error(consumer, sorted(order[20:].tolist())) for order in (exact, shared)]
    chance = brute_force_error(consumer, list(range(20)))
    assert halves[1] < 0.5 * (halves[0] + chance)


def test_obs_without_consumers_goes_by_index() -> None:
    assert order_of("obs", example_view(4, columns=())) == [0, 1, 2, 3]


def test_obs_names_damaged_statistics() -> None:
    consumer = example_view(3).consumers[0]
    assert consumer.moments is not None
    damaged = replace(consumer, moments=consumer.moments * torch.nan)
    with pytest.raises(DataError, match="not finite"):
        order_of("obs", replace(example_view(3), consumers=(damaged,)))
