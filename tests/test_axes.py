"""Axes: the algebra of dimensions, and the groups and positions of every pattern as counted by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import IMAGE, masked, randomised, snapshot
from torch import Tensor, nn
from torch.nn import functional

from autoprune.model.axes.expressions import ONE, Axes, Expr
from autoprune.model.axes.trace import trace
from autoprune.model.coupling import coupled_groups
from autoprune.model.cut import cut, plan_cut
from autoprune.model.discover import discover

torch.set_num_threads(1)

# ---- the algebra ---------------------------------------------------------------------------------------------------


def widths(axes: Axes, expr: Expr) -> list[list[int]]:
    return [[axes.width(axis) for axis in term] for term in axes.resolve(expr)]


def test_a_dimension_of_one_has_no_axis() -> None:
    assert Axes().fresh(1) == ONE


def test_a_split_is_seen_everywhere() -> None:
    axes = Axes()
    whole, twin = axes.fresh(12), axes.fresh(12)
    axes.unify(whole, twin, reason="")
    heads, width = axes.split(whole, (3, 4), reason="")
    assert axes.resolve(twin) == axes.product((heads, width))
    assert widths(axes, twin) == [[3, 4]]


def test_products_have_a_common_refinement() -> None:
    axes = Axes()
    whole = axes.fresh(24)
    axes.split(whole, (2, 12), reason="")
    axes.split(whole, (6, 4), reason="")
    assert widths(axes, whole) == [[2, 3, 4]]


def test_products_without_one_are_pinned() -> None:
    axes = Axes()
    whole = axes.fresh(24)
    axes.split(whole, (4, 6), reason="")
    assert not axes.unify(whole, axes.product((axes.fresh(6), axes.fresh(4))), reason="does not fit")
    assert axes.is_pinned(whole)
    assert {axes.pin_of(leaf) for leaf in axes.leaves(whole)} == {"does not fit"}


def test_a_sum_split_in_equal_halves_ties_them() -> None:
    axes = Axes()
    left, right = axes.fresh(5), axes.fresh(5)
    both = (*left, *right)
    _, inside = axes.split(both, (2, 5), reason="")
    assert axes.resolve(left) == axes.resolve(right) == axes.resolve(inside)


def test_a_sum_inside_a_product_keeps_its_positions() -> None:
    """(heads (q k v)): interleaved by head, as some fused projections are."""
    axes = Axes()
    heads, q, rest = axes.fresh(2), axes.fresh(3), axes.fresh(2)
    whole = axes.product((heads, (*q, *rest)))
    places, tangled = axes.places(whole)
    ((q_axis,),), ((rest_axis,),), ((heads_axis,),) = q, rest, heads
    assert places[q_axis] == [[0, 5], [1, 6], [2, 7]]
    assert places[rest_axis] == [[3, 8], [4, 9]]
    assert places[heads_axis] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert not tangled


def test_a_boundary_across_a_product_is_one_in_every_row() -> None:
    axes = Axes()
    rows, columns = axes.fresh(3), axes.fresh(4)
    axes.unify(axes.product((rows, columns)), (*axes.fresh(6), *axes.fresh(6)), reason="")
    assert axes.resolve(rows) == ((), (), ())
    assert widths(axes, columns) == [[2], [2]]


def test_a_pin_holds_for_all_parts_and_the_first_reason_stays() -> None:
    axes = Axes()
    whole = axes.fresh(8)
    axes.pin(whole, "first")
    axes.pin(whole, "second")
    other = axes.fresh(8)
    parts = axes.pieces(other, (3, 5), reason="")
    axes.unify(whole, other, reason="")
    assert [axes.pin_of(leaf) for part in parts for leaf in axes.leaves(part)] == ["first", "first"]


def test_an_axis_across_itself_is_tangled() -> None:
    axes = Axes()
    one = axes.fresh(3)
    assert axes.places(axes.product((one, one)))[1] == axes.leaves(one)


factors = st.lists(st.integers(1, 4), min_size=1, max_size=4)
parts = st.lists(st.integers(1, 6), min_size=1, max_size=4)


@given(st.lists(st.tuples(st.booleans(), st.randoms(use_true_random=False)), min_size=1, max_size=5))
def test_places_cover_what_sizes_say(steps: list[tuple[bool, object]]) -> None:
    """However a dimension is split, sizes hold, places are in range, in order and even, and twins stay equal."""
    axes, size = Axes(), 24
    whole, twin = axes.fresh(size), axes.fresh(size)
    axes.unify(whole, twin, reason="")
    for is_product, random in steps:
        if is_product:
            first = random.choice([2, 3, 4, 6, 8, 12])  # type: ignore[attr-defined]
            axes.split(whole, (first, size // first), reason="clash")
        else:
            at = random.randint(1, size - 1)  # type: ignore[attr-defined]
            axes.pieces(twin, (at, size - at), reason="clash")
    assert axes.size(whole) == axes.size(axes.resolve(whole)) == size
    assert axes.resolve(whole) == axes.resolve(twin)
    places, _ = axes.places(whole)
    for axis, lists in places.items():
        assert len(lists) == axes.width(axis)
        assert len({len(part) for part in lists}) == 1
        assert all(part == sorted(set(part)) and part[0] >= 0 and part[-1] < size for part in lists)
        flat = [place for part in lists for place in part]
        assert len(flat) == len(set(flat))


@given(factors, factors)
def test_unifying_products_is_agreement_or_a_pin(left: list[int], right: list[int]) -> None:
    axes = Axes()
    one, other = (axes.product([axes.fresh(size) for size in sizes]) for sizes in (left, right))
    agreed = axes.unify(one, other, reason="clash")
    if math.prod(left) != math.prod(right):
        assert not agreed
    assert agreed == (axes.resolve(one) == axes.resolve(other)) or axes.size(one) == 1
    if not agreed:
        assert axes.is_pinned(one)
        assert axes.is_pinned(other)


@given(parts, parts)
def test_sums_always_have_a_common_refinement(left: list[int], right: list[int]) -> None:
    axes = Axes()
    total = max(sum(left), sum(right))
    sums = [(*sizes, total - sum(sizes)) for sizes in (left, right)]
    one, other = (tuple(axes.fresh(size)[0] for size in sizes if size) for sizes in sums)
    assert axes.unify(one, other, reason="clash")
    assert axes.resolve(one) == axes.resolve(other)
    boundaries = {sum(sizes[: i + 1]) for sizes in sums for i in range(len(sizes))}
    ends, done = set(), 0
    for term in axes.resolve(one):
        done += axes.size((term,))
        ends.add(done)
    assert ends == boundaries


# ---- patterns ------------------------------------------------------------------------------------------------------


class Shuffling(nn.Module):
    """A ShuffleNet unit: split, one half through convolutions, joined, interleaved."""

    def __init__(self, *, op: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 1)
        self.narrow, self.depth, self.widen = (
            nn.Conv2d(6, 5, 1),
            nn.Conv2d(5, 5, 3, padding=1, groups=5),
            nn.Conv2d(5, 6, 1),
        )
        self.head = nn.Linear(12, 5)
        self.op = op

    def forward(self, x: Tensor) -> Tensor:
        left, right = functional.relu(self.stem(x)).chunk(2, 1)
        both = torch.cat((left, functional.relu(self.widen(self.depth(functional.relu(self.narrow(right)))))), 1)
        if self.op:
            return self.head(functional.channel_shuffle(both, 2).mean((2, 3)))
        return self.head(both.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2).mean((2, 3)))


class Padded(nn.Module):
    """Option A: zero channels before and after."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 1, stride=2), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.stem(x))
        return self.head((self.wide(x) + functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 3))).mean((2, 3)))


