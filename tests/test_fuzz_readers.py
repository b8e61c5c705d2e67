"""Files that somebody else wrote: whatever is in them, a reader ends soon, in little memory, with an error of ours.

Directed attacks one by one, random damage by hypothesis, and (slow) a hundred thousand damaged files.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import pickle
import random
import re
import resource
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz_files import (
    CANARY,
    CONFIG,
    LATENCY,
    MEMORY,
    POLICY,
    SPACE,
    TAGGED,
    Fuzzer,
    Tally,
    commanded,
    damaged,
    fuzz,
    readers,
    table,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autoprune.config import load_config, load_run
from autoprune.core.budget import MOST_BUDGETS
from autoprune.core.cost import LatencyTable, SharesTable
from autoprune.core.memory_table import MemoryTable
from autoprune.errors import AutopruneError, ConfigError, PolicyError, RunError
from autoprune.files import read_policy, read_yaml
from autoprune.importers import IMPORTERS
from autoprune.importers.tables import read_times
from autoprune.importing import Import, read_import
from autoprune.run import Kept, Run
from autoprune.side_file import read_side_file
from autoprune.spaces import load_space
from autoprune.yamls import NODE_LIMIT

torch.set_num_threads(1)

SMALL, LARGE = 40_000, 10_000_000
"""Bytes of an attack: those that every run makes, and the most that is read of a file at all."""
SMALL_S, LARGE_S = 5.0, 60.0
"""Processor seconds that an attack may take, several times what it does."""
MEMORY_BYTES = 1_500_000_000

Read = Callable[[Path], object]


@pytest.fixture(autouse=True)
def _nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No program is started, nothing unpickled, no text run as Python, in any test here; `pwned` is never made."""
    monkeypatch.chdir(tmp_path)
    with CANARY.listening() as events:
        yield
    assert not [event for event in events if "pwned" in event or not event.startswith(("compile", "exec"))]
    assert not list(tmp_path.rglob("pwned*"))


def test_the_canary_sings(tmp_path: Path) -> None:
    """Otherwise none of these tests could fail."""
    payload = pickle.dumps(Payload())
    attacks: dict[str, Callable[[], object]] = {
        "os.system": lambda: os.system("true"),
        "subprocess.Popen": lambda: subprocess.run(["true"], check=True),
        "pickle.find_class": lambda: pickle.loads(payload),
        "compile": lambda: eval("1 + 1"),
        "exec": lambda: exec("pwned = 1"),
    }
    for name, attack in attacks.items():
        with CANARY.listening() as events:
            attack()
        assert any(event.startswith(name) for event in events), name
    CANARY.events.clear()


