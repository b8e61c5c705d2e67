"""Damaged files for every reader of files that others may have written, and what becomes of them.

    python tests/fuzz_files.py --files 100000 --workers 2 --seed 0

What a file holds follows from the seed and its number alone: `--only NUMBER` reads one again, with its traceback.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import hashlib
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from click.testing import CliRunner
from safetensors.torch import save
from typer.main import get_command

from autoprune import cli
from autoprune.config import demo_config, load_config, load_run, save_run
from autoprune.core.cost import LatencyTable, SharesTable, SignatureCost, TableCheck, TimedModel
from autoprune.core.memory_table import MemoryTable
from autoprune.core.policy import Policy
from autoprune.engines.base import Engine
from autoprune.errors import AutopruneError, ConfigError, ModelError, PolicyError, RunError
from autoprune.files import open_file, read_policy, read_yaml
from autoprune.importers import IMPORTERS
from autoprune.importers.tables import read_times
from autoprune.importing import Import, read_import
from autoprune.packing.archive import MAGIC, inspected, pack
from autoprune.packing.coding import Codes, deflate, unframe
from autoprune.run import Kept, Run
from autoprune.side_file import content_of, read_side_file
from autoprune.spaces import load_space

GOLDEN = Path(__file__).parent / "golden"
CPU_S = 2.0
"""Of one file, at most; a machine that is busy with other work takes nothing of it."""
WALL_S = 20.0
"""A reader that waits for something takes no processor time."""
ROOM_BYTES = 2 << 30
"""What a worker may map beside what it needs to stand there."""
LONGEST = 60_000
CHUNK = 200

# ---- what may not happen -------------------------------------------------------------------------------------------

_FORBIDDEN = (
    "os.system", "os.exec", "os.spawn", "os.posix_spawn", "os.fork", "os.forkpty", "subprocess.Popen",
    "pickle.find_class", "ctypes.dlopen", "socket.connect", "socket.getaddrinfo",
)  # fmt: skip


class Canary:
    """Records, while it listens, all that starts a program, unpickles, or runs a text as Python."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self._listens = False
        sys.addaudithook(self._hook)

    @contextmanager
    def listening(self) -> Iterator[list[str]]:
        before, self._listens = self._listens, True
        self.events.clear()
        try:
            yield self.events
        finally:
            self._listens = before

    def stop(self) -> None:
        """Listen no more; for tests that start processes of their own."""
        self._listens = False

    def _hook(self, event: str, arguments: tuple[object, ...]) -> None:
        if not self._listens:
            return
        if event in _FORBIDDEN:
            self.events.append(f"{event} {arguments!r:.100}")
        elif event == "compile" and str(arguments[1]).startswith("<"):
            self.events.append(f"compile {arguments[0]!r:.100}")
        elif event == "exec" and str(getattr(arguments[0], "co_filename", "<")).startswith(("<string", "<stdin")):
            self.events.append(f"exec {arguments[0]!r:.100}")


CANARY = Canary()


class TooLong(BaseException):
    """A reader took more time than a file may; no reader catches this."""


# ---- readers -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seed:
    """A valid file, and what it is called."""

    file: str
    content: bytes


@dataclass(frozen=True)
class Reader:
    """`read` takes a path and raises `errors` alone; `weight`: how many files of all are for it."""

    name: str
    read: Callable[[Path], object]
    seeds: tuple[Seed, ...]
    errors: tuple[type[AutopruneError], ...] = (PolicyError,)
    weight: int = 6
    resealed: Callable[[bytes, Callable[[bytes], bytes]], bytes] | None = None
    """Damages what lies behind a checksum or a length, and makes these right again."""


def _files(*patterns: str) -> tuple[Seed, ...]:
    paths = [path for pattern in patterns for path in sorted(GOLDEN.glob(pattern))]
    return tuple(Seed(path.name, path.read_bytes()) for path in paths)


