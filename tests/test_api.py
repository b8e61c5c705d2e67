"""From a model to a verified policy and back, on networks so small that it takes seconds."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import safetensors.torch
import torch
from networks import IMAGE, Residual, Vgg, assert_untouched, data_of, randomised, snapshot
from torch import Tensor, nn

from autoprune import api, policies
from autoprune.config import Config, load_config, load_run
from autoprune.core.budget import Metric, parse_budgets
from autoprune.core.target import Target
from autoprune.errors import AutopruneError, BudgetError, ConfigError, MissedError, PolicyError
from autoprune.files import read_policy, write_policy
from autoprune.goal import Plan
from autoprune.loading import load_factory
from autoprune.model.describe import macs_of
from autoprune.model.flow import norms_after
from autoprune.nest import tensors_of
from autoprune.progress import Silent
from autoprune.run import JOURNAL
from autoprune.storage import FLOATS, onnx_file
from autoprune.verify import Stopwatch, params
from autoprune.windows import windows

torch.set_num_threads(1)

PLAN = Plan(trials=12, finalists=2)
HERE = Path(__file__).parent


class Notes(Silent):
    """Remembers what was said."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.phases: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def phase(self, name: str, steps: int | None = None) -> None:
        self.phases.append(name)


@pytest.fixture(autouse=True)
def _short_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here is about precise latencies."""
    made: Callable[..., Stopwatch] = Stopwatch.of
    monkeypatch.setattr(
        Stopwatch, "of", lambda *args, **kwargs: dataclasses.replace(made(*args, **kwargs), seconds_each=0.05, rounds=5)
    )


def searched(
    model: nn.Module, folder: Path, budget: Any = "50%macs", runtime: str = "torch", **more: Any
) -> api.Outcome:
    if "calibration" not in more:
        more["calibration"], more["validation"] = data_of(model, IMAGE)
    return api.search(
        model,
        **{
            "budget": budget,
            "target": Target(runtime=runtime),
            "plan": PLAN,
            "run": folder,
            **more,
        },
    )


def numbers_of(model: nn.Module) -> dict[Metric, int]:
    example = torch.zeros(1, *IMAGE)
    written = onnx_file(model, FLOATS, example=example, norms=norms_after(model, torch.randn(2, *IMAGE)))
    return {"macs": macs_of(model, example), "params": params(model), "size": len(written)}


def assert_within(outcome: api.Outcome, dense: nn.Module, budget: str) -> None:
    """Counted here, on the model that was handed back."""
    have, full = numbers_of(outcome.model), numbers_of(dense)
    for limit in parse_budgets([budget])[0].limits:
        assert have[limit.metric] <= limit.resolve(full[limit.metric]), limit.text
    assert outcome.met
    record = outcome.record.chosen
    assert (record.macs, record.params, record.size_bytes) == (have["macs"], have["params"], have["size"])


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
@pytest.mark.parametrize("budget", ["50%macs", "60%params", "70%size"])
def test_a_budget_is_kept_and_the_model_untouched(budget: str, runtime: str, tmp_path: Path) -> None:
    model = randomised(Residual())
    before = snapshot(model)
    outcome = searched(model, tmp_path, budget, runtime)
    assert_within(outcome, model, budget)
    assert_untouched(model, before)
    assert not model.training
    with torch.no_grad():
        assert outcome.model(torch.randn(3, *IMAGE)).shape == (3, 5)
    assert {path.name for path in outcome.folder.iterdir()} == {
        "policy.yaml",
        "policy.safetensors",
        "outcome.json",
        "report.html",
    }


def test_a_model_in_training_mode_stays_in_it(tmp_path: Path) -> None:
    model = randomised(Residual())
    calibration, validation = data_of(model, IMAGE)
    model.train()
    before = snapshot(model)
    searched(model, tmp_path, calibration=calibration, validation=validation)
    assert_untouched(model, before)
    assert all(module.training for module in model.modules())


def test_several_limits_hold_at_once(tmp_path: Path) -> None:
    model = randomised(Vgg())
    outcome = searched(model, tmp_path, ["60%macs", "55%params", "70%size"])
    for budget in ("60%macs", "55%params", "70%size"):
        assert_within(outcome, model, budget)
    assert set(outcome.policy.budget) == {"macs", "params", "size"}


def test_a_family_gives_one_outcome_each(tmp_path: Path) -> None:
    model = randomised(Residual())
    outcome = searched(model, tmp_path, "60%macs,40%macs")
    assert_within(outcome, model, "40%macs")
    found = {read_policy(path).budget["macs"]: path for path in tmp_path.rglob("policy.yaml")}
    assert set(found) == {"60%macs", "40%macs"}


@pytest.mark.slow
def test_the_fastest_above_a_floor(tmp_path: Path) -> None:
    """Judged on held-out data, so a floor that most policies keep."""
    model = randomised(Residual(width=16))
    try:
        outcome = searched(model, tmp_path, None, max_drop=0.9)
    except MissedError as error:  # timing on a busy machine
        assert "latency" in str(error)  # noqa: PT017
        return
    assert outcome.met
    assert outcome.policy.floor == {"max_drop": 0.9}
    assert outcome.policy.units


def test_a_second_run_reuses_what_was_measured(tmp_path: Path) -> None:
    model, notes = randomised(Residual()), Notes()
    start = time.perf_counter()
    searched(model, tmp_path, "60%latency", progress=Notes())
    middle = time.perf_counter()
    searched(model, tmp_path, "50%macs", progress=notes)
    assert any("reused the bank" in note for note in notes.notes)
    assert not {"calibrate", "one at a time", "profile"} & set(notes.phases)
    assert time.perf_counter() - middle < middle - start


def test_the_same_search_again_tells_no_trial_twice(tmp_path: Path) -> None:
    model = randomised(Residual())
    first = searched(model, tmp_path)
    second = searched(model, tmp_path)
    assert len(second.record.trials) == len(first.record.trials)
    assert second.policy.units == first.policy.units


def test_the_same_seed_finds_the_same(tmp_path: Path) -> None:
    model = randomised(Residual())
    outcomes = [searched(model, tmp_path / str(index)) for index in range(2)]
    assert outcomes[0].policy.units == outcomes[1].policy.units
    one, other = (outcome.model.state_dict() for outcome in outcomes)
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize(
    ("budget", "text"), [("0.001%macs", "reachable"), ("100%macs", "dense"), ("2000%params", "dense")]
)
def test_budgets_out_of_reach(budget: str, text: str, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=text):
        searched(randomised(Residual()), tmp_path, budget)


def test_a_regression_by_its_squared_error(tmp_path: Path) -> None:
    model = randomised(Vgg())
    inputs = torch.randn(200, *IMAGE)
    with torch.no_grad():
        wanted = model(inputs)
    outcome = searched(model, tmp_path, calibration=inputs[:100], validation=(inputs[100:], wanted[100:]), metric="mse")
    assert_within(outcome, model, "50%macs")
    assert not outcome.record.higher_is_better


def test_min_accuracy_is_for_metrics_where_more_is_better(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="with mae give a budget or max_drop"):
        searched(randomised(Vgg()), tmp_path, metric="mae", min_accuracy=0.5)


class Segmenter(nn.Module):
    """Two maps of logits and the features between them, in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.head, self.early = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> dict[str, object]:
        early = torch.relu(self.first(x))
        late = torch.relu(self.second(early))
        return {"out": self.head(late), "more": [self.early(early), late]}


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
def test_a_segmentation_that_returns_a_dict(tmp_path: Path, runtime: str) -> None:
    torch.manual_seed(0)
    model, inputs = Segmenter().eval(), torch.randn(120, *IMAGE)
    with torch.no_grad():
        wanted = torch.cat([model(part)["out"] for part in inputs.split(40)]).argmax(1)
    wanted[:, 0] = 255  # not to be counted
    outcome = searched(
        model, tmp_path, runtime=runtime, calibration=(inputs[:60], wanted[:60]),
        validation=(inputs[60:], wanted[60:]), metric="miou",
    )  # fmt: skip
    assert outcome.record.dense.score is not None
    assert (outcome.record.dense.score.value, outcome.record.chosen.macs < outcome.record.dense.macs) == (1.0, True)
    shapes = {tuple(tensor.shape[1:]) for tensor in tensors_of(outcome.model(inputs[:2]))}
    assert shapes == {tuple(tensor.shape[1:]) for tensor in tensors_of(model(inputs[:2]))}  # features stay whole