class Pixels(nn.Module):
    """Channels laid out in space."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shuffle, self.last, self.head = (
            nn.Conv2d(3, 20, 1), nn.PixelShuffle(2), nn.Conv2d(5, 4, 1), nn.Linear(4, 5)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.head(functional.relu(self.last(functional.relu(self.shuffle(self.stem(x))))).mean((2, 3)))


class Sliced(nn.Module):
    """A partial convolution: the first channels go through it, the others pass (FasterNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.part, self.head = (
            nn.Conv2d(3, 12, 1), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 4, 1), nn.Linear(12, 5)
        )  # fmt: skip
        self.touched = 4

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.stem(x))
        first, rest = x[:, : self.touched], x[:, self.touched :]
        return self.head(torch.cat((self.part(functional.relu(self.inner(first))), rest), 1).mean((2, 3)))


class Heads(nn.Module):
    """Attention written by hand: fused projection, head count in the forward."""

    def __init__(self, *, interleaved: bool = False, by_hand: bool = False) -> None:
        super().__init__()
        self.heads, self.interleaved, self.by_hand = 3, interleaved, by_hand
        self.qkv, self.output = nn.Linear(8, 36), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        if self.interleaved:
            q, k, v = self.qkv(x).view(n, t, self.heads, -1).transpose(1, 2).chunk(3, -1)
        else:
            q, k, v = self.qkv(x).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if self.by_hand:
            mixed = ((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(-1) @ v
        else:
            mixed = functional.scaled_dot_product_attention(q, k, v)
        return self.output(mixed.transpose(1, 2).reshape(n, t, -1))


class Bert(nn.Module):
    """Three projections, head counts and their product as attributes (as in BERT)."""

    def __init__(self) -> None:
        super().__init__()
        self.num_attention_heads, self.attention_head_size, self.all_head_size = 3, 4, 12
        self.query, self.key, self.value = (nn.Linear(8, 12) for _ in range(3))
        self.dense = nn.Linear(12, 8)

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.num_attention_heads, self.attention_head_size).permute(0, 2, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._heads(self.query(x)), self._heads(self.key(x)), self._heads(self.value(x))
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(self.attention_head_size)
        mixed = torch.matmul(scores.softmax(-1), v).permute(0, 2, 1, 3).contiguous()
        return self.dense(mixed.view(*mixed.shape[:-2], self.all_head_size))


class Grouped(nn.Module):
    """Grouped-query attention with rotary positions by halves, as LLaMA has it: 4 query heads, 2 key-value heads."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.num_kv, self.head_dim = 4, 2, 4
        self.q, self.k, self.v = nn.Linear(8, 16), nn.Linear(8, 8), nn.Linear(8, 8)
        self.o = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q = self.q(x).view(n, t, self.num_heads, self.head_dim).transpose(1, 2)
        k, v = (layer(x).view(n, t, self.num_kv, self.head_dim).transpose(1, 2) for layer in (self.k, self.v))
        angles = torch.outer(torch.arange(t), torch.tensor([1.0, 0.1])).repeat(1, 2)
        q, k = (part * angles.cos() + self._turned(part) * angles.sin() for part in (q, k))
        repeats = self.num_heads // self.num_kv
        k, v = (part[:, :, None].expand(n, -1, repeats, t, -1).flatten(1, 2) for part in (k, v))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(mixed.transpose(1, 2).reshape(n, t, -1))

    @staticmethod
    def _turned(x: Tensor) -> Tensor:
        first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
        return torch.cat((-second, first), -1)


class SwiGlu(nn.Module):
    def __init__(self, *, fused: bool = False) -> None:
        super().__init__()
        self.fused = fused
        self.gate, self.down = nn.Linear(8, 20 if fused else 10), nn.Linear(10, 8)
        self.up = None if fused else nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        if self.up is None:
            gate, up = self.gate(x).chunk(2, -1)
            return self.down(functional.silu(gate) * up)
        return self.down(functional.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """A pre-norm transformer block and a head, on vectors (N, T, 8)."""

    def __init__(self, attention: nn.Module, feed: nn.Module | None = None) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2, self.feed = nn.LayerNorm(8), attention, nn.RMSNorm(8), feed
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + (self.attention(y, y, y)[0] if isinstance(self.attention, nn.MultiheadAttention) else self.attention(y))
        if self.feed is not None:
            x = x + self.feed(self.norm2(x))
        return self.head(x).mean(1)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(1))


class Tables(nn.Module):
    """Features of groups: a group norm whose groups go, but not the channels in one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.last, self.head = (
            nn.Conv2d(3, 12, 1), nn.GroupNorm(3, 12, affine=False), nn.Conv2d(12, 6, 1), nn.Linear(6, 5)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.head(functional.relu(self.last(self.norm(self.stem(x)))).mean((2, 3)))


class Unknown(nn.Module):
    """Channels through an operation that no rule describes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cdist(self.stem(x).flatten(2), self.stem(x).flatten(2)).unsqueeze(-1)
        return self.head(self.last(x).mean((2, 3)))


class Einsum(nn.Module):
    """Attention between channels' heads, by einsum, and a squeeze-and-excite gate."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.squeeze, self.excite, self.last = (
            nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1), nn.Conv2d(8, 6, 1)
        )  # fmt: skip
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.stem(x))
        x = x * self.excite(functional.relu(self.squeeze(x.mean((2, 3), keepdim=True)))).sigmoid()
        return self.head(torch.einsum("nchw->nc", functional.relu(self.last(x))))


