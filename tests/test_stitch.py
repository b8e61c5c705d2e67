"""Candidates: keeping everything is the dense model, mended weights are the least squares ones, nothing is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from networks import CASES, IMAGE, Case, Joined, Residual, Vgg, assert_untouched, randomised, snapshot, workbench_of
from torch import Tensor, nn
from torch.nn import functional

from autoprune.bank.mend import Mender
from autoprune.bank.stitch import shape_only
from autoprune.core.unit import DROP, Option
from autoprune.methods.compensate import DAMPING
from autoprune.model.cut import Kept
from autoprune.model.recalibrate import Anchor
from autoprune.workbench import Workbench

torch.set_num_threads(1)

SOUND = {name: case for name, case in CASES.items() if name != "asserting"}


def options_of(bench: Workbench, position: int, *, blocks: bool = False) -> dict[str, Option]:
    """For every unit the option at `position`, counted in its own list."""
    return {
        entry.unit.name: entry.options[1 + position % (len(entry.options) - 1)]
        for entry in bench.space.entries
        if len(entry.options) > 1 and (blocks or entry.unit.narrows)
    }


@pytest.mark.parametrize("case", SOUND.values(), ids=list(SOUND))
def test_keeping_everything_is_the_dense_model_to_the_bit(case: Case, tmp_path: Path) -> None:
    bench = workbench_of(case.model(), case.shape, tmp_path)
    whole = bench.stitcher.build({}).model
    for name, tensor in bench.subject.model.state_dict().items():
        assert torch.equal(whole.state_dict()[name], tensor), name
    example = case.example(8)
    assert torch.equal(whole(example), bench.subject.model(example))


def test_a_dead_channel_keeps_its_statistics() -> None:
    """A channel that never varies has no variance to compare with: its norm stays as it is."""
    model = randomised(Residual())
    with torch.no_grad():
        model.stem[0].weight[2] = 0
    batches = (torch.randn(32, *IMAGE),)
    before = snapshot(model)
    Anchor.of(model, batches).mend(model, {})
    for name, tensor in before.items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_statistics_leave_the_norms_alone() -> None:
    model = randomised(Residual())
    model.layer1[0].bn1.momentum = 0.03
    before, training = snapshot(model), [module.training for module in model.modules()]
    Anchor.of(model, (torch.randn(8, *IMAGE),))
    assert_untouched(model, before)
    assert [module.training for module in model.modules()] == training
    assert model.layer1[0].bn1.momentum == 0.03


def entering(model: nn.Module, layer: str, inputs: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_pre_hook(lambda _m, args: seen.append(args[0].clone()))
    with torch.no_grad():
        model(inputs)
    handle.remove()
    return seen[0]


def test_a_shared_consumer_is_mended_by_least_squares_on_all_it_reads(tmp_path: Path) -> None:
    groups = 1  # a grouped consumer of a join is refused: its groups would not stay equal
    model = randomised(Joined(groups))
    bench = workbench_of(model, IMAGE, tmp_path)
    widths = {unit.name: unit.width for unit in bench.space.units}
    options = {name: Option("obs", widths[name] // 2, "least_squares") for name in ("left", "right")}
    candidate = bench.stitcher.build(options)
    dense, layer = bench.subject.model.join, candidate.model.join
    columns = functional.unfold(
        entering(bench.subject.model, "join", bench.subject.task.data.calibration_inputs).double(), 3, padding=1
    )
    rows = columns.transpose(1, 2).flatten(0, 1)  # (samples * positions, inputs * 9)
    kept = candidate.plan.layers["join"].inputs
    assert kept is not None
    mean, ridge = rows.mean(0), DAMPING * float((rows - rows.mean(0)).square().mean())
    outputs, each = 8 // groups, len(kept) // groups
    for group in range(groups):
        lines = slice(group * outputs, (group + 1) * outputs)
        own = slice(group * 144 // groups, (group + 1) * 144 // groups)
        weight = torch.zeros(outputs, 144, dtype=torch.float64)
        weight[:, own] = dense.weight[lines].detach().double().flatten(1)
        inputs = kept[group * each : (group + 1) * each]
        stays = (inputs[:, None] * 9 + torch.arange(9)).flatten()
        read = (rows - mean)[:, stays]
        wanted = (rows - mean) @ weight.T
        firm = (ridge * len(rows)) ** 0.5
        stacked = torch.cat((read, firm * torch.eye(len(stays), dtype=torch.float64)))
        solved = torch.linalg.lstsq(stacked, torch.cat((wanted, firm * weight[:, stays].T))).solution.T
        got = layer.weight[lines].detach().double().flatten(1)
        assert torch.allclose(got, solved, atol=2e-4 * float(solved.abs().max()))
        bias = dense.bias[lines].detach().double() + weight @ mean - solved @ mean[stays]
        assert torch.allclose(layer.bias[lines].detach().double(), bias, atol=1e-4)


def test_without_compensation_weights_are_selected(tmp_path: Path) -> None:
    bench = workbench_of(randomised(Joined()), IMAGE, tmp_path)
    candidate = bench.stitcher.build({"left": Option("l2", 5), "right": Option("l2", 3)})
    kept = candidate.plan.layers["join"].inputs
    assert kept is not None
    assert torch.equal(candidate.model.join.weight, bench.subject.model.join.weight[:, kept])
    assert torch.equal(candidate.model.join.bias, bench.subject.model.join.bias)


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "plain"])
def test_duplicated_channels_go_without_a_trace(norm: bool, tmp_path: Path) -> None:
    model = randomised(Vgg(norm=norm))
    with torch.no_grad():
        model[0].weight[4:] = model[0].weight[:4]
        model[0].bias[4:] = model[0].bias[:4]
    bench = workbench_of(model, IMAGE, tmp_path)
    candidate = bench.stitcher.build({"0": Option("obs", 4, "least_squares")})
    inputs = bench.subject.parts.selection.inputs
    with torch.no_grad():
        wanted, got = bench.subject.model(inputs), candidate.model(inputs)
    assert candidate.model[0].out_channels == 4
    assert float((got - wanted).abs().max() / wanted.abs().max()) < 1e-3


@pytest.mark.parametrize("name", ["residual functional", "residual in place", "dense", "grouped 2", "mlp", "mobile"])
def test_building_writes_to_no_model_and_repeats(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    user = case.model()
    bench = workbench_of(user, case.shape, tmp_path)
    mine, theirs = snapshot(bench.subject.model), snapshot(user)
    for position in (0, 7, 30):
        for blocks in (False, True):
            options = options_of(bench, position, blocks=blocks)
            first, second = bench.stitcher.build(options).model, bench.stitcher.build(options).model
            assert snapshot(first).keys() == snapshot(second).keys()
            assert all(torch.equal(tensor, second.state_dict()[key]) for key, tensor in first.state_dict().items())
            assert torch.isfinite(first(case.example())).all()
            with torch.no_grad():
                for tensor in first.state_dict().values():
                    tensor.zero_()  # a candidate shares no memory with the bank or the model
            third = bench.stitcher.build(options).model
            assert all(torch.equal(tensor, third.state_dict()[key]) for key, tensor in second.state_dict().items())
    assert_untouched(bench.subject.model, mine)
    assert_untouched(user, theirs)


def test_what_was_solved_is_remembered_within_the_bound(tmp_path: Path) -> None:
    bench = workbench_of(randomised(Joined()), IMAGE, tmp_path)
    mender = Mender(bench.subject.model, bench.bank.statistics, norms=bench.bank.norms)
    inputs = torch.arange(5)
    assert mender.mend("join", Kept(inputs)) is mender.mend("join", Kept(inputs.clone()))
    assert mender.mend("join", Kept(torch.arange(6))) is not mender.mend("join", Kept(inputs))
    forgetful = Mender(bench.subject.model, bench.bank.statistics, norms=bench.bank.norms, memory_bytes=0)
    assert forgetful.mend("join", Kept(inputs)) is not forgetful.mend("join", Kept(inputs))


@pytest.mark.parametrize("name", ["residual functional", "bottleneck", "grouped 4", "vgg", "unet", "dense"])
def test_compensation_is_no_worse_than_selection(name: str, tmp_path: Path) -> None:
    """Over all units, each halved alone: one may gain by chance from what is lost."""
    bench = workbench_of(CASES[name].model(), CASES[name].shape, tmp_path, calibration=512)
    totals = {}
    for compensate in ("least_squares", "none"):
        options = [Option("obs", max(1, u.width // 2), compensate) for u in bench.space.units if u.narrows]
        names = [unit.name for unit in bench.space.units if unit.narrows]
        built = [bench.stitcher.build({unit: option}) for unit, option in zip(names, options, strict=True)]
        totals[compensate] = sum(float(bench.selection.divergences(one.model).mean()) for one in built)
    assert totals["least_squares"] < totals["none"]


def test_a_dropped_block_takes_its_units_with_it(tmp_path: Path) -> None:
    bench = workbench_of(randomised(Residual()), IMAGE, tmp_path)
    candidate = bench.stitcher.build({"layer1.1": DROP, "stem.0": Option("l2", 5)})
    names = dict(candidate.model.named_modules())
    assert "layer1.1.conv1" not in names
    assert names["layer2.0.conv1"].in_channels == 5
    assert not any(name.startswith("layer1.1.") for name in candidate.plan.layers)


def test_shapes_for_the_clock_are_those_of_the_candidate(tmp_path: Path) -> None:
    for name in ("residual functional", "grouped 2", "mobile"):
        bench = workbench_of(CASES[name].model(), CASES[name].shape, tmp_path)
        options = options_of(bench, 9)
        one = {key: tensor.shape for key, tensor in bench.stitcher.build(options).model.state_dict().items()}
        other = shape_only(bench.subject.model, bench.subject.anatomy, options).state_dict()
        assert one == {key: tensor.shape for key, tensor in other.items()}
