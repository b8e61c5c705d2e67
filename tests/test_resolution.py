"""Models that resize their input: where that is possible, what it costs beside other cuts, and the way to the files."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Residual, Vgg, conv, data_of, randomised
from shipped import assert_onnx_runtime_agrees, shipped
from test_weights import logits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from autoprune import api
from autoprune.apply import apply
from autoprune.bank.stitch import shape_only
from autoprune.core.cost import LatencyTable, TableCheck
from autoprune.core.space import Choice
from autoprune.core.target import Target
from autoprune.core.unit import DROP, Option
from autoprune.costing import Stages, measured_costs
from autoprune.engines.local import Local
from autoprune.errors import ConfigError, PolicyError
from autoprune.files import read_policy
from autoprune.goal import Plan
from autoprune.model.discover import discover
from autoprune.model.resolution import smaller_inputs
from autoprune.profile.cost_model import CostModel
from autoprune.profile.draw import draw
from autoprune.profile.latency import refitted
from autoprune.profile.live_map import LiveMap, SizedMaps
from autoprune.progress import Silent
from autoprune.recover.refit import refit
from autoprune.run import Run
from autoprune.runtimes.onnxruntime import _export_traced
from autoprune.spaces import SpaceSpec, load_space, resolve
from autoprune.storage import Weights
from autoprune.subject import Task, subject_of
from autoprune.verify import params
from autoprune.workbench import Workbench, prepare

torch.set_num_threads(1)

IMAGE = (3, 16, 24)
SPACE = """
methods:
  - {method: l2, compensate: least_squares}
weights:
  - {method: low_rank, ranks: [25%]}
kernels: [3]
resolutions: [75%, 50%]
levels: 4
"""
MIXED = {
    "stem.0": Option("l2", 4, "least_squares"),
    "stem.0.kernel": Option("center", 3, "least_squares"),
    "layer1.0.conv1.weight": Option("low_rank", 160, rank=2),
    "layer1.1": DROP,
    "input": Option("resize", 12),
}


class Wider(Residual):
    """A residual network whose first kernel is 5x5; maps of half the height at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem[0] = conv(3, 8, 5)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    model, folder = randomised(Wider()), tmp_path_factory.mktemp("bench")
    (folder / "space.yaml").write_text(SPACE)
    task = Task(model, "Wider", api.as_data(*data_of(model, IMAGE)), api.evaluator("top1"), Target("onnxruntime"),
                load_space("space.yaml", folder))  # fmt: skip
    stages, subject = Stages(), subject_of(task, Silent())
    run = Run(folder, Local())
    space, costs, table = measured_costs(subject, run, latency=False, stages=stages, progress=Silent())
    return prepare(subject, space, costs, table, run=run, stages=stages, progress=Silent())


def test_sizes_are_multiples_of_the_stride_with_both_sides_alike() -> None:
    found = smaller_inputs(Wider().eval(), torch.randn(2, *IMAGE))
    assert list(found) == [14, 12, 10, 8, 6, 4]
    assert all(height == side and width % 2 == 0 for side, (height, width) in found.items())
    assert all(abs(width - 1.5 * height) <= 1 for height, width in found.values())