class Payload:
    """What a pickle that is loaded would do."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("true",)


# ---- large files ---------------------------------------------------------------------------------------------------


def _cut(line: Callable[[int], str]) -> Callable[[int], bytes]:
    """So many lines."""

    def content(size: int) -> bytes:
        count = size // len(line(size // 10))
        return "".join(line(n) for n in range(count)).encode()[:size]

    return content


def _full(part: bytes, before: bytes = b"", after: bytes = b"") -> Callable[[int], bytes]:
    return lambda size: before + part * ((size - len(before) - len(after)) // len(part)) + after


def laughs(size: int) -> bytes:
    """Three to the power of the number of lines, written out."""
    lines = [b"a0: &a0 [ha, ha, ha]", *(b"a%d: &a%d [*a%d, *a%d, *a%d]" % (n, n, *[n - 1] * 3) for n in range(1, 99))]
    return b"\n".join(lines)


def most(size: int) -> int:
    """Keys of a file that is small or has as many things in it as it may."""
    return min(size // 16, NODE_LIMIT // 2 - 10)


UNITS, DECIDES = b"autoprune: 1\nunits:\n", b"autoprune: 1\nunits: {}\n"
UNIT = b"autoprune: 1\nunits: {a: {kind: weights, method: m, keep: 1, of: "
YAML: dict[str, Callable[[int], bytes]] = {
    "billion laughs": laughs,
    "anchors": _cut(lambda n: f"- &a{n} x\n"),
    "merge keys": _full(b"- {<<: {a: 1}}\n"),
    "a scalar": _full(b"x"),
    "a quoted scalar": _full(b"x", b'"', b'"'),
    "escapes": _full(b"\\x41", b'"', b'"'),
    "digits": _full(b"1"),
    "a quoted line": _full(b"\n", b'"', b'"'),
    "words on lines": _full(b"a\n"),
    "a literal": _full(b" a\n", b"|\n"),
    "brackets": _full(b"["),
    "braces": _full(b"{"),
    "nested lists": _full(b"- "),
    "nested keys": _full(b"? "),
    "a long list": _full(b"- \n"),
    "a flow list": _full(b"1,", b"[", b"]"),
    "a flow list of lists": _full(b"[],", b"[", b"]"),
    "keys": _cut(lambda n: f"k{n}: 1\n"),
    "unknown keys": _cut(lambda n: f"weight{n}: 1\n"),
    "a long key": _full(b"k", b"autoprune: 1\n", b": 1\n"),
    "units": lambda size: b"autoprune: 1\nunits:\n" + _cut(lambda n: f"  u{n}: {{kep: 1}}\n")(size - 30),
    "as many unknown keys as there may be": lambda size: DECIDES + b"".join(b"w%d: 1\n" % n for n in range(most(size))),
    "as many units as there may be": lambda size: UNITS + b"".join(b"  w%d: {}\n" % n for n in range(most(size))),
    "comments": _full(b"#\n"),
    "a comment": _full(b"#"),
    "spaces": _full(b" "),
    "empty lines": _full(b"\n"),
    "directives": _full(b"%A\n"),
    "documents": _full(b"---\n"),
    "a long anchor": _full(b"a", b"&", b" x"),
    "a long tag": _full(b"a", b"!<", b"> x"),
    "tags": _full(b"- !!python/name:os.system x\n"),
    "a pattern of digits": _full(b"1", UNIT + b"2, pattern: '", b"'}}"),
    "a huge count": lambda size: UNIT + b"9" * 4000 + b"}}",
}  # fmt: skip
JSON: dict[str, Callable[[int], bytes]] = {
    "brackets": _full(b"["),
    "objects": _full(b'{"a":'),
    "keys": lambda size: b"{" + b",".join(b'"%d":0' % n for n in range(size // 11)) + b"}",
    "shares": lambda size: b"{" + b",".join(b'"%d":0.5' % n for n in range(size // 13)) + b"}",
    "a list": _full(b"0,", b"[", b"0]"),
    "a list of lists": _full(b"[],", b"[", b"[]]"),
    "a history": _full(b'["a",true,[1]],', b"[", b"[]]"),
    "entries": _full(b'{"op_names":["a"],"sparse_ratio":0.5},', b"[", b"{}]"),
    "layers": _full(b'"a",', b'[{"sparse_ratio":0.5,"op_names":[', b'"a"]}]'),
    "a text": _full(b"x", b'"', b'"'),
    "digits": _full(b"9", b'{"a":', b"}"),
    "decimals": _full(b"9", b'{"a":0.', b"}"),
    "an exponent": _full(b"9", b'{"a":1e', b"}"),
    "one key": _full(b'"a":1,', b"{", b'"a":1}'),
    "spaces": _full(b" ", b"[", b"]"),
}
LINES: dict[str, Callable[[int], bytes]] = {
    "empty lines": _full(b"\n"),
    "a word a line": _full(b"a\n"),
    "words": _full(b"a "),
    "two words a line": _full(b"0 a\n"),
    "base": _full(b"a\n0.5 0.5\n", b"base\n1\nprunable\n0.5\n"),
    "one line": _full(b"x"),
}
CSV: dict[str, Callable[[int], bytes]] = {
    "rows": _cut(lambda n: f"u{n},1,1\n"),
    "times": lambda size: b"unit,keep,ms\nbase,,1\n" + _cut(lambda n: f"u{n},1,1\n")(size - 30),
    "ratios": lambda size: b"layer,ratio\n" + _cut(lambda n: f"u{n},0.5\n")(size - 30),
    "wrong rows": _full(b",,\n,a\n", b"layer,ratio\n"),
    "wrong times": _full(b"a,,\n", b"unit,keep,ms\n"),
    "commas": _full(b","),
    "a quote": _full(b'"'),
    "an open quote": _full(b"\n", b'"'),
    "carriage returns": _full(b"\r"),
}


def _ending(tool: str, ending: str) -> Read:
    def read(path: Path) -> object:
        return read_import(path.rename(path.with_suffix(ending)), Import(tool))

    return read


def _times(path: Path) -> object:
    return read_times(path.read_bytes(), name="times.csv")


def attacks() -> dict[str, tuple[Callable[[int], bytes], tuple[Read, ...]]]:
    """By name: what makes the file, and who reads it; all YAML is read by one parser."""
    found: dict[str, tuple[Callable[[int], bytes], tuple[Read, ...]]] = {}
    for name, content in YAML.items():
        found[f"YAML: {name}"] = content, (read_policy,)
        if "key" in name:
            found[f"YAML: {name}"] = content, (read_policy, lambda p: load_config(p, {}), _ending("plain", ".yaml"))
    for name, content in JSON.items():
        found[f"JSON: {name}"] = content, tuple(_ending(tool, ".json") for tool in IMPORTERS)
    for name, content in LINES.items():
        found[f"lines: {name}"] = content, (_ending("spdy", ".txt"), _times)
    for name, content in CSV.items():
        found[f"CSV: {name}"] = content, (_times, _ending("plain", ".csv"))
    return found


ATTACKS = attacks()


def attacked(name: str, size: int, folder: Path) -> float:
    """Processor seconds of the slowest reader of an attack."""
    content, readers = ATTACKS[name]
    slowest = 0.0
    written = content(size)
    for read in readers:
        path = folder / "attack"
        path.write_bytes(written)
        start = time.process_time()
        with contextlib.suppress(PolicyError, ConfigError):
            read(path)
        slowest = max(slowest, time.process_time() - start)
    return slowest


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_ends_soon(tmp_path: Path, name: str) -> None:
    assert attacked(name, SMALL, tmp_path) < SMALL_S


def _measured(name: str, folder: str) -> tuple[float, int]:
    """In a process of its own: seconds, and by how many bytes it grew."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = attacked(name, LARGE, Path(folder))
    return seconds, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


