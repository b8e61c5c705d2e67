"""The command line, with everything heavy behind its door replaced."""

import errno
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from records import outcome, units_of, verified
from typer.testing import CliRunner

from autoprune import cli
from autoprune.commands.app import api as door
from autoprune.config import DEMO_SECONDS, Config, load_config, save_run
from autoprune.errors import BudgetError, MissedError
from autoprune.progress import Progress

GOLDEN = Path(__file__).parent / "golden" / "policy-1.yaml"
HEAVY = {"torch", "optuna", "numpy", "scipy", "onnx", "onnxruntime", "safetensors"}
runner = CliRunner()


class Api:
    """Stands in for autoprune.api and remembers what it was asked."""

    def __init__(self) -> None:
        self.config: Config | None = None
        self.seen: dict[str, Any] = {}
        self.error: BaseException | None = None
        self.verified = verified()

    def _take(self, config: Config, **seen: Any) -> None:
        self.config, self.seen = config, seen
        if self.error is not None:
            raise self.error

    def search_config(self, config: Config, *, folder: Path, progress: Progress) -> list[Any]:
        self._take(config, folder=folder)
        progress.phase("search", 10)
        return [outcome()]

    def units_of(self, config: Config, *, folder: Path, latency: bool, progress: Progress) -> Any:
        self._take(config, folder=folder, latency=latency)
        return units_of("stem")

    def apply_policy(
        self, policy_path: Path, config: Config, *, folder: Path, output: Path, anew: bool, progress: Progress
    ) -> dict[str, Path]:
        self._take(config, folder=folder, policy=policy_path, output=output, anew=anew)
        return {"onnx": output / "model.onnx"}

    def verify_policy(self, policy_path: Path, config: Config, *, folder: Path, progress: Progress) -> Any:
        self._take(config, folder=folder, policy=policy_path)
        return self.verified


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Api:
    fake = Api()
    for module in ("autoprune.api", "autoprune.policies"):
        monkeypatch.setitem(sys.modules, module, fake)  # type: ignore[arg-type]
    monkeypatch.chdir(tmp_path)
    return fake


def run(*arguments: str, code: int = 0) -> str:
    result = runner.invoke(cli.app, list(arguments))
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.output


def result_of(output: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads([line for line in output.splitlines() if line.startswith("{")][-1])
    return content


def test_search_without_a_file_runs_the_demo_and_says_so(api: Api, tmp_path: Path) -> None:
    output = run("search", "--budget", "5ms")
    assert "running the embedded demo" in output
    assert "met: 4.93 ms is 1.4 % under 5 ms" in output
    assert "runs/demo" in output
    assert api.config is not None
    assert (api.config.model, api.config.search.seconds) == ("autoprune.demo.network:model", DEMO_SECONDS)
    assert api.seen == {"folder": tmp_path}


ALL_FLAGS = """
    --model a.py:m --data a.py:d --weights w.pt --metric a.py:f --lower-is-better -b 3ms,5ms -b 2MB --max-drop 1%
    --size packed --max-loss 12.5 --space mine.yaml --protect a* --protect b --runtime torch --device cuda
    --precision float16 --threads 2 --batch 4 --example 1,3,8,8 --trials 9 --seconds 3.5 --seed 7 --sampler tpe
    --finalists 2 --no-refit --bank-memory 1GB --run here --engine ray --workers 5 --retries 1
    --storage sqlite:///s.db --ray-address auto --ray-cpus 2 --ray-gpus 0.25 --ray-target-wait 9 --ray-asha
    --ray-population 4 --ray-callback m:C --recover-steps 80 --recover-learning-rate 0.002 --recover-batch 32
    --recover-trials --latency-table device.csv
"""


def test_every_flag_reaches_the_configuration(api: Api) -> None:
    run("search", *ALL_FLAGS.split())
    assert api.config is not None
    assert api.config.model_dump() == {
        "model": "a.py:m",
        "weights": "w.pt",
        "data": "a.py:d",
        "metric": "a.py:f",
        "higher_is_better": False,
        "target": {
            "runtime": "torch",
            "device": "cuda",
            "threads": 2,
            "batch": 4,
            "example": (1, 3, 8, 8),
            "precision": "float16",
            "table": "device.csv",
        },
        "budget": ("3ms,5ms", "2MB"),
        "size": "packed",
        "max_drop": "1%",
        "min_accuracy": None,
        "max_loss": 12.5,
        "space": {"preset": "mine.yaml", "protect": ("a*", "b")},
        "search": {
            "trials": 9,
            "seconds": 3.5,
            "seed": 7,
            "sampler": "tpe",
            "finalists": 2,
            "bank_memory": 1_000_000_000,
            "refit": False,
            "engine": "ray",
            "workers": 5,
            "retries": 1,
            "storage": "sqlite:///s.db",
        },
        "recover": {"steps": 80, "learning_rate": 0.002, "batch": 32, "trials": True},
        "ray": {
            "address": "auto",
            "cpus": 2.0,
            "gpus": 0.25,
            "target_wait": 9.0,
            "asha": True,
            "population": 4,
            "callbacks": ("m:C",),
        },
        "run": "here",
    }


def test_an_accuracy_floor_reaches_the_configuration(api: Api) -> None:
    run("search", "--metric", "psnr", "--min-accuracy", "30dB")
    assert api.config is not None
    assert (api.config.min_accuracy, api.config.floor.text) == (30.0, "at least 30 dB")


def test_init_then_units(api: Api, tmp_path: Path) -> None:
    run("init")
    assert "exist already; give --force" in run("init", code=2)
    run("init", "--force", "--json")
    output = run("units", "--latency")
    assert "autoprune.yaml" in output
    assert "stem is protected" in output
    assert api.config is not None
    assert (api.config.model, api.seen) == ("model.py:model", {"folder": tmp_path, "latency": True})


def test_a_configuration_elsewhere_has_its_own_folder(api: Api, tmp_path: Path) -> None:
    run("init", "project")
    run("search", "--config", "project/autoprune.yaml")
    assert api.seen["folder"] == tmp_path / "project"


def test_json_ends_with_the_records(api: Api) -> None:
    output = run("search", "--budget", "5ms", "--json")
    events = [json.loads(line) for line in output.splitlines()]
    assert [event["event"] for event in events][-2:] == ["note", "result"]
    assert events[-1]["outcomes"][0]["chosen"]["latency_ms"]["median"] == 4.93
    found = result_of(run("units", "--json"))
    assert (found["units"][0]["keep"], found["coverage"]["kept"][0]["macs_share"]) == (10, 0.04)
    assert result_of(run("show", str(GOLDEN), "--json"))["policy"]["units"]["layer2.3"]["keep"] == 0


def test_quiet_prints_nothing(api: Api) -> None:
    assert run("search", "--budget", "5ms", "--quiet") == ""


def test_show_and_schema() -> None:
    assert "10 of 16" in run("show", str(GOLDEN))
    assert "budget" in json.loads(run("schema"))["properties"]
    assert "units" in json.loads(run("schema", "policy"))["properties"]
    assert run("--version").startswith("autoprune 0.")


def test_apply_and_verify(api: Api, tmp_path: Path) -> None:
    assert "onnx: out/model.onnx" in run("apply", str(GOLDEN), "-o", "out")
    assert api.seen == {"folder": tmp_path, "policy": GOLDEN, "output": Path("out"), "anew": False}
    assert "embedded demo" in run("verify", str(GOLDEN))
    api.verified = verified(met=False)
    assert "error: 4.93 ms against 5 ms" in run("verify", str(GOLDEN), code=4)


def test_a_policy_is_verified_by_its_own_goal_or_by_a_flag(api: Api) -> None:
    run("init")
    run("verify", str(GOLDEN))
    assert api.config is not None
    assert (api.config.budget, api.config.max_drop) == (None, None)
    run("verify", str(GOLDEN), "--budget", "7ms")
    assert api.config.budget == ("7ms",)


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (BudgetError("the fastest is 3 ms"), 3, "error: the fastest is 3 ms"),
        (MissedError("missed by 2 %"), 4, "error: missed by 2 %"),
        (OSError(errno.ENOSPC, "No space left on device", "runs/x"), 2, "error: runs/x: the disk is full"),
        (PermissionError(errno.EACCES, "denied"), 2, "error: permission denied"),
        (KeyboardInterrupt(), 130, "--resume runs/demo"),
    ],
)
def test_errors_are_a_line_and_a_code(api: Api, error: BaseException, code: int, text: str) -> None:
    api.error = error
    assert text in run("search", "--budget", "5ms", code=code)
    assert result_of(run("search", "--budget", "5ms", "--json", code=code))["exit_code"] == code