CONFIG = """model: model.py:model
weights: weights.pt
data: model.py:data
metric: top1
target: {runtime: torch, threads: 2, batch: 4, example: [1, 3, 32, 32], precision: float32}
budget: ["5ms,7ms", 50%params]
max_drop: 1%
space: {preset: cnn-channels, protect: ['head*']}
search: {trials: 50, seconds: 1.5, seed: 3, bank_memory: 2GB, storage: 'sqlite:///study.db'}
recover: {steps: 10, learning_rate: 1e-3, trials: true}
ray: {cpus: 1, gpus: 0.25, callbacks: ['a.py:b']}
"""
SPACE = """about: everything that a space may say
methods: [{method: l2}, {method: taylor, compensate: least_squares}]
channels: {widths: [24, 75%], align: 8}
heads: {levels: 8, min_keep: 25%}
ffn: false
weights:
  - {method: magnitude, patterns: [50%, "2:4", 4x1 50%], bits: [32, 8]}
  - {method: low_rank, ranks: [25%, 0.5]}
  - {bits: [8], inputs: [32, 8]}
kernels: [5, 3]
resolutions: [87.5%, 75%]
dense_layers: ['head*']
protect: ['stem.*']
"""
CHECK = TableCheck(models=3, median_error=0.02, worst_error=0.1)
KEY = "ab" * 16
LATENCY = LatencyTable(
    key=KEY, dense_s=0.01, base=0.1, channel_block=8, fitted_models=3, check=CHECK, seam=0.001, where="here",
    signatures=(SignatureCost(signature="conv 3x3", coefficients={"in*out": 1e-5, "1": 2e-3}),),
    timed=(TimedModel(keeps=(8, 16), forms=("float", "2:4"), share=0.5),),
)  # fmt: skip
MEMORY = MemoryTable(
    key=KEY, dense_bytes=1e6, runtime_bytes=2e7, base_bytes=1e4, per_weight_byte=1.0, per_live_byte=1.1,
    loading_base_bytes=1e3, loading_per_weight_byte=2.0, channel_block=8, fitted_models=3, check=CHECK,
)  # fmt: skip
SHARES = SharesTable(key=KEY, shares=(0.5, 0.25, 1.0))
POLICY = Policy(units={}, weights="policy.safetensors")


def archive() -> bytes:
    codes = torch.tensor([[1, 0, -3], [0, 5, 127]], dtype=torch.int8)
    plain = {"conv.weight": torch.linspace(-1, 1, 24).reshape(2, 3, 2, 2), "mask": torch.tensor([True, False])}
    return pack(plain, {"fc.weight": Codes(codes, torch.tensor([0.1, 0.2]), (2, 3))}, about={"policy": "é"})


def _tensors() -> tuple[Seed, ...]:
    kept = content_of({"kept/stem.0": torch.arange(12), "tensor/stem.0.weight": torch.ones(2, 3, 1, 1)})
    types = save({str(t): torch.zeros(2, dtype=t) for t in (torch.bool, torch.int8, torch.bfloat16, torch.float64)})
    return Seed("policy.safetensors", kept), Seed("policy.safetensors", types)


def resealed_archive(content: bytes, damage: Callable[[bytes], bytes]) -> bytes:
    """A packed model whose header or payload is damaged and whose checksum is right."""
    start = len(MAGIC) + 1 + 8
    end = start + int.from_bytes(content[start - 8 : start], "little")
    header, payload = unframe(content[start:end], 1 << 20), content[end:-32]
    changed = damage(header)
    if changed == header or changed[:3] == b"\xef\xbb\xbf":
        payload = damage(payload)
    stored = deflate(changed)
    body = MAGIC + b"\x01" + len(stored).to_bytes(8, "little") + stored + payload
    return body + hashlib.sha256(body).digest()


def resealed_tensors(content: bytes, damage: Callable[[bytes], bytes]) -> bytes:
    """A safetensors file whose header is damaged and whose length of it is right."""
    size = int.from_bytes(content[:8], "little")
    header = damage(content[8 : 8 + size])
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


class _Here:
    """An engine that stands on this machine and measures nothing."""

    def where(self) -> str | None:
        return "here"


def _numbers(value: object) -> Iterator[float]:
    """All that is a number in plain values."""
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _numbers(inner)


