"""Opaque modules: what stands in for them computes the same, can be cut, and is rebuilt without autoprune."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import onnxruntime
import pytest
import torch
from networks import masked, randomised, snapshot
from torch import Tensor, nn
from torch.nn import functional

from autoprune.apply import Applied
from autoprune.core.policy import Policy
from autoprune.model.cut import cut, plan_cut
from autoprune.model.discover import Anatomy, discover
from autoprune.model.plain import plain_copy
from autoprune.model.plain_modules import Attention
from autoprune.progress import Silent
from autoprune.runtimes.onnxruntime import export
from autoprune.ship import write_model
from autoprune.storage import Weights

torch.set_num_threads(1)


def kept_of(anatomy: Anatomy, seed: int) -> dict[str, Tensor]:
    """A random choice for every unit, of one channel at least."""
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for group in anatomy.groups:
        count = int(torch.randint(1, group.width + 1, (), generator=generator))
        kept[group.root] = torch.randperm(group.width, generator=generator)[:count].sort().values
    return kept


def assert_cuts_equal_masks(model: nn.Module, example: Tensor, units: dict[str, int]) -> nn.Module:
    """Random cuts of all units against their masks, in torch and, the last one, in ONNX Runtime. Returns that one."""
    anatomy = discover(model, example, blocks=False)
    assert {group.root: group.width for group in anatomy.groups} == units
    for seed in range(3):
        kept = kept_of(anatomy, seed)
        smaller = cut(model, plan_cut(anatomy.widths, anatomy.groups, kept=kept, dropped=()))
        with torch.no_grad(), masked(model, anatomy, kept):
            wanted = model(example)
        with torch.no_grad():
            found = smaller(example)
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5 * max(1.0, float(wanted.abs().max())))
    session = onnxruntime.InferenceSession(export(smaller, example), providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    (made,) = session.run(None, {given.name: example.numpy()})
    assert np.allclose(made, found.numpy(), rtol=1e-4, atol=1e-5 * max(1.0, float(wanted.abs().max())))
    return smaller


# ---- multi-head attention ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(24))
def test_attention_is_what_multi_head_attention_computes(seed: int) -> None:
    """Over configurations drawn at random: layout, masks, cross attention, other widths of keys, weights or none."""
    draw = torch.Generator().manual_seed(seed)

    def one_of(*choices: object) -> object:
        return choices[int(torch.randint(len(choices), (), generator=draw))]

    width, heads, n, long, short = 12, one_of(1, 2, 3), 3, 6, one_of(4, 6)
    mode = one_of("self", "cross", "wide")
    kdim, vdim = (7, 9) if mode == "wide" else (width, width)
    batched, first, bias = one_of(True, True, False), bool(one_of(True, False)), bool(one_of(True, False))
    own = nn.MultiheadAttention(width, heads, bias=bias, batch_first=first, kdim=kdim, vdim=vdim).eval()  # type: ignore[arg-type]
    own = randomised(own)
    fused = mode == "self" or (mode == "cross" and bool(one_of(True, False)))
    plain = Attention(own, fused=fused, silent=False).eval()

    def made(positions: int, features: int) -> Tensor:
        shape = (n, positions, features) if first else (positions, n, features)
        return torch.randn(*(shape if batched else (positions, features)), generator=draw)

    query = made(long, width)
    keys = long if mode == "self" else short
    key, value = (query, query) if mode == "self" else (made(keys, kdim), made(keys, vdim))
    given: dict[str, object] = {"need_weights": one_of(True, False), "average_attn_weights": one_of(True, False)}
    padding = torch.rand(n, keys, generator=draw) < 0.3  # type: ignore[arg-type]
    padding[:, 0] = False
    given["key_padding_mask"] = one_of(None, padding if batched else padding[0])
    triangle = torch.ones(long, keys, dtype=torch.bool).triu(1)  # type: ignore[call-overload]
    per_head = torch.randn((n if batched else 1) * heads, long, keys, generator=draw)  # type: ignore[operator]
    given["attn_mask"] = one_of(None, triangle, triangle.float() * -2, per_head)
    given["is_causal"] = given["attn_mask"] is triangle and mode == "self" and one_of(True, False)
    with torch.no_grad():
        wanted, weights = own(query, key, value, **given)
        found, found_weights = plain(query, key, value, **given)
    assert found.shape == wanted.shape
    assert torch.allclose(found, wanted, atol=1e-6 * max(1.0, float(wanted.abs().max())), rtol=1e-6)
    assert (found_weights is None) == (weights is None)
    if weights is not None:
        assert torch.allclose(found_weights, weights, atol=1e-6)


class Encoder(nn.Module):
    def __init__(self, **given: object) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 24, **given)  # type: ignore[arg-type]
        self.encoder, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x)).mean(1)


class Translator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Transformer(16, 4, 1, 1, 24, batch_first=True), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return self.head(self.inner(x, x.flip(1), tgt_mask=mask)).mean(1)


class Weighted(nn.Module):
    """Asks for attention weights; reads them or not."""

    def __init__(self, *, reads: bool) -> None:
        super().__init__()
        self.attention, self.head, self.reads = nn.MultiheadAttention(16, 4, batch_first=True), nn.Linear(16, 5), reads

    def forward(self, x: Tensor) -> Tensor:
        y, weights = self.attention(x, x, x)
        return self.head(x + y).mean(1) * (weights.amax((1, 2))[:, None] if self.reads else 1)


ENCODER = {f"encoder.layers.{i}.{name}": width for i in (0, 1) for name, width in
           (("self_attn.in_proj", 4), ("linear1", 24))}  # fmt: skip
TRANSLATOR = {
    "inner.encoder.layers.0.self_attn.in_proj": 4, "inner.encoder.layers.0.linear1": 24,
    "inner.decoder.layers.0.self_attn.in_proj": 4, "inner.decoder.layers.0.multihead_attn.q_proj": 4,
    "inner.decoder.layers.0.linear1": 24,
}  # fmt: skip
OPAQUE: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "encoder": (lambda: Encoder(batch_first=True), ENCODER),
    "encoder, positions first": (Encoder, ENCODER),
    "encoder, norms first": (lambda: Encoder(batch_first=True, norm_first=True, bias=False), ENCODER),
    "translator": (Translator, TRANSLATOR),
    "weights that nobody reads": (lambda: Weighted(reads=False), {"attention.in_proj": 4}),
}


@pytest.mark.parametrize("name", OPAQUE)
def test_heads_are_cut(name: str) -> None:
    make, units = OPAQUE[name]
    model, example = randomised(make()), torch.randn(3, 6, 16, generator=torch.Generator().manual_seed(1))
    before = snapshot(model)
    plain = plain_copy(model, example)
    assert not plain.refused
    with torch.no_grad():
        assert torch.allclose(plain.model(example), model(example), atol=1e-5, rtol=1e-5)
    assert_cuts_equal_masks(plain.model, example, units)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_attention_weights_that_are_read_keep_the_heads() -> None:
    model, example = randomised(Weighted(reads=True)), torch.randn(3, 6, 16)
    plain = plain_copy(model, example)
    assert plain.kinds == {"attention": ("attention", "fused")}
    anatomy = discover(plain.model, example, blocks=False, weights=True)
    assert not anatomy.groups
    assert "attention.in_proj" in {entry.root for entry in anatomy.refused}


def test_what_looks_inside_stays_opaque() -> None:
    class Curious(Weighted):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.attention.in_proj_weight.mean()

    plain = plain_copy(Curious(reads=False), torch.randn(2, 6, 16))
    assert (plain.kinds, plain.refused) == ({}, ("attention",))
    assert isinstance(plain.model.get_submodule("attention"), nn.MultiheadAttention)


# ---- weights that lie the other way round, or are computed ---------------------------------------------------------


class Turned(nn.Module):
    """x W + b, as GPT-2 has it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


