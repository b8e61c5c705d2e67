"""Kernels cut to their middle: against zeros in the outer taps, theory, built models, and the way to the files."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import conv, data_of, randomised
from shipped import assert_onnx_runtime_agrees, shipped
from test_weights import logits
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from autoprune import api
from autoprune.apply import apply
from autoprune.bank.mend import solve
from autoprune.bank.stitch import shape_only
from autoprune.core.cost import LatencyTable, TableCheck
from autoprune.core.policy import UnitDecision
from autoprune.core.space import Choice
from autoprune.core.target import Target
from autoprune.core.unit import DROP, Option
from autoprune.costing import Stages, measured_costs
from autoprune.engines.local import Local
from autoprune.errors import ConfigError, PolicyError
from autoprune.files import read_policy
from autoprune.goal import Plan
from autoprune.model.coupling import CONVOLUTIONS
from autoprune.model.cut import Kept, cut, plan_cut
from autoprune.model.describe import macs_of
from autoprune.model.discover import discover
from autoprune.model.kernels import cut_sizes, middle
from autoprune.profile.cost_model import CostModel
from autoprune.profile.draw import draw
from autoprune.profile.latency import refitted
from autoprune.progress import Silent
from autoprune.rebuilding import cropped
from autoprune.recover.refit import refit
from autoprune.run import Run
from autoprune.spaces import SpaceSpec, load_space, resolve
from autoprune.storage import Weights
from autoprune.subject import Task, subject_of
from autoprune.verify import params
from autoprune.workbench import Workbench, prepare

torch.set_num_threads(1)

IMAGE = (3, 12, 12)
SPACE = """
methods:
  - {method: l2, compensate: least_squares}
weights:
  - {method: low_rank, ranks: [25%]}
  - {method: magnitude, patterns: [50%], bits: [8]}
kernels: [3, 5]
levels: 4
"""
MIXED = {
    "stem.0": Option("l2", 8, "least_squares"),
    "stem.0.kernel": Option("center", 5, "least_squares"),
    "wide.kernel": Option("center", 3),
    "wide.weight": Option("magnitude", 1600, pattern="50%", bits=8),
    "block.conv1": Option("l2", 9, "least_squares"),
    "block.depthwise.kernel": Option("center", 3, "least_squares"),
    "block.conv2.kernel": Option("center", 3, "least_squares"),
    "block.conv2.weight": Option("low_rank", 616, rank=2),
}


class Inverted(nn.Module):
    """A residual block whose branch has a depthwise layer of 5x5 and a convolution of 5x5."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv(8, 12, 1), nn.BatchNorm2d(12)
        self.depthwise, self.norm2 = conv(12, 12, 5, groups=12), nn.BatchNorm2d(12)
        self.conv2, self.norm3 = conv(12, 8, 5), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.norm2(self.depthwise(torch.relu(self.norm1(self.conv1(x))))))
        return x + self.norm3(self.conv2(inner))