class Language(nn.Module):
    """The next token from this one alone."""

    def __init__(self) -> None:
        super().__init__()
        self.look_up = nn.Embedding(20, 16)
        self.widen, self.narrow, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 20)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.look_up(tokens)  # (samples, tokens, 16)
        logits: Tensor = self.head(x + self.narrow(torch.relu(self.widen(x))))
        return logits


def test_a_language_model_by_its_perplexity(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs, targets = windows(torch.randint(20, (900,)), length=8, stride=4)
    outcome = searched(
        Language().eval(), tmp_path, "70%macs", runtime="onnxruntime", calibration=inputs[:90],
        validation=(inputs[90:], targets[90:]), metric="perplexity",
    )  # fmt: skip
    assert outcome.record.chosen.macs < outcome.record.dense.macs
    assert outcome.record.chosen.score is not None
    assert 10 < outcome.record.chosen.score.value < 60  # chance is 20
    assert not outcome.record.higher_is_better


def test_a_perplexity_may_rise_by_a_part_of_the_dense_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Language().eval()
    inputs, _ = windows(torch.randint(20, (900,)), length=8, stride=4)
    with torch.no_grad():
        targets = model(inputs).argmax(2)
    more: dict[str, Any] = {"calibration": inputs[:90], "validation": (inputs[90:], targets[90:])}
    outcome = searched(model, tmp_path, "70%macs", metric="perplexity", max_drop="300%", max_loss=1e6, **more)
    dense, chosen = outcome.record.dense.score, outcome.record.chosen.score
    assert dense is not None
    assert chosen is not None
    assert chosen.value <= 4 * dense.value
    assert outcome.policy.floor == {"max_relative_drop": 3.0, "max_loss": 1e6}
    assert "max rise 300 % of the dense value + at most 1e+06" in outcome.record.verdict
    with pytest.raises(MissedError, match=r"above the floor \(at most 1\)"):
        searched(model, tmp_path, "70%macs", metric="perplexity", max_loss=1, **more)


class Viewed(Vgg):
    """`view` where `flatten` would do: the commonest line of older networks."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in list(self)[:8]:
            x = layer(x)
        x = x.view(x.size(0), -1)
        for layer in list(self)[9:]:
            x = layer(x)
        return x


def test_a_view_is_as_good_as_a_flatten(tmp_path: Path) -> None:
    model = randomised(Viewed())
    assert_within(searched(model, tmp_path), model, "50%macs")


# ---- policies come back --------------------------------------------------------------------------------------------


SOURCE = """
import dataclasses
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn


@dataclasses.dataclass
class Sizes:
    width: int = 8
    classes: int = 5


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width, affine=AFFINE)

    def forward(self, x):
        out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(out + x)