def _kept(kind: str, table: Any) -> Callable[[Path], object]:
    def read(path: Path) -> object:
        run = Run(path.parent.parent, cast(Engine, _Here()))
        kept = Kept(kind, KEY, type(table))
        notes: list[str] = []
        place = kept._paths(path.parent, "here")[0]
        os.replace(path, place)
        found, reused = kept.found_or_made(run, lambda: table, note=notes.append)
        assert type(found) is type(table)
        assert found.key == KEY
        assert all(map(math.isfinite, _numbers(found.model_dump())))
        assert reused or found == table
        return None if reused else "measured anew"

    return read


def _unpack(path: Path) -> object:
    with open_file(path) as file:
        return inspected(file.read(), name=str(path))


def _times(path: Path) -> object:
    with open_file(path) as file:
        return read_times(file.read(), name=str(path))


def _space(path: Path) -> object:
    return load_space(path.name, path.parent)


_RUNNER = CliRunner()
_CLI = get_command(cli.app)
"""Made once: typer evaluates its own annotations for that."""


def commanded(name: str, path: Path) -> object:
    """The command line's own door: any exception but its exit is a fault."""
    golden = str(GOLDEN / "policy-1.yaml")
    words = {
        "show": [str(path)], "diff": [golden, str(path)], "merge": [golden, str(path), "-o", f"{path}.merged"],
        "unpack": [str(path), "-o", f"{path}.unpacked"],
    }  # fmt: skip
    result = _RUNNER.invoke(_CLI, [name, *words[name], *(["--json"] if name == "show" else [])])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert "Traceback" not in result.output
    if result.exit_code:
        assert result.exit_code == 2, result.output
        raise PolicyError(result.output)
    return None


def _run_file(folder: Path) -> bytes:
    config = demo_config({"budget": ("50%",), "search.storage": "postgresql://me:secret@host/db"})
    save_run(config, folder, folder)
    return (folder / "run.json").read_bytes()


def readers() -> dict[str, Reader]:
    """All of them by name."""
    policies = _files("policy-*.yaml")
    imports = _files("imports/*", "exports/*")
    with tempfile.TemporaryDirectory() as folder:
        run = Seed("run.json", _run_file(Path(folder)))
    spaces = (Seed("own.yaml", SPACE.encode()), *_files("../../search_spaces/*.yaml"))
    config = (PolicyError, ConfigError)
    found = [
        Reader("policy", read_policy, policies, weight=10),
        Reader("yaml", read_yaml, (*policies, *imports), (ConfigError,), weight=4),
        Reader("config", lambda p: load_config(p, {}), (Seed("autoprune.yaml", CONFIG.encode()),), (ConfigError,), 8),
        Reader("space", _space, spaces, (ConfigError,), 8),
        Reader("run", lambda p: load_run(p.parent, {}), (run,), (RunError, ConfigError)),
        Reader("times", _times, tuple(s for s in imports if "tim" in s.file)),
        Reader(
            "side file", lambda p: read_side_file(p.parent / "policy.yaml", POLICY), _tensors(),
            resealed=resealed_tensors,
        ),
        Reader("archive", _unpack, (Seed("model.packed", archive()),), (ModelError,), resealed=resealed_archive),
    ]  # fmt: skip
    for tool in IMPORTERS:
        own = tuple(s for s in imports if s.file.startswith((tool.replace("-", "_"), tool)) and "tim" not in s.file)
        found.append(Reader(f"import {tool}", partial(_import, tool), own or imports, config))
    for kind, table in (("latency", LATENCY), ("memory", MEMORY), ("shares", SHARES)):
        seed = Seed("table.json", table.model_dump_json(indent=1).encode())
        found.append(Reader(f"{kind} table", _kept(kind, table), (seed,), (), 3))
    for name in ("show", "diff", "merge"):
        found.append(Reader(f"autoprune {name}", partial(commanded, name), policies, weight=1))
    found.append(
        Reader(
            "autoprune unpack", partial(commanded, "unpack"), (Seed("model.packed", archive()),), weight=1,
            resealed=resealed_archive,
        )
    )  # fmt: skip
    return {reader.name: reader for reader in found}


def _import(tool: str, path: Path) -> object:
    return read_import(path, Import(tool))


# ---- damage --------------------------------------------------------------------------------------------------------

