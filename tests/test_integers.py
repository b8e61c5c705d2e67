"""Layers that compute in integers: simulated in torch, really done by ONNX Runtime, searched, written and read back."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import IMAGE, Residual, data_of, randomised, residual_files
from test_low_rank import module_at
from test_weights import bench_of, logits
from torch import Tensor, nn

from autoprune import api
from autoprune.apply import apply
from autoprune.bank.ranges import observe_arithmetic
from autoprune.bank.stitch import deployable, shape_only
from autoprune.core.policy import UnitDecision
from autoprune.core.target import Target
from autoprune.core.unit import Option
from autoprune.errors import ConfigError, PolicyError
from autoprune.files import read_policy
from autoprune.goal import Plan
from autoprune.model.flow import norms_after
from autoprune.model.integers import Arithmetic, Grid, compute_in_integers, deployed, integer_layers
from autoprune.progress import Silent
from autoprune.rivals import baseline_choices
from autoprune.runtimes.onnxruntime import OnnxRuntime, export
from autoprune.searching.baselines import uniform
from autoprune.searching.problem import Problem
from autoprune.spaces import load_space
from autoprune.subject import Task, subject_of
from autoprune.workbench import Workbench

torch.set_num_threads(1)

SPACE = """
methods:
  - {method: l2, compensate: least_squares}
weights:
  - {method: dense, bits: [8], inputs: [32, 8]}
  - {method: magnitude, patterns: [50%], bits: [8], inputs: [8]}
levels: 4
"""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    folder = tmp_path_factory.mktemp("bench")
    return bench_of(randomised(Residual()), folder, size="plain", text=SPACE, target=Target(batch=16))


def all_integer(bench: Workbench) -> dict[str, Option]:
    """Every layer, one of them sparse, and one unit narrower."""
    options = {
        entry.unit.name: next(option for option in entry.options if option.form == "integer")
        for entry in bench.space.entries
        if entry.unit.kind == "weights"
    }
    sparse = Option("magnitude", 288, pattern="50%", bits=8, inputs=8)
    return {"layer1.0.conv1": Option("l2", 4, "least_squares"), **options, "layer1.0.conv2.weight": sparse}


@given(low=st.floats(-1e3, 1e3), span=st.floats(1e-3, 1e3), value=st.floats(-2e3, 2e3))
def test_a_grid_holds_zero_and_what_it_spans(low: float, span: float, value: float) -> None:
    grid = Grid.over(low, low + span)
    assert float(grid.rounded(torch.zeros(1))) == 0.0
    inside = min(max(value, min(low, 0.0)), max(low + span, 0.0))
    assert abs(float(grid.rounded(torch.tensor([value]))) - inside) <= 1.01 * grid.scale + 1e-4


def test_rectified_outputs_have_a_grid_without_negatives() -> None:
    model = randomised(Residual())
    batches = [torch.randn(16, *IMAGE)]
    norms = norms_after(model, batches[0])
    layers = [name for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)]
    found = observe_arithmetic(model, layers, norms=norms, batches=batches, progress=Silent())
    assert found["layer1.0.conv1"].outputs.zero == 0  # a rectifier follows
    assert found["layer1.0.conv2"].outputs.zero > 0  # an addition follows
    assert found["layer1.0.conv1"].tail == norms["layer1.0.conv1"]


def one_layer() -> tuple[nn.Module, Tensor, Arithmetic]:
    """A convolution and its rectifier, and inputs that use the whole grid."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU()).eval()
    x = torch.randn(4, 8, 9, 9, generator=generator)
    with torch.no_grad():
        high = float(model(x).max())
    return model, x, Arithmetic("0", Grid.over(float(x.min()), float(x.max())), Grid.over(0.0, high))


