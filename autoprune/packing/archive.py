"""The packed model: named tensors and quantised weights as one file's content, and what each of them takes of it.

Knows the file's format; does not know where it is kept. Nothing in it is executed or unpickled, and no size in it is
believed. The same input gives the same bytes (with one version of zstd).

    magic "AUTOPRUNE", version 1 | 8 bytes: header length, little-endian | header | payload | SHA-256 of all before

The header is canonical JSON in a zstd frame. A layout is `[dtype, shape, kind, [bytes of each stream]]`; offsets follow
from the order, which is that of names, tensors first:

    {"about": {...}, "quantised": {name: [shape, layout of codes, layout of scales]}, "tensors": {name: layout}}
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from torch import Tensor

from autoprune.errors import ModelError
from autoprune.packing.coding import DTYPES, Coded, Codes, Kind, Layout, decode, deflate, encode, shannon_bytes, unframe

MAGIC = b"AUTOPRUNE"
VERSION = 1
_HEADER = len(MAGIC) + 1 + 8
_DIGEST = 32
HEADER_LIMIT = 1 << 25
"""Bytes of JSON; a header beyond this describes no model."""
_ELEMENTS_LIMIT = 1 << 48
_DIMENSIONS_LIMIT = 64


@dataclass(frozen=True, slots=True)
class Unpacked:
    """`tensors` holds all of the model's, the quantised ones as the layers compute with them."""

    tensors: dict[str, Tensor]
    quantised: dict[str, Codes]
    about: dict[str, str]


@dataclass(frozen=True, slots=True)
class Item:
    """What one tensor takes; `kind` is dtype and kind, as "int8 masked"; scales are counted with their codes."""

    name: str
    kind: str
    shape: tuple[int, ...]
    stored_bytes: int
    shannon_bytes: float


@dataclass(frozen=True, slots=True)
class Inventory:
    """Where a packed model's bytes go; `overhead_bytes` is all that is not payload, most of it the header."""

    items: tuple[Item, ...]
    overhead_bytes: int

    @property
    def size_bytes(self) -> int:
        """The whole file."""
        return self.overhead_bytes + sum(item.stored_bytes for item in self.items)

    @property
    def shannon_bytes(self) -> float:
        """The order-0 bound of the payload; see `coding.shannon_bytes`."""
        return sum(item.shannon_bytes for item in self.items)


@dataclass(frozen=True, slots=True)
class Packed:
    """The content of a file, and what takes how much of it."""

    content: bytes
    inventory: Inventory


@dataclass(frozen=True, slots=True)
class _Entry:
    """One tensor as a file holds it: how each part lies in its bytes; a quantised weight has two, codes and scales."""

    name: str
    shape: tuple[int, ...]
    layouts: tuple[Layout, ...]
    payloads: tuple[bytes, ...]


def pack(tensors: Mapping[str, Tensor], quantised: Mapping[str, Codes], *, about: Mapping[str, str]) -> bytes:
    """The content of a packed model; `about` is free text. Raises ModelError for what cannot be packed."""
    return packed(tensors, quantised, about=about).content


