"""Refit: it brings a candidate nearer to the dense model, and leaves what it must not touch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from networks import CASES, IMAGE, Residual, Vgg, assert_untouched, conv, randomised, snapshot, workbench_of
from torch import Tensor, nn
from torch.nn import functional

from autoprune.bank.stitch import Stitcher
from autoprune.core.unit import DROP, Option
from autoprune.model.additions import links, stand_in, watching_additions
from autoprune.model.flow import norms_after, tails_of
from autoprune.recover.refit import Reference, refit
from autoprune.searching.scorer import Selection
from autoprune.workbench import Workbench

torch.set_num_threads(1)

STYLES = ["functional", "module", "inplace"]
NARROW = {"layer1.0.conv1": Option("l2", 4), "layer2.0.conv1": Option("l2", 6), "layer2.1.conv1": Option("l2", 5)}


def half_of_all(bench: Workbench) -> dict[str, Option]:
    units = (unit for unit in bench.space.units if unit.narrows)
    return {unit.name: Option("l2", max(1, unit.width // 2)) for unit in units}


def before_and_after(
    model: nn.Module, shape: tuple[int, ...], options: Mapping[str, Option] | None, folder: Path
) -> tuple[float, float, int]:
    """Divergence from the dense model on the calibration data before and after, and how many layers were solved."""
    bench = workbench_of(model, shape, folder, calibration=256)
    mine = snapshot(bench.subject.model)
    batches = torch.split(bench.subject.task.data.calibration_inputs, 128)
    reference = Reference.of(bench.subject.model, batches, blocks=bench.subject.anatomy.blocks)
    selection = Selection.of(bench.subject.model, batches, torch.zeros(0, dtype=torch.int64))
    bare = replace(bench.bank, runs={})  # without what the bank does for dropped blocks: refitting alone is tested here
    stitcher = Stitcher(bench.subject.model, bench.subject.anatomy, bare, anchor=bench.stitcher.anchor)
    candidate = stitcher.build(half_of_all(bench) if options is None else options)
    before = float(selection.divergences(candidate.model).mean())
    count = refit(reference, candidate).layers
    after = float(selection.divergences(candidate.model).mean())
    assert_untouched(bench.subject.model, mine)
    return before, after, count


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    "options",
    [
        NARROW,
        {"layer1.1": DROP},
        {"layer2.1": DROP},
        {"layer1.0": DROP, "layer1.1": DROP},
        {"layer1.1": DROP, **NARROW},
        {"stem.0": Option("l2", 6), **NARROW},
    ],
    ids=["narrow", "a block", "after a projection", "two in a row", "both", "the stream too"],
)
def test_a_residual_network_comes_nearer(style: str, options: Mapping[str, Option], tmp_path: Path) -> None:
    before, after, count = before_and_after(randomised(Residual(style=style)), IMAGE, options, tmp_path)
    assert count > 0
    assert after < 0.9 * before


def test_styles_of_the_same_network_are_refitted_alike(tmp_path: Path) -> None:
    options = {"layer1.1": DROP, **NARROW}
    results = [before_and_after(randomised(Residual(style=style)), IMAGE, options, tmp_path) for style in STYLES]
    assert len({count for _, _, count in results}) == 1
    assert results[1][:2] == pytest.approx(results[0][:2], rel=0.02)
    assert results[2][:2] == pytest.approx(results[0][:2], rel=0.02)


@pytest.mark.parametrize(
    "name", ["vgg", "vgg in place", "mobile", "bottleneck", "dense", "unet", "mlp", "waves", "grouped 2"]
)
def test_other_networks_come_nearer(name: str, tmp_path: Path) -> None:
    before, after, count = before_and_after(CASES[name].model(), CASES[name].shape, None, tmp_path)
    assert count > 0
    assert after < before


@pytest.mark.parametrize("name", ["residual functional", "residual in place", "vgg", "mlp", "mobile", "grouped 2"])
def test_an_unpruned_model_stays_as_it_is(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    bench = workbench_of(case.model(), case.shape, tmp_path)
    candidate = bench.stitcher.build({})
    batches = (bench.subject.task.data.calibration_inputs,)
    refit(Reference.of(bench.subject.model, batches, blocks=bench.subject.anatomy.blocks), candidate)
    inputs = bench.subject.parts.selection.inputs
    with torch.no_grad():
        wanted, got = bench.subject.model(inputs), candidate.model(inputs)
    assert torch.allclose(got, wanted, atol=1e-4 * float(wanted.abs().max()))


def test_grouped_layers_are_left_alone(tmp_path: Path) -> None:
    case = CASES["grouped 2"]
    bench = workbench_of(case.model(), case.shape, tmp_path)
    candidate = bench.stitcher.build(half_of_all(bench))
    before = snapshot(candidate.model)
    refit(
        Reference.of(
            bench.subject.model, (bench.subject.task.data.calibration_inputs,), blocks=bench.subject.anatomy.blocks
        ),
        candidate,
    )
    for name, tensor in candidate.model.state_dict().items():
        if ".spatial." in name:
            assert torch.equal(tensor, before[name])


# ---- shapes that are easily got wrong -----------------------------------------------------------------------------


class Ended(nn.Module):
    """Branches that end with an activation (in place, if asked) before they are added."""

    def __init__(self, *, inplace: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first, self.norm1 = conv(8, 8), nn.BatchNorm2d(8)
        self.second, self.norm2 = conv(8, 8), nn.BatchNorm2d(8)
        self.inplace = inplace
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        branch = functional.relu(self.norm1(self.first(x)))
        branch = functional.relu(self.norm2(self.second(branch)), inplace=self.inplace)
        return self.head((x + branch).mean((2, 3)))


@pytest.mark.parametrize("inplace", [False, True], ids=["copied", "in place"])
def test_a_branch_that_ends_with_an_activation(inplace: bool, tmp_path: Path) -> None:
    """What enters the sum is not what the norm gave: it must not be fitted as if it were."""
    before, after, _ = before_and_after(randomised(Ended(inplace=inplace)), IMAGE, {"first": Option("l2", 4)}, tmp_path)
    assert after < before


class Unbiased(nn.Module):
    """No bias and no norm: there is nowhere to put a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = conv(3, 12), conv(12, 12), conv(12, 12)
        self.head = nn.Linear(12, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.first(x))
        x = x + self.second(x)
        return self.head(functional.relu(self.third(x)).mean((2, 3)))


