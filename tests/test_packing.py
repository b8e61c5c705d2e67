"""The packed model: the same bits back, nothing damaged accepted, and sizes next to what theory allows."""

import hashlib
import json
import math
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

from autoprune.errors import ModelError
from autoprune.packing import coding
from autoprune.packing.archive import HEADER_LIMIT, MAGIC, inspected, pack, packed, unpack
from autoprune.packing.coding import DTYPES, Codes, Kind, decode, deflate, encode, inflate, shannon_bytes

SPECIAL = {
    2: [0x8000, 0x0001, 0x7C00, 0xFC00, 0x7E01, 0x7F80, 0x7FA5, 0xFFFF],  # -0.0, denormal, infinities, NaNs
    4: [0x80000000, 0x00000001, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7FA00001, 0xFFFFFFFF],
    8: [1 << 63, 1, 0x7FF0 << 48, 0xFFF0 << 48, (0x7FF8 << 48) | 5, (0x7FF0 << 48) | 7, (1 << 64) - 1],
}
"""Bit patterns that a computation with floats would change, by width in bytes."""


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Of any shape, dtype and share of zeros; floats are drawn by their bits."""
    dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
    shape = draw(arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    width = dtype.itemsize
    elements = generator.integers(0, draw(st.sampled_from([2, 256])), (math.prod(shape), width), dtype=np.uint8)
    if dtype is torch.bool:
        elements &= 1
    elif draw(st.booleans()) and width in SPECIAL:
        chosen = generator.random(len(elements)) < 0.3
        patterns = generator.choice(np.array(SPECIAL[width], dtype=f"<u{width}"), int(chosen.sum()))
        elements[chosen] = patterns.view(np.uint8).reshape(-1, width)
    elements[generator.random(len(elements)) < draw(st.sampled_from([0.0, 0.5, 0.9, 1.0]))] = 0
    return torch.from_numpy(elements.reshape(-1)).view(dtype).reshape(shape)


def bits(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    return tensor.dtype, tuple(tensor.shape), flat.numpy().tobytes()


def laplace_codes(outputs: int, columns: int = 64, *, zeros: float = 0.0, seed: int = 0) -> Codes:
    """What quantising a trained layer gives: one scale an output, the smallest weights gone."""
    x = torch.from_numpy(np.random.default_rng(seed).laplace(size=(outputs, columns)))
    x[x.abs() < x.abs().quantile(zeros)] = 0
    scales = x.abs().amax(1) / 127
    return Codes(torch.round(x / scales[:, None]).to(torch.int8), scales.float(), (outputs, columns))


def sparse_weight(zeros: float, *, shape: tuple[int, ...] = (128, 288), seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * 0.02
    return weight * (torch.rand(shape, generator=generator) >= zeros) + 0.0  # + 0.0: no -0.0


def model() -> tuple[dict[str, Tensor], dict[str, Codes]]:
    codes = laplace_codes(32, 36, zeros=0.8)
    return (
        {
            "bn.weight": torch.linspace(0.5, 1.5, 32),
            "bn.num_batches_tracked": torch.tensor(39_100),
            "conv1.weight": sparse_weight(0.9, shape=(16, 3, 3, 3)),
            "mask": torch.tensor([True, False, True]),
            "empty": torch.empty(0, 3),
        },
        {"conv2.weight": Codes(codes.codes, codes.scales, (32, 4, 3, 3)), "fc.weight": laplace_codes(10, seed=1)},
    )


CONTENT = pack(*model(), about={"policy": "latency_s: 0.01\nunits: é"})


@settings(deadline=None)
@given(tensor=tensors())
@example(tensor=torch.tensor(-0.0))
@example(tensor=torch.empty(3, 0, 2))
def test_every_tensor_comes_back_bit_for_bit(tensor: Tensor) -> None:
    coded = encode(tensor)
    assert bits(decode(coded.payload, coded.layout)) == bits(tensor)
    assert len(coded.payload) <= tensor.numel() * tensor.dtype.itemsize
    assert coded.shannon_bytes == shannon_bytes(tensor, coded.layout.kind)


@settings(deadline=None)
@given(tensor=tensors(), outputs=st.integers(0, 9), columns=st.integers(0, 9), seed=st.integers(0, 2**32 - 1))
def test_a_model_comes_back_bit_for_bit(tensor: Tensor, outputs: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-128, 128, (outputs, columns), generator=generator, dtype=torch.int8)
    codes[torch.rand(codes.shape, generator=generator) < 0.5] = 0
    given_codes = Codes(codes, torch.rand(outputs, generator=generator) * 1e-3, (columns, outputs, 1))
    known = unpack(pack({"a": tensor}, {"b": given_codes}, about={"key": "text"}))
    assert (set(known.tensors), set(known.quantised), known.about) == ({"a", "b"}, {"b"}, {"key": "text"})
    assert bits(known.tensors["a"]) == bits(tensor)
    assert bits(known.tensors["b"]) == bits((codes.float() * given_codes.scales[:, None]).reshape(columns, outputs, 1))
    assert bits(known.quantised["b"].codes) == bits(codes)
    assert bits(known.quantised["b"].scales) == bits(given_codes.scales)


def test_tensors_that_are_views_need_gradients_or_are_tied() -> None:
    weight = torch.nn.Parameter(sparse_weight(0.5, shape=(6, 4)))
    known = unpack(pack({"a": weight, "b": weight.T, "c": weight[::2, 1:]}, {}, about={})).tensors
    for name, expected in {"a": weight, "b": weight.T, "c": weight[::2, 1:]}.items():
        assert bits(known[name]) == bits(expected.detach())
        assert not known[name].requires_grad
        known[name].add_(1)  # writable, and no memory is shared
    assert bits(unpack(pack({"a": weight}, {}, about={})).tensors["a"]) == bits(weight.detach())


def test_negative_zero_is_a_value() -> None:
    tensor = torch.zeros(10_000)
    tensor[::100] = -0.0
    coded = encode(tensor)
    assert torch.signbit(decode(coded.payload, coded.layout)).equal(torch.signbit(tensor))


def test_large_tensors_have_a_stream_for_each_plane() -> None:
    dense, masked = (encode(sparse_weight(zeros, shape=(256, 300))) for zeros in (0.0, 0.5))
    assert (dense.layout.kind, len(dense.layout.lengths)) == (Kind.DENSE, 4)
    assert (masked.layout.kind, len(masked.layout.lengths)) == (Kind.MASKED, 5)
    for coded, zeros in ((dense, 0.0), (masked, 0.5)):
        assert bits(decode(coded.payload, coded.layout)) == bits(sparse_weight(zeros, shape=(256, 300)))


def test_the_same_model_gives_the_same_bytes() -> None:
    plain, codes = model()
    about = {"policy": "latency_s: 0.01\nunits: é", "autoprune": "0.1.0"}
    backwards = [dict(reversed(part.items())) for part in (plain, codes, about)]
    assert pack(backwards[0], backwards[1], about=backwards[2]) == pack(plain, codes, about=about)
    assert pack(plain, codes, about=about) != CONTENT


def test_what_was_unpacked_packs_to_the_same_bytes() -> None:
    known = unpack(CONTENT)
    plain = {name: tensor for name, tensor in known.tensors.items() if name not in known.quantised}
    assert pack(plain, known.quantised, about=known.about) == CONTENT


def test_a_model_without_tensors() -> None:
    known = unpack(pack({}, {}, about={}))
    assert (known.tensors, known.quantised, known.about) == ({}, {}, {})


@pytest.mark.parametrize("flip", [0x01, 0x80, 0xFF])
def test_every_flipped_byte_is_refused(flip: int) -> None:
    for position in {*range(80), *range(80, len(CONTENT), 37), *range(len(CONTENT) - 40, len(CONTENT))}:
        damaged = bytearray(CONTENT)
        damaged[position] ^= flip
        reason = "not a packed model" if position < 9 else "format version" if position == 9 else "damaged or cut short"
        for read in (unpack, inspected):
            with pytest.raises(ModelError, match=rf"^net\.apk: .*{reason}"):
                read(bytes(damaged), name="net.apk")


def test_every_truncation_and_addition_is_refused() -> None:
    for length in {*range(120), *range(120, len(CONTENT), 31), *range(len(CONTENT) - 40, len(CONTENT))}:
        reason = "not a packed model" if length < 9 else "damaged or cut short"
        with pytest.raises(ModelError, match=reason):
            unpack(CONTENT[:length])
    with pytest.raises(ModelError, match="damaged or cut short"):
        unpack(CONTENT + b"\0")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04" * 30, b"\x80\x02}q\x00.", MAGIC, MAGIC + b"\x02" + bytes(60)])
def test_foreign_content_is_refused(content: bytes) -> None:
    with pytest.raises(ModelError, match=r"not a packed model|damaged|version"):
        unpack(content)


def sealed(stored_header: bytes, payload: bytes = b"", *, length: int | None = None) -> bytes:
    """A file whose checksum is right, whatever it holds."""
    length = len(stored_header) if length is None else length
    body = MAGIC + b"\x01" + length.to_bytes(8, "little") + stored_header + payload
    return body + hashlib.sha256(body).digest()


def forged(row: object = None, payload: bytes = b"", **sections: object) -> bytes:
    """A file with one tensor, or with other sections in the header."""
    header = {"about": {}, "quantised": {}, "tensors": {} if row is None else {"a": row}} | sections
    return sealed(deflate(json.dumps(header).encode()), payload)


FLOATS: list[Any] = ["float32", [2], "dense", [8]]
CODES: list[Any] = ["int8", [2, 2], "dense", [4]]
INCONSISTENT: dict[str, tuple[bytes, str]] = {
    "length": (sealed(b"abc", length=2**63), "longer than the file"),
    "no frame": (sealed(b"\xff" * 40), "zstd"),
    "no JSON": (sealed(deflate(b"{")), "header"),
    "no UTF-8": (sealed(deflate(b'"\xff\xff"')), "header"),
    "deep": (sealed(deflate(b"[" * 1_000_000)), "header"),
    "bomb": (sealed(deflate(b" " * (HEADER_LIMIT + 1))), "more than"),
    "long number": (sealed(deflate(b"9" * 10_000)), "header"),
    "a list": (sealed(deflate(b"[]")), "does not hold"),
    "about": (forged(about={"a": 1}), "does not hold"),
    "tensors": (forged(tensors=[]), "does not hold"),
    "twice": (forged(FLOATS, bytes(8), quantised={"a": [[2, 2], CODES, FLOATS]}), "each name in one"),
    "row": (forged({"dtype": "float32"}), "a: is no dtype"),
    "dtype": (forged(["object", [2], "dense", [8]], bytes(8)), "a: is no dtype"),
    "kind": (forged(["float32", [2], "pickle", [8]], bytes(8)), "a: is no dtype"),
    "negative": (forged(["float32", [-2], "dense", [8]], bytes(8)), "whole number"),
    "boolean size": (forged(["float32", [True], "dense", [4]], bytes(4)), "whole number"),
    "fraction": (forged(["float32", [2], "dense", [8.0]], bytes(8)), "whole number"),
    "huge": (forged(["float32", [2**40, 2**40], "dense", [8]], bytes(8)), "too large"),
    "huge and empty": (forged(["float32", [0, 2**62], "dense", [0]]), "too large"),
    "dimensions": (forged(["float32", [1] * 65, "dense", [4]], bytes(4)), "too large"),
    "claimed": (forged(["float32", [2**40], "dense", [8]], bytes(8)), "a: "),
    "claimed mask": (forged(["float32", [2**40], "masked", [8, 0]], bytes(8)), "a: "),
    "claimed frame": (forged(["int8", [2**40], "dense", [14]], deflate(bytes(9_000))[:14].ljust(14)), "a: "),
    "lengths": (forged(["float32", [2], "dense", [9]], bytes(8)), "9 bytes in all, the payload has 8"),
    "streams": (forged(["float32", [2], "dense", [4, 4]], bytes(8)), "2 streams stored, 1 or 4"),
    "no streams": (forged(["float32", [0], "dense", []]), "0 streams"),
    "no mask": (forged(["float32", [0], "masked", []]), "0 streams"),
    "values": (forged(["int8", [8], "masked", [1, 3]], b"\x81abc"), "a: "),
    "more inside": (forged(["int8", [999], "dense", [len(deflate(bytes(1000)))]], deflate(bytes(1000))), "more than"),
    "less inside": (forged(["int8", [999], "dense", [len(deflate(bytes(998)))]], deflate(bytes(998))), "998 bytes"),
    "truth": (forged(["bool", [2], "dense", [2]], b"\x01\x02"), "neither 0 nor 1"),
    "quantised": (forged(quantised={"a": FLOATS}), "no shape and two layouts"),
    "codes": (forged(None, bytes(16), quantised={"a": [[2], FLOATS, FLOATS]}), "int8 and float32 are wanted"),
    "weight": (forged(None, bytes(12), quantised={"a": [[5], CODES, FLOATS]}), "do not fill"),
}


@pytest.mark.parametrize("case", INCONSISTENT)
def test_a_header_is_not_believed(case: str) -> None:
    content, reason = INCONSISTENT[case]
    tracemalloc.start()
    try:
        for read in (unpack, inspected):
            with pytest.raises(ModelError, match=rf"^net\.apk: is not a valid packed model: (?s:.)*{reason}"):
                read(content, name="net.apk")
        assert tracemalloc.get_traced_memory()[1] < 4 * HEADER_LIMIT
    finally:
        tracemalloc.stop()


def test_forgeries_are_refused_for_what_they_claim_only() -> None:
    """Without this, a mistake in `forged` would let every case above pass."""
    known = unpack(forged(FLOATS, bytes(20), quantised={"b": [[4, 1], CODES, FLOATS]}))
    assert {name: tuple(tensor.shape) for name, tensor in known.tensors.items()} == {"a": (2,), "b": (4, 1)}


def test_what_cannot_be_packed_is_named() -> None:
    refused: list[tuple[Tensor, str]] = [
        (torch.zeros(2, dtype=torch.complex64), "dtype complex64 cannot be packed; allowed: bool"),
        (torch.eye(3).to_sparse(), "to_dense"),
        (torch.empty(3, device="meta"), "in memory"),
    ]
    for tensor, reason in refused:
        with pytest.raises(ModelError, match=rf"^layer: .*{reason}"):
            pack({"layer": tensor}, {}, about={})
    with pytest.raises(ModelError, match="given both"):
        pack({"a": torch.zeros(4)}, {"a": laplace_codes(2, 2)}, about={})
    with pytest.raises(ModelError, match="shorten `about`"):
        pack({}, {}, about={"policy": "x" * HEADER_LIMIT})


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Codes(torch.zeros(2, 3), torch.ones(2), (2, 3)), "int8 and float32"),
        (lambda: Codes(torch.zeros(2, 3, dtype=torch.int8), torch.ones(3), (2, 3)), "do not fit"),
        (lambda: Codes(torch.zeros(6, dtype=torch.int8), torch.ones(6), (6,)), "do not fit"),
        (lambda: Codes(torch.zeros(2, 3, dtype=torch.int8), torch.ones(2), (2, 4)), "do not fill"),
    ],
)
def test_codes_fit_their_weight(make: Callable[[], Codes], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        make()


def test_the_inventory_accounts_for_every_byte() -> None:
    plain, codes = model()
    whole = packed(plain, codes, about={"policy": "text"})
    found = whole.inventory
    assert inspected(whole.content)[1] == found
    assert found.size_bytes == len(whole.content)
    assert found.shannon_bytes == pytest.approx(sum(item.shannon_bytes for item in found.items))
    assert [item.name for item in found.items] == [*sorted(plain), *sorted(codes)]
    kinds = {item.name: (item.kind, item.shape) for item in found.items}
    assert kinds["conv1.weight"] == ("float32 masked", (16, 3, 3, 3))
    assert kinds["conv2.weight"] == ("int8 masked", (32, 4, 3, 3))
    assert kinds["bn.num_batches_tracked"] == ("int64 dense", ())
    assert found.overhead_bytes < 600


def test_the_shannon_bound_by_hand() -> None:
    symbols = torch.tensor([1, 1, 2, 3] * 8, dtype=torch.int8)
    assert shannon_bytes(symbols, Kind.DENSE) == pytest.approx(32 * 1.5 / 8)
    symbols = torch.tensor([0, 0, 0, 1, 0, 0, 0, 2] * 4, dtype=torch.int8)
    mask_bits = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))
    assert shannon_bytes(symbols, Kind.MASKED) == pytest.approx((32 * mask_bits + 8 * 1) / 8)
    assert shannon_bytes(torch.zeros(9), Kind.MASKED) == shannon_bytes(torch.empty(0), Kind.DENSE) == 0.0


def test_a_sparse_float_layer_is_near_the_bound() -> None:
    weight = sparse_weight(0.9)
    coded = encode(weight)
    assert coded.layout.kind is Kind.MASKED
    assert len(coded.payload) < 1.03 * coded.shannon_bytes
    # by theory: a mask of 0.469 bits an element, and 10 % of values with two mantissa bytes that nothing compresses
    share = float((weight != 0).float().mean())
    mask = -(share * math.log2(share) + (1 - share) * math.log2(1 - share)) / 32
    assert mask + share * 0.5 < len(coded.payload) / (4 * weight.numel()) < min(0.12, mask + share)


@pytest.mark.parametrize(
    ("outputs", "zeros", "above"), [(16, 0.0, 0.14), (576, 0.0, 0.01), (576, 0.75, 0.03), (576, 0.9, 0.05)]
)
def test_int8_codes_are_near_the_bound(outputs: int, zeros: float, above: float) -> None:
    coded = encode(laplace_codes(outputs, zeros=zeros).codes)
    assert coded.layout.kind is (Kind.MASKED if zeros else Kind.DENSE)
    assert coded.shannon_bytes < len(coded.payload) < (1 + above) * coded.shannon_bytes


def test_a_pattern_beats_the_bound() -> None:
    """2:4 has 2.58 bits a group where independent mask bits need 4."""
    groups = torch.randn(9_216, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros_like(groups).scatter_(1, groups.abs().argsort(1)[:, 2:], 1.0)
    coded = encode(mask.to(torch.int8))
    assert len(coded.payload) < 0.7 * 36_864 / 8 < coded.shannon_bytes


@given(raw=st.binary(max_size=300), limit=st.integers(0, 400))
def test_streams_hold_what_they_should_or_are_refused(raw: bytes, limit: int) -> None:
    stored = deflate(raw)
    assert inflate(stored, len(raw)) == raw
    assert inflate(raw, len(raw)) == raw
    if limit not in (len(raw), len(stored)):
        with pytest.raises(ValueError, match="a stream"):
            inflate(stored, limit)


def test_a_frame_that_wants_a_large_window_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = deflate(np.random.default_rng(0).bytes(3_000_000) * 2)
    assert len(inflate(stored, 6_000_000)) == 6_000_000
    monkeypatch.setattr(coding, "_WINDOW_LOG", 20)
    with pytest.raises(ValueError, match="no zstd frame"):
        inflate(stored, 6_000_000)
