"""Zeros and integers inside layers, as part of a search: costs, candidates, refit, files, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import IMAGE, Residual, data_of, randomised, residual_files, workbench_of
from torch import Tensor, nn

from autoprune import api, policies
from autoprune.apply import apply
from autoprune.bank.sparse import Reading, edited
from autoprune.core.pattern import parse_pattern
from autoprune.core.policy import UnitDecision
from autoprune.core.target import Target
from autoprune.core.unit import DROP, Option
from autoprune.costing import Stages, measured_costs
from autoprune.engines.local import Local
from autoprune.errors import ConfigError, PolicyError
from autoprune.files import read_policy
from autoprune.goal import Plan
from autoprune.model.discover import discover
from autoprune.packing.archive import unpack
from autoprune.profile.cost_model import CostModel
from autoprune.progress import Silent
from autoprune.recover.refit import Reference, refit
from autoprune.run import Run
from autoprune.searching.baselines import global_sparsity, uniform_sparsity
from autoprune.searching.problem import Problem
from autoprune.spaces import SpaceSpec, load_space, resolve
from autoprune.storage import FLOATS, Weights
from autoprune.subject import Task, subject_of
from autoprune.verify import Stopwatch, size_bytes
from autoprune.workbench import Workbench, prepare

torch.set_num_threads(1)

TORCH = Target("torch")
SPACE = """
methods:
  - {method: l2, compensate: least_squares}
weights:
  - {method: dense, bits: [8, 4]}
  - {method: sparsegpt, patterns: ["2:4", 50%, 80%], bits: [32, 8]}
  - {method: magnitude, patterns: [30%, 60%, 90%], bits: [8]}