NUMBERS = (
    b"9" * 5000, b"-" + b"9" * 4000, b"1" + b"0" * 4299, b"1e999", b"-1e999", b"1e-999", b"-0", b"0", b"-1", b"NaN",
    b".nan", b".inf", b"-.inf", b"Infinity", b"-Infinity", b"0x7fffffff", b"0o17", b"017", b"0b1", b"1_000", b"1:30",
    b"2024-99-99", b"2001-12-14t21:59:43.10-05:00", b"9223372036854775808", b"18446744073709551616",
    b"340282366920938463463374607431768211456", b"1.7976931348623157e308", b"1e", b"1.", b".", b"+", b"1e400%", b"%",
    b"0.9999999999999999", b"1.0000000000000002", b"null", b"true", b"''", b"[]", b"{}", b"~", "٣".encode(),
    b"2" * 400 + b":" + b"4" * 400, b"4x1 100%", b"0:4", b"1" * 3000 + b"%",
)  # fmt: skip
TOKENS = (
    b"[", b"]", b"{", b"}", b"'", b'"', b":", b": ", b",", b"- ", b"? ", b"| ", b"> ", b"#", b"&a ", b"*a", b"<<: ",
    b"<<: *a\n", b"!!binary ", b"!!set ", b"!!omap ", b"!!python/name:os.system ", b"!!timestamp ", b"!!int ",
    b"!!float ",
    b"!<tag:yaml.org,2002:python/object/apply:os.system> ", b"!x ", b"%YAML 9.9\n", b"%TAG ! tag:yaml.org,2002:\n",
    b"---\n", b"...\n", b"\xef\xbb\xbf", b"\0", b"\xed\xa0\x80", b'"\\ud800"', b'"\\udfff"', b"\\ud800", b"\r\n", b"\r",
    b"\t", b"\x1b[2J", b"\x85", "\u2028".encode(), "\u202e".encode(), b"\xff\xfe", b"\xc0\x80", b'"\\UFFFFFFFF"',
    b'"\\x"', b"`", b"@", b"%", b"\\", b"=", b"base\n", b"__proto__: 1\n", b"__class__: x\n", b"80%", b"x" * 5000,
    b"//", b"/*", b"*/", b"$(touch pwned)", b"`touch pwned`", b"{{7*7}}", b"../../etc/passwd",
)  # fmt: skip
COMMAND = "touch pwned"
TAGGED = (
    f"!!python/object/apply:os.system ['{COMMAND}']", f"!!python/object/apply:subprocess.check_output [['{COMMAND}']]",
    f"!!python/object/new:os.system [{COMMAND}]", "!!python/name:os.system ''", "!!python/module:os ''",
    f"!!python/object/apply:eval ['__import__(\"os\").system(\"{COMMAND}\")']", "!!python/tuple [1, 2]",
    "!!python/object/new:type {args: [z, !!python/tuple [], {extend: !!python/name:exec }], "
    f"listitems: '{COMMAND}'}}",
    f"__import__('os').system('{COMMAND}')", "!!binary R0lGODlhDAAMAIQAAP", "!!set {a, b}", "!!map [1]", "!!str {a: 1}",
)  # fmt: skip
_NUMBER = re.compile(rb"-?[0-9]+(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
_VALUE = re.compile(rb"(?<=: )[^,}\[\]{\n]+|(?<=, )[^,}\[\]{\n:]+")
_KEY = re.compile(rb"[\w.\"'-]+\s*:")

Damage = Callable[[random.Random, bytes, Sequence[bytes]], bytes]


def _at(rng: random.Random, content: bytes) -> int:
    return rng.randrange(len(content) + 1)


def _part(rng: random.Random, content: bytes) -> tuple[int, int]:
    start = _at(rng, content)
    return start, min(len(content), start + rng.choice((1, 2, 8, 40, 200)))


def _insert(rng: random.Random, content: bytes, new: bytes) -> bytes:
    """At any place, or where a line or a value begins."""
    place = _at(rng, content)
    if rng.random() < 0.5:
        starts = [0, *(match.end() for match in re.finditer(rb"\n|: |\[|, ", content))]
        place = rng.choice(starts)
    return content[:place] + new + content[place:]


def _flip(rng: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _noise(rng: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    return _insert(rng, content, rng.randbytes(rng.choice((1, 2, 4, 30))))


def _delete(rng: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    start, end = _part(rng, content)
    return content[:start] + content[end:]


def _truncate(rng: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    return content[: _at(rng, content)] if rng.random() < 0.7 else content[_at(rng, content) :]


def _duplicate(rng: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    start, end = _part(rng, content)
    return _insert(rng, content, content[start:end] * rng.choice((1, 2, 30, 300)))


def _splice(rng: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    other = rng.choice(others)
    start, end = sorted((_at(rng, other), _at(rng, other)))
    return _insert(rng, content, other[start : min(end, start + 2000)])


def _number(rng: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    found = list(_NUMBER.finditer(content))
    if not found:
        return _insert(rng, content, rng.choice(NUMBERS))
    where = rng.choice(found)
    return content[: where.start()] + rng.choice(NUMBERS) + content[where.end() :]


def _token(rng: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    return _insert(rng, content, rng.choice(TOKENS) * rng.choice((1, 1, 1, 2, 60, 500)))


def _tag(rng: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    tagged = rng.choice(TAGGED).encode()
    values = list(re.finditer(rb"(?<=: )[^,}\n]+|(?<=- )[^\n]+", content))
    if values and rng.random() < 0.7:
        where = rng.choice(values)
        return content[: where.start()] + tagged + content[where.end() :]
    return _insert(rng, content, tagged)


def _line(rng: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    """Twice, at another place, or gone: keys are repeated and rows stand where they should not."""
    lines = content.split(b"\n")
    chosen = rng.choice(lines)
    if rng.random() < 0.3:
        lines.remove(chosen)
    lines.insert(rng.randrange(len(lines) + 1), chosen if rng.random() < 0.8 else chosen * 2)
    return b"\n".join(lines)


def _key(rng: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    """A key becomes another one of the file, or one of another file."""
    found, donors = list(_KEY.finditer(content)), list(_KEY.finditer(rng.choice((content, rng.choice(others)))))
    if not found or not donors:
        return content
    where = rng.choice(found)
    return content[: where.start()] + rng.choice(donors)[0] + content[where.end() :]


def _value(rng: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    """A value becomes another one of this or another file, or one of another type: the file stays YAML or JSON."""
    found = list(_VALUE.finditer(content))
    donors = [match[0] for match in _VALUE.finditer(rng.choice((content, rng.choice(others))))]
    if not found:
        return content
    where = rng.choice(found)
    others_types = (b"[]", b"{}", b"null", b"true", b'""', b"[1, 2]", b'{"a": 1}', b"0", b"-1", b"1.5", b'"x"')
    new = rng.choice((*donors, *others_types))
    return content[: where.start()] + new + content[where.end() :]


def _nest(rng: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    depth = rng.choice((10, 49, 51, 200, 3000))
    opening, closing = rng.choice(((b"[", b"]"), (b"{a: ", b"}"), (b'{"a":', b"}"), (b"- ", b""), (b"? ", b"")))
    return _insert(rng, content, opening * depth + b"1" + closing * (depth if rng.random() < 0.7 else 0))


def _anchors(rng: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    laughs = b"a0: &a0 [x, x]\n" + b"".join(b"a%d: &a%d [*a%d, *a%d]\n" % (n, n, n - 1, n - 1) for n in range(1, 30))
    return _insert(rng, content, rng.choice((laughs, b"m: &m {a: 1}\nn: {<<: *m}\n", b"&r [*r]", b"&a &a x", b"&a x")))


def _endings(rng: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    old, new = rng.choice(((b"\n", b"\r\n"), (b"\n", b"\r"), (b"  ", b"\t"), (b" ", b"\xc2\xa0"), (b"\n", b"\xc2\x85")))
    return content.replace(old, new)


def _comments(rng: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    return _insert(rng, content, rng.choice((b"#" * 20_000, b"\n#" * 10_000, b"\n" * 20_000, b" " * 20_000)) + b"\n")


def _encoded(rng: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    if rng.random() < 0.5:
        return b"\xef\xbb\xbf" * rng.choice((1, 2)) + content
    return content.decode("utf-8", "replace").encode(rng.choice(("utf-16", "utf-32-le", "utf-7")), "replace")


DAMAGES: tuple[tuple[Damage, int], ...] = (
    (_flip, 8), (_noise, 5), (_delete, 6), (_truncate, 3), (_duplicate, 5), (_splice, 5), (_number, 12), (_token, 12),
    (_tag, 6), (_line, 8), (_key, 10), (_value, 20), (_nest, 3), (_anchors, 3), (_endings, 2), (_comments, 1),
    (_encoded, 1),
)  # fmt: skip


def damaged(rng: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    """Damaged in one way or in several, at most `LONGEST` bytes."""
    kinds, weights = zip(*DAMAGES, strict=True)
    for kind in rng.choices(kinds, weights, k=rng.choice((1, 1, 1, 1, 2, 2, 3, 6))):
        content = kind(rng, content, others)[:LONGEST]
    return content


# ---- work ----------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What became of files: counts by reader and outcome; the slowest ones; what went wrong."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    slowest: list[tuple[float, str, int]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    grown_bytes: int = 0
    """Of a worker's resident memory, at its peak, above what it held when it began."""

    def add(self, other: Tally) -> None:
        self.counts += other.counts
        self.slowest = sorted((*self.slowest, *other.slowest), reverse=True)[:5]
        self.faults += other.faults
        self.grown_bytes = max(self.grown_bytes, other.grown_bytes)


@dataclass
class Fuzzer:
    """Makes files by number and has them read, each in a folder of its own place."""

    seed: int
    folder: Path
    readers: Mapping[str, Reader] = field(default_factory=readers)

    def __post_init__(self) -> None:
        self.others = [seed.content for reader in self.readers.values() for seed in reader.seeds]
        for name, reader in self.readers.items():
            self.place(name).mkdir(parents=True, exist_ok=True)
            for seed in reader.seeds:  # warms up what is imported late, and shows that seeds are what they should be
                self._write(reader, seed.file, seed.content)
                with suppress(*reader.errors):  # files of other kinds are among the seeds of some
                    reader.read(self.place(name) / seed.file)

    def place(self, name: str) -> Path:
        return self.folder / name.replace(" ", "-") / "tables"

    def made(self, number: int) -> tuple[Reader, str, bytes]:
        """Reader, name and content of a file."""
        rng = random.Random(f"{self.seed} {number}")
        everyone = list(self.readers.values())
        reader = rng.choices(everyone, [each.weight for each in everyone])[0]
        start = rng.choice(reader.seeds)
        content = start.content
        if rng.random() < 0.03:
            content = rng.choice(self.others)
        damage = partial(damaged, rng, others=self.others)
        if reader.resealed is not None and content == start.content and rng.random() < 0.75:
            return reader, start.file, reader.resealed(content, damage)
        return reader, start.file, damage(content)

    def _write(self, reader: Reader, file: str, content: bytes) -> Path:
        path = self.place(reader.name) / file
        path.write_bytes(content)
        return path

    def one(self, number: int, tally: Tally, *, loud: bool = False) -> None:
        """One file made, read and judged."""
        reader, file, content = self.made(number)
        path = self._write(reader, file, content)
        start, wall = time.process_time(), time.monotonic()
        outcome, events = outcome_of(reader, path, loud=loud), CANARY.events
        seconds = time.process_time() - start
        tally.counts[reader.name, outcome.split(":")[0]] += 1
        tally.slowest = sorted((*tally.slowest, (seconds, reader.name, number)), reverse=True)[:5]
        if events:
            outcome = f"CODE: {events[0]}; {outcome}"
            tally.counts[reader.name, "CODE"] += 1
        if outcome.startswith(("FAULT", "CODE", "TOO LONG")):
            tally.faults.append(f"{number} {reader.name}: {outcome} ({time.monotonic() - wall:.1f} s)")


def _too_long(_signal: int, _frame: object) -> None:
    raise TooLong


def outcome_of(reader: Reader, path: Path, *, loud: bool = False) -> str:
    """`read`, the name of an error that may be, or FAULT or TOO LONG and what happened."""
    old = {each: signal.signal(each, _too_long) for each in (signal.SIGPROF, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_PROF, CPU_S)
    signal.setitimer(signal.ITIMER_REAL, WALL_S)
    faulthandler.dump_traceback_later(3 * WALL_S, exit=True)
    try:
        with CANARY.listening():
            found = reader.read(path)
    except reader.errors as error:
        return type(error).__name__ if len(str(error)) < 100_000 else f"FAULT: a text of {len(str(error))} letters"
    except TooLong:
        return f"TOO LONG: {traceback.format_exc(limit=-3)}"
    except BaseException as error:  # noqa: BLE001 - that is what is looked for
        if loud:
            traceback.print_exc()
        return f"FAULT: {type(error).__name__}: {error!s:.200} | {traceback.format_exc(limit=-2)[-400:]}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        for each, handler in old.items():
            signal.signal(each, handler)
    return "measured anew" if found == "measured anew" else "read"


_FUZZER: list[Fuzzer] = []
_BASE_KB: list[int] = []


def begin(seed: int, folder: str) -> None:
    """A worker: bounded memory, and a folder of its own."""
    torch.set_num_threads(1)
    own = Path(folder) / str(os.getpid())
    own.mkdir(parents=True)
    os.chdir(own)  # where a command without a path would leave its canary
    _FUZZER[:] = [Fuzzer(seed, own)]
    gc.collect()
    mapped = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + ROOM_BYTES, resource.RLIM_INFINITY))
    _BASE_KB[:] = [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]


def work(start: int, stop: int) -> Tally:
    """Files by number, in a worker."""
    tally = Tally()
    for number in range(start, stop):
        _FUZZER[0].one(number, tally)
    tally.grown_bytes = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - _BASE_KB[0])
    return tally


def fuzz(files: int, *, seed: int = 0, workers: int = 2, tell: Callable[[str], None] = print, first: int = 0) -> Tally:
    """Have `files` damaged files read, in processes of their own."""
    total, began = Tally(), time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, context, initializer=begin, initargs=(seed, str(folder))) as pool:
            starts = range(first, first + files, CHUNK)
            stops = [min(start + CHUNK, first + files) for start in starts]
            for number, tally in enumerate(pool.map(work, starts, stops), 1):
                total.add(tally)
                if number % 25 == 0:
                    tell(f"{number * CHUNK} files, {len(total.faults)} faults, {time.monotonic() - began:.0f} s")
        pwned = [str(path) for path in folder.rglob("pwned*")]
        total.faults += [f"a command was run: {path}" for path in pwned]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return total


def table(tally: Tally) -> str:
    """Counts by reader and outcome, for people."""
    outcomes = sorted({outcome for _, outcome in tally.counts})
    lines = ["| reader | files | " + " | ".join(outcomes) + " |", "|---" * (len(outcomes) + 2) + "|"]
    for name in sorted({name for name, _ in tally.counts}):
        row = [tally.counts[name, outcome] for outcome in outcomes]
        lines.append(f"| {name} | {sum(row)} | " + " | ".join(str(each) if each else "" for each in row) + " |")
    slowest = ", ".join(f"{seconds:.2f} s ({name}, {number})" for seconds, name, number in tally.slowest)
    return "\n".join([*lines, f"slowest: {slowest}", f"peak memory: +{tally.grown_bytes / 1e6:.0f} MB"])


def main() -> None:
    """Read the flags; exit with 1 where a file did what none may."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    for name, default in (("files", 2000), ("seed", 0), ("workers", 2), ("only", -1), ("first", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    flags = parser.parse_args()
    if flags.only >= 0:
        with tempfile.TemporaryDirectory() as folder:
            fuzzer, tally = Fuzzer(flags.seed, Path(folder)), Tally()
            reader, file, content = fuzzer.made(flags.only)
            sys.stdout.write(f"{reader.name} {file} {len(content)} bytes\n{content[:3000]!r}\n")
            fuzzer.one(flags.only, tally, loud=True)
    else:
        tally = fuzz(flags.files, seed=flags.seed, workers=flags.workers, first=flags.first)
    sys.stdout.write("\n".join([table(tally), *tally.faults[:100], f"{len(tally.faults)} faults\n"]))
    raise SystemExit(bool(tally.faults))


if __name__ == "__main__":
    main()