def test_one_layer_is_what_the_runtime_computes() -> None:
    model, x, arithmetic = one_layer()
    compute_in_integers(model, "0", arithmetic)
    ready = deployed(model, {})
    with torch.no_grad():
        model[0].weight.data = ready[0].weight.detach()  # what the layer computes with
        wanted = model(x)
    got = torch.from_numpy(OnnxRuntime().load(ready, x, Target(batch=4)).run(x.numpy()))
    codes = ((got - wanted) / arithmetic.outputs.scale).round().abs()
    assert int(codes.max()) <= 1
    assert float((codes > 0).float().mean()) < 0.01


def test_the_runtime_fuses_every_integer_layer(bench: Workbench, tmp_path: Path) -> None:
    candidate = bench.stitcher.build(all_integer(bench))
    ready = deployable(candidate, bench.stitcher.norms)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(export(ready, bench.subject.example), options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
    convolutions = [m for m in candidate.model.modules() if isinstance(m, nn.Conv2d)]
    assert kinds.count("QLinearConv") == len(convolutions)
    assert "Conv" not in kinds
    assert "FusedConv" not in kinds


def test_candidates_round_as_the_runtime_does(bench: Workbench) -> None:
    candidate = bench.stitcher.build(all_integer(bench))
    assert set(integer_layers(candidate.model)) == {name.removesuffix(".weight") for name in all_integer(bench)}
    inputs = bench.subject.task.data.validation_inputs[:64]
    simulated = logits(candidate.model, inputs)
    session = OnnxRuntime().load(deployable(candidate, bench.stitcher.norms), inputs, Target(batch=64))
    got = torch.from_numpy(session.run(inputs.numpy()))
    step = bench.stitcher.arithmetic["head"].outputs.scale
    codes = ((got - simulated) / step).round().abs()
    assert float((codes <= 1).float().mean()) > 0.95  # codes that fall to the other side inside add up
    assert int(codes.max()) <= 2
    off = (simulated - logits(bench.subject.model, inputs)).abs().mean()
    assert float((got - simulated).abs().mean()) < 0.1 * float(off)


def test_weights_are_still_integers_times_scales(bench: Workbench) -> None:
    candidate = bench.stitcher.build(all_integer(bench))
    for layer, edit in candidate.edits.items():
        assert edit.codes is not None
        assert torch.equal(candidate.model.get_submodule(layer).weight, edit.codes.dequantised())


def test_shapes_alone_are_ready_for_the_clock(bench: Workbench) -> None:
    model = shape_only(
        bench.subject.model, bench.subject.anatomy, all_integer(bench), norms=bench.stitcher.norms,
        arithmetic=bench.stitcher.arithmetic,
    )  # fmt: skip
    graph = onnx.load_from_string(export(model, bench.subject.example)).graph
    kinds = [node.op_type for node in graph.node]
    layers = sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in bench.subject.model.modules())
    assert len(integer_layers(model)) == layers
    assert kinds.count("QuantizeLinear") == 3 * layers - 1  # a convolution and its shortcut read the same
    assert "BatchNormalization" not in kinds


def test_a_baseline_has_all_layers_in_integers(bench: Workbench) -> None:
    problem = Problem(bench.space, bench.costs, {"macs": 0.5 * bench.costs.dense["macs"]}, bench.priors)
    found = uniform(problem, method="l2", compensate="least_squares", integers=True)
    assert found is not None
    options = bench.space.options_of(found)
    for entry in bench.space.entries:
        if entry.unit.kind == "weights":
            assert options[entry.unit.name] == next(option for option in entry.options if option.form == "integer")
    assert problem.fits(found)
    assert "uniform l2 + least squares, all int8" in baseline_choices(bench, problem)


def test_models_without_integers_are_handed_on_as_they_are(bench: Workbench) -> None:
    candidate = bench.stitcher.build({})
    assert deployable(candidate, bench.stitcher.norms) is candidate.model


def test_a_runtime_that_computes_in_floats_has_no_such_options(tmp_path: Path) -> None:
    plain = bench_of(randomised(Residual()), tmp_path, text=SPACE, target=Target("torch"))
    assert all(option.inputs == 32 for entry in plain.space.entries for option in entry.options)


