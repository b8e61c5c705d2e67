"""Costs of models that are more than convolutions and linear layers: against models that are really cut, and torch's
own counter.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from shipped import shipped
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from unusual_networks import NETWORKS, Network

from autoprune import api
from autoprune.bank.build import Bank
from autoprune.bank.stitch import Stitcher, shape_only
from autoprune.core.space import Choice, Space, UnitOptions
from autoprune.core.target import Target
from autoprune.core.unit import DROP, Option, SizeOf, Unit, keep_all
from autoprune.evaluators import evaluator
from autoprune.goal import Plan
from autoprune.model.describe import describe, macs_of
from autoprune.model.discover import Anatomy, discover
from autoprune.model.flow import norms_after
from autoprune.model.recalibrate import Anchor
from autoprune.profile.cost_model import CostModel
from autoprune.spaces import load_space
from autoprune.storage import FLOATS, FileFormat, storage_of
from autoprune.subject import Task
from autoprune.verify import params, size_bytes

torch.set_num_threads(1)
every_network = pytest.mark.parametrize("network", NETWORKS.values(), ids=list(NETWORKS))


def made(network: Network) -> nn.Module:
    """The network with numbers that no two tensors share, as training leaves them: files hold equal ones once."""
    torch.manual_seed(0)
    model = network.make().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.5 if parameter.ndim == 1 else 0.0, 0.3)
    return model


def counted(model: nn.Module, sample: Tensor) -> int:
    """Multiply-adds by torch's counter, with nothing fused that it would not see."""
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel([SDPBackend.MATH]),
            torch.backends.mkldnn.flags(enabled=False),
        ):  # fmt: skip
            model(sample)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    return int(counter.get_total_flops()) // 2


