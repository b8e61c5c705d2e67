"""A search by times of a device that cannot be reached: sums of a table's rows, nothing measured, nothing guessed."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import IMAGE, Mlp, Residual, data_of, randomised
from search_problems import every_choice
from torch import nn

from autoprune import api
from autoprune.config import load_config, load_run
from autoprune.core.policy import Policy
from autoprune.core.space import Choice, Space
from autoprune.core.target import Target
from autoprune.core.unit import Unit
from autoprune.errors import BudgetError, ConfigError
from autoprune.files import read_policy
from autoprune.goal import Plan
from autoprune.importers.tables import UnitTimes
from autoprune.model.discover import discover
from autoprune.profile.cost_model import CostModel
from autoprune.profile.device_table import DeviceTable, laid, read_table
from autoprune.progress import Silent
from autoprune.report import text
from autoprune.searching.fit import solve_fit, total_harm
from autoprune.searching.problem import Problem, as_choice
from autoprune.spaces import SpaceSpec, load_space
from autoprune.verify import Stopwatch

torch.set_num_threads(1)

PLAN = Plan(trials=10, finalists=2)
HERE = Path(__file__).parent
ROWS = """unit,keep,ms
base,,0.1
stem.0,8,1.0
stem.0,4,0.7
stem.0,2,0.75
layer1.0,1,0.3
layer1.0,0,0.05
layer1.0.conv1,8,0.9
layer1.0.conv1,5,0.2
layer1.1,1,0.3
layer1.1,0,0.0
layer2.0.conv1,12,0.6
layer2.0.conv1,6,0.4
layer2.1,1,0.4
layer2.1.conv1,12,1.2
layer2.1.conv1,3,0.3
"""
DENSE_MS = 0.1 + 1.0 + 0.3 + 0.9 + 0.3 + 0.6 + 0.4 + 1.2
PARENTS = {"layer1.0.conv1": "layer1.0", "layer2.1.conv1": "layer2.1"}


@pytest.fixture(autouse=True)
def _no_stopwatch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever measures a latency fails."""

    def compare(*_: object, **__: object) -> None:
        raise AssertionError("a stopwatch ran")

    monkeypatch.setattr(Stopwatch, "compare", compare)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return written(tmp_path, ROWS)


def written(folder: Path, content: str, name: str = "device.csv") -> Path:
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return path


def rows_of(path: Path) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for row in csv.DictReader(path.read_text(encoding="utf-8").splitlines()):
        found.setdefault(row["unit"], {})[row["keep"]] = float(row["ms"])
    return found


def summed(kept: Mapping[str, int], path: Path) -> float:
    """Milliseconds, added up row by row from the file; `kept` has the units that do not stay whole."""
    rows = rows_of(path)
    total = rows.pop("base")[""]
    for unit, levels in rows.items():
        whole = max(levels, key=int)
        inside_dropped = kept.get(PARENTS.get(unit, ""), 1) == 0
        total += 0.0 if inside_dropped else levels[str(kept.get(unit, whole))]
    return total


def anatomy_of(model: nn.Module, spec: SpaceSpec, shape: tuple[int, ...] = IMAGE) -> Any:
    return discover(
        model, torch.randn(2, *shape), narrow=spec.narrowed, blocks=spec.blocks, weights=bool(spec.weights),
        kernels=bool(spec.kernels),
    )  # fmt: skip


def costs_by(path: Path) -> CostModel:
    spec = load_space("cnn-channels", HERE)
    found = anatomy_of(randomised(Residual()), spec)
    space, latency = laid(read_table(path), found.units, spec)
    return CostModel(found.architecture, space, latency=latency)


def kept_of(space: Space, choice: Choice) -> dict[str, int]:
    return {unit: option.keep for unit, option in space.options_of(choice).items()}


def some_choices(space: Space) -> np.ndarray[Any, Any]:
    """The first option of each width, the least harmful one where harm rises, so that all can be tried."""
    seen = [{o.keep: i for i, o in reversed(list(enumerate(entry.options)))} for entry in space.entries]
    small = [sorted(options.values()) for options in seen]
    shape = np.array(np.meshgrid(*small, indexing="ij")).reshape(len(small), -1)
    return shape.T.astype(np.int64)