@pytest.mark.parametrize("unit", ["second", "third", "first"])
def test_layers_without_bias_or_norm(unit: str, tmp_path: Path) -> None:
    model = randomised(Unbiased())
    bench = workbench_of(model, IMAGE, tmp_path)
    if unit not in bench.space.names:
        pytest.skip("coupled with another unit")
    before, after, _ = before_and_after(model, IMAGE, {unit: Option("l2", 6)}, tmp_path)
    assert after < before


def test_without_bias_the_solution_is_that_without_a_constant(tmp_path: Path) -> None:
    """The last layer, refitted, is the least squares one among those that it can be."""
    model = randomised(Unbiased())
    bench = workbench_of(model, IMAGE, tmp_path)
    inputs = bench.subject.task.data.calibration_inputs
    candidate = bench.stitcher.build({"third": Option("l2", 6)}, recalibrate=False)
    refit(Reference.of(bench.subject.model, (inputs,), blocks=()), candidate)
    seen: list[Tensor] = []
    handle = candidate.model.head.register_forward_pre_hook(lambda _m, args: seen.append(args[0].double()))
    with torch.no_grad():
        got = candidate.model(inputs).double()
        wanted = bench.subject.model(inputs).double()
    handle.remove()
    best = seen[0] @ torch.linalg.lstsq(seen[0], wanted).solution
    assert float((got - wanted).square().mean()) <= 1.02 * float((best - wanted).square().mean()) + 1e-9


def test_plain_convolutions_without_norm(tmp_path: Path) -> None:
    before, after, count = before_and_after(randomised(Vgg(norm=False)), IMAGE, None, tmp_path)
    assert count == 4
    assert after < before


class Backwards(Residual):
    """Layers registered in another order than they run in."""

    def __init__(self) -> None:
        super().__init__()
        head, layer2, layer1, stem = self.head, self.layer2, self.layer1, self.stem
        for name in ("stem", "layer1", "layer2", "head"):
            delattr(self, name)
        self.head, self.layer2, self.layer1, self.stem = head, layer2, layer1, stem