@pytest.mark.slow
def test_the_largest_attacks_end_soon_in_little_memory(tmp_path: Path) -> None:
    told = []
    context = multiprocessing.get_context("spawn")
    CANARY.stop()  # processes are started here
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        results = pool.map(_measured, ATTACKS, [str(tmp_path)] * len(ATTACKS))
        for name, (seconds, grown) in zip(ATTACKS, results, strict=True):
            print(f"{name}: {seconds:.1f} s, +{grown / 1e6:.0f} MB", flush=True)
            if seconds > LARGE_S or grown > MEMORY_BYTES:
                told.append(f"{name}: {seconds:.1f} s, {grown / 1e6:.0f} MB")
    assert not told


# ---- texts that take long to match, and families without end ---------------------------------------------------------

LONG = "1" * 300_000
BUDGETS = [",".join(["1ms"] * 1000), ",".join(["1MB"] * 1000), ",".join(["1MMACs"] * 1000), "1params", "1MBmemory"]
KEYS = {
    "a budget of digits": ("budget", LONG),
    "a budget of letters": ("budget", "1" + "a" * 300_000 + "!"),
    "a family of budgets": ("budget", BUDGETS),
    "a drop of digits": ("max_drop", LONG + "!"),
    "a loss of digits": ("max_loss", LONG + "!"),
    "a shape of spaces": ("target.example", "1" + " " * 300_000 + "1"),
    "a model of dots": ("model", "a." * 150_000),
    "a model of names": ("model", "x.py:a" * 50_000 + "!"),
    "a metric": ("metric", "top" * 100_000),
    "a storage": ("search.storage", "a" * 300_000),
    "memory of digits": ("search.bank_memory", LONG),
    "endless memory": ("search.bank_memory", "1e999GB"),
    "more memory than a float holds": ("search.bank_memory", "1e308GB"),
    "an endless budget": ("budget", "1e999ms"),
    "a speed-up by nothing": ("budget", "1e-320x"),
    "seconds": ("search.seconds", 10**3999),
    "a rate": ("recover.learning_rate", 10**3999),
    "cpus": ("ray.cpus", 10**3999),
    "trials": ("search.trials", 10**3999),
}


