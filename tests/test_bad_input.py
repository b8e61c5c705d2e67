"""A user's mistakes and a machine's, on the real command line: one clear message, the right exit code, no traceback."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
import safetensors.torch
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from test_api import SOURCE, YAML, written
from typer.testing import CliRunner

from autoprune import cli

torch.set_num_threads(1)

runner = CliRunner()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = written(tmp_path / "project")
    monkeypatch.chdir(folder)
    return folder


def failing(*arguments: str, code: int = 2) -> str:
    """The message of a command that fails as it should."""
    result = runner.invoke(cli.app, list(arguments))
    trouble = result.exception
    assert trouble is None or isinstance(trouble, SystemExit), f"{type(trouble).__name__}: {trouble}"
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    message = " ".join(result.output.split())
    assert "error: " in message
    return message.partition("error: ")[2]


def yaml_with(project: Path, old: str, new: str) -> None:
    assert old in YAML
    written(project, yaml=YAML.replace(old, new))


def source_with(project: Path, old: str, new: str) -> None:
    assert old in SOURCE
    written(project, source=SOURCE.replace(old, new))


# ---- the configuration ---------------------------------------------------------------------------------------------


def test_an_empty_configuration(project: Path) -> None:
    written(project, yaml="")
    message = failing("search")
    assert "model: is missing" in message
    assert "data: is missing" in message
    assert "nothing to search for" in message


def test_an_unknown_key_names_the_nearest(project: Path) -> None:
    yaml_with(project, "budget:", "budgte:")
    message = failing("search")
    assert "autoprune.yaml: budgte: unknown key; did you mean 'budget'?" in message


def test_an_unknown_sampler_runtime_or_metric(project: Path) -> None:
    assert "'torch'" in failing("search", "--runtime", "troch")
    assert "'top1'" in failing("search", "--metric", "top11")
    assert "'tpe'" in failing("search", "--sampler", "tpee")


def test_a_space_with_an_unknown_method(project: Path) -> None:
    (project / "mine.yaml").write_text("methods: [{method: obbs}]\n", encoding="utf-8")
    assert "'obs'" in failing("search", "--space", "mine.yaml")


def test_a_space_that_names_a_method_twice(project: Path) -> None:
    (project / "mine.yaml").write_text("methods: [{method: l2}, {method: l2}]\n", encoding="utf-8")
    assert "mine.yaml" in failing("search", "--space", "mine.yaml")


def test_a_glob_that_matches_nothing(project: Path) -> None:
    message = failing("search", "--protect", "blocks.0.conv3")
    assert "'blocks.0.conv3' matches no module" in message
    assert "blocks.0.conv" in message.partition("did you mean")[2]


# ---- model and data ------------------------------------------------------------------------------------------------


def test_a_model_file_that_raises(project: Path) -> None:
    source_with(project, "def model():", "raise RuntimeError('broken on purpose')\ndef model():")
    message = failing("search")
    assert "net.py" in message
    assert "line " in message
    assert "RuntimeError: broken on purpose" in message


def test_a_factory_that_raises(project: Path) -> None:
    source_with(project, "    torch.manual_seed(0)", "    raise ValueError('no checkpoint')")
    assert "ValueError: no checkpoint" in failing("search")


def test_a_factory_that_returns_no_module(project: Path) -> None:
    source = SOURCE.replace("    return network", "    return network.state_dict()")
    written(project, source=source.replace("model()(inputs).argmax(1)", "inputs[:, 0, 0, 0].long() * 0"))
    assert "must return a torch.nn.Module" in failing("units")


@pytest.mark.parametrize(
    ("old", "new", "wanted"),
    [
        ("torch.randn(240, 3, 8, 8,", "torch.randn(240, 4, 8, 8,", "4"),
        ("(inputs[96:], labels[96:])", "inputs[96:]", "targets are missing"),
        ("(inputs[96:], labels[96:])", "(inputs[:0], labels[:0])", "no samples"),
        ("(inputs[96:], labels[96:])", "(inputs[96:97], labels[96:97])", "at least 2"),
        ("(inputs[96:], labels[96:])", "(inputs[96:], labels[:5])", "144 inputs but 5 targets"),
        ("(inputs[96:], labels[96:])", "(inputs[96:] / 0, labels[96:])", "NaN or infinity"),
        ("(inputs[96:], labels[96:])", "(inputs[96:], labels[96:] + 7)", "5 outputs"),
    ],
)
def test_data_that_does_not_fit(project: Path, old: str, new: str, wanted: str) -> None:
    if "randn" in old:
        written(
            project,
            source=SOURCE.replace(old, new).replace("model()(inputs).argmax(1)", "inputs[:, 0, 0, 0].long() * 0"),
        )
    else:
        source_with(project, old, new)
    message = failing("search")
    assert wanted in message
    assert "validation" in message or "shape" in message


def test_weights_that_hold_nan(project: Path) -> None:
    source_with(project, "    return network", "    network.head.weight.data[0, 0] = float('nan')\n    return network")
    message = failing("search")
    assert "head.weight" in message
    assert "NaN" in message


def test_weights_that_do_not_fit(project: Path) -> None:
    state = {"stem.weight": torch.ones(9, 3, 3, 3), "extra": torch.ones(1)}
    safetensors.torch.save_file(state, project / "w.safetensors")
    message = failing("search", "--weights", "w.safetensors")
    for part in ("missing", "extra", "stem.weight (file (9, 3, 3, 3), model (8, 3, 3, 3))"):
        assert part in message
    assert "w.safetensors" in failing("search", "--weights", "absent.safetensors".replace("absent", "w"))
    assert "cannot be read" in failing("search", "--weights", "absent.safetensors")
    (project / "w.pt").write_bytes(b"no pickle")
    assert "tensors alone" in failing("search", "--weights", "w.pt")


# ---- budgets -------------------------------------------------------------------------------------------------------


def test_a_budget_out_of_reach_says_what_is_reachable(project: Path) -> None:
    message = failing("search", "--budget", "0.001%macs", code=3)
    assert "reachable: " in message
    assert "try --budget" in message


def test_a_budget_above_the_dense_model(project: Path) -> None:
    assert "the dense model meets it already" in failing("search", "--budget", "1GB", code=3)


def test_limits_that_no_policy_keeps_together(project: Path) -> None:
    """Each is in reach alone; either they can be kept together or that is said."""
    result = runner.invoke(cli.app, ["search", "--budget", "8%macs", "--budget", "12%params", "--budget", "12%size"])
    assert result.exit_code in (0, 3), result.output
    assert "Traceback" not in result.output


def test_a_floor_that_cannot_be_kept(project: Path) -> None:
    message = failing("search", "--budget", "12%macs", "--max-drop", "0.0001%", code=4)
    assert "below the floor" in message
    assert list((project / "out").rglob("policy.yaml"))  # the evidence is there all the same


# ---- policies ------------------------------------------------------------------------------------------------------


def test_corrupt_and_foreign_policies(project: Path) -> None:
    policy = project / "p.yaml"
    for content, wanted in (
        ("units: [", "p.yaml"),
        ("autoprune: 9\nunits: {}\n", "upgrade"),
        ("autoprune: 1\nunits: {a: {kind: channels, method: l2, keep: 9, of: 4}}\n", "keep (9) is more"),
        ("autoprune: 1\nunits: {}\n", "which model"),
        ("hello\n", "not a policy"),
    ):
        policy.write_text(content, encoding="utf-8")
        for command in ("apply", "verify"):
            assert wanted in failing(command, "p.yaml")
    policy.write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in failing("show", "p.yaml")


def test_a_policy_of_another_model_and_a_missed_one(project: Path) -> None:
    result = runner.invoke(cli.app, ["search"])
    assert result.exit_code == 0, result.output
    policy = str(next((project / "out").rglob("policy.yaml")))
    assert runner.invoke(cli.app, ["verify", policy]).exit_code == 0
    assert "misses" in failing("verify", policy, "--budget", "5%macs", code=4)
    result = runner.invoke(cli.app, ["apply", policy, "-o", "pruned"])
    assert result.exit_code == 0, result.output
    assert "onnx: " in result.output
    source_with(project, "width: int = 8", "width: int = 10")
    message = failing("apply", policy, "-o", "other")
    assert "it was made for 'Net'" in message
    assert not (project / "other").exists()


# ---- the machine ---------------------------------------------------------------------------------------------------


def test_a_resume_of_no_run(project: Path) -> None:
    (project / "empty").mkdir()
    for name in ("empty", "absent"):
        message = failing("search", "--resume", name)
        assert f"{name}: is no autoprune run" in message
    assert not (project / "absent").exists()


def test_a_run_folder_that_cannot_be_made(project: Path) -> None:
    (project / "taken").write_text("a file", encoding="utf-8")
    assert "a part of the path is a file" in failing("search", "--run", "taken")
    assert "a part of the path is a file" in failing("search", "--run", "taken/run")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(project: Path) -> None:
    (project / "locked").mkdir(mode=0o500)
    assert "permission denied" in failing("search", "--run", "locked")


def started(project: Path, *arguments: str, limit: int | None = None) -> subprocess.Popen[str]:
    def limited() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "autoprune", *arguments], cwd=project, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=limited,  # noqa: PLW1509
    )  # fmt: skip


@pytest.mark.parametrize("limit", [100, 12_000], ids=["from the start", "when the bank is written"])
def test_a_full_disk_leaves_the_old_files_whole(project: Path, limit: int) -> None:
    folder = project / "out"
    folder.mkdir()
    (folder / "README.txt").write_text("old", encoding="utf-8")
    process = started(project, "search", limit=limit)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2, output
    assert "Traceback" not in output
    assert "cannot be written" in output
    if limit == 100:
        assert (folder / "README.txt").read_text(encoding="utf-8") == "old"
    assert not [path for path in folder.rglob("*.tmp")]  # noqa: C416


def test_a_full_disk_while_trials_are_recorded(project: Path) -> None:
    """The bank is there already; what grows is the journal of trials."""
    assert runner.invoke(cli.app, ["search"]).exit_code == 0
    journal = project / "out" / "study.journal"
    process = started(project, "search", "--budget", "40%macs", "--trials", "400", limit=200_000)
    output, _ = process.communicate(timeout=120)
    assert journal.stat().st_size <= 200_000
    assert process.returncode == 2, output
    assert "Traceback" not in output
    assert "study.journal" in output


def told(journal: Path) -> dict[tuple[str, int], float]:
    """Values of complete trials, by study and number, as plain Optuna reads them."""
    storage = JournalStorage(JournalFileBackend(str(journal)))
    return {
        (study.study_name, trial.number): trial.value
        for study in storage.get_all_studies()
        for trial in storage.get_all_trials(study._study_id)
        if trial.state == optuna.trial.TrialState.COMPLETE and trial.value is not None
    }


@pytest.mark.slow
def test_a_killed_search_resumes_with_every_told_trial(project: Path) -> None:
    yaml_with(project, "trials: 12", "trials: 300")
    journal = project / "out" / "study.journal"
    process = started(project, "search")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if journal.exists() and journal.stat().st_size > 60_000:
            break
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()[0]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = told(journal)
    assert 5 < len(before) < 300
    resumed = started(project, "search", "--resume", "out")
    output, _ = resumed.communicate(timeout=180)
    assert resumed.returncode == 0, output
    assert "reused the bank" in output
    after = told(journal)
    assert {key: after[key] for key in before} == before
    assert len(after) > len(before)
    assert list((project / "out").rglob("policy.yaml"))