class Tokens(nn.Module):
    """No images."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.second(torch.relu(self.first(x)))).mean(1)


@pytest.mark.parametrize(
    ("model", "shape"),
    [(Vgg(), (3, 8, 8)), (nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 4)), (3, 16, 16)), (Tokens(), (5, 12))],
    ids=["flat", "maps", "tokens"],
)
def test_models_whose_outputs_would_differ_keep_their_size(model: nn.Module, shape: tuple[int, ...]) -> None:
    found = discover(model.eval(), torch.randn(2, *shape), resolutions=True)
    assert not any(unit.kind == "resolution" for unit in found.units)
    assert [entry.root for entry in found.refused if "same shapes" in entry.reason] == ["input"]


def test_nothing_is_resized_unless_asked_for() -> None:
    found = discover(Wider().eval(), torch.randn(2, *IMAGE))
    assert not any(unit.kind == "resolution" for unit in found.units)
    assert found.architecture.smaller == ()


def test_the_space_says_which_sizes() -> None:
    found = discover(Wider().eval(), torch.randn(2, *IMAGE), resolutions=True)
    spec = SpaceSpec.model_validate({"channels": False, "resolutions": ["80%", 0.74, "50%"]})
    options = {entry.unit.name: entry.options[1:] for entry in resolve(found.units, spec).entries}
    assert options["input"] == (Option("resize", 12), Option("resize", 8))


@pytest.mark.parametrize("share", ["100%", "0%", "[]"])
def test_mistakes_in_resolutions_are_named(share: str, tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(f"channels: false\nresolutions: [{share}]\n")
    with pytest.raises(ConfigError, match="resolutions"):
        load_space("space.yaml", tmp_path)


def test_a_candidate_is_the_model_on_resized_images(bench: Workbench) -> None:
    candidate = bench.stitcher.build({"input": Option("resize", 12)}, recalibrate=False)
    inputs = torch.randn(4, *IMAGE)
    expected = logits(bench.subject.model, functional.interpolate(inputs, (12, 18), mode="bilinear", antialias=True))
    torch.testing.assert_close(logits(candidate.model, inputs), expected, rtol=0, atol=1e-6)
    assert set(candidate.model.state_dict()) == set(bench.subject.model.state_dict())
    again = bench.stitcher.build({}, recalibrate=False)
    torch.testing.assert_close(logits(again.model, inputs), logits(bench.subject.model, inputs), rtol=0, atol=0)


def test_recalibration_is_at_the_new_size(bench: Workbench) -> None:
    plain, mended = (bench.stitcher.build({"input": Option("resize", 8)}, recalibrate=on) for on in (False, True))
    errors = [float(bench.selection.divergences(each.model).mean()) for each in (plain, mended)]
    assert errors[1] < errors[0]


def test_a_mixed_candidate_is_counted_and_refitted(bench: Workbench) -> None:
    candidate = bench.stitcher.build(MIXED)
    choice = bench.space.choice_of(MIXED)
    with FlopCounterMode(display=False) as counter:
        candidate.model(torch.randn(1, *IMAGE))
    assert bench.costs.cost("macs", choice) == counter.get_total_flops() / 2
    assert bench.costs.cost("params", choice) == params(candidate.model)
    before = float(bench.selection.divergences(candidate.model).mean())
    done = refit(bench.thorough, candidate, edits=bench.stitcher.edited_layers(MIXED))
    assert done.layers > 3
    assert float(bench.selection.divergences(candidate.model).mean()) < before


def drawn(bench: Workbench, data: st.DataObject) -> Choice:
    return tuple(data.draw(st.integers(0, size - 1)) for size in bench.space.sizes)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_counts_are_those_of_really_built_models(bench: Workbench, data: st.DataObject) -> None:
    choice = drawn(bench, data)
    built = shape_only(bench.subject.model, bench.subject.anatomy, bench.space.options_of(choice))
    with FlopCounterMode(display=False) as counter:
        built(torch.randn(1, *IMAGE))
    assert bench.costs.cost("macs", choice) == counter.get_total_flops() / 2
    assert bench.costs.cost("params", choice) == params(built)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), metric=st.sampled_from(["macs", "params", "size"]))
def test_costs_of_neighbours_are_exact(bench: Workbench, data: st.DataObject, metric: str) -> None:
    costs, choice = bench.costs, drawn(bench, data)
    now, changes = costs.cost(metric, choice), costs.linearise(metric, choice)
    unit = data.draw(st.integers(0, len(choice) - 1))
    for option in range(bench.space.sizes[unit]):
        neighbour = (*choice[:unit], option, *choice[unit + 1 :])
        assert costs.cost(metric, neighbour) - now == pytest.approx(float(changes[unit][option]), abs=1e-6)


@pytest.mark.parametrize("options", [{"input": Option("resize", 12)}, MIXED], ids=["resized", "mixed"])
def test_bytes_of_the_file_are_predicted(bench: Workbench, options: dict[str, Option]) -> None:
    candidate = bench.stitcher.build(options, recalibrate=False)
    actual = bench.files.size(candidate.model, Weights.of(candidate))
    assert bench.costs.cost("size", bench.space.choice_of(options)) == pytest.approx(actual, rel=0.02)


def test_harm_grows_as_images_shrink(bench: Workbench) -> None:
    place = bench.space.names.index("input")
    for harms in bench.priors.values():
        assert 0 == harms[place][0] < harms[place][1] < harms[place][2]


@pytest.mark.parametrize("planned", [True, False])
def test_activations_are_those_of_the_chosen_size(bench: Workbench, planned: bool) -> None:
    subject, space, example = bench.subject, bench.space, torch.randn(1, *IMAGE)

    def build(choice: Choice) -> nn.Module:
        return shape_only(subject.model, subject.anatomy, space.options_of(choice))

    sized = SizedMaps.of(space, build, example, planned=planned)
    for options in (
        {},
        {"input": Option("resize", 8)},
        {"input": Option("resize", 8), "stem.0": Option("l2", 4, "least_squares")},
    ):
        choice = space.choice_of(options)
        kept = np.asarray([[entry.options[index].keep for entry, index in zip(space.entries, choice, strict=True)]])
        own = LiveMap.of(space, lambda _, choice=choice: build(choice), example, planned=planned)
        assert sized.needs(kept.astype(float), block=1) == pytest.approx(own.needs(kept.astype(float), block=1))


@pytest.mark.slow
def test_the_table_learns_what_a_smaller_input_takes(bench: Workbench) -> None:
    """Times by a law in which resizing itself takes a tenth of the dense model's time."""
    architecture, space = bench.costs.architecture, bench.space
    place = space.names.index("input")

    def law(choice: Choice) -> float:
        macs = bench.costs.cost("macs", choice) / bench.costs.dense["macs"]
        return 0.1 + 0.9 * macs + (0.1 if choice[place] else 0.0)

    choices = draw(space, 40, np.random.default_rng(0))
    assert {choice[place] for choice in choices} == set(range(space.sizes[place]))
    none = TableCheck(models=0, median_error=0.0, worst_error=0.0)
    empty = LatencyTable(key="k", dense_s=1.0, base=1.0, channel_block=1, signatures=(), fitted_models=0, check=none)
    table = refitted(empty, space, architecture, [(choice, law(choice)) for choice in choices], seed=0)
    costs = CostModel(architecture, space, table)
    others = [choice for choice in draw(space, 60, np.random.default_rng(1)) if choice not in choices]
    errors = [abs(costs.cost("latency", choice) / law(choice) - 1) for choice in others]
    assert float(np.median(errors)) < 0.05