def packed(tensors: Mapping[str, Tensor], quantised: Mapping[str, Codes], *, about: Mapping[str, str]) -> Packed:
    """As `pack`, with the inventory."""
    if both := sorted(tensors.keys() & quantised.keys()):
        raise ModelError(f"{', '.join(both)}: given both as a tensor and as int8 codes; give one of them")
    plain = {name: _encode(name, tensors[name]) for name in sorted(tensors)}
    codes = {name: _encode(name, quantised[name].codes) for name in sorted(quantised)}
    scales = {name: _encode(name, quantised[name].scales) for name in codes}
    content = {
        "about": dict(about),
        "quantised": {name: [quantised[name].shape, _row(codes[name]), _row(scales[name])] for name in codes},
        "tensors": {name: _row(coded) for name, coded in plain.items()},
    }
    header = json.dumps(content, sort_keys=True, separators=(",", ":")).encode("ascii")
    if len(header) > HEADER_LIMIT:
        raise ModelError(f"names and descriptions take {len(header)} bytes, allowed: {HEADER_LIMIT}; shorten `about`")
    stored = deflate(header)
    payload = [coded.payload for coded in plain.values()]
    payload += [part.payload for name in codes for part in (codes[name], scales[name])]
    body = b"".join((MAGIC, bytes([VERSION]), len(stored).to_bytes(8, "little"), stored, *payload))
    items = [_item(name, (coded,), coded.layout.shape) for name, coded in plain.items()]
    items += [_item(name, (codes[name], scales[name]), tuple(quantised[name].shape)) for name in codes]
    overhead = _HEADER + len(stored) + _DIGEST
    return Packed(body + hashlib.sha256(body).digest(), Inventory(tuple(items), overhead))


def unpack(content: bytes, *, name: str = "packed model") -> Unpacked:
    """The inverse of `pack`, bit for bit. Raises ModelError for what is damaged, cut short, foreign or inconsistent.

    `name` is what the error calls the content: its path.
    """
    about, entries = _opened(content, name)
    return _unpacked(about, [(entry, _decoded(entry, name)) for entry in entries], name)


def inspected(content: bytes, *, name: str = "packed model") -> tuple[Unpacked, Inventory]:
    """As `unpack`, with what each tensor takes; checked and decoded once."""
    about, entries = _opened(content, name)
    decoded = [(entry, _decoded(entry, name)) for entry in entries]
    items = [_item(entry.name, _coded(entry, parts), entry.shape) for entry, parts in decoded]
    overhead = len(content) - sum(item.stored_bytes for item in items)
    return _unpacked(about, decoded, name), Inventory(tuple(items), overhead)


def _unpacked(about: dict[str, str], decoded: Sequence[tuple[_Entry, Sequence[Tensor]]], name: str) -> Unpacked:
    tensors: dict[str, Tensor] = {}
    quantised: dict[str, Codes] = {}
    for entry, parts in decoded:
        if len(parts) == 1:
            tensors[entry.name] = parts[0]
            continue
        try:
            quantised[entry.name] = Codes(parts[0], parts[1], entry.shape)
        except ValueError as error:
            raise _inconsistent(name, f"{entry.name}: {error}") from error
        tensors[entry.name] = quantised[entry.name].dequantised()
    return Unpacked(tensors, quantised, about)


def _coded(entry: _Entry, parts: Sequence[Tensor]) -> list[Coded]:
    """Each part as it was stored, with its Shannon bound."""
    rows = zip(entry.layouts, entry.payloads, parts, strict=True)
    return [Coded(layout, payload, shannon_bytes(part, layout.kind)) for layout, payload, part in rows]


def _encode(name: str, tensor: Tensor) -> Coded:
    try:
        return encode(tensor)
    except ValueError as error:
        raise ModelError(f"{name}: {error}") from error


def _item(name: str, parts: Sequence[Coded], shape: tuple[int, ...]) -> Item:
    kind = f"{parts[0].layout.dtype} {parts[0].layout.kind}"
    return Item(name, kind, shape, sum(len(part.payload) for part in parts), sum(part.shannon_bytes for part in parts))


def _row(coded: Coded) -> list[object]:
    """A layout as it stands in the header; `_layout` reads it."""
    layout = coded.layout
    return [layout.dtype, layout.shape, layout.kind, layout.lengths]