class Net(nn.Module):
    def __init__(self, sizes):
        super().__init__()
        width = sizes.width
        self.stem, self.norm = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width, affine=AFFINE)
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.depthwise = nn.Conv2d(width, width, 3, stride=2, padding=1, groups=width)
        self.point = nn.Conv2d(width, 12, 1)
        self.head = nn.Linear(12, sizes.classes)

    def forward(self, x):
        x = self.blocks(torch.relu(self.norm(self.stem(x))))
        return self.head(torch.relu(self.point(self.depthwise(x))).mean((2, 3)))


def model():
    torch.manual_seed(0)
    network = Net(Sizes()).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.rand(tensor.shape, generator=generator)
                tensor.copy_(0.5 + noise if "running_var" in name or tensor.ndim == 1 else tensor * 2)
        network.head.bias -= network(torch.randn(64, 3, 8, 8, generator=generator)).mean(0)  # every class is answered
    return network


def data():
    inputs = torch.randn(240, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        labels = model()(inputs).argmax(1)
    return (inputs[:96], labels[:96]), (inputs[96:], labels[96:])
"""
YAML = """
model: net.py:model
data: net.py:data
target: {runtime: torch}
budget: 50%macs
search: {trials: 12, finalists: 2}
run: out
"""


def written(folder: Path, *, affine: bool = True, source: str = SOURCE, yaml: str = YAML) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "net.py").write_text(source.replace("AFFINE", str(affine)), encoding="utf-8")
    (folder / "autoprune.yaml").write_text(yaml, encoding="utf-8")
    return folder


def config_of(folder: Path, **overrides: object) -> Config:
    return load_config(folder / "autoprune.yaml", {key.replace("_", "."): value for key, value in overrides.items()})


@dataclasses.dataclass
class Run:
    folder: Path
    config: Config
    policy: Path
    outcome: Any

    def apply(self, output: Path) -> dict[str, Path]:
        return policies.apply_policy(self.policy, self.config, folder=self.folder, output=output, progress=Silent())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = written(tmp_path_factory.mktemp("project"))
    config = config_of(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        record = api.search_config(config, folder=folder, progress=Silent())[0]
    return Run(folder, config, next((folder / "out").rglob("policy.yaml")), record)


@pytest.fixture
def run(finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A copy of the finished run that a test may damage."""
    folder = tmp_path / "project"
    shutil.copytree(finished.folder, folder)
    monkeypatch.chdir(folder)
    return Run(folder, config_of(folder), folder / finished.policy.relative_to(finished.folder), finished.outcome)


def inputs() -> Tensor:
    return torch.randn(5, *IMAGE, generator=torch.Generator().manual_seed(5))


def test_apply_gives_the_verified_model_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits of what `search` handed back, from its files alone."""
    folder = written(tmp_path / "project")
    monkeypatch.chdir(folder)
    config = config_of(folder)
    calibration, validation = load_factory("net.py:data", folder, key="data")()
    user: Any = load_factory("net.py:model", folder, key="model")()
    outcome = api.search(
        user, calibration=calibration, validation=validation, budget="50%macs", plan=PLAN,
        target=Target(runtime="torch"), run=folder / "mine",
    )  # fmt: skip
    written_files = policies.apply_policy(
        outcome.folder / "policy.yaml", config, folder=folder, output=tmp_path / "out", progress=Silent()
    )
    with torch.no_grad():
        wanted = outcome.model(inputs())
    state = safetensors.torch.load_file(written_files["state dict"])
    assert all(torch.equal(tensor, state[name]) for name, tensor in outcome.model.state_dict().items())
    session = onnxruntime.InferenceSession(str(written_files["onnx"]), providers=["CPUExecutionProvider"])
    got = session.run(None, {session.get_inputs()[0].name: inputs().numpy()})[0]
    assert np.abs(got - wanted.numpy()).max() < 1e-4 * max(1.0, float(wanted.abs().max()))
    program = torch.export.load(written_files["torch.export"]).module()
    assert torch.allclose(program(inputs()), wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("affine", "first"),
    [(True, ""), (False, ""), (True, "from __future__ import annotations\n")],
    ids=["plain", "norms without weights", "a dataclass with annotations as text"],
)
def test_the_rebuild_script_needs_no_autoprune(
    affine: bool, first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = written(tmp_path / "project", affine=affine, source=first + SOURCE)
    monkeypatch.chdir(folder)
    api.search_config(config_of(folder), folder=folder, progress=Silent())
    policy = next((folder / "out").rglob("policy.yaml"))
    files = policies.apply_policy(
        policy, config_of(folder), folder=folder, output=tmp_path / "pruned", progress=Silent()
    )
    shutil.copy(folder / "net.py", tmp_path / "pruned" / "net.py")
    torch.save(inputs(), tmp_path / "x.pt")
    code = (
        "import sys, torch\n"
        "class Closed:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.partition('.')[0] == 'autoprune': raise ImportError('autoprune is closed')\n"
        "sys.meta_path.insert(0, Closed())\n"
        "from rebuild import model\n"
        f"x = torch.load({str(tmp_path / 'x.pt')!r})\n"
        f"torch.save(model()(x).detach(), {str(tmp_path / 'y.pt')!r})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "pruned", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    session = onnxruntime.InferenceSession(str(files["onnx"]), providers=["CPUExecutionProvider"])
    wanted = session.run(None, {session.get_inputs()[0].name: inputs().numpy()})[0]
    got = torch.load(tmp_path / "y.pt").numpy()
    assert np.abs(got - wanted).max() < 1e-4 * max(1.0, float(np.abs(wanted).max()))


def test_verify_judges_by_the_policys_own_budget(run: Run) -> None:
    bare = run.config.model_copy(update={"budget": None})
    record = policies.verify_policy(run.policy, bare, folder=run.folder, progress=Silent())
    assert record.met
    assert record.pruned.macs == run.outcome.chosen.macs
    assert record.pruned.score == run.outcome.chosen.score
    assert record.dense.score == run.outcome.dense.score


def test_verify_says_when_a_tighter_budget_is_missed(run: Run) -> None:
    tighter = run.config.model_copy(update={"budget": ("5%macs",)})
    record = policies.verify_policy(run.policy, tighter, folder=run.folder, progress=Silent())
    assert not record.met
    assert "misses" in record.verdict
    assert MissedError.exit_code == 4


def test_a_run_goes_beside_its_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths in a configuration file are relative to it, wherever the command is given."""
    folder = written(tmp_path / "project")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    api.search_config(config_of(folder), folder=folder, progress=Silent())
    assert list(elsewhere.iterdir()) == []
    assert (folder / "out" / JOURNAL).is_file()


def test_resume_continues_a_finished_run(run: Run) -> None:
    config, folder = load_run(run.folder / "out", {})
    records = api.search_config(config, folder=folder, progress=Silent())
    assert len(records[0].trials) >= len(run.outcome.trials)
    assert records[0].met


def refused(run: Run, kind: type[AutopruneError] = PolicyError) -> str:
    with pytest.raises(kind) as raised:
        run.apply(run.folder / "pruned")
    assert not (run.folder / "pruned").exists()
    return str(raised.value)


def test_a_policy_of_another_model_names_the_difference(run: Run) -> None:
    written(run.folder, source=SOURCE.replace("width: int = 8", "width: int = 10"))
    text = refused(run)
    assert "stem.weight" in text or "parameters" in text
    assert "'Net'" in text


def test_a_policy_for_other_weights_is_refused(run: Run) -> None:
    written(run.folder, source=SOURCE.replace("manual_seed(1)", "manual_seed(9)"))
    assert "other weights" in refused(run)


def test_a_side_file_that_is_missing_or_changed(run: Run) -> None:
    side = run.policy.with_name("policy.safetensors")
    content = bytearray(side.read_bytes())
    content[-1] ^= 1
    side.write_bytes(content)
    assert "SHA-256" in refused(run)
    side.unlink()
    assert "policy.safetensors" in refused(run)


def test_a_damaged_side_file_without_checksum(run: Run) -> None:
    policy = read_policy(run.policy)
    write_policy(run.policy, policy.model_copy(update={"weights_sha256": None}))
    side = run.policy.with_name("policy.safetensors")
    whole = side.read_bytes()
    side.write_bytes(whole[:-40])
    assert "damaged" in refused(run)
    tensors = safetensors.torch.load(whole)
    kept = next(name for name in tensors if name.startswith("kept/"))
    for wrong in (
        tensors[kept] + 1000,
        tensors[kept] - 1000,
        tensors[kept] * 0,
        tensors[kept].float(),
        tensors[kept][None],
    ):
        side.write_bytes(safetensors.torch.save({**tensors, kept: wrong}))
        assert kept.removeprefix("kept/") in refused(run)
    lacking = {name: tensor for name, tensor in tensors.items() if name != "tensor/head.weight"}
    side.write_bytes(safetensors.torch.save(lacking))
    assert "head.weight" in refused(run)


def test_a_side_file_in_another_folder_is_not_followed(run: Run) -> None:
    write_policy(run.policy, read_policy(run.policy).model_copy(update={"weights": "../../secret.safetensors"}))
    assert "without folders" in refused(run)


def test_a_policy_that_names_other_units(run: Run) -> None:
    policy = read_policy(run.policy)
    name, decision = next((n, d) for n, d in policy.units.items() if d.kind == "channels")
    units = {f"{name}x": decision, **{n: d for n, d in policy.units.items() if n != name}}
    write_policy(run.policy, policy.model_copy(update={"units": units}))
    assert f"'{name}'" in refused(run)


def test_a_drop_that_is_no_drop(run: Run) -> None:
    """A block with a method that no block has must not pass in silence."""
    policy = read_policy(run.policy)
    decision = {"kind": "block", "method": "l2", "keep": 0, "of": 1}
    text = json.loads(policy.model_dump_json())
    text["units"]["blocks.1"] = decision
    write_policy(run.policy, type(policy).model_validate(text))
    assert "blocks.1" in refused(run)