def test_transposed_layers_are_linear() -> None:
    model, example = nn.Sequential(Turned(6, 10), nn.GELU(), Turned(10, 4)), torch.randn(3, 5, 6)
    plain = plain_copy(model, example)
    assert plain.kinds == {"0": ("transposed",), "2": ("transposed",)}
    assert_cuts_equal_masks(plain.model, example, {"0": 10})


def test_a_layer_that_only_looks_transposed_stays() -> None:
    class Squared(Turned):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) ** 2

    model = nn.Sequential(Squared(6, 10), nn.Embedding(3, 3), nn.Linear(10, 4))
    assert plain_copy(model[::2], torch.randn(3, 6)).kinds == {}


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_weight_norm_is_computed_once(norm: Callable[[nn.Module], nn.Module]) -> None:
    with torch.no_grad():
        model = nn.Sequential(norm(nn.Conv2d(3, 8, 1)), nn.ReLU(), norm(nn.Conv2d(8, 4, 1)))
    example = torch.randn(2, 3, 5, 5)
    plain = plain_copy(model, example)
    assert set(plain.kinds) == {"0", "2"}
    assert_cuts_equal_masks(plain.model, example, {"0": 8})
    assert "weight" not in dict(model[0].named_parameters())
    with torch.no_grad():
        assert torch.allclose(model(example), plain.model(example), atol=1e-5)


# ---- integers in what modules share --------------------------------------------------------------------------------