VECTORS = (6, 8)
Side = tuple[str, str]


@dataclass(frozen=True)
class Pattern:
    """A network, one sample's shape; by hand: units -> width, some sides' positions, refused layers -> their reason."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    units: Mapping[str, int]
    places: Mapping[tuple[str, str, str], list[list[int]]] = field(default_factory=dict)
    numbers: Mapping[str, dict[str, int]] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)


FUSED = [[4 * (3 * part + head) + i for part in range(3) for i in range(4)] for head in range(3)]
MIXED = [[12 * head + i for i in range(12)] for head in range(3)]
OUTPUT = [[4 * head + i for i in range(4)] for head in range(3)]

PATTERNS: dict[str, Pattern] = {
    "shuffle": Pattern(
        Shuffling, IMAGE, {"stem": 6, "narrow": 5},
        {("stem", "stem", "out"): [[i, 6 + i] for i in range(6)], ("stem", "widen", "out"): [[i] for i in range(6)],
         ("stem", "narrow", "in"): [[i] for i in range(6)],
         ("stem", "head", "in"): [[2 * i, 2 * i + 1] for i in range(6)],
         ("narrow", "depth", "both"): [[i] for i in range(5)]},
    ),
    "shuffle op": Pattern(
        lambda: Shuffling(op=True), IMAGE, {"stem": 6, "narrow": 5},
        {("stem", "head", "in"): [[2 * i, 2 * i + 1] for i in range(6)]},
    ),
    "option A": Pattern(
        Padded, IMAGE, {"stem": 4},
        {("stem", "wide", "out"): [[1 + i] for i in range(4)], ("stem", "wide", "in"): [[i] for i in range(4)],
         ("stem", "head", "in"): [[1 + i] for i in range(4)]},
        refused={"wide": "constant_pad_nd"},
    ),
    "pixel shuffle": Pattern(
        Pixels, IMAGE, {"stem": 5, "last": 4},
        {("stem", "stem", "out"): [list(range(4 * i, 4 * i + 4)) for i in range(5)],
         ("stem", "last", "in"): [[i] for i in range(5)]},
    ),
    "fused qkv": Pattern(
        lambda: Block(Heads()), VECTORS, {"attention.qkv": 3},
        {("attention.qkv", "attention.qkv", "out"): FUSED, ("attention.qkv", "attention.output", "in"): OUTPUT},
        {"attention.qkv": {"attention.heads": 1}},
    ),
    "fused qkv by hand": Pattern(
        lambda: Block(Heads(by_hand=True)), VECTORS, {"attention.qkv": 3},
        {("attention.qkv", "attention.qkv", "out"): FUSED}, {"attention.qkv": {"attention.heads": 1}},
    ),
    "qkv inside heads": Pattern(
        lambda: Block(Heads(interleaved=True)), VECTORS, {"attention.qkv": 3},
        {("attention.qkv", "attention.qkv", "out"): MIXED, ("attention.qkv", "attention.output", "in"): OUTPUT},
        {"attention.qkv": {"attention.heads": 1}},
    ),
    "bert": Pattern(
        lambda: Block(Bert()), VECTORS, {"attention.query": 3},
        {("attention.query", name, side): OUTPUT for name, side in
         (("attention.query", "out"), ("attention.key", "out"), ("attention.value", "out"), ("attention.dense", "in"))},
        {"attention.query": {"attention.num_attention_heads": 1, "attention.all_head_size": 4}},
    ),
    "llama": Pattern(
        lambda: Block(Grouped(), SwiGlu()), VECTORS, {"attention.q": 2, "feed.gate": 10},
        {("attention.q", "attention.q", "out"): [list(range(8)), list(range(8, 16))],
         ("attention.q", "attention.k", "out"): [list(range(4)), list(range(4, 8))],
         ("attention.q", "attention.v", "out"): [list(range(4)), list(range(4, 8))],
         ("attention.q", "attention.o", "in"): [list(range(8)), list(range(8, 16))],
         ("feed.gate", "feed.up", "out"): [[i] for i in range(10)]},
        {"attention.q": {"attention.num_heads": 2, "attention.num_kv": 1}},
    ),
    "fused gate": Pattern(
        lambda: Block(Heads(), SwiGlu(fused=True)), VECTORS, {"attention.qkv": 3, "feed.gate": 10},
        {("feed.gate", "feed.gate", "out"): [[i, 10 + i] for i in range(10)]},
    ),
    "encoder layer": Pattern(
        Encoder, VECTORS, {"layer.linear1": 16}, refused={"layer.self_attn": "self_attn.out_proj is not run itself"},
    ),
    "multi-head attention": Pattern(
        lambda: Block(nn.MultiheadAttention(8, 2, batch_first=True), SwiGlu()), VECTORS, {"feed.gate": 10},
        refused={"attention": "reduces over it"},
    ),
    "squeeze and excite": Pattern(Einsum, IMAGE, {"stem": 8, "squeeze": 4, "last": 6}),
    "groups of a norm": Pattern(
        Tables, IMAGE, {"stem": 3, "last": 6},
        {("stem", "stem", "out"): [list(range(4 * i, 4 * i + 4)) for i in range(3)]},
        {"stem": {"norm.num_groups": 1}},
    ),
    "partial": Pattern(
        Sliced, IMAGE, {"stem": 8, "inner": 6, "part": 4}, {("stem", "stem", "out"): [[4 + i] for i in range(8)]},
    ),
    "unknown": Pattern(Unknown, IMAGE, {"last": 6}, refused={"stem": "cdist"}),
}  # fmt: skip
every_pattern = pytest.mark.parametrize("pattern", PATTERNS.values(), ids=list(PATTERNS))


def example_of(pattern: Pattern) -> Tensor:
    return torch.randn(4, *pattern.shape, generator=torch.Generator().manual_seed(0))


@every_pattern
def test_groups_and_positions_are_those_counted_by_hand(pattern: Pattern) -> None:
    anatomy = discover(randomised(pattern.make()), example_of(pattern), blocks=False)
    assert {group.root: group.width for group in anatomy.groups} == pattern.units
    for (root, layer, axis), places in pattern.places.items():
        (member,) = (m for m in anatomy.group(root).members if (m.layer, m.axis) == (layer, axis))
        assert member.positions.tolist() == places, (root, layer, axis)
    for root, numbers in pattern.numbers.items():
        found = {f"{n.module}.{n.attribute}": n.each for n in anatomy.group(root).numbers}
        assert found == numbers
    refused = {entry.root: entry.reason for entry in anatomy.refused}
    for root, word in pattern.refused.items():
        assert word in refused[root]


@every_pattern
@pytest.mark.parametrize("seed", range(4))
def test_any_cut_equals_its_mask(pattern: Pattern, seed: int) -> None:
    model, example = randomised(pattern.make()), example_of(pattern)
    before = snapshot(model)
    anatomy = discover(model, example, blocks=False)
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for group in anatomy.groups:
        count = int(torch.randint(1, group.width + 1, (), generator=generator))
        kept[group.root] = torch.randperm(group.width, generator=generator)[:count].sort().values
    smaller = cut(model, plan_cut(anatomy.widths, anatomy.groups, kept=kept, dropped=()))
    with torch.no_grad():
        with masked(model, anatomy, kept):
            wanted = model(example)
        assert torch.allclose(smaller(example), wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max().clamp_min(1)))
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


class Outside(nn.Module):
    """Channels that reach an embedding, a slope for each, a bare scale and a grouped norm's parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner, self.slope = nn.Embedding(7, 6), nn.Linear(6, 12), nn.PReLU(12)
        self.scale, self.norm = nn.Parameter(torch.linspace(0.5, 1.5, 12)), nn.GroupNorm(3, 12)
        self.last, self.head = nn.Linear(12, 9), nn.Linear(9, 5)
        self.slopes = nn.PReLU(9, init=0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(self.table((x[:, 0] * 2).long().remainder(7)))
        x = self.norm(self.slope(x) * self.scale)
        return self.head(self.slopes(self.last(x)))


def test_parameters_outside_layers_are_cut_with_them() -> None:
    model, example = randomised(Outside()), torch.randn(4, 3)
    anatomy = discover(model, example, blocks=False)
    assert {group.root: group.width for group in anatomy.groups} == {"table": 6, "inner": 3, "last": 9}
    assert {slab.parameter for slab in anatomy.group("inner").slabs} == {
        "slope.weight", "scale", "norm.weight", "norm.bias"
    }  # fmt: skip
    kept = {"table": torch.tensor([1, 4]), "inner": torch.tensor([0, 2]), "last": torch.tensor([0, 3, 8])}
    smaller = cut(model, plan_cut(anatomy.widths, anatomy.groups, kept=kept, dropped=()))
    assert smaller.get_submodule("norm").num_groups == 2
    assert smaller.get_parameter("slope.weight").shape == (8,)
    with torch.no_grad(), masked(model, anatomy, kept):
        assert torch.allclose(smaller(example), model(example), atol=1e-5)


def test_a_run_in_training_mode_leaves_no_trace() -> None:
    """Statistics of norms, modes and hooks are as before."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Conv2d(4, 2, 1)).train()
    model[3].eval()
    before = snapshot(model)
    coupled_groups(model, torch.randn(2, *IMAGE))
    assert [module.training for module in model] == [True, True, True, False, True]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_tied_weights_are_refused_by_both_names() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.left, self.right = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6)
            self.right.weight = self.left.weight
            self.head = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.right(self.left(self.first(x)).relu()).relu())

    groups, refused = coupled_groups(Tied(), torch.randn(2, 4))
    assert not groups
    assert "left and right share their weights" in {entry.root: entry.reason for entry in refused}["first"]


def test_the_trace_knows_every_parameter() -> None:
    model = randomised(Block(Heads(), SwiGlu()))
    traced = trace(model, torch.randn(2, *VECTORS))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert {name: tuple(traced.axes.size(e) for e in dims) for name, dims in traced.dims.items()} == shapes


class Part(nn.Module):
    """A partial convolution whose two widths are written down (FasterNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.taken, self.passed = 3, 9
        self.inner = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        first, rest = torch.split(x, [self.taken, self.passed], 1)
        return torch.cat((self.inner(first).relu(), rest), 1)


def test_a_width_that_every_block_writes_down() -> None:
    """More blocks than attributes that are tried one by one."""
    model = randomised(
        nn.Sequential(
            nn.Conv2d(3, 12, 1), *(Part() for _ in range(8)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)
        )
    )
    group = discover(model, torch.randn(2, *IMAGE), blocks=False).group("0")
    assert group.width == 9
    assert {(number.module, number.attribute, number.each) for number in group.numbers} == {
        (str(place), "passed", 1) for place in range(1, 9)
    }


def test_a_pool_to_one_position_in_another_layout_keeps_its_channels() -> None:
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    model = randomised(nn.Sequential(*layers)).to(memory_format=torch.channels_last)
    assert [group.width for group in discover(model, torch.randn(2, *IMAGE)).groups] == [8]
