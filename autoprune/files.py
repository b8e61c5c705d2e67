"""Files: written whole or not at all, YAML read without surprises, and the policy file.

Knows what a disk can do to a write and what a text file can hide. Does not know what a policy means.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import ValidationError

from autoprune import yamls
from autoprune.core.policy import FORMAT, Policy, unknown_keys
from autoprune.errors import AutopruneError, ConfigError, PolicyError, RunError, listed, near_miss
from autoprune.problems import MOST_TOLD, given, problems_of, shown

SIZE_LIMIT = 10_000_000
"""Bytes; a YAML file beyond this is not one that a person wrote or that autoprune did."""

_NO_FILE = "it is a pipe or a device; give an ordinary file"
_CAUSES = {
    errno.ENOSPC: "the disk is full; free some space or choose another folder",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another folder",
    errno.EFBIG: "the file would be larger than this process may write; raise the limit (ulimit -f)",
    errno.EROFS: "the folder is read-only; choose another one",
    errno.EACCES: "permission denied; choose a folder that you may write to",
    errno.EPERM: "permission denied; choose a folder that you may write to",
    errno.ENOENT: "there is no such file or folder",
    errno.ENOTDIR: "a part of the path is a file, not a folder; choose another path",
    errno.EEXIST: "a part of the path is a file, not a folder; choose another path",
    errno.EISDIR: "it is a folder; give a file",
    errno.ENAMETOOLONG: "the name is too long",
}


def cause(error: OSError) -> str:
    """Why the system refused, and what to do."""
    code = errno.ENOENT if isinstance(error, FileNotFoundError) else error.errno  # some libraries leave errno out
    if code in _CAUSES:
        return _CAUSES[code]
    return error.strerror or str(error)


def open_file(path: Path) -> BinaryIO:
    """A file's bytes, to be read. Raises OSError as `open` does, and for what is no ordinary file: a pipe to which
    nobody writes would hold its reader for ever, and a device such as /dev/zero has no end.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, _NO_FILE, str(path))


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all. Raises RunError, the old file intact."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data`, whole or not at all. Raises RunError naming path and cause; the old file is intact then."""
    target = Path(os.path.realpath(path))  # a link stays a link
    temporary = target.with_name(f".autoprune-{os.getpid()}-{os.urandom(4).hex()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _write_synced(temporary, data)
        os.replace(temporary, target)
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {cause(error)}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    _sync_folder(target.parent)


def read_yaml(path: Path, *, error: type[AutopruneError] = ConfigError) -> object:
    """The content of a YAML file as dict, list, str, int, float, bool or None.

    Raises `error` for what cannot be read, is over 10 MB, repeats a key, holds an alias, too much or too deep, with
    line and column.
    """
    data = read_limited(path, error=error)
    if len(data) > SIZE_LIMIT:
        raise error(f"{path}: is larger than {SIZE_LIMIT // 1_000_000} MB; this is no file of autoprune's")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as bad:
        raise error(f"{path}: is not UTF-8 text (byte {bad.start})") from bad
    return yamls.parse(text, name=str(path), error=error)


def read_limited(path: Path, *, error: type[AutopruneError]) -> bytes:
    """An ordinary file's bytes, of a larger one than `SIZE_LIMIT` one more than that. Raises `error`."""
    try:
        with open_file(path) as file:
            return file.read(SIZE_LIMIT + 1)
    except OSError as refused:
        raise error(f"{path}: cannot be read: {cause(refused)}") from refused
    except ValueError as refused:  # a null byte in the path
        raise error(f"{path!s:.200}: is not a path") from refused


def write_policy(path: Path, policy: Policy) -> None:
    """Write `policy` as readable YAML, one unit a line. Raises RunError when the file cannot be written."""
    write_text(path, policy_text(policy))


def policy_text(policy: Policy) -> str:
    """`policy` as YAML: decision first, evidence after, fields without a value left out."""
    return yamls.text(_plain(policy))


def read_policy(path: Path) -> Policy:
    """The policy in a file. Raises PolicyError with all problems at once."""
    content = read_yaml(path, error=PolicyError)
    if not isinstance(content, dict):
        raise PolicyError(f"{path}: is not a policy: given {given(content)}, allowed: a mapping with `units`")
    if "autoprune" not in content:
        raise PolicyError(f"{path}: is not a policy: it must begin with `autoprune: {FORMAT}` (the format version)")
    version = content["autoprune"]
    if type(version) is not int or version != FORMAT:
        raise PolicyError(
            f"{path}: autoprune: format version {given(version)} is unknown; this version of autoprune reads {FORMAT}; "
            "upgrade autoprune if the file is newer"
        )
    unknown = unknown_keys(content)
    problems = [f"{shown(key)}: unknown key; {near_miss(key, Policy.model_fields)}" for key in unknown[:MOST_TOLD]]
    if len(unknown) > MOST_TOLD:
        problems.append(f"and {len(unknown) - MOST_TOLD} more unknown keys")
    passed_over = frozenset(unknown)
    try:
        policy = Policy.model_validate({key: content[key] for key in content if key not in passed_over}, strict=True)
    except ValidationError as invalid:
        problems += [f"{key}: {text}" for key, text in problems_of(invalid, Policy)]
    if problems:
        raise PolicyError(f"{path}: is not a valid policy:\n{listed(problems)}")
    return policy


def _write_synced(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable where the system can; not every file system lets a folder be opened."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _plain(policy: Policy) -> dict[str, Any]:
    content = policy.model_dump(exclude_none=True)
    if policy.evidence is not None:
        content["evidence"]["search"] = dict(policy.evidence.search)  # whatever it holds, None included
    for unit in content["units"].values():
        for key, usual in (("compensate", "none"), ("pattern", ""), ("bits", 32), ("rank", 0), ("inputs", 32)):
            if unit[key] == usual:
                del unit[key]
    if content.get("target", {}).get("precision") == "float32":
        del content["target"]["precision"]
    if content["size"] == "onnx":
        del content["size"]
    for section in ("budget", "floor"):
        if not content[section]:
            del content[section]
    return content
