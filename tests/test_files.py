"""Writes are whole or not at all, and say why not."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from autoprune.errors import ConfigError, RunError
from autoprune.files import read_yaml, write_bytes, write_text

ENOSPC_AFTER_A_PART = """
import resource, sys
from pathlib import Path
from autoprune.errors import RunError
from autoprune.files import write_bytes
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_bytes(Path(sys.argv[1]), b"x" * 5000)
except RunError as error:
    print(error)
"""


def test_write_and_overwrite(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file.txt"
    write_text(path, "one – é")
    write_text(path, "two")
    assert path.read_text(encoding="utf-8") == "two"
    assert [item.name for item in path.parent.iterdir()] == ["file.txt"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_text(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "text"


@pytest.mark.parametrize("function", ["write", "fsync", "replace"])
@pytest.mark.parametrize(("code", "reason"), [(errno.ENOSPC, "disk is full"), (errno.EROFS, "read-only")])
def test_a_failure_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, code: int, reason: str
) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")

    def refuse(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patched:
        patched.setattr(os, function, refuse)
        with pytest.raises(RunError, match=rf"file\.txt: cannot be written: .*{reason}"):
            write_text(path, "new")
    assert path.read_text() == "old"
    assert [item.name for item in tmp_path.iterdir()] == ["file.txt"]


@pytest.mark.skipif(sys.platform == "win32", reason="no resource limits")
def test_a_real_refusal_in_the_middle_of_a_write(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    write_bytes(path, b"old")
    command = [sys.executable, "-c", ENOSPC_AFTER_A_PART, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert "file.bin: cannot be written" in done.stdout
    assert path.read_bytes() == b"old"
    assert [item.name for item in tmp_path.iterdir()] == ["file.bin"]


def test_paths_that_cannot_be(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "text")
    for path, reason in ((tmp_path / "file" / "below", "not a folder"), (tmp_path / ("n" * 300), "too long")):
        with pytest.raises(RunError, match=reason):
            write_text(path, "text")
    with pytest.raises(RunError, match="folder"):
        write_text(tmp_path, "text")


def test_yaml_is_read_by_the_core_schema(tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    path.write_text("a: 1e-3\nb: no\nc: 1:30\nd: ~\ne: [true, -2, .inf]\nf: 2024-01-01\ng: '1'\n")
    expected = {
        "a": 1e-3,
        "b": "no",
        "c": "1:30",
        "d": None,
        "e": [True, -2, float("inf")],
        "f": "2024-01-01",
        "g": "1",
    }
    assert read_yaml(path) == expected


def test_depth_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "deep.yaml"
    path.write_text("[" * 40 + "]" * 40)
    read_yaml(path)
    path.write_text("[" * 60 + "]" * 60)
    with pytest.raises(ConfigError, match="line 1, column 51: nested deeper than 50 levels"):
        read_yaml(path)
