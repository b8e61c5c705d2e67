"""Layers split in two: factors against theory, costs against really built models, and the way to the files."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import IMAGE, Residual, data_of, randomised, residual_files
from test_weights import bench_of, logits
from torch import Tensor, nn

from autoprune import api
from autoprune.apply import apply
from autoprune.bank.stitch import shape_only
from autoprune.core.target import Target
from autoprune.core.unit import DROP, Option
from autoprune.errors import ConfigError
from autoprune.files import read_policy
from autoprune.goal import Plan
from autoprune.model.describe import macs_of
from autoprune.model.factor import factor_layer, low_rank
from autoprune.profile.latency import Bench, measure_table
from autoprune.progress import Silent
from autoprune.runtimes.torch import TorchRuntime
from autoprune.searching.baselines import uniform_ranks
from autoprune.searching.problem import Problem
from autoprune.spaces import load_space
from autoprune.storage import Weights
from autoprune.subject import Task, subject_of
from autoprune.verify import params
from autoprune.workbench import Workbench

torch.set_num_threads(1)

SPACE = """
methods:
  - {method: l2, compensate: least_squares}
weights:
  - {method: low_rank, ranks: [12.5%, 25%, 0.5]}
  - {method: magnitude, patterns: [50%], bits: [8]}
levels: 4
"""
MIXED = {
    "layer1.0.conv1": Option("l2", 4, "least_squares"),
    "layer1.1": DROP,
    "layer1.0.conv2.weight": Option("low_rank", 160, rank=2),
    "layer2.0.conv1.weight": Option("low_rank", 252, rank=3),
    "layer2.1.conv2.weight": Option("magnitude", 648, pattern="50%", bits=8),
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return bench_of(randomised(Residual()), tmp_path_factory.mktemp("bench"), size="plain", text=SPACE)


def layer(outputs: int = 10, columns: int = 18) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, moments of correlated inputs and a scale."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, columns, generator=generator, dtype=torch.float64)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    scale = 0.5 + torch.rand(outputs, generator=generator, dtype=torch.float64)
    return weight, mixing @ mixing.T, scale


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_no_pair_of_that_rank_is_nearer(rank: int) -> None:
    weight, moments, scale = layer()
    first, second = low_rank(weight, moments, scale, rank)

    def error(product: Tensor) -> float:
        difference = scale[:, None] * (product - weight)
        return float((difference @ moments * difference).sum())

    root = torch.linalg.cholesky(moments)
    least = torch.linalg.svdvals(scale[:, None] * weight @ root)[rank:].square().sum()  # Eckart-Young
    assert error(second @ first) == pytest.approx(float(least), rel=1e-6)
    plain = torch.linalg.svd(weight)
    assert error(plain[0][:, :rank] * plain[1][:rank] @ plain[2][:rank]) > float(least)


def test_full_rank_is_the_layer_also_where_inputs_never_vary() -> None:
    weight, moments, scale = layer()
    moments[3], moments[:, 3] = 0.0, 0.0
    first, second = low_rank(weight, moments, scale, 12)  # more than there is
    torch.testing.assert_close((second @ first) @ moments, weight @ moments)
    assert first.shape == (12, 18)


@pytest.mark.parametrize(
    "made",
    [
        nn.Linear(6, 8), nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False),
        nn.Conv1d(4, 6, 5, dilation=2, padding_mode="circular", padding=2),
    ],
)  # fmt: skip
def test_two_layers_compute_what_their_product_does(made: nn.Module) -> None:
    model = nn.Sequential(made)
    x = torch.randn(2, 6) if isinstance(made, nn.Linear) else torch.randn(2, 4, *(9,) * (made.weight.ndim - 2))
    wanted = model(x)
    weight = made.weight.detach()
    rank = min(weight.flatten(1).shape)
    pair = factor_layer(model, "0", rank)
    eye = torch.eye(weight[0].numel(), dtype=torch.float64)
    first, second = low_rank(weight.double().flatten(1), eye, torch.ones(len(weight)), rank)
    pair[0].weight.data = first.reshape(rank, *weight.shape[1:]).float()
    pair[1].weight.data = second.reshape(pair[1].weight.shape).float()
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)


def test_candidates_hold_two_layers_and_cost_what_was_predicted(bench: Workbench) -> None:
    candidate = bench.stitcher.build(MIXED)
    pair = candidate.model.get_submodule("layer1.0.conv2")
    assert [tuple(part.weight.shape) for part in pair] == [(2, 4, 3, 3), (8, 2, 1, 1)]
    choice = bench.space.choice_of(MIXED)
    assert bench.costs.cost("macs", choice) == macs_of(candidate.model, torch.randn(1, *IMAGE))
    assert bench.costs.cost("params", choice) == params(candidate.model)
    stored = bench.files.size(candidate.model, Weights.of(candidate))
    assert bench.costs.cost("size", choice) == pytest.approx(stored, rel=2e-3)


def test_more_rank_is_nearer(bench: Workbench) -> None:
    for entry, harms in zip(bench.space.entries, bench.priors["reconstruction"], strict=True):
        ranks = [harm for option, harm in zip(entry.options, harms, strict=True) if option.rank]
        assert ranks == sorted(ranks)
        assert all(0 < harm < 1.0 for harm in ranks)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), metric=st.sampled_from(["macs", "params", "size"]))
def test_costs_of_neighbours_are_exact(bench: Workbench, data: st.DataObject, metric: str) -> None:
    costs = bench.costs
    choice = tuple(data.draw(st.integers(0, size - 1)) for size in bench.space.sizes)
    now, changes = costs.cost(metric, choice), costs.linearise(metric, choice)
    unit = data.draw(st.integers(0, len(choice) - 1))
    for option in range(bench.space.sizes[unit]):
        neighbour = (*choice[:unit], option, *choice[unit + 1 :])
        assert costs.cost(metric, neighbour) - now == pytest.approx(float(changes[unit][option]), abs=1e-6)


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_counts_are_those_of_really_built_models(bench: Workbench, data: st.DataObject) -> None:
    choice = tuple(data.draw(st.integers(0, size - 1)) for size in bench.space.sizes)
    built = shape_only(bench.subject.model, bench.subject.anatomy, bench.space.options_of(choice))
    assert bench.costs.cost("macs", choice) == pytest.approx(macs_of(built, torch.randn(1, *IMAGE)))
    assert bench.costs.cost("params", choice) == pytest.approx(params(built))


def test_the_cheapest_choice_may_be_a_split_layer(bench: Workbench) -> None:
    for metric in ("macs", "size"):
        least = bench.costs.cost(metric, bench.costs.cheapest_choice(metric))
        narrowest = tuple(size - 1 for size in bench.space.sizes)
        assert least <= bench.costs.cost(metric, narrowest)


def test_the_table_prices_both_forms(bench: Workbench) -> None:
    subject = bench.subject
    table = measure_table(
        bench.space, bench.costs.architecture,
        bench=Bench(lambda choice: shape_only(subject.model, subject.anatomy, bench.space.options_of(choice)),
                    TorchRuntime(), Target("torch"), subject.example),
        key="k", seed=0, progress=Silent(), check=4,
    )  # fmt: skip
    names = {entry.signature for entry in table.signatures}
    assert any(name.endswith(" first") for name in names) or any(name.endswith(" second") for name in names)


def test_uniform_ranks_fit_and_are_all_alike(bench: Workbench) -> None:
    problem = Problem(bench.space, bench.costs, {"macs": 0.6 * bench.costs.dense["macs"]}, bench.priors)
    choice = uniform_ranks(problem)
    assert choice is not None
    assert problem.fits(choice)
    assert all(option.rank for option in bench.space.options_of(choice).values())


def module_at(path: Path) -> ModuleType:
    found = importlib.util.spec_from_file_location("rebuild", path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_search_yaml_apply_rebuild_and_back(tmp_path: Path) -> None:
    model = randomised(Residual())
    space = tmp_path / "space.yaml"
    space.write_text("channels: false\nblocks: false\nweights:\n  - {method: low_rank, ranks: [25%, 50%]}\n")
    calibration, validation = data_of(model, IMAGE)
    outcome = api.search(
        model, calibration=calibration, validation=validation, budget="60%macs", space=str(space),
        plan=Plan(trials=6, finalists=1), run=tmp_path / "run", target=Target("torch"),
    )  # fmt: skip
    assert outcome.met
    decisions = read_policy(outcome.folder / "policy.yaml").units
    assert {decision.method for decision in decisions.values()} == {"low_rank"}
    assert "uniform low rank" in outcome.record.baselines
    task = Task(model, "Residual", api.as_data(calibration, validation), api.evaluator("top1"), Target("torch"),
                load_space(str(space), tmp_path))  # fmt: skip
    subject = subject_of(task, Silent())
    applied = apply(outcome.folder / "policy.yaml", subject)
    inputs = torch.randn(8, *IMAGE)
    torch.testing.assert_close(logits(applied.model, inputs), logits(outcome.model, inputs), rtol=0, atol=1e-5)
    written = residual_files(applied, subject, tmp_path / "out")
    rebuilt = module_at(written["rebuild script"]).model()
    torch.testing.assert_close(logits(rebuilt, inputs), logits(outcome.model, inputs), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{method: low_rank}", "needs ranks"), ("{method: wanda, patterns: [50%], ranks: [10%]}", "nothing else has"),
        ("{method: low_rank, ranks: [0%]}", "no share of the full rank"),
        ("{method: low_rank, ranks: [10%], bits: [8]}", "neither patterns nor bits"),
    ],
)  # fmt: skip
def test_mistakes_in_ranks_are_named(line: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(f"channels: false\nweights:\n  - {line}\n")
    with pytest.raises(ConfigError, match=problem):
        load_space("space.yaml", tmp_path)