@pytest.mark.parametrize("attack", KEYS)
@pytest.mark.parametrize("metric", ["top1", "mse"])
def test_values_of_a_configuration(tmp_path: Path, attack: str, metric: str) -> None:
    key, value = KEYS[attack]
    content: dict[str, Any] = {"model": "m.py:m", "data": "m.py:d", "budget": "1ms", "metric": metric}
    section, _, name = key.rpartition(".")
    (content.setdefault(section, {}) if section else content)[name] = value
    path = tmp_path / "autoprune.yaml"
    path.write_text(json.dumps(content))
    start = time.process_time()
    if attack == "trials":
        load_config(path, {})  # any number of them
    else:
        with pytest.raises(ConfigError) as error:
            load_config(path, {})
        assert len(str(error.value)) < 5000
    assert time.process_time() - start < SMALL_S


def test_a_family_of_budgets_has_an_end(tmp_path: Path) -> None:
    path = tmp_path / "autoprune.yaml"
    path.write_text(json.dumps({"model": "m.py:m", "data": "m.py:d", "budget": BUDGETS}))
    with pytest.raises(ConfigError, match=f"more than {MOST_BUDGETS} budgets"):
        load_config(path, {})


SPACES = {
    "patterns of digits": f"weights: [{{method: magnitude, patterns: ['{LONG}']}}]",
    "a pattern of spaces": f"weights: [{{method: magnitude, patterns: ['1{' ' * 300_000}1']}}]",
    "a share of digits": f"min_keep: '{LONG}'",
    "a huge share": f"min_keep: {'9' * 4000}",
    "a huge width": f"widths: [{'9' * 4000}]",
    "a width of digits": f"widths: ['{LONG}']",
    "huge levels": f"levels: {'9' * 4000}",
    "a mapping": "channels: {levels: {a: 1}}",
    "an unknown key": f"{'k' * 900}: 1",
}


@pytest.mark.parametrize("attack", SPACES)
def test_values_of_a_space(tmp_path: Path, attack: str) -> None:
    (tmp_path / "space.yaml").write_text(f"methods: [{{method: l2}}]\n{SPACES[attack]}\n")
    start = time.process_time()
    if attack != "a huge width":  # no unit is as wide
        with pytest.raises(ConfigError) as error:
            load_space("space.yaml", tmp_path)
        assert len(str(error.value)) < 5000
    else:
        load_space("space.yaml", tmp_path)
    assert time.process_time() - start < SMALL_S


def test_many_problems_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text("autoprune: 1\nunits: {}\n" + "".join(f"weight{n}: 1\n" for n in range(500)))
    with pytest.raises(PolicyError, match="and 400 more unknown keys"):
        read_policy(path)
    path.write_text("autoprune: 1\nunits:\n" + "".join(f"  u{n}: {{}}\n" for n in range(500)))
    with pytest.raises(PolicyError, match="and 1900 more problems"):
        read_policy(path)
    (tmp_path / "profile.txt").write_text("a\n" * 500)
    with pytest.raises(PolicyError, match="and 480 more"):
        read_import(tmp_path / "profile.txt", Import("spdy"))


# ---- what YAML and JSON can say that no policy needs -----------------------------------------------------------------