levels: 4
"""
MIXED = {
    "layer1.0.conv1": Option("l2", 4, "least_squares"),
    "layer1.1": DROP,
    "layer1.0.conv2.weight": Option("sparsegpt", 288, pattern="50%", bits=8),
    "layer2.0.conv1.weight": Option("sparsegpt", 432, pattern="2:4"),
    "layer2.1.conv2.weight": Option("dense", 1296, bits=8),
}


@pytest.fixture(autouse=True)
def _short_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    made: Callable[..., Stopwatch] = Stopwatch.of
    monkeypatch.setattr(
        Stopwatch, "of", lambda *args, **kwargs: dataclasses.replace(made(*args, **kwargs), seconds_each=0.05, rounds=5)
    )


def spec(folder: Path, text: str = SPACE) -> SpaceSpec:
    (folder / "space.yaml").write_text(text)
    return load_space("space.yaml", folder)


def bench_of(
    model: nn.Module, folder: Path, *, size: Any = "packed", text: str = SPACE, target: Target = TORCH
) -> Workbench:  # fmt: skip
    plain = workbench_of(model, IMAGE, folder)
    task: Task = dataclasses.replace(plain.subject.task, spec=spec(folder, text), size=size, target=target)
    subject = subject_of(task, Silent())
    stages = Stages()
    run = Run(folder, Local())
    space, costs, table = measured_costs(subject, run, latency=False, stages=stages, progress=Silent())
    return prepare(subject, space, costs, table, run=run, stages=stages, progress=Silent())


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return bench_of(randomised(Residual()), tmp_path_factory.mktemp("bench"))


def test_every_matrix_is_a_unit_and_nothing_else() -> None:
    found = discover(Residual().eval(), torch.randn(2, *IMAGE), weights=True, dense_layers=["stem.0"])
    weights = {unit.name: unit for unit in found.units if unit.kind == "weights"}
    layers = {name for name, m in Residual().named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert {f"{name}.weight" for name in layers - {"stem.0"}} == set(weights)
    assert weights["layer1.1.conv2.weight"].parent == "layer1.1"
    with pytest.raises(ConfigError, match=r"dense_layers: 'nothing' matches no module"):
        discover(Residual().eval(), torch.randn(2, *IMAGE), weights=True, dense_layers=["nothing"])


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{method: sparsegpt}", "needs patterns"),
        ("{method: dense, patterns: [50%]}", "`dense` has none"),
        ("{method: dense}", "32 bits are what is there already"),
        ("{method: wanda, patterns: [5:4]}", "keeps 5 of 4"),
        ("{method: wanda, patterns: [half]}", "cannot be read"),
        ("{method: dense, bits: [7]}", "bits"),
    ],
)
def test_mistakes_in_a_space_are_named(line: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=problem):
        spec(tmp_path, f"channels: false\nweights:\n  - {line}\n")


def test_a_decision_says_what_may_not_be() -> None:
    with pytest.raises(ValueError, match="belong to weights"):
        UnitDecision(kind="channels", method="l2", keep=3, of=4, bits=8)
    with pytest.raises(ValueError, match="2 kept of 4"):
        UnitDecision(kind="weights", method="wanda", keep=3, of=4, pattern="4:2")


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_bytes_of_neighbours_are_exact(bench: Workbench, data: st.DataObject) -> None:
    costs = bench.costs
    choice = tuple(data.draw(st.integers(0, size - 1)) for size in bench.space.sizes)
    now, changes = costs.cost("size", choice), costs.linearise("size", choice)
    unit = data.draw(st.integers(0, len(choice) - 1))
    for option in range(bench.space.sizes[unit]):
        neighbour = (*choice[:unit], option, *choice[unit + 1 :])
        assert costs.cost("size", neighbour) - now == pytest.approx(float(changes[unit][option]), abs=1e-6)
    assert costs.cost("macs", choice) == CostModel(costs.architecture, costs.space).cost("macs", choice)


def test_plain_bytes_are_predicted(tmp_path: Path) -> None:
    bench = bench_of(randomised(Residual()), tmp_path, size="plain")
    for options in ({}, MIXED):
        candidate = bench.stitcher.build(options)
        expected = bench.files.size(candidate.model, Weights.of(candidate))
        assert bench.costs.cost("size", bench.space.choice_of(options)) == pytest.approx(expected, rel=2e-3)
    assert size_bytes(candidate.model) - expected == 3 * (288 + 1296) - 4 * (8 + 12)


def test_packed_bytes_are_predicted(bench: Workbench) -> None:
    assert bench.costs.dense["size"] == bench.files.size(bench.subject.model, FLOATS)
    inside = {name: option for name, option in MIXED.items() if name.endswith(".weight")}
    candidate = bench.stitcher.build(inside)
    predicted = bench.costs.cost("size", bench.space.choice_of(inside))
    assert bench.files.size(candidate.model, Weights.of(candidate)) == pytest.approx(predicted, rel=0.01)


def test_a_candidate_mixes_four_kinds(bench: Workbench) -> None:
    model = bench.stitcher.build(MIXED).model
    state = model.state_dict()
    assert state["layer1.0.conv1.weight"].shape[0] == 4
    assert not any(name.startswith("layer1.1.") for name in state)
    groups = state["layer2.0.conv1.weight"].permute(0, 2, 3, 1).reshape(-1, 4)
    assert (groups.count_nonzero(1) == 2).all()
    candidate = bench.stitcher.build(MIXED)
    for name, codes in Weights.of(candidate).quantised.items():
        assert torch.equal(codes.dequantised(), candidate.model.state_dict()[name])
    sparse = candidate.model.state_dict()["layer1.0.conv2.weight"]  # reads the 4 channels that stay
    assert (sparse == 0).float().mean() == pytest.approx(0.5, abs=0.05)
    assert set(Weights.of(candidate).quantised) == {"layer1.0.conv2.weight", "layer2.1.conv2.weight"}


def test_an_edit_keeps_the_mean_of_every_output() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 4, 3, 3, generator=generator)
    x = torch.randn(500, 36, generator=generator, dtype=torch.float64) + 2.0
    reading = Reading(torch.cov(x.T, correction=0), x.mean(0), torch.ones(6, dtype=torch.float64))
    edit = edited(weight, reading, [Option("sparsegpt", 108, pattern="50%", bits=8)], seed=0)[0]
    before, after = x @ weight.double().flatten(1).T, x @ edit.weight.double().flatten(1).T
    torch.testing.assert_close((after + edit.shift).mean(0), before.mean(0))
    assert edit.codes is not None
    assert torch.equal(edit.codes.dequantised(), edit.weight)


def test_refit_keeps_patterns_and_integers_and_comes_nearer(bench: Workbench) -> None:
    batches = torch.split(bench.subject.task.data.calibration_inputs, 128)
    reference = Reference.of(bench.subject.model, batches, blocks=bench.subject.anatomy.blocks)
    candidate = bench.stitcher.build(MIXED)
    before = float(bench.selection.divergences(candidate.model).mean())
    done = refit(reference, candidate, edits=bench.stitcher.edited_layers(MIXED))
    assert float(bench.selection.divergences(candidate.model).mean()) < before
    state = candidate.model.state_dict()
    assert (state["layer2.0.conv1.weight"].permute(0, 2, 3, 1).reshape(-1, 4).count_nonzero(1) == 2).all()
    again = dataclasses.replace(candidate, edits=done.edits)
    assert set(done.edits) == {name.removesuffix(".weight") for name in MIXED if name.endswith(".weight")}
    for name, codes in Weights.of(again).quantised.items():
        assert torch.equal(codes.dequantised(), state[name])


@pytest.mark.parametrize("share", [0.3, 0.2])
def test_baselines_inside_layers_are_the_best_that_fit(bench: Workbench, share: float) -> None:
    problem = Problem(bench.space, bench.costs, {"size": share * bench.costs.dense["size"]}, bench.priors)
    state = bench.subject.model.state_dict()
    weights = {u.name: state[u.name].double().abs().flatten().numpy() for u in bench.space.units if u.kind == "weights"}
    for choice in (
        uniform_sparsity(problem, method="magnitude", bits=8), global_sparsity(problem, weights, bits=8)
    ):  # fmt: skip
        assert choice is not None
        options = bench.space.options_of(choice)
        assert set(options) == set(weights)
        assert {option.bits for option in options.values()} == {8}
        assert problem.fits(choice)
    uniform = bench.space.options_of(uniform_sparsity(problem, method="magnitude", bits=8) or ())
    assert len({option.pattern for option in uniform.values()}) == 1


def logits(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        output: Tensor = model.eval()(inputs)
    return output


def test_search_yaml_apply_pack_and_back(tmp_path: Path) -> None:
    model = randomised(Residual())
    spec(tmp_path)
    calibration, validation = data_of(model, IMAGE)
    outcome = api.search(
        model, calibration=calibration, validation=validation, budget="20%size", size="packed",
        space=str(tmp_path / "space.yaml"), plan=Plan(trials=20, finalists=2), run=tmp_path / "run",
        target=Target("torch"),
    )  # fmt: skip
    assert outcome.met
    policy = read_policy(outcome.folder / "policy.yaml")
    assert policy.size == "packed"
    kinds = {decision.kind for decision in policy.units.values()}
    assert "weights" in kinds
    assert any("inside layers" in name for name in outcome.record.baselines)
    inputs = torch.randn(16, *IMAGE)
    task = Task(model, "Residual", api.as_data(calibration, validation), api.evaluator("top1"), Target("torch"),
                spec(tmp_path), size="packed")  # fmt: skip
    subject = subject_of(task, Silent())
    applied = apply(outcome.folder / "policy.yaml", subject)
    torch.testing.assert_close(logits(applied.model, inputs), logits(outcome.model, inputs), rtol=0, atol=1e-4)
    written = residual_files(applied, subject, tmp_path / "out")
    session = onnxruntime.InferenceSession(written["onnx"], providers=["CPUExecutionProvider"])
    got = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: inputs.numpy()})[0])
    torch.testing.assert_close(got, logits(outcome.model, inputs), rtol=0, atol=1e-4)
    packed = written["packed"].read_bytes()
    assert len(packed) == outcome.record.chosen.size_bytes
    state = applied.model.state_dict()
    tensors = unpack(packed).tensors
    assert set(tensors) == set(state)
    assert all(torch.equal(tensors[name], state[name]) for name in state)
    record = policies.unpack_file(written["packed"], tmp_path / "again.safetensors")
    again = safetensors.torch.load_file(tmp_path / "again.safetensors")
    assert all(torch.equal(again[name], state[name]) for name in state)
    assert record.size_bytes == len(packed)


def test_patterns_of_the_shipped_space_are_read() -> None:
    shipped = load_space("compress", Path())
    found = discover(Residual().eval(), torch.randn(2, *IMAGE), weights=True)
    space = resolve(found.units, shipped)
    weights = [entry for entry in space.entries if entry.unit.kind == "weights"]
    assert all(len(entry.options) > 20 for entry in weights)
    sparsities = {parse_pattern(option.pattern).sparsity for e in weights for option in e.options if option.pattern}
    assert max(sparsities) == pytest.approx(0.9)


def test_storage_rates_fall_with_bits_and_sparsity(bench: Workbench) -> None:
    storage = bench.costs.storage
    assert storage is not None
    for entry in bench.space.entries:
        if entry.unit.kind == "weights" and entry.unit.width > 1000:
            found = [rate.per_weight for rate in storage.rates[entry.unit.name]]
            rates = dict(zip((option.label for option in entry.options), found, strict=True))
            assert rates["dense int4"] < rates["dense int8"] < rates[f"keep:{entry.unit.width}"]
            assert rates["magnitude 90% int8"] < rates["magnitude 60% int8"] < rates["magnitude 30% int8"]
            assert np.isfinite(list(rates.values())).all()


def test_side_file_with_other_integers_is_refused(tmp_path: Path) -> None:
    model = randomised(Residual())
    calibration, validation = data_of(model, IMAGE)
    spec(tmp_path, "channels: false\nblocks: false\nweights:\n  - {method: dense, bits: [4]}\n")
    outcome = api.search(
        model, calibration=calibration, validation=validation, budget="60%size", space=str(tmp_path / "space.yaml"),
        plan=Plan(trials=4, finalists=1), run=tmp_path / "run", target=Target("torch"),
    )  # fmt: skip
    side = outcome.folder / "policy.safetensors"
    tensors = safetensors.torch.load_file(side)
    name = next(name for name in tensors if name.startswith("scales/"))
    tensors[name] = tensors[name] * 1.5
    safetensors.torch.save_file(tensors, side)
    text = (outcome.folder / "policy.yaml").read_text()
    kept = [line for line in text.splitlines() if not line.startswith("weights_sha256")]
    (outcome.folder / "policy.yaml").write_text("\n".join(kept) + "\n")
    task = Task(model, "Residual", api.as_data(calibration, validation), api.evaluator("top1"), Target("torch"),
                load_space(str(tmp_path / "space.yaml"), tmp_path))  # fmt: skip
    with pytest.raises(PolicyError, match="not the integers times scales"):
        apply(outcome.folder / "policy.yaml", subject_of(task, Silent()))


def test_layers_without_a_norm_are_edited_where_their_outputs_are_cut(tmp_path: Path) -> None:
    plain = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 5))
    bench = bench_of(randomised(plain), tmp_path)
    options = {
        "3": Option("l2", 6, "least_squares"),
        "3.weight": next(o for e in bench.space.entries if e.unit.name == "3.weight" for o in e.options if o.pattern),
    }
    assert bench.stitcher.build(options).model.get_submodule("3").weight.shape == (6, 16)
