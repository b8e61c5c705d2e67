"""Every example runs as a user runs it. Left out are what trained the demo, which takes minutes,
and the reader of policies, which has tests of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SEPARATE = {"train_demo.py", "read_policy.py"}
LONG = {"from_python.py"}
"""The README's Python is the same search, which its own test runs."""
LIMIT_S = 1500
"""Far above what they take, for machines that are busy."""


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the examples, so that what they write stays out of the repository."""
    copied = tmp_path_factory.mktemp("copy") / "examples"
    shutil.copytree(EXAMPLES, copied, ignore=shutil.ignore_patterns("runs", "weights.safetensors", "__pycache__"))
    return copied


def run(*command: str, folder: Path) -> str:
    done = subprocess.run(
        command, cwd=folder, env=os.environ | {"COLUMNS": "120"}, timeout=LIMIT_S, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in LONG else name
        for name in sorted({path.name for path in EXAMPLES.glob("*.py")} - SEPARATE)
    ],
)
def test_script(script: str, examples: Path, tmp_path: Path) -> None:
    assert "met: " in run(sys.executable, str(examples / script), folder=tmp_path)


def test_own_model(examples: Path) -> None:
    folder = examples / "own_model"
    assert "met: " in run(sys.executable, "-m", "autoprune", "search", folder=folder)
    assert (folder / "runs" / "autoprune" / "50pctmacs" / "policy.yaml").is_file()