ODD = {
    "octal": ("of", "017", True), "new octal": ("of", "0o17", False), "hexadecimal": ("of", "0x10", False),
    "sexagesimal": ("of", "1:30", False), "a timestamp": ("of", "2001-12-14t21:59:43.10-05:00", False),
    "underscores": ("of", "1_000", False), "not a number": ("of", ".nan", False), "infinity": ("of", ".inf", False),
    "1e400": ("of", "1e400", False), "-0": ("keep", "-0", False), "a huge integer": ("of", "9" * 5000, False),
    "a boolean": ("of", "true", False), "yes": ("of", "yes", False), "Arabic digits": ("of", "١٦", False),
    "a surrogate": ("method", '"\\ud800"', False), "a null": ("method", "~", False),
    "a tag": ("method", "!!binary R0lG", False),
    "a merge": ("method", "x, <<: {bits: 8}", False), "a float": ("of", "16.0", False),
}  # fmt: skip


@pytest.mark.parametrize("odd", ODD)
def test_odd_scalars(tmp_path: Path, odd: str) -> None:
    key, value, allowed = ODD[odd]
    decision = {"kind": "channels", "method": "l2", "keep": "4", "of": "16", key: value}
    path = tmp_path / "policy.yaml"
    path.write_text("autoprune: 1\nunits: {a: {" + ", ".join(f"{k}: {v}" for k, v in decision.items()) + "}}\n")
    if allowed:
        assert read_policy(path).units["a"].of == 17  # YAML 1.2: no octal
        return
    with pytest.raises(PolicyError, match=r"policy\.yaml"):
        read_policy(path)


@pytest.mark.parametrize("key", ["x-note", "evidence"])
def test_half_a_character_is_refused_wherever_it_is(tmp_path: Path, key: str) -> None:
    """It could be neither shown nor written again."""
    path = tmp_path / "policy.yaml"
    path.write_text(f'autoprune: 1\nunits: {{}}\n{key}: {{"\\ud800": 1}}\n')
    with pytest.raises(PolicyError, match=r"line 3, column .*half a character"):
        read_policy(path)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400", "-1e400", "9" * 5000])
@pytest.mark.parametrize("tool", IMPORTERS)
def test_numbers_that_are_none_in_json(tmp_path: Path, tool: str, number: str) -> None:
    for form in ('{"a": N}', '[["a", true, [N]]]', '[{"op_names": ["a"], "sparse_ratio": N}]'):
        path = tmp_path / "given.json"
        path.write_text(form.replace("N", number))
        with contextlib.suppress(PolicyError):
            found = read_import(path, Import(tool))
            assert not found.wanted, found


@pytest.mark.parametrize("tool", IMPORTERS)
def test_tags_of_python_are_refused_by_every_importer(tmp_path: Path, tool: str) -> None:
    forms = ("{}", "a: {}", "pruners: {}", "pruners: {{a: {{class: {}}}}}", "- op_names: {}", "? {}\n: 1", "units: {}")
    for number, (form, tag) in enumerate((form, tag) for form in forms for tag in TAGGED if tag.startswith("!!py")):
        path = tmp_path / f"{number}.yaml"
        path.write_text(form.format(tag))
        with pytest.raises(PolicyError):
            read_import(path, Import(tool))


@pytest.mark.parametrize("tag", TAGGED)
def test_tags_are_refused_everywhere_else(tmp_path: Path, tag: str) -> None:
    project = {"autoprune.yaml": CONFIG, "space.yaml": SPACE, "run.json": "folder: .\nconfig: {}\n"}
    for name, content in project.items():
        (tmp_path / name).write_text(f"{content}extra: {tag}\n")
    (tmp_path / "policy.yaml").write_text(f"autoprune: 1\nunits: {{}}\nevidence: {tag}\n")
    readers: tuple[Callable[[], object], ...] = (
        lambda: load_config(tmp_path / "autoprune.yaml", {}), lambda: load_space("space.yaml", tmp_path),
        lambda: load_run(tmp_path, {}), lambda: read_policy(tmp_path / "policy.yaml"),
    )  # fmt: skip
    for read in readers:
        with pytest.raises((ConfigError, PolicyError, RunError)):
            read()


# ---- pickles -------------------------------------------------------------------------------------------------------