def test_latency_is_the_sum_of_the_rows_for_every_choice(table: Path) -> None:
    costs = costs_by(table)
    choices = some_choices(costs.space)
    assert len(choices) == 3 * 2 * 2 * 2 * 2 * 2  # layer2.1 cannot be dropped, by the table
    wanted = [1e-3 * summed(kept_of(costs.space, as_choice(row)), table) for row in choices]
    np.testing.assert_allclose(costs.evaluate("latency", choices), wanted, rtol=1e-12)
    assert costs.dense["latency"] == pytest.approx(1e-3 * DENSE_MS, rel=1e-12)
    assert costs.range("latency")[0] == pytest.approx(min(wanted), rel=1e-12)


def test_changes_of_one_unit_are_exact_and_add_up(table: Path) -> None:
    costs = costs_by(table)
    assert costs.is_additive("latency")
    for incumbent in (costs.space.dense, as_choice(some_choices(costs.space)[17])):
        now = costs.cost("latency", incumbent)
        for unit, changes in enumerate(costs.linearise("latency", incumbent)):
            for option, change in enumerate(changes):
                other = (*incumbent[:unit], option, *incumbent[unit + 1 :])
                assert now + change == pytest.approx(costs.cost("latency", other), rel=1e-9)


@pytest.mark.parametrize("limit_ms", [2.0, 3.1, 4.2])
def test_the_solver_finds_what_trying_every_choice_finds(table: Path, limit_ms: float) -> None:
    costs, rng = costs_by(table), np.random.default_rng(0)
    harm = [np.concatenate([[0.0], np.sort(rng.random(size - 1))]) for size in costs.space.sizes]
    problem = Problem(costs.space, costs, {"latency": 1e-3 * limit_ms}, {"harm": harm})
    padded = problem.structure.padded(harm, 0.0)
    found = solve_fit(problem, padded)
    assert found is not None
    assert summed(kept_of(costs.space, found), table) <= limit_ms + 1e-9
    choices = problem.structure.normal(some_choices(costs.space))
    fitting = choices[costs.evaluate("latency", choices) <= 1e-3 * limit_ms]
    best = min(total_harm(problem, padded, as_choice(row)) for row in fitting)
    assert total_harm(problem, padded, found) == pytest.approx(best)


def test_the_space_is_what_the_table_has(table: Path) -> None:
    space = costs_by(table).space
    kept = {entry.unit.name: sorted({option.keep for option in entry.options}) for entry in space.entries}
    assert kept == {
        "stem.0": [2, 4, 8], "layer1.0": [0, 1], "layer1.0.conv1": [5, 8], "layer1.1": [0, 1], "layer1.1.conv1": [8],
        "layer2.0.conv1": [6, 12], "layer2.0.conv2": [12], "layer2.1": [1], "layer2.1.conv1": [3, 12],
    }  # fmt: skip
    methods = {option.method for option in space.entries[0].options} - {"keep"}
    assert methods == {choice.method for choice in load_space("cnn-channels", HERE).methods}


def test_a_sum_that_is_the_limit_keeps_it(tmp_path: Path) -> None:
    """0.1 + 0.2 is more than 0.3 in floats, and not to whoever wrote the table."""
    path = written(tmp_path, "unit,keep,ms\nbase,,0.1\nstem.0,8,0.7\nstem.0,4,0.2\n")
    costs = costs_by(path)
    assert costs.range("latency")[0] == 0.3 * 1e-3  # as the budget `0.3ms` is read
    assert 0.1 + 0.2 > 0.3


def searched(model: nn.Module, folder: Path, table: Path, budget: Any, **more: Any) -> api.Outcome:
    calibration, validation = data_of(model, IMAGE)
    return api.search(
        model, calibration=calibration, validation=validation, budget=budget, latency_table=table, run=folder,
        **{"target": Target(runtime="torch"), "plan": PLAN, **more},
    )  # fmt: skip


def assert_by_table(policy: Policy, table: Path, limit_ms: float) -> None:
    ms = summed({name: unit.keep for name, unit in policy.units.items()}, table)
    assert ms <= limit_ms + 1e-9
    assert policy.evidence is not None
    assert policy.target is not None
    latency = policy.evidence.pruned.latency_ms
    assert latency is not None
    assert (latency.median, latency.runs) == (pytest.approx(ms, rel=1e-9), 0)
    assert policy.evidence.pruned.ratio == pytest.approx(ms / DENSE_MS, abs=1e-5)
    assert not policy.evidence.verified
    assert (policy.target.where, policy.target.runtime) == ("table device.csv", "table")