def test_search_yaml_apply_and_back(tmp_path: Path) -> None:
    model = randomised(Residual())
    space = tmp_path / "space.yaml"
    space.write_text("channels: false\nblocks: false\nweights:\n  - {method: dense, bits: [8], inputs: [8]}\n")
    calibration, validation = data_of(model, IMAGE)
    outcome = api.search(
        model, calibration=calibration, validation=validation, budget="90%size", space=str(space),
        plan=Plan(trials=6, finalists=1), run=tmp_path / "run", target=Target(batch=16),
    )  # fmt: skip
    policy = read_policy(outcome.folder / "policy.yaml")
    assert {decision.inputs for decision in policy.units.values()} == {8}
    assert "inputs: 8" in (outcome.folder / "policy.yaml").read_text()
    task = Task(model, "Residual", api.as_data(calibration, validation), api.evaluator("top1"), Target(batch=16),
                load_space(str(space), tmp_path))  # fmt: skip
    subject = subject_of(task, Silent())
    applied = apply(outcome.folder / "policy.yaml", subject)
    inputs = torch.randn(16, *IMAGE)
    torch.testing.assert_close(logits(applied.model, inputs), logits(outcome.model, inputs), rtol=0, atol=1e-4)
    written = residual_files(applied, subject, tmp_path / "out")
    assert set(written) == {"state dict", "packed", "rebuild script", "onnx", "torch.export"}
    rebuilt = module_at(written["rebuild script"]).model()
    torch.testing.assert_close(logits(rebuilt, inputs), logits(outcome.model, inputs), rtol=0, atol=1e-4)
    program = torch.export.load(written["torch.export"]).module()
    torch.testing.assert_close(program(inputs), logits(outcome.model, inputs), rtol=0, atol=1e-4)
    content = written["onnx"].read_bytes()
    assert len(content) == outcome.record.chosen.size_bytes
    kinds = [tensor.data_type for tensor in onnx.load_from_string(content).graph.initializer]
    assert kinds.count(onnx.TensorProto.INT8) == len(policy.units)
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    got = torch.from_numpy(session.run(None, {"input": inputs.numpy()})[0])
    assert float((got - logits(outcome.model, inputs)).abs().mean()) < 0.1
    side = outcome.folder / "policy.safetensors"
    tensors = safetensors.torch.load_file(side)
    name = next(name for name in tensors if name.startswith("grids/"))
    text = (outcome.folder / "policy.yaml").read_text()
    kept = [line for line in text.splitlines() if not line.startswith("weights_sha256")]
    (outcome.folder / "policy.yaml").write_text("\n".join(kept) + "\n")
    for wrong in (torch.tensor([0.0, 1.0, 1.0, 1.0]), torch.tensor([1.0]), None):
        changed = {key: tensor for key, tensor in tensors.items() if key != name}
        safetensors.torch.save_file(changed | ({} if wrong is None else {name: wrong}), side)
        with pytest.raises(PolicyError, match="no grids for it"):
            apply(outcome.folder / "policy.yaml", subject)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{method: dense, bits: [4], inputs: [8]}", r"needs bits: \[8\]"),
        ("{method: dense, bits: [8], inputs: [4]}", "inputs"),
        ("{method: low_rank, ranks: [50%], inputs: [8]}", "neither patterns nor bits nor inputs"),
    ],
)
def test_mistakes_in_a_space_are_named(line: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(f"channels: false\nweights:\n  - {line}\n")
    with pytest.raises(ConfigError, match=problem):
        load_space("space.yaml", tmp_path)


def test_a_decision_says_what_may_not_be() -> None:
    with pytest.raises(ValueError, match="inputs: 8 needs bits: 8"):
        UnitDecision(kind="weights", method="dense", keep=4, of=4, bits=4, inputs=8)