class Wide(nn.Module):
    """Kernels of 7 and 5, with and without norm, in a line and in a residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 16, 7, stride=2), nn.BatchNorm2d(16), nn.ReLU())
        self.wide = nn.Conv2d(16, 8, 5, padding="same", padding_mode="reflect")
        self.block = Inverted()
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.block(torch.relu(self.wide(self.stem(x))))
        logits: Tensor = self.fc(features.mean((2, 3)))
        return logits


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    model = randomised(Wide())
    folder = tmp_path_factory.mktemp("bench")
    calibration, validation = data_of(model, IMAGE)
    (folder / "space.yaml").write_text(SPACE)
    data, target = api.as_data(calibration, validation), Target("torch")
    task = Task(model, "Wide", data, api.evaluator("top1"), target, load_space("space.yaml", folder), size="plain")
    stages, subject = Stages(), subject_of(task, Silent())
    run = Run(folder, Local())
    space, costs, table = measured_costs(subject, run, latency=False, stages=stages, progress=Silent())
    return prepare(subject, space, costs, table, run=run, stages=stages, progress=Silent())


LAYERS = {
    "5x5": (nn.Conv2d(6, 4, 5, padding=2), (3,)),
    "7x7 strided": (nn.Conv2d(6, 4, 7, 2, 3), (5, 3)),
    "little padding": (nn.Conv2d(6, 4, 7, padding=1), (5,)),
    "same, reflected": (nn.Conv2d(6, 4, 5, padding="same", padding_mode="reflect"), (3,)),
    "circular": (nn.Conv2d(6, 4, 5, padding=2, padding_mode="circular"), (3,)),
    "depthwise": (nn.Conv2d(6, 6, 5, padding=2, groups=6), (3,)),
    "grouped": (nn.Conv2d(6, 4, 5, padding=2, groups=2), (3,)),
    "1-d": (nn.Conv1d(6, 4, 9, padding=4), (7, 5, 3)),
    "3-d": (nn.Conv3d(6, 4, 5, padding=2), (3,)),
}
WHOLE = {
    "small": nn.Conv2d(6, 4, 3, padding=1), "dilated": nn.Conv2d(6, 4, 5, padding=4, dilation=2),
    "without padding": nn.Conv2d(6, 4, 5), "valid": nn.Conv2d(6, 4, 5, padding="valid"),
    "even": nn.Conv2d(6, 4, 6, padding=3), "of two sides": nn.Conv2d(6, 4, (1, 7), padding=(0, 3)),
    "linear": nn.Linear(6, 4),
}  # fmt: skip


def zeroed(layer: nn.Module, size: int) -> Tensor:
    """The weight of `layer` with zeros but for the middle."""
    inner = torch.zeros_like(layer.weight)
    cropped(inner, size).copy_(cropped(layer.weight.detach(), size))
    return inner


@pytest.mark.parametrize("name", LAYERS)
def test_a_cut_kernel_is_one_with_zeros_around(name: str) -> None:
    layer, sizes = LAYERS[name]
    assert cut_sizes(layer) == sizes
    inputs = torch.randn(2, 6, *(13, 12, 11)[: layer.weight.ndim - 2])
    for size in sizes:
        smaller = cut(nn.Sequential(layer), plan_cut({}, (), kept={}, dropped=(), kernels={"0": size}))
        assert smaller[0].kernel_size == (size,) * (layer.weight.ndim - 2)
        with torch.no_grad():
            masked = nn.Sequential(layer)
            state = {**masked.state_dict(), "0.weight": zeroed(layer, size)}
            expected = torch.func.functional_call(masked, state, (inputs,))
            torch.testing.assert_close(smaller(inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", WHOLE)
def test_other_kernels_stay(name: str) -> None:
    assert cut_sizes(WHOLE[name]) == ()


class Asks(nn.Conv2d):
    """A convolution that looks at its kernel: a cut one does something else."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.kernel_size[0]


def test_units_are_what_can_be_cut_and_the_others_say_why() -> None:
    asks = Asks(4, 4, 5, padding=2)
    model = nn.Sequential(
        conv(3, 4, 7), asks, nn.Conv2d(4, 4, 5), nn.Conv2d(4, 4, 5, padding=4, dilation=2), conv(4, 4)
    )
    example = torch.randn(2, 3, 12, 12)
    found = discover(model, example, kernels=True)
    assert [unit for unit in found.units if unit.kind == "kernel"] == [
        dataclasses.replace(found.units[0], name="0.kernel", kind="kernel", width=7, layers=("0",), sizes=(5, 3))
    ]
    reasons = {entry.root: entry.reason for entry in found.refused if entry.root.endswith(".kernel")}
    assert set(reasons) == {"1.kernel", "2.kernel", "3.kernel"}
    assert "more than a convolution" in reasons["1.kernel"]
    assert "padding" in reasons["2.kernel"]
    assert "dilated" in reasons["3.kernel"]
    assert not any(unit.kind == "kernel" for unit in discover(model, example).units)
    protected = discover(model, example, kernels=True, protect=["0"])
    assert not any(unit.kind == "kernel" for unit in protected.units)


def test_the_space_says_which_sizes() -> None:
    found = discover(Wide().eval(), torch.randn(2, *IMAGE), kernels=True)
    channels = {"channels": False, "blocks": True}
    for kernels, stem in (((), ()), ((3,), (3, 3)), ((3, 5), (5, 5, 3, 3))):
        spec = SpaceSpec.model_validate({**channels, "kernels": kernels})
        options = {entry.unit.name: entry.options[1:] for entry in resolve(found.units, spec).entries}
        assert tuple(option.keep for option in options["stem.0.kernel"]) == stem
        assert {option.compensate for option in options["wide.kernel"]} == (
            {"none", "least_squares"} if stem else set()
        )