def test_a_whole_search_keeps_the_budget_by_the_tables_own_sum(tmp_path: Path, table: Path) -> None:
    outcome = searched(randomised(Residual()), tmp_path / "run", table, "3ms")
    policy = read_policy(outcome.folder / "policy.yaml")
    assert_by_table(policy, table, 3.0)
    assert outcome.met
    assert "keeps 3 ms (" in outcome.record.verdict
    assert "by the table device.csv, not measured; top1" in outcome.record.verdict
    told = "Latency is by the table device.csv, not measured: run `autoprune verify`"
    for shown in (text.plain(text.policy_view(policy)), text.plain(text.outcome_view(outcome.record))):
        assert told in shown
        assert "p10" not in shown  # nothing has a spread
    assert told in outcome.report
    assert "predicted against measured" not in outcome.report
    kept = json.loads((outcome.folder / "outcome.json").read_text(encoding="utf-8"))
    assert kept["dense"]["latency_ms"] == {"median": DENSE_MS, "p10": DENSE_MS, "p90": DENSE_MS, "runs": 0}
    assert kept["check"] is None
    assert kept["policy"]["evidence"]["search"]["latency_table"]["sha256"] == read_table(table).digest
    with torch.no_grad():
        assert outcome.model(torch.randn(3, *IMAGE)).shape == (3, 5)


def test_other_limits_hold_beside_it_in_a_family_and_in_a_database(tmp_path: Path, table: Path) -> None:
    model = randomised(Residual())
    plan = Plan(trials=10, finalists=2, storage=f"sqlite:///{tmp_path}/study.db")
    searched(model, tmp_path / "run", table, ["3ms,4ms", "80%params"], plan=plan)
    policies = {read_policy(path).budget["latency"]: read_policy(path) for path in tmp_path.rglob("policy.yaml")}
    dense = sum(parameter.numel() for parameter in model.parameters())
    for budget, limit_ms in (("3ms", 3.0), ("4ms", 4.0)):
        assert_by_table(policies[budget], table, limit_ms)
        evidence = policies[budget].evidence
        assert evidence is not None
        assert evidence.pruned.params <= 0.8 * dense


@pytest.mark.slow
def test_the_fastest_above_a_floor(tmp_path: Path, table: Path) -> None:
    outcome = searched(randomised(Residual()), tmp_path, table, None, max_drop=0.95)
    assert_by_table(outcome.policy, table, DENSE_MS)


def test_out_of_reach_says_what_is(tmp_path: Path, table: Path) -> None:
    with pytest.raises(BudgetError, match=r"reachable: 1\.95 ms to 4\.8 ms"):
        # base, stem 0.7, layer1.0 dropped 0.05, layer1.1 dropped, 0.4, layer2.1 with 3: 0.4 + 0.3
        searched(randomised(Residual()), tmp_path, table, "1ms")


PROJECT = """
import torch
from networks import IMAGE, Residual, data_of, randomised

def model():
    return randomised(Residual())

def data():
    calibration, validation = data_of(model(), IMAGE)
    return {"calibration": calibration, "validation": validation}
"""


def test_a_resumed_run_reads_the_table_again_and_a_changed_one_is_another_study(
    tmp_path: Path, table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path, PROJECT, "net.py")
    file = written(
        tmp_path,
        "model: net.py:model\ndata: net.py:data\nbudget: 3ms\nrun: run\ntarget: {runtime: torch, table: device.csv}\n"
        "search: {trials: 8, finalists: 2}\n",
        "autoprune.yaml",
    )
    monkeypatch.chdir(HERE)  # the table is found beside the configuration
    (first,) = api.search_config(load_config(file, {}), folder=tmp_path, progress=Silent())
    config, folder = load_run(tmp_path / "run", {})
    assert config.target.table == "device.csv"
    (again,) = api.search_config(config, folder=folder, progress=Silent())
    assert len(again.trials) == len(first.trials)
    written(
        tmp_path, "\n".join([*ROWS.splitlines()[:2], *reversed(ROWS.splitlines()[2:])])
    )  # the same in another order
    (same,) = api.search_config(config, folder=folder, progress=Silent())
    written(tmp_path, ROWS.replace("stem.0,8,1.0", "stem.0,8,1.1"))
    (other,) = api.search_config(config, folder=folder, progress=Silent())
    studies = [record.policy.evidence.search["study"] for record in (first, again, same, other)]  # type: ignore[union-attr]
    assert studies[0] == studies[1] == studies[2] != studies[3]
    table.unlink()
    with pytest.raises(ConfigError, match=r"latency table: .*device\.csv: cannot be read"):
        api.search_config(config, folder=folder, progress=Silent())