class Shared(nn.Module):
    """Attention whose number of heads stands in a configuration that two layers share, or in a tuple, or in a dict."""

    def __init__(self, held: object) -> None:
        super().__init__()
        self.held = held
        self.qkv, self.output = nn.Linear(8, 36), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        if isinstance(self.held, tuple):
            heads = self.held[1]
        else:
            heads = self.held["heads"] if isinstance(self.held, dict) else self.held.heads  # type: ignore[attr-defined]
        q, k, v = self.qkv(x).view(n, t, 3, heads, -1).permute(2, 0, 3, 1, 4)
        return self.output(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, -1))


HELD = {"config": SimpleNamespace(heads=3, depth=2), "tuple": (2, 3), "dict": {"heads": 3}}


@pytest.mark.parametrize("held", HELD.values(), ids=list(HELD))
def test_each_layer_gets_numbers_of_its_own(held: object) -> None:
    model, example = randomised(nn.Sequential(Shared(held), Shared(held))), torch.randn(2, 6, 8)
    smaller = assert_cuts_equal_masks(model, example, {"0.qkv": 3, "0.output": 8, "1.qkv": 3})
    assert model[0].held is model[1].held
    assert smaller[0].held is not held


OWN_MODELS = """
import torch
from torch import nn
from types import SimpleNamespace


class Turned(nn.Module):
    def __init__(self, i, o):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(i, o)), nn.Parameter(torch.randn(o))

    def forward(self, x):
        return x @ self.weight + self.bias


class Heads(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.qkv, self.out = config, nn.Linear(16, 36), nn.Linear(12, 16)

    def forward(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.config.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.out(mixed.transpose(1, 2).flatten(2))


class Opaque(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
        config = SimpleNamespace(heads=3)
        self.heads = nn.Sequential(Heads(config), Heads(config))
        self.rnn = nn.LSTM(16, 8, num_layers=2, bidirectional=True, batch_first=True)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(16, 12))
        self.turned, self.head = Turned(12, 10), nn.Linear(10, 5)

    def forward(self, x):
        x = self.rnn(self.heads(self.encoder(x)))[0]
        return self.head(self.turned(self.normed(x).relu()).relu()).mean(1)


class Stream(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(11, 16), nn.Parameter(torch.randn(6, 16))
        self.encoder = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, norm_first=True)
        self.heads, self.norm, self.head = Heads(SimpleNamespace(heads=3)), nn.RMSNorm(16), nn.Linear(16, 11)
        self.head.weight = self.tokens.weight

    def forward(self, x):
        return self.head(self.norm(self.heads(self.encoder(self.tokens(x) + self.positions))))
"""
OWN: dict[str, tuple[Tensor, set[str]]] = {
    "Opaque": (torch.randn(2, 6, 16), {"encoder.self_attn", "rnn", "normed", "turned"}),
    "Stream": (torch.arange(12).view(2, 6).remainder(11), {"encoder.self_attn"}),
}


@pytest.mark.parametrize("name", OWN)
def test_the_rebuild_script_makes_the_plain_modules(name: str, tmp_path: Path) -> None:
    """In a process without autoprune, from the person's own factory: every kind, shared numbers, a narrow stream."""
    (tmp_path / "own.py").write_text(OWN_MODELS)
    made: dict[str, Callable[[], nn.Module]] = {}
    exec(OWN_MODELS, made)
    example, opaque = OWN[name]
    torch.manual_seed(0)
    plain = plain_copy(made[name](), example)
    assert set(plain.kinds) == opaque
    anatomy = discover(plain.model, example, blocks=False, hidden=True)
    kept = kept_of(anatomy, 0)
    assert any(group.norms and len(kept[group.root]) < group.width for group in anatomy.groups) or name != "Stream"
    plan = plan_cut(anatomy.widths, anatomy.groups, kept=kept, dropped=())
    smaller = cut(plain.model, plan)
    applied = Applied(cast(Policy, None), smaller, plan, Weights({}, ()), {}, {}, plain.kinds)
    folder = tmp_path / "out"
    folder.mkdir()
    write_model(applied, example=example, factory=f"own.py:{name}", source=tmp_path, folder=folder, progress=Silent())
    with torch.no_grad():
        torch.save((example, smaller(example), sum(p.numel() for p in smaller.parameters())), folder / "wanted.pt")
    lines = (
        "import sys, torch", "sys.modules['autoprune'] = None", "from rebuild import model",
        "example, wanted, count = torch.load('wanted.pt')", "network = model()",
        "assert sum(p.numel() for p in network.parameters()) == count",
        "with torch.no_grad(): assert torch.allclose(network(example), wanted, atol=1e-6)",
    )  # fmt: skip
    subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=folder, check=True)