def _opened(content: bytes, name: str) -> tuple[dict[str, str], list[_Entry]]:
    """`about` and what the payload holds. Raises ModelError for what is not whole, not ours or inconsistent."""
    body = _body(content, name)
    end = _HEADER + int.from_bytes(body[_HEADER - 8 : _HEADER], "little")
    try:
        if end > len(body):
            raise ValueError("is longer than the file")
        header = json.loads(unframe(body[_HEADER:end], HEADER_LIMIT))
        match header:
            case {"about": dict(about), "quantised": dict(quantised), "tensors": dict(tensors)}:
                if all(isinstance(text, str) for text in about.values()) and not tensors.keys() & quantised.keys():
                    return about, _entries(tensors, quantised, body[end:])
        raise ValueError("does not hold `about` (texts), `tensors` and `quantised` (each name in one of them)")
    except (ValueError, RecursionError) as error:
        raise _inconsistent(name, f"header: {error}") from error


def _body(content: bytes, name: str) -> bytes:
    """All but the checksum, which is right."""
    if not content.startswith(MAGIC):
        raise ModelError(f"{name}: is not a packed model: it does not begin with {MAGIC.decode()!r}; give another file")
    version = content[len(MAGIC) : len(MAGIC) + 1]
    if version and version[0] != VERSION:
        raise ModelError(
            f"{name}: format version {version[0]} is unknown; this version of autoprune reads {VERSION}; "
            "upgrade autoprune if the file is newer, copy it again if it may be damaged"
        )
    body, digest = content[:-_DIGEST], content[-_DIGEST:]
    if len(body) < _HEADER or hashlib.sha256(body).digest() != digest:
        raise ModelError(f"{name}: is damaged or cut short (the checksum is wrong); copy it again or pack it anew")
    return body


def _entries(tensors: Mapping[str, object], quantised: Mapping[str, object], payload: bytes) -> list[_Entry]:
    """All tensors with their bytes. Raises ValueError where the header is not what `packed` writes."""
    rows: list[tuple[str, tuple[int, ...], tuple[Layout, ...]]] = []
    for name in sorted(tensors):
        layout = _layout(name, tensors[name])
        rows.append((name, layout.shape, (layout,)))
    for name in sorted(quantised):
        match quantised[name]:
            case [list(shape), codes, scales]:
                rows.append((name, _shape(name, shape), (_layout(name, codes), _layout(name, scales))))
            case _:
                raise ValueError(f"{name}: is no shape and two layouts")
    entries, start = [], 0
    for name, dimensions, layouts in rows:
        ends = list(accumulate((sum(layout.lengths) for layout in layouts), initial=start))
        entries.append(_Entry(name, dimensions, layouts, tuple(payload[first:last] for first, last in pairwise(ends))))
        start = ends[-1]
    if start != len(payload):
        raise ValueError(f"lengths are {start} bytes in all, the payload has {len(payload)}")
    return entries


def _layout(name: str, row: object) -> Layout:
    match row:
        case [str(dtype), list(shape), str(kind), list(lengths)] if dtype in DTYPES and kind in set(Kind):
            return Layout(dtype, _shape(name, shape), Kind(kind), _sizes(name, lengths))
    raise ValueError(f"{name}: is no dtype, shape, kind and list of lengths that this version knows")


def _shape(name: str, values: list[object]) -> tuple[int, ...]:
    shape = _sizes(name, values)
    if len(shape) > _DIMENSIONS_LIMIT or math.prod(max(size, 1) for size in shape) > _ELEMENTS_LIMIT:
        raise ValueError(f"{name}: the shape is too large for a tensor")
    return shape


def _sizes(name: str, values: list[object]) -> tuple[int, ...]:
    """`values` as whole numbers from zero up."""
    sizes = tuple(value for value in values if type(value) is int and value >= 0)
    if len(sizes) != len(values):
        raise ValueError(f"{name}: a size is not a whole number from 0 up")
    return sizes


def _decoded(entry: _Entry, name: str) -> list[Tensor]:
    try:
        return [decode(payload, layout) for payload, layout in zip(entry.payloads, entry.layouts, strict=True)]
    except ValueError as error:
        raise _inconsistent(name, f"{entry.name}: {error}") from error


def _inconsistent(name: str, problem: str) -> ModelError:
    return ModelError(f"{name}: is not a valid packed model: {problem:.500}; pack the model anew")