def test_a_flags_path_is_relative_to_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "project").mkdir()
    file = written(tmp_path / "project", "model: net.py:model\ndata: net.py:data\nbudget: 3ms\n", "autoprune.yaml")
    monkeypatch.chdir(tmp_path)
    assert load_config(file, {"target.table": "device.csv"}).target.table == f"{tmp_path}/device.csv"


def test_units_show_shares_by_the_table(tmp_path: Path, table: Path) -> None:
    written(tmp_path, PROJECT, "net.py")
    content = f"model: net.py:model\ndata: net.py:data\nrun: run\ntarget: {{table: {table.name}}}\n"
    config = load_config(written(tmp_path, content, "autoprune.yaml"), {}, goal=False)
    record = api.units_of(config, folder=tmp_path, latency=True, progress=Silent())
    shares = {unit.name: unit.latency_share for unit in record.units}
    assert shares["stem.0"] == pytest.approx(0.3 / DENSE_MS)
    assert shares["layer1.0"] == pytest.approx((0.3 + 0.9 - 0.05) / DENSE_MS)
    assert shares["layer2.0.conv2"] == 0


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (("stem.0,", "stem.O,"), ["stem.O: is no unit of this model in this space; did you mean 'stem.0'?"]),
        (("stem.0,8,1.0\n", ""), ["stem.0: has no time for all that it has; add a row `stem.0,8,MS`"]),
        (("stem.0,2,", "stem.0,9,"), ["stem.0: keep is given as 9, allowed in this space: 1 to 8"]),
        (("stem.0,2,", "stem.0,0,"), ["stem.0: keep is given as 0, allowed"]),
        (("layer1.1,0,", "layer1.1,2,"), ["layer1.1: keep is given as 2, allowed in this space: 1, 0"]),
        (
            ("layer", "lay"),
            ["lay1.0: is no unit", "did you mean 'layer1.0", "lay2.1.conv1: is no unit", "has no rows: what it takes"],
        ),
    ],
)
def test_all_that_is_not_there_is_told_at_once(tmp_path: Path, changed: tuple[str, str], told: list[str]) -> None:
    path = written(tmp_path, ROWS.replace(*changed))
    with pytest.raises(ConfigError) as error:
        searched(randomised(Residual()), tmp_path / "run", path, "3ms")
    message = str(error.value)
    assert message.startswith("latency table device.csv does not fit this model and space:\n")
    for part in told:
        assert part in message


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("unit,keep,ms\nstem.0,8,1\n", r"(?s)latency table: .*base,,MS"),
        ("unit,keep,ms\nbase,,0\nstem.0,8,0\n", "takes 0 ms"),
        ("unit,width,ms\n", "unit,keep,ms"),
    ],
)
def test_tables_that_are_none(tmp_path: Path, content: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        searched(randomised(Residual()), tmp_path / "run", written(tmp_path, content), "3ms")


SPDY = """base
0.010
prunable
0.009
0
0.006 0.0
0.004 0.4375
0.002 0.75
3
0.002 0.0
0.0025 0.75
"""
WEIGHTS = {
    "channels": False, "blocks": False,
    "weights": [
        {"method": "magnitude", "patterns": ["50%", "2:4"]}, {"method": "wanda", "patterns": ["60%"], "bits": [32, 8]},
        {"method": "dense", "bits": [8]}, {"method": "low_rank", "ranks": [0.25]},
    ],
}  # fmt: skip


def spdy_units(spec: SpaceSpec) -> tuple[Unit, ...]:
    return tuple(anatomy_of(randomised(Mlp()), spec, (10,)).units)


def test_spdys_layers_are_units_of_weights_at_exactly_its_sparsities(tmp_path: Path) -> None:
    spec = SpaceSpec.model_validate(WEIGHTS)
    found = anatomy_of(randomised(Mlp()), spec, (10,))
    space, latency = laid(read_table(written(tmp_path, SPDY, "timings.txt")), found.units, spec)
    costs = CostModel(found.architecture, space, latency=latency)
    options = {entry.unit.name: entry.options for entry in space.entries}
    assert {option.pattern for option in options["0.weight"]} == {"", "43.75%", "75%"}
    assert {(o.method, o.bits) for o in options["3.weight"]} == {
        ("keep", 32), ("dense", 8), ("magnitude", 32), ("wanda", 32), ("wanda", 8)
    }  # fmt: skip
    assert len(options["5.weight"]) == 1  # not in the table
    assert costs.dense["latency"] == pytest.approx(0.001 + 0.006 + 0.002)
    times = {"0.weight": {"": 6, "43.75%": 4, "75%": 2}, "3.weight": {"": 2, "75%": 2.5}, "5.weight": {"": 0}}
    for choice in every_choice(space):
        picked = zip(space.entries, choice, strict=True)
        wanted = 1 + sum(times[entry.unit.name][entry.options[option].pattern] for entry, option in picked)
        assert costs.cost("latency", as_choice(choice)) == pytest.approx(1e-3 * wanted)
    assert costs.range("latency")[0] == pytest.approx(0.001 + 0.002 + 0.002)  # fewer weights may take longer


@pytest.mark.parametrize(
    ("content", "weights", "told"),
    [
        (SPDY.replace("0.006 0.0\n", ""), WEIGHTS, "0.weight: has no time for all of its weights"),
        (SPDY.replace("\n3\n", "\n4\n"), WEIGHTS, "4.weight: is no unit of this model in this space; did you mean"),
        (SPDY, {**WEIGHTS, "weights": [{"method": "dense", "bits": [8]}]}, "0.weight: its zeros may not be anywhere"),
    ],
)
def test_what_spdys_timings_may_lack(tmp_path: Path, content: str, weights: dict[str, object], told: str) -> None:
    spec = SpaceSpec.model_validate(weights)
    with pytest.raises(ConfigError, match=r"latency table timings\.txt does not fit") as error:
        laid(read_table(written(tmp_path, content, "timings.txt")), spdy_units(spec), spec)
    assert told in str(error.value)


def test_rows_of_weights_are_those_of_one_pattern(tmp_path: Path) -> None:
    """Half of 160 weights may be 2:4 or anywhere: how many stay does not say which."""
    spec = SpaceSpec.model_validate(WEIGHTS)
    rows = "unit,keep,ms\nbase,,1\n0.weight,160,6\n0.weight,80,3\n"
    with pytest.raises(ConfigError, match=r"0\.weight: keep 80 is 2:4 and 50%, which a table cannot tell apart"):
        laid(read_table(written(tmp_path, rows)), spdy_units(spec), spec)
    one = SpaceSpec.model_validate({**WEIGHTS, "weights": [{"method": "magnitude", "patterns": ["2:4"]}]})
    space, latency = laid(read_table(written(tmp_path, rows)), spdy_units(one), one)
    assert [option.pattern for option in space.entries[0].options] == ["", "2:4"]
    assert latency.cheapest() == (1, 0, 0)


def test_kernels_take_the_sides_that_table_and_space_have(tmp_path: Path) -> None:
    spec = SpaceSpec.model_validate({"channels": False, "blocks": False, "kernels": [3]})
    model = randomised(nn.Sequential(nn.Conv2d(3, 8, 5, padding=2), nn.ReLU(), nn.Flatten(), nn.Linear(512, 5)))
    units = anatomy_of(model, spec).units
    table = DeviceTable("t.csv", UnitTimes(1.0, {"0.kernel": {5: 2.0, 3: 1.0}}))
    space, latency = laid(table, units, spec)
    assert {option.keep for option in space.entries[0].options} == {5, 3}
    assert latency.dense_s == pytest.approx(3e-3)
    with pytest.raises(ConfigError, match=r"0\.kernel: keep is given as 1, allowed in this space: 5, 3"):
        laid(DeviceTable("t.csv", UnitTimes(1.0, {"0.kernel": {5: 2.0, 1: 1.0}})), units, spec)