def test_layers_are_solved_as_they_run_not_as_they_are_written(tmp_path: Path) -> None:
    torch.manual_seed(0)
    forwards, backwards = randomised(Residual()), Backwards().eval()
    backwards.load_state_dict(forwards.state_dict())
    options = {"layer1.1": DROP, "stem.0": Option("l2", 6), **NARROW}
    wanted = before_and_after(forwards, IMAGE, options, tmp_path)
    assert before_and_after(backwards, IMAGE, options, tmp_path)[:2] == pytest.approx(wanted[:2], rel=0.02)


# ---- additions -----------------------------------------------------------------------------------------------------


def found_in(model: nn.Module, blocks: Mapping[str, list[str]]) -> dict[str, str | None]:
    example = torch.randn(2, *IMAGE)
    tails = tails_of(model, norms_after(model, example), example)
    found = links(model, example, layers=tails, blocks=blocks)
    return {layer: link and link.block for layer, link in found.items()}


@pytest.mark.parametrize("style", STYLES)
def test_every_addition_and_the_block_after_it(style: str) -> None:
    model = randomised(Residual(style=style, blocks=3))
    names = [f"layer{stage}.{index}" for stage in (1, 2) for index in range(3)]
    blocks = {n: [f"{n}.{part}" for part in ("conv1", "bn1", "conv2", "bn2")] for n in names if n != "layer2.0"}
    tails = [f"{name}.bn2" for name in names]
    if style == "module":  # the shortcut is made last there, and enters the sum as well
        found = found_in(model, blocks)
        tails[3] = "layer2.0.bn2" if "layer2.0.bn2" in found else "layer2.0.shortcut.1"
    assert found_in(model, blocks) == dict(
        zip(tails, ["layer1.1", "layer1.2", None, "layer2.1", "layer2.2", None], strict=True)
    )


def test_a_sum_stands_for_that_of_the_last_block_dropped_after_it() -> None:
    model, example = randomised(Residual(blocks=4)), torch.randn(2, *IMAGE)
    names = [f"layer{stage}.{index}" for stage in (1, 2) for index in range(4) if (stage, index) != (2, 0)]
    blocks = {name: [f"{name}.{part}" for part in ("conv1", "bn1", "conv2", "bn2")] for name in names}
    found = links(model, example, layers=tails_of(model, norms_after(model, example), example), blocks=blocks)
    assert stand_in(found, "layer1.0.bn2", []) == "layer1.0.bn2"
    assert stand_in(found, "layer1.0.bn2", ["layer1.1"]) == "layer1.1.bn2"
    assert stand_in(found, "layer1.0.bn2", ["layer1.1", "layer1.2", "layer1.3"]) == "layer1.3.bn2"
    assert stand_in(found, "layer1.0.bn2", ["layer1.2"]) == "layer1.0.bn2"
    projection = next(name for name in found if name.startswith("layer2.0."))
    assert stand_in(found, projection, ["layer2.1", "layer2.2"]) == "layer2.2.bn2"
    assert stand_in(found, "layer1.3.bn2", ["layer2.1"]) == "layer1.3.bn2"


@pytest.mark.parametrize("style", STYLES)
def test_branch_and_sum_are_reported_as_they_were(style: str) -> None:
    model, example = randomised(Residual(style=style)), torch.randn(2, *IMAGE)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    made: dict[str, Tensor] = {}
    handle = model.layer1[1].bn2.register_forward_hook(lambda _m, _x, y: made.update(branch=y.clone()))
    entering = model.layer1[1].register_forward_pre_hook(lambda _m, x: made.update(shortcut=x[0].clone()))
    with (
        torch.no_grad(),
        watching_additions(model, {"layer1.1.bn2": 1}, lambda n, b, s: seen.update({n: (b.clone(), s.clone())})),
    ):
        model(example)
    handle.remove()
    entering.remove()
    branch, total = seen["layer1.1.bn2"]
    assert torch.equal(branch, made["branch"])
    assert torch.equal(total, made["branch"] + made["shortcut"])