@pytest.mark.parametrize(("kernels", "problem"), [("[4]", "odd"), ("[1]", "greater than or equal to 3")])
def test_mistakes_in_kernels_are_named(kernels: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(f"channels: false\nkernels: {kernels}\n")
    with pytest.raises(ConfigError, match=problem):
        load_space("space.yaml", tmp_path)


def test_decisions_on_kernels_are_checked() -> None:
    assert UnitDecision(kind="kernel", method="center", keep=3, of=5).option == Option("center", 3)
    with pytest.raises(ValueError, match="odd"):
        UnitDecision(kind="kernel", method="center", keep=4, of=5)


@pytest.mark.parametrize("layer", ["wide", "block.depthwise", "block.conv2"])
def test_what_stays_is_the_least_squares_answer(bench: Workbench, layer: str) -> None:
    """On the calibration images themselves: torch.linalg.lstsq over the patches that the smaller kernel sees, with a
    constant, does no better, and the middle as it was does worse.
    """
    model, calibration = bench.subject.model, bench.subject.task.data.calibration_inputs
    module, norms = model.get_submodule(layer), bench.bank.norms
    assert isinstance(module, CONVOLUTIONS)
    seen: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    logits(model, calibration)
    hook.remove()
    patches, wanted = moved_patches(module, seen[0], 5), logits(module, seen[0]).double()
    inner, wanted = patches[..., middle((5, 5), 3)], wanted.flatten(2).transpose(1, 2).flatten(0, 1)  # (rows, outputs)
    norm = model.get_submodule(norms[layer]) if layer in norms else None
    solved = solve(module, bench.bank.statistics[layer], kept=Kept(kernel=3), norm=norm).mended.weight
    error = {}
    for output in range(len(module.weight)):
        own = inner[:, output, None] if module.groups > 1 else inner  # (rows, channels, taps)
        columns = torch.cat((own.flatten(1), torch.ones(len(own), 1)), 1).double()
        best = torch.linalg.lstsq(columns, wanted[:, output]).solution
        error["best"] = float((columns @ best - wanted[:, output]).square().sum())
        for name, weight in (("solved", solved), ("middle", cropped(module.weight.detach(), 3))):
            rest = wanted[:, output] - columns[:, :-1] @ weight[output].flatten().double()
            error[name] = float((rest - rest.mean()).square().sum())
        assert error["solved"] == pytest.approx(error["best"], rel=0.01)
        assert error["solved"] < error["middle"]


def moved_patches(layer: nn.Module, inputs: Tensor, side: int) -> Tensor:
    """What each output position of `layer` reads, (rows, channels, taps)."""
    assert isinstance(layer, CONVOLUTIONS)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = nn.functional.pad(inputs, (side // 2,) * 4, mode=mode)
    flat = nn.functional.unfold(padded, side, stride=layer.stride)  # (N, channels * taps, positions)
    return flat.transpose(1, 2).flatten(0, 1).view(-1, inputs.shape[1], side**2)


def test_harm_is_less_when_the_rest_is_solved_again_and_grows_with_what_goes(bench: Workbench) -> None:
    for name in ("reconstruction", "second_order"):
        for entry, harms in zip(bench.space.entries, bench.priors[name], strict=True):
            if entry.unit.kind != "kernel":
                continue
            harm = {(option.keep, option.compensate): value for option, value in zip(entry.options, harms, strict=True)}
            sizes = sorted({option.keep for option in entry.options[1:]})
            assert all(0 < harm[size, "least_squares"] < harm[size, "none"] for size in sizes)
            assert [harm[size, "least_squares"] for size in sizes] == sorted(
                (harm[size, "least_squares"] for size in sizes), reverse=True
            )


def test_a_mixed_candidate_is_the_masked_model_where_nothing_is_mended(bench: Workbench) -> None:
    options = {"stem.0.kernel": Option("center", 3), "block.depthwise.kernel": Option("center", 3)}
    candidate = bench.stitcher.build(options, recalibrate=False)
    model, inputs = bench.subject.model, torch.randn(4, *IMAGE)
    layers = ("stem.0", "block.depthwise")
    state = model.state_dict() | {f"{name}.weight": zeroed(model.get_submodule(name), 3) for name in layers}
    with torch.no_grad():
        expected = torch.func.functional_call(model, state, (inputs,))
    torch.testing.assert_close(logits(candidate.model, inputs), expected, rtol=0, atol=1e-5)


def test_a_mixed_candidate_runs_refits_and_is_counted(bench: Workbench) -> None:
    candidate = bench.stitcher.build(MIXED)
    modules = dict(candidate.model.named_modules())
    assert modules["wide"].kernel_size == (3, 3)
    assert (modules["wide"].weight == 0).float().mean() == pytest.approx(0.5, abs=0.02)
    assert modules["block.depthwise"].weight.shape == (9, 1, 3, 3)
    assert [part.kernel_size for part in modules["block.conv2"]] == [(3, 3), (1, 1)]
    choice = bench.space.choice_of(MIXED)
    assert bench.costs.cost("macs", choice) == macs_of(candidate.model, torch.randn(1, *IMAGE))
    assert bench.costs.cost("params", choice) == params(candidate.model)
    before = float(bench.selection.divergences(candidate.model).mean())
    refit(bench.thorough, candidate, edits=bench.stitcher.edited_layers(MIXED))
    assert modules["wide"].weight.shape == (8, 8, 3, 3)
    assert float(bench.selection.divergences(candidate.model).mean()) < before
    assert candidate.edits["wide"].codes is not None
    dropped = bench.stitcher.build({**MIXED, "block": DROP})
    assert "block.conv2" not in dict(dropped.model.named_modules())


@settings(max_examples=40, deadline=None)
@given(data=st.data(), metric=st.sampled_from(["macs", "params", "size"]))
def test_costs_of_neighbours_are_exact(bench: Workbench, data: st.DataObject, metric: str) -> None:
    costs, choice = bench.costs, drawn(bench, data)
    now, changes = costs.cost(metric, choice), costs.linearise(metric, choice)
    unit = data.draw(st.integers(0, len(choice) - 1))
    for option in range(bench.space.sizes[unit]):
        neighbour = (*choice[:unit], option, *choice[unit + 1 :])
        assert costs.cost(metric, neighbour) - now == pytest.approx(float(changes[unit][option]), abs=1e-6)


def drawn(bench: Workbench, data: st.DataObject) -> Choice:
    return tuple(data.draw(st.integers(0, size - 1)) for size in bench.space.sizes)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_counts_are_those_of_really_built_models(bench: Workbench, data: st.DataObject) -> None:
    choice, image = drawn(bench, data), torch.randn(1, *IMAGE)
    built = shape_only(bench.subject.model, bench.subject.anatomy, bench.space.options_of(choice))
    with FlopCounterMode(display=False) as counter:
        built(image)
    assert bench.costs.cost("macs", choice) == counter.get_total_flops() / 2
    assert bench.costs.cost("params", choice) == params(built)


@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_bytes_are_those_of_really_built_models(bench: Workbench, data: st.DataObject) -> None:
    choice = bench.space.normal(drawn(bench, data))
    candidate = bench.stitcher.build(bench.space.options_of(choice), recalibrate=False)
    actual = bench.files.size(candidate.model, Weights.of(candidate))
    assert bench.costs.cost("size", choice) == pytest.approx(actual, abs=8)


def test_the_table_learns_what_a_smaller_kernel_takes(bench: Workbench) -> None:
    """Times by a law of which the MACs know nothing: at 3x3 the kernel of `wide` takes next to nothing."""
    architecture, space = bench.costs.architecture, bench.space
    place = space.names.index("wide.kernel")

    def law(choice: Choice) -> float:
        macs = bench.costs.cost("macs", choice) / bench.costs.dense["macs"]
        return 0.1 + 0.5 * macs + (0.4 if space.entries[place].options[choice[place]].keep == 5 else 0.02)

    choices = draw(space, 80, np.random.default_rng(0))
    none = TableCheck(models=0, median_error=0.0, worst_error=0.0)
    empty = LatencyTable(key="k", dense_s=1.0, base=1.0, channel_block=1, signatures=(), fitted_models=0, check=none)
    table = refitted(empty, space, architecture, [(choice, law(choice)) for choice in choices], seed=0)
    costs = CostModel(architecture, space, table)
    other = [choice for choice in draw(space, 120, np.random.default_rng(1)) if choice not in choices]
    errors = [abs(costs.cost("latency", choice) / law(choice) - 1) for choice in other]
    assert float(np.median(errors)) < 0.05
    small = space.choice_of({"wide.kernel": Option("center", 3)})
    assert costs.cost("latency", small) < 0.75 * costs.cost("latency", space.dense)


def test_search_yaml_apply_rebuild_and_back(tmp_path: Path) -> None:
    model = randomised(Wide())
    space = tmp_path / "space.yaml"
    space.write_text("methods:\n  - {method: l2, compensate: least_squares}\nlevels: 4\nkernels: [3]\n")
    calibration, validation = data_of(model, IMAGE)
    outcome = api.search(
        model, calibration=calibration, validation=validation, budget="45%macs", space=str(space),
        plan=Plan(trials=8, finalists=1), run=tmp_path / "run", target=Target("torch"),
    )  # fmt: skip
    assert outcome.met
    policy = outcome.folder / "policy.yaml"
    kernels = {name: decision for name, decision in read_policy(policy).units.items() if decision.kind == "kernel"}
    assert kernels
    assert all(decision.method == "center" and decision.keep == 3 for decision in kernels.values())
    task = Task(model, "Wide", api.as_data(calibration, validation), api.evaluator("top1"), Target("torch"),
                load_space(str(space), tmp_path))  # fmt: skip
    inputs = torch.randn(8, *IMAGE)
    subject, written, _ = shipped(task, outcome, inputs, factory="test_kernels.py:Wide", folder=tmp_path / "out")
    assert_onnx_runtime_agrees(written, outcome, inputs)
    name = next(iter(kernels))
    text = policy.read_text()
    start = text.index(name)
    policy.write_text(text[:start] + text[start:].replace("keep: 3", "keep: 1", 1))
    with pytest.raises(PolicyError, match=f"units.{name}: a kernel of 1 is not possible here"):
        apply(policy, subject)