def test_onnx_runtime_resizes_as_torch_does_by_the_quick_exporter(bench: Workbench) -> None:
    candidate = bench.stitcher.build(MIXED)
    inputs = torch.randn(5, *IMAGE)
    session = onnxruntime.InferenceSession(_export_traced(candidate.model, inputs[:1], dynamic_batch=True))
    (given_back,) = session.run(None, {"input": inputs.numpy()})
    torch.testing.assert_close(torch.from_numpy(given_back), logits(candidate.model, inputs), rtol=0, atol=1e-5)


def test_search_yaml_apply_rebuild_and_back(tmp_path: Path) -> None:
    model = randomised(Wider())
    space = tmp_path / "space.yaml"
    space.write_text("channels: false\nkernels: [3]\nresolutions: [75%, 50%]\n")
    calibration, validation = data_of(model, IMAGE)
    outcome = api.search(
        model, calibration=calibration, validation=validation, budget="60%macs", space=str(space),
        plan=Plan(trials=8, finalists=1), run=tmp_path / "run", target=Target("torch"),
    )  # fmt: skip
    assert outcome.met
    policy = outcome.folder / "policy.yaml"
    assert read_policy(policy).units["input"].kind == "resolution"
    task = Task(model, "Wider", api.as_data(calibration, validation), api.evaluator("top1"), Target("torch"),
                load_space(str(space), tmp_path))  # fmt: skip
    inputs = torch.randn(8, *IMAGE)
    subject, written, _ = shipped(task, outcome, inputs, factory="test_resolution.py:Wider", folder=tmp_path / "out")
    assert_onnx_runtime_agrees(written, outcome, inputs)
    loaded = torch.export.load(written["torch.export"]).module()
    one = inputs[: subject.example.shape[0]]
    torch.testing.assert_close(loaded(one), logits(outcome.model, one), rtol=0, atol=1e-5)
    text = policy.read_text()
    start = text.index("  input:")
    policy.write_text(text[:start] + re.sub(r"keep: \d+", "keep: 1", text[start:], count=1))
    with pytest.raises(PolicyError, match=r"units\.input"):
        apply(policy, subject)