def test_the_resume_command_can_be_pasted(api: Api, tmp_path: Path) -> None:
    api.error = KeyboardInterrupt()
    output = run("search", "--budget", "3ms,5ms", "--run", "old one", code=130)
    assert "autoprune search --resume 'old one'" in output


def test_a_resumed_search_takes_its_own_configuration_and_the_flags(api: Api, tmp_path: Path) -> None:
    asked = load_config(None, {"model": "a.py:m", "data": "a.py:d", "budget": ("3ms,5ms",), "search.seed": 4})
    (tmp_path / "home").mkdir()
    save_run(asked, tmp_path / "home", tmp_path / "old one")
    run("search", "--resume", "old one", "--trials", "7")
    assert api.config is not None
    assert (api.config.budget, api.config.search.seed, api.config.search.trials) == (("3ms,5ms",), 4, 7)
    assert api.seen == {"folder": tmp_path / "home"}
    assert "is no autoprune run" in run("search", "--resume", str(tmp_path), code=2)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["search"], "nothing to search for"),
        (["search", "--budget", "5 parsecs"], "command line: budget: unknown unit"),
        (["search", "--config", "absent.yaml"], "absent.yaml: cannot be read"),
        (["search", "--model", "a.py:b", "--budget", "5ms"], "data: is missing"),
        (["show", "absent.yaml"], "absent.yaml: cannot be read"),
        (["search", "--threads", "many"], "--threads"),
        (["serach"], "serach"),
    ],
)
def test_a_users_mistakes(api: Api, arguments: list[str], text: str) -> None:
    assert text in run(*arguments, code=2)


def test_the_door_opens_on_the_api(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = ModuleType("autoprune.api")
    monkeypatch.setitem(sys.modules, "autoprune.api", stand_in)
    assert door() is stand_in


@pytest.mark.parametrize("arguments", [["--help"], ["search", "--help"], ["show", str(GOLDEN)], ["schema"]])
def test_nothing_heavy_is_imported(arguments: list[str]) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "autoprune", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    imported = {line.rsplit("|", 1)[-1].strip().partition(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert "typer" in imported
    assert imported & HEAVY == set()


def test_import_autoprune_is_instant() -> None:
    code = (
        "import sys, autoprune; autoprune.read_policy; assert 'torch' not in sys.modules; print(autoprune.__version__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1]
    )
    assert done.returncode == 0, done.stderr


def test_unknown_attributes_are_told() -> None:
    package = __import__("autoprune")
    assert "search" in dir(package)
    with pytest.raises(AttributeError, match="serach"):
        SimpleNamespace(value=package.serach)
