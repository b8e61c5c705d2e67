"""The cost model against really cut and counted torch modules, and linearisation against brute force."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from autoprune.core.architecture import Architecture, Layer, LayerKind, Width
from autoprune.core.cost import LatencyTable, SignatureCost, TableCheck
from autoprune.core.space import Choice, Space, UnitOptions
from autoprune.core.unit import DROP, Kind, Option, Unit, keep_all
from autoprune.profile.cost_model import CostModel
from autoprune.profile.features import FEATURES

SIDE = 8
COUNTED = ("macs", "params", "size")
PRICED = ("latency", *COUNTED)


def entry(
    name: str, width: int, keeps: tuple[int, ...], parent: str | None = None, kind: Kind = "channels"
) -> UnitOptions:
    unit = Unit(name, kind, width, (name,), parent)
    cuts = (DROP,) if kind == "block" else tuple(Option("l2", keep) for keep in keeps)
    return UnitOptions(unit, (keep_all(unit), *cuts))


SPACE = Space(
    (
        entry("outer.inner.conv1", 6, (5, 3, 1), parent="outer.inner"),
        entry("stem", 8, (7, 4, 2)),
        entry("outer", 1, (), kind="block"),
        entry("outer.inner", 1, (), parent="outer", kind="block"),
        entry("fc1", 10, (9, 8, 5, 1)),
    )
)


class Net(nn.Module):
    """Stem, depthwise, a droppable block within a droppable block, two linears after a flatten. Cut when made."""

    def __init__(self, choice: Choice) -> None:
        super().__init__()
        inner, stem, outer, block, hidden = (
            unit.options[index].keep for unit, index in zip(SPACE.entries, choice, strict=True)
        )
        self.stem = nn.Sequential(nn.Conv2d(3, stem, 3, padding=1, bias=False), nn.BatchNorm2d(stem))
        self.depthwise = nn.Conv2d(stem, stem, 3, padding=1, groups=stem)
        self.inner = self.tail = None
        if outer and block:
            self.inner = nn.Sequential(
                nn.Conv2d(stem, inner, 3, padding=1), nn.BatchNorm2d(inner), nn.Conv2d(inner, stem, 1)
            )
        if outer:
            self.tail = nn.Conv2d(stem, stem, 1)
        self.fc1, self.fc2 = nn.Linear(4 * stem, hidden), nn.Linear(hidden, 5)
        self.scale = nn.Parameter(torch.ones(3))
        self.register_buffer("codes", torch.zeros(7, dtype=torch.uint8))

    def forward(self, images: Tensor) -> Tensor:
        features = self.depthwise(self.stem(images * self.scale.reshape(1, 3, 1, 1)))
        if self.tail is not None:
            inside = features if self.inner is None else features + self.inner(features)
            features = features + self.tail(inside)
        pooled = nn.functional.adaptive_avg_pool2d(features, 2).flatten(1)
        result: Tensor = self.fc2(torch.relu(self.fc1(pooled)))
        return result


def width(fixed: int = 0, **terms: int) -> Width:
    return Width(fixed, tuple((name.replace("__", "."), times) for name, times in terms.items()))


def layer(  # a shorthand for the table below
    name: str, kind: LayerKind, inputs: Width, outputs: Width, *, kernel: int = 1, positions: int = SIDE**2,
    bias: int = 1, block: str | None = None,
) -> Layer:  # fmt: skip
    buffers = (8, 8) if kind == "norm" else (0, 0)  # mean and variance; the batch counter
    return Layer(name, kind, f"{kind}:{name}", inputs, outputs, kernel, 1, positions, bias, *buffers, block)


A, M, F = width(stem=1), width(outer__inner__conv1=1), width(fc1=1)
ARCHITECTURE = Architecture(
    layers=(
        layer("stem.0", "conv", width(3), A, kernel=9, bias=0),
        layer("stem.1", "norm", A, A, bias=2),
        layer("depthwise", "depthwise", A, A, kernel=9),
        layer("inner.0", "conv", A, M, kernel=9, block="outer.inner"),
        layer("inner.1", "norm", M, M, bias=2, block="outer.inner"),
        layer("inner.2", "conv", M, A, block="outer.inner"),
        layer("tail", "conv", A, A, block="outer"),
        layer("fc1", "linear", width(stem=4), F, positions=1),
        layer("fc2", "linear", F, width(5), positions=1),
    ),
    other_params=3,
    other_bytes=7,
)


def table(correction: float = 1.0) -> LatencyTable:
    shares = np.random.default_rng(0).dirichlet(np.ones(1 + 7 * len(FEATURES))).tolist()
    timed = [layer.signature for layer in ARCHITECTURE.layers if layer.kind != "norm"]
    prices = [
        SignatureCost(signature=name, coefficients={feature: shares.pop() for feature in FEATURES}) for name in timed
    ]
    return LatencyTable(
        key="k",
        dense_s=0.004,
        base=shares.pop(),
        channel_block=4,
        signatures=tuple(prices),
        fitted_models=1,
        check=TableCheck(models=0, median_error=0, worst_error=0),
        correction=correction,
    )


MODEL = CostModel(ARCHITECTURE, SPACE, table())
CHOICES = st.tuples(*(st.integers(0, size - 1) for size in SPACE.sizes))


def macs(model: nn.Module) -> int:
    total = 0

    def count(module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        weight = next(module.parameters())
        total += output[0].numel() * weight[0].numel()

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(count)
    model(torch.zeros(2, 3, SIDE, SIDE))
    return total


def test_costs_equal_those_of_really_cut_modules() -> None:
    torch.set_num_threads(1)
    choices = list(product(*(range(size) for size in SPACE.sizes)))[::7]
    found = {metric: MODEL.evaluate(metric, np.asarray(choices)) for metric in COUNTED}
    for position, choice in enumerate(choices):
        model = Net(choice).eval()
        tensors = [*model.parameters(), *model.buffers()]
        assert found["macs"][position] == macs(model)
        assert found["params"][position] == sum(value.numel() for value in model.parameters())
        assert found["size"][position] == sum(value.numel() * value.element_size() for value in tensors)


def test_latency_is_the_tables_sum_over_layers() -> None:
    choice = (2, 1, 0, 0, 3)  # conv1 3, stem 7, fc1 5
    names = ("stem.0", "depthwise", "inner.0", "inner.2", "tail", "fc1", "fc2")
    narrow = dict(zip(names, ((3, 7), (7, 7), (7, 3), (3, 7), (7, 7), (28, 5), (5, 5)), strict=True))
    full = dict(zip(names, ((3, 8), (8, 8), (8, 6), (6, 8), (8, 8), (32, 10), (10, 5)), strict=True))
    share = table().base
    up = lambda value: 4 * -(-value // 4)  # noqa: E731
    for price in table().signatures:
        name = price.signature.split(":")[1]
        (i, o), (wide_i, wide_o) = narrow[name], full[name]
        is_thin, is_loose, ragged = i < 4, i >= 4 and i % 4 != 0, 4 * (o % 4 != 0)
        pairs = {"macs": i * o, "blocked": up(i) * up(o), "thin": is_thin * i * up(o), "loose": is_loose * i * o}
        pairs["whole"] = (i % 4 == 0) * i * up(o)
        inputs = {"in": up(i), "thin_in": is_thin * i, "loose_in": is_loose * i}
        outputs = {"out": up(o), "loose_out": is_loose * o, "ragged_out": ragged, "odd_out": ragged}
        share += price.coefficients["present"]
        share += sum(price.coefficients[feature] * count / (wide_i * wide_o) for feature, count in pairs.items())
        share += sum(price.coefficients[feature] * count / wide_i for feature, count in inputs.items())
        share += sum(price.coefficients[feature] * count / wide_o for feature, count in outputs.items())
    assert MODEL.cost("latency", choice) == pytest.approx(0.004 * share)
    assert MODEL.dense["latency"] == 0.004


def test_a_correction_scales_predictions_and_not_the_measured_dense_latency() -> None:
    corrected = CostModel(ARCHITECTURE, SPACE, table(correction=1.1))
    assert corrected.cost("latency", (1,) * 5) == pytest.approx(1.1 * MODEL.cost("latency", (1,) * 5))
    assert corrected.dense["latency"] == 0.004


@settings(max_examples=60, deadline=None)
@given(incumbent=CHOICES, metric=st.sampled_from(PRICED))
def test_linearise_equals_brute_force_differences(incumbent: Choice, metric: str) -> None:
    now = MODEL.cost(metric, incumbent)
    changes = MODEL.linearise(metric, incumbent)
    assert [len(change) for change in changes] == list(SPACE.sizes)
    for unit, change in enumerate(changes):
        for option, found in enumerate(change):
            neighbour = (*incumbent[:unit], option, *incumbent[unit + 1 :])
            assert found == pytest.approx(MODEL.cost(metric, neighbour) - now, rel=1e-9, abs=1e-9 * now)


@settings(max_examples=30, deadline=None)
@given(incumbent=CHOICES, metric=st.sampled_from(PRICED))
def test_inside_a_dropped_block_nothing_matters(incumbent: Choice, metric: str) -> None:
    for dropped in ((*incumbent[:3], 1, incumbent[4]), (*incumbent[:2], 1, *incumbent[3:])):
        assert not MODEL.linearise(metric, dropped)[0].any()
        assert MODEL.cost(metric, dropped) == MODEL.cost(metric, SPACE.normal(dropped))


def test_what_a_dropped_block_holds_does_not_reach_outside() -> None:
    outside = layer("outside", "conv", M, A)
    model = CostModel(Architecture((*ARCHITECTURE.layers, outside)), SPACE)
    dropped = (2, 0, 0, 1, 0)  # conv1 cut to 3, but its block is gone: the layer outside still reads all 6
    assert model.cost("macs", dropped) == model.cost("macs", (0, 0, 0, 1, 0))
    assert not model.linearise("macs", dropped)[0].any()
    assert model.linearise("macs", (2, 0, 0, 0, 0))[0].any()


@pytest.mark.parametrize("metric", PRICED)
def test_the_cheapest_choice_is_the_least_of_all(metric: str) -> None:
    everything = np.asarray(list(product(*(range(size) for size in SPACE.sizes))))
    least, dense = MODEL.range(metric)
    assert least == pytest.approx(MODEL.evaluate(metric, everything).min())
    assert dense == MODEL.dense[metric]
    if metric != "latency":  # a ragged width may take longer than the full one
        assert dense == MODEL.evaluate(metric, everything).max()


def test_additive_only_when_no_two_units_share_a_layer() -> None:
    assert not MODEL.is_additive("macs")  # fc1 reads the stem and has its own width
    space = Space(tuple(unit for unit in SPACE.entries if unit.unit.name != "stem"))
    fixed = {A: width(8), width(stem=4): width(32)}
    layers = tuple(
        Layer(old.name, old.kind, old.signature, fixed.get(old.inputs, old.inputs), fixed.get(old.outputs, old.outputs),
              old.kernel, 1, old.positions, old.bias_like, 0, 0, old.block)
        for old in ARCHITECTURE.layers
    )  # fmt: skip
    model = CostModel(Architecture(layers), space)
    assert model.is_additive("macs")
    linear = model.linearise("macs", space.dense)
    for choice in product((0, 1, 2, 3), (0,), (0,), (0, 2, 4)):
        gain = sum(change[index] for change, index in zip(linear, choice, strict=True))
        assert model.cost("macs", choice) == model.dense["macs"] + gain


def test_aligned_widths_are_the_steps_and_the_full_width() -> None:
    assert MODEL.aligned_widths(SPACE.units[4]) == (4, 8, 10)
    assert MODEL.aligned_widths(SPACE.units[1]) == (4, 8)
    assert CostModel(ARCHITECTURE, SPACE).aligned_widths(SPACE.units[0]) == (6,)  # no step is known


def test_without_a_table_there_is_no_latency() -> None:
    model = CostModel(ARCHITECTURE, SPACE)
    assert set(model.dense) == set(COUNTED)
    with pytest.raises(ValueError, match="no latency without a measured table"):
        model.cost("latency", SPACE.dense)


def test_a_width_of_an_unknown_unit_is_refused() -> None:
    with pytest.raises(ValueError, match="'stem' sets a layer's width but is not in the space"):
        CostModel(ARCHITECTURE, Space(SPACE.entries[2:]))