def space_of(anatomy: Anatomy) -> Space:
    def options(unit: Unit) -> tuple[Option, ...]:
        narrower = sorted({-(-unit.width * part // 4) for part in (1, 2, 3)} - {unit.width}, reverse=True)
        return (DROP,) if unit.kind == "block" else tuple(Option("l2", keep) for keep in narrower)

    return Space(tuple(UnitOptions(unit, (keep_all(unit), *options(unit))) for unit in anatomy.units))


def some_choices(space: Space, count: int) -> list[Choice]:
    draw = random.Random(0)
    drawn = [space.normal(tuple(draw.randrange(size) for size in space.sizes)) for _ in range(count)]
    return [space.dense, space.normal(tuple(size - 1 for size in space.sizes)), *drawn]


@every_network
def test_units_are_those_counted_by_hand(network: Network) -> None:
    anatomy = discover(made(network), network.inputs(4))
    assert {unit.name: unit.width for unit in anatomy.units} == network.units


@every_network
def test_counts_of_any_choice_are_those_of_the_model_that_is_really_cut(network: Network) -> None:
    model, sample = made(network), network.inputs(1)
    anatomy = discover(model, network.inputs(4))
    space = space_of(anatomy)
    costs = CostModel(anatomy.architecture, space)
    for choice in some_choices(space, 10):
        smaller = shape_only(model, anatomy, space.options_of(choice))
        assert costs.cost("macs", choice) == macs_of(smaller, sample) == counted(smaller, sample)
        assert costs.cost("params", choice) == params(smaller)
        assert costs.cost("size", choice) == size_bytes(smaller)


def files_of(model: nn.Module, example: Tensor, kind: SizeOf) -> tuple[FileFormat, Stitcher, Anatomy]:
    norms = norms_after(model, example)
    anatomy = discover(model, example)
    stitcher = Stitcher(model, anatomy, Bank({}, {}, norms, {}), anchor=Anchor.of(model, [example]))
    return FileFormat(kind, example[:1], norms), stitcher, anatomy


@pytest.mark.parametrize("kind", ["onnx", "plain", "packed"])
@pytest.mark.parametrize("name", ["vit", "gpt", "encoder", "outside", "slopes"])
def test_files_of_any_choice_are_foretold(name: str, kind: SizeOf) -> None:
    model, example = made(NETWORKS[name]), NETWORKS[name].inputs(4)
    files, stitcher, anatomy = files_of(model, example, kind)
    space = space_of(anatomy)
    costs = CostModel(anatomy.architecture, space, storage=storage_of(stitcher, space, anatomy.architecture, files))
    assert costs.dense["size"] == files.size(model, FLOATS)
    for choice in some_choices(space, 6):
        really = files.size(shape_only(model, anatomy, space.options_of(choice)), FLOATS)
        # Packed weights are compressed about as well when cut; ONNX has constants of as many groups as a norm has, and
        # the addition, of a zero now, that a branch entered.
        dropped = list(space.options_of(choice).values()).count(DROP)
        relative, absolute = (0.05, 150) if kind == "packed" else (0.01, 64 + 320 * dropped)
        assert costs.cost("size", choice) == pytest.approx(really, rel=relative, abs=absolute)


def test_products_have_one_shape_for_each_kind_and_go_with_their_block() -> None:
    network = NETWORKS["vit"]
    layers = discover(made(network), network.inputs(4)).architecture.layers
    products = [layer for layer in layers if layer.kind == "product"]
    assert {layer.block for layer in products} == {f"blocks.{i}.attention" for i in range(3)}
    assert len({layer.signature for layer in products}) == 2  # scores and what they mix, alike in all blocks
    assert {term for layer in products for term in layer.outputs.terms} == {
        (f"blocks.{i}.attention.qkv", 1) for i in range(3)
    }


def test_a_product_in_which_three_units_meet_is_bounded_from_above() -> None:
    class Three(nn.Module):
        """(n, a, t) and (n, b, t) over t, times a third in its batch: einsum over channels of three layers."""

        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three = nn.Conv1d(3, 6, 1), nn.Conv1d(3, 5, 1), nn.Conv1d(3, 4, 1)
            self.last = nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            left = self.three(x)[:, :, None] * self.one(x)[:, None]  # (n, 4, 6, t)
            return self.last(torch.einsum("ncat,nbt->ncab", left, self.two(x))).mean((2, 3))

    torch.manual_seed(0)
    model, example = Three().eval(), torch.randn(2, 3, 7)
    anatomy = discover(model, example)
    space = space_of(anatomy)
    costs = CostModel(anatomy.architecture, space)
    for choice in some_choices(space, 8):
        really = counted(shape_only(model, anatomy, space.options_of(choice)), example[:1])
        assert costs.cost("macs", choice) >= really
    assert costs.dense["macs"] == counted(model, example[:1])


def test_weights_that_layers_share_count_once_and_stay() -> None:
    class Shared(nn.Module):
        """Two linear layers with one matrix and their own biases, in one block."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.block, self.head = nn.Linear(6, 8), nn.Module(), nn.Linear(8, 3)
            self.block = Shared.Inner()

        class Inner(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8)
                self.right.weight = self.left.weight

            def forward(self, x: Tensor) -> Tensor:
                return x + self.right(self.left(x).relu())

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.block(self.first(x)))

    model, example = Shared().eval(), torch.randn(4, 6)
    anatomy = discover(model, example, weights=True)
    assert {unit.name for unit in anatomy.units} == {"block", "first.weight", "head.weight"}
    reasons = {entry.root: entry.reason for entry in anatomy.refused}
    assert "block.right.weight is the same tensor" in reasons["block.left.weight"]
    space = space_of(discover(model, example))
    costs = CostModel(anatomy.architecture, space)
    for choice in some_choices(space, 0):
        smaller = shape_only(model, anatomy, space.options_of(choice))
        assert costs.cost("params", choice) == params(smaller)
        assert costs.cost("size", choice) == size_bytes(smaller)
        assert costs.cost("macs", choice) == counted(smaller, example[:1])


def test_what_cannot_be_watched_has_its_layers() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            if torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
                raise RuntimeError("not while you look")
            return self.head(self.first(x).relu())

    kinds = [layer.kind for layer in describe(Odd().eval(), torch.randn(2, 6), groups=(), blocks=()).layers]
    assert kinds == ["linear", "linear"]


@pytest.mark.parametrize("name", ["outside", "slopes", "gpt"])
def test_search_apply_rebuild_and_back(name: str, tmp_path: Path) -> None:
    """All that is outside layers goes through ranking, mending, refitting, the policy and the script."""
    network = NETWORKS[name]
    model = made(network)
    (tmp_path / "space.yaml").write_text(
        "levels: 4\nmethods:\n  - {method: obs, compensate: least_squares}\n  - {method: l1}\n"
    )
    calibration, validation = ((network.inputs(n), answers(model, network.inputs(n))) for n in (96, 64))
    outcome = api.search(
        model, calibration=calibration, validation=validation, budget="60%macs", space=str(tmp_path / "space.yaml"),
        plan=Plan(trials=6, finalists=1), run=tmp_path / "run", target=Target("torch"),
        metric="perplexity" if name == "gpt" else "top1",
    )  # fmt: skip
    assert outcome.record.chosen.macs <= 0.6 * counted(model, network.inputs(1))
    task = Task(
        model, type(model).__name__, api.as_data(calibration, validation), evaluator("top1"), Target("torch"),
        load_space(str(tmp_path / "space.yaml"), tmp_path),
    )  # fmt: skip
    factory = f"unusual_networks.py:{type(model).__name__}"
    _, _, rebuilt = shipped(task, outcome, network.inputs(8), factory=factory, folder=tmp_path / "out")
    assert widths_of(rebuilt) == widths_of(outcome.model)


def answers(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(inputs).argmax(-1)


def widths_of(model: nn.Module) -> Mapping[str, object]:
    """What modules say of their own widths, as `repr` shows it."""
    return {name: repr(module) for name, module in model.named_modules() if not list(module.children())}