def _saved(*, archive: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": Payload()}, buffer, _use_new_zipfile_serialization=archive)
    return buffer.getvalue()


PICKLES = {
    **{f"protocol {number}": pickle.dumps(Payload(), protocol=number) for number in range(6)},
    "by hand": b"cos\nsystem\n(S'touch pwned'\ntR.",
    "model.pt": _saved(archive=True),
    "model.pth of old": _saved(archive=False),
}


@pytest.mark.parametrize("name", PICKLES)
def test_no_reader_loads_a_pickle(tmp_path: Path, name: str) -> None:
    for tool in IMPORTERS:
        for ending in (".pt", ".json", ".yaml", ".csv", ".pkl"):
            path = tmp_path / f"given{ending}"
            path.write_bytes(PICKLES[name])
            with pytest.raises(PolicyError):
                read_import(path, Import(tool))
    with pytest.raises(PolicyError):
        read_policy(path)
    with pytest.raises(PolicyError):
        read_times(PICKLES[name], name="times.csv")
    (tmp_path / "policy.safetensors").write_bytes(PICKLES[name])
    with pytest.raises(PolicyError, match="is damaged"):
        read_side_file(tmp_path / "policy.yaml", POLICY)
    with pytest.raises(PolicyError, match="not a packed model"):
        commanded("unpack", path)


# ---- the side file -------------------------------------------------------------------------------------------------


def tensors(header: object, data: bytes = bytes(64), *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def row(shape: object = (4,), offsets: object = (0, 16), dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


SIDES = {
    "nothing": b"",
    "a length alone": bytes(8),
    "a header beyond the file": tensors({}, length=1 << 20),
    "a header of 2^63 bytes": tensors({}, length=1 << 63),
    "a header of 2^64 - 1 bytes": tensors({}, length=(1 << 64) - 1),
    "no JSON": tensors(b"{"),
    "brackets": tensors(b"[" * 1_000_000),
    "nested metadata": tensors(b'{"__metadata__":' * 100_000),
    "no UTF-8": tensors(b'{"\xff": 1}'),
    "a list": tensors([1]),
    "overlapping offsets": tensors({"a": row(), "b": row(offsets=(8, 24))}, bytes(24)),
    "a hole": tensors({"a": row(), "b": row(offsets=(32, 48))}, bytes(48)),
    "reversed offsets": tensors({"a": row(offsets=(16, 0))}, bytes(16)),
    "negative offsets": tensors({"a": row(offsets=(-16, 0))}, bytes(16)),
    "offsets beyond the file": tensors({"a": row(offsets=(0, 1 << 62))}, bytes(16)),
    "a shape of 2^60": tensors({"a": row((1 << 60,))}, bytes(16)),
    "a shape that wraps": tensors({"a": row((1 << 62, 4))}, bytes(16)),
    "a shape that wraps to zero": tensors({"a": row((1 << 32, 1 << 32), (0, 0))}, b""),
    "a negative shape": tensors({"a": row((-4,))}, bytes(16)),
    "an unknown dtype": tensors({"a": row(dtype="Q9")}, bytes(16)),
    "a dtype that is no text": tensors({"a": row(dtype=[1])}, bytes(16)),
    "metadata that is no text": tensors({"__metadata__": {"a": 1}}, b""),
    "more data than said": tensors({"a": row()}, bytes(17)),
}


@pytest.mark.parametrize("name", SIDES)
def test_side_files_that_lie(tmp_path: Path, name: str) -> None:
    (tmp_path / "policy.safetensors").write_bytes(SIDES[name])
    with pytest.raises(PolicyError, match=r"policy\.safetensors: is damaged"):
        read_side_file(tmp_path / "policy.yaml", POLICY)


SHAPES = ((), (0,), (2, 2), (3,), (1,) * 70, (1 << 60, 0), (0, 1 << 40, 1 << 40), (1 << 63, 0), (1 << 64, 0))
DTYPES = (
    "BOOL", "F4", "F6_E2M3", "F6_E3M2", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "I16", "U16", "F16", "BF16", "C64",
)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_side_files_of_any_type_are_read_or_refused(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    bits = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "C64": 64}.get(dtype, 16 if dtype.endswith("16") else 8)
    count = 1
    for size in shape:
        count *= size
    content = tensors({"a": row(shape, (0, count * bits // 8), dtype)}, bytes(count * bits // 8))
    (tmp_path / "policy.safetensors").write_bytes(content)
    with contextlib.suppress(PolicyError):
        found = read_side_file(tmp_path / "policy.yaml", POLICY)
        assert found["a"].shape in (shape, (*shape[:-1], *([shape[-1] // 2] if shape else [])))


# ---- what is no file -----------------------------------------------------------------------------------------------


def _link(path: Path, to: str) -> None:
    path.symlink_to(to)


PLACES: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a loop": lambda path: _link(path, path.name),
    "a link to nowhere": lambda path: _link(path, "nowhere"),
    "an endless device": lambda path: _link(path, "/dev/zero"),
    "an empty device": lambda path: _link(path, "/dev/null"),
    "a link to a pipe": lambda path: (os.mkfifo(path.with_name("pipe")), _link(path, "pipe")),
    "unreadable": lambda path: (path.write_bytes(b"a"), path.chmod(0)),
    "empty": lambda path: path.write_bytes(b""),
}


def _readers(folder: Path) -> dict[str, tuple[str, Callable[[], object]]]:
    """By name: the file that each reads, and how."""
    found: dict[str, tuple[str, Callable[[], object]]] = {
        "policy": ("policy.yaml", lambda: read_policy(folder / "policy.yaml")),
        "yaml": ("any.yaml", lambda: read_yaml(folder / "any.yaml")),
        "config": ("autoprune.yaml", lambda: load_config(folder / "autoprune.yaml", {})),
        "space": ("space.yaml", lambda: load_space("space.yaml", folder)),
        "run": ("run.json", lambda: load_run(folder, {})),
        "side file": ("policy.safetensors", lambda: read_side_file(folder / "policy.yaml", POLICY)),
        "packed": ("model.packed", lambda: commanded("unpack", folder / "model.packed")),
    }
    for tool in IMPORTERS:
        found[tool] = "given.json", lambda tool=tool: read_import(folder / "given.json", Import(tool))  # type: ignore[misc]
    return found


READERS = tuple(_readers(Path()))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_ordinary_file(tmp_path: Path, reader: str, place: str) -> None:
    name, read = _readers(tmp_path)[reader]
    PLACES[place](tmp_path / name)
    if place == "unreadable" and os.access(tmp_path / name, os.R_OK):
        pytest.skip("this user may read everything")
    if place == "empty" and reader in ("yaml", "spdy"):
        read()  # there is nothing in it, and that is all
        return
    start = time.monotonic()
    with pytest.raises(AutopruneError):
        read()
    assert time.monotonic() - start < SMALL_S


def test_a_pipe_is_told_as_one(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "policy.yaml")
    with pytest.raises(PolicyError, match="is a pipe or a device; give an ordinary file"):
        read_policy(tmp_path / "policy.yaml")


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "x" * 300 + ".yaml"])
def test_names_that_no_file_can_have(tmp_path: Path, name: str) -> None:
    readers: tuple[Callable[[], object], ...] = (
        lambda: read_policy(tmp_path / name), lambda: load_config(tmp_path / name, {}),
        lambda: load_space(name, tmp_path), lambda: read_import(tmp_path / name, Import("spdy")),
        lambda: read_side_file(tmp_path / "policy.yaml", POLICY.model_copy(update={"weights": name})),
        lambda: load_run(tmp_path / name, {}),
    )  # fmt: skip
    for read in readers:
        with pytest.raises(AutopruneError):
            read()


@pytest.mark.parametrize(
    "content",
    [
        "folder: 1\nconfig: 5\n", "folder: 1\nconfig: [a]\n", "folder: 1\nconfig: text\n", "folder: 1\nconfig: ~\n",
        "folder: 1\n", "config: {}\n", "[]", "", "{folder: 1, config: {model: 5}}", "{folder: 1, config: {search: 5}}",
    ],
)  # fmt: skip
def test_damaged_runs(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises((RunError, ConfigError)):
        load_run(tmp_path, {"search.trials": 5})


@pytest.mark.parametrize("folder", ["x" * 5000, "a\\0b", "[1]"])
def test_a_run_whose_folder_is_gone_is_read(tmp_path: Path, folder: str) -> None:
    (tmp_path / "run.json").write_text(f'{{folder: "{folder}", config: {{model: m.py:m, data: m.py:d}}}}')
    assert load_run(tmp_path, {})[1] == Path.cwd()


# ---- tables measured before ----------------------------------------------------------------------------------------


TABLES = (
    b"", b"{", b"[" * 1_000_000, b'{"key":"k","shares":[NaN]}', b'{"key":"k","shares":[Infinity]}',
    b'{"key":"k","shares":[1e400]}', b'{"key":"k","shares":[' + b"9" * 5000 + b"]}", b'\xff{"key":"k","shares":[1]}',
    b'{"key":"other","shares":[1]}', b'{"key":"k","shares":["a"]}', b'{"key":"k","shares":[1],"more":1}',
    b'{"key":"\\ud800","shares":[1]}', None,
)  # fmt: skip


@pytest.mark.parametrize("content", TABLES)
def test_a_damaged_table_is_measured_anew(tmp_path: Path, content: bytes | None) -> None:
    class Here:
        def where(self) -> str:
            return "here"

    run: Any = Run(tmp_path, Here())  # type: ignore[arg-type]
    kept = Kept("shares", "k", SharesTable)
    place = kept._paths(tmp_path / "tables", "here")[0]
    place.parent.mkdir()
    good = SharesTable(key="k", shares=(0.5,))
    if content is None:
        os.mkfifo(place)
    else:
        place.write_bytes(content)
    notes: list[str] = []
    assert kept.found_or_made(run, lambda: good, note=notes.append) == (good, False)
    assert kept.found_or_made(run, lambda: good, note=notes.append) == (good, True)
    assert len(notes) == (0 if content and b"other" in content else 1)


@pytest.mark.parametrize("number", ["0", "-1", "9" * 4000, "1.5", "NaN", "1e999"])
@pytest.mark.parametrize("table", [LATENCY, MEMORY])
def test_a_table_of_impossible_blocks_is_damaged(table: LatencyTable | MemoryTable, number: str) -> None:
    whole = table.model_dump_json()
    assert type(table).model_validate_json(whole) == table
    for key in ("channel_block", "fitted_models", "version"):
        if key == "channel_block" or number != "0":
            with pytest.raises(ValueError, match=key):
                type(table).model_validate_json(re.sub(rf'(?<="{key}":)\d+', number, whole))


# ---- any damage ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Fuzzer:
    return Fuzzer(0, tmp_path_factory.mktemp("fuzz"))


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_an_error_of_ours_or_none(fuzzer: Fuzzer, data: st.DataObject) -> None:
    reader = fuzzer.readers[data.draw(st.sampled_from([n for n in fuzzer.readers if not n.startswith("autoprune")]))]
    start = data.draw(st.sampled_from(reader.seeds))
    cut, noise = data.draw(st.integers(0, len(start.content))), data.draw(st.binary(max_size=8))
    generator = random.Random(data.draw(st.integers(0, 2**32 - 1)))
    content = start.content[:cut] + noise + start.content[cut + data.draw(st.integers(0, 8)) :]
    path = fuzzer.place(reader.name) / start.file
    path.write_bytes(damaged(generator, content, fuzzer.others))
    with contextlib.suppress(*reader.errors):
        reader.read(path)


def test_some_damaged_files_of_each_reader(fuzzer: Fuzzer) -> None:
    tally = Tally()
    for number in range(500):
        fuzzer.one(number, tally)
    assert not tally.faults, "\n".join(tally.faults)
    assert {name for name, _ in tally.counts} == set(fuzzer.readers)


@pytest.mark.slow
def test_a_hundred_thousand_damaged_files() -> None:
    CANARY.stop()
    tally = fuzz(100_000, seed=1, workers=2)
    print(table(tally))
    assert not tally.faults, "\n".join(tally.faults)
    assert tally.grown_bytes < MEMORY_BYTES
    assert tally.counts.total() == 100_000
    assert {name for name, _ in tally.counts} == set(readers())
