"""Hidden sizes: a cut stream is the masked model whose norms look only at the channels that stay."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import onnxruntime
import pytest
import torch
from networks import masked, randomised
from test_plain import kept_of
from torch import Tensor, nn
from torch.nn import functional

from autoprune.model.cut import cut, plan_cut
from autoprune.model.discover import Anatomy, discover
from autoprune.model.plain import plain_copy
from autoprune.runtimes.onnxruntime import export

torch.set_num_threads(1)
TOKENS = torch.randint(0, 11, (2, 6), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@contextmanager
def norms_over(model: nn.Module, places: Mapping[str, Tensor]) -> Iterator[None]:
    """Norms of the last dimension, written by hand, over `places` alone; zeros elsewhere."""

    def over(keep: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def after(norm: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x, weight = inputs[0][..., keep], norm.get_parameter("weight")[keep]
            if isinstance(norm, nn.LayerNorm):
                x = x - x.mean(-1, keepdim=True)
            eps = getattr(norm, "eps", None) or getattr(norm, "variance_epsilon", torch.finfo(torch.float32).eps)
            x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight
            x = x + norm.bias[keep] if getattr(norm, "bias", None) is not None else x
            return torch.zeros_like(output).index_copy(-1, keep, x)

        return after

    handles = [model.get_submodule(name).register_forward_hook(over(keep)) for name, keep in places.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def assert_cut_is_the_narrow_model(
    model: nn.Module, example: Tensor, units: Mapping[str, int]
) -> tuple[Anatomy, nn.Module]:
    anatomy = discover(model, example, blocks=False, hidden=True)
    assert {group.root: group.width for group in anatomy.groups} == units
    for seed in range(3):
        kept = kept_of(anatomy, seed)
        (wide,) = (group for group in anatomy.groups if group.norms)
        smaller = cut(model, plan_cut(anatomy.widths, anatomy.groups, kept=kept, dropped=()))
        with torch.no_grad():
            with masked(model, anatomy, kept), norms_over(model, dict.fromkeys(wide.norms, kept[wide.root])):
                wanted = model(example)
            found = smaller(example)
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5 * max(1.0, float(wanted.abs().max())))
    session = onnxruntime.InferenceSession(export(smaller, example), providers=["CPUExecutionProvider"])
    (made,) = session.run(None, {session.get_inputs()[0].name: example.numpy()})
    assert np.allclose(made, found.numpy(), rtol=1e-4, atol=1e-5 * max(1.0, float(wanted.abs().max())))
    return anatomy, smaller


class Block(nn.Module):
    def __init__(
        self, width: int, norm: Callable[[int], nn.Module], *, post: bool = False, causal: bool = True
    ) -> None:
        super().__init__()
        self.norm1, self.norm2, self.post, self.causal = norm(width), norm(width), post, causal
        self.qkv, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def attend(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, -1, 4).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.output(mixed.transpose(1, 2).reshape(n, t, -1))

    def forward(self, x: Tensor) -> Tensor:
        if self.post:
            x = self.norm1(x + self.attend(x))
            return self.norm2(x + self.down(functional.gelu(self.up(x))))
        x = x + self.attend(self.norm1(x))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class Language(nn.Module):
    """A small GPT or, with RMS norms and no positions, LLaMA's shape; tied or not; norms before or after."""

    def __init__(
        self, norm: Callable[[int], nn.Module] = nn.LayerNorm, *, tied: bool = False, post: bool = False
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(11, 12), nn.Parameter(torch.randn(1, 6, 12))
        self.blocks = nn.Sequential(*(Block(12, norm, post=post) for _ in range(2)))
        self.last, self.head = norm(12), nn.Linear(12, 11, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.blocks(self.tokens(x) + self.positions)))


class Vision(nn.Module):
    """A small ViT: patches, a class token, positions."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.first = nn.Conv2d(3, 12, 4, stride=4), nn.Parameter(torch.randn(1, 1, 12))
        self.positions = nn.Parameter(torch.randn(1, 5, 12))
        self.block, self.last, self.head = Block(12, nn.LayerNorm, causal=False), nn.LayerNorm(12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.first.expand(len(x), -1, -1), x), 1) + self.positions
        return self.head(self.last(self.block(x))[:, 0])


INNER = {f"blocks.{i}.{name}": width for i in range(2) for name, width in (("qkv", 3), ("up", 24))}
STREAMS: dict[str, tuple[Callable[[], nn.Module], Tensor, dict[str, int]]] = {
    "gpt": (Language, TOKENS, {"tokens": 12, **INNER}),
    "tied": (lambda: Language(tied=True), TOKENS, {"blocks.0.output": 12, **INNER}),
    "rms norms": (lambda: Language(nn.RMSNorm), TOKENS, {"tokens": 12, **INNER}),
    "norms after": (lambda: Language(post=True), TOKENS, {"tokens": 12, **INNER}),
    "vision": (Vision, IMAGES, {"patches": 12, "block.qkv": 3, "block.up": 24}),
}


@pytest.mark.parametrize("name", STREAMS)
def test_a_narrow_stream(name: str) -> None:
    make, example, units = STREAMS[name]
    model = randomised(make())
    anatomy, smaller = assert_cut_is_the_narrow_model(model, example, units)
    assert discover(model, example, blocks=False).units != anatomy.units
    if name == "tied":
        assert smaller.get_parameter("head.weight") is smaller.get_parameter("tokens.weight")
        assert model.get_parameter("head.weight") is model.get_parameter("tokens.weight")


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit"])
def test_streams_of_transformers(name: str) -> None:
    hugging_face = pytest.importorskip("test_hugging_face")
    example = hugging_face.example_of(name)
    plain = plain_copy(hugging_face.made(name, "sdpa"), example)
    first = {"llama": "model.embed_tokens", "gpt2": "transformer.wpe", "bert": "bert.embeddings.word_embeddings",
             "vit": "vit.embeddings.patch_embeddings.projection"}[name]  # fmt: skip
    assert_cut_is_the_narrow_model(plain.model, example, {**hugging_face.MODELS[name][2], f"inner.{first}": 32})


def test_what_cannot_narrow_is_refused_by_name() -> None:
    """A norm without weights of its own, and channels inside the groups of a norm."""
    bare = randomised(Language(lambda width: nn.LayerNorm(width, elementwise_affine=False)))
    anatomy = discover(bare, TOKENS, blocks=False, hidden=True)
    refused = {entry.root: entry.reason for entry in anatomy.refused}
    assert refused["tokens"].startswith("it is normalised by blocks.0.norm1 and 4 more")
    grouped = nn.Sequential(nn.Conv2d(3, 12, 1), nn.GroupNorm(1, 12), nn.Conv2d(12, 5, 1), nn.Conv2d(5, 4, 1))
    anatomy = discover(randomised(grouped), IMAGES, blocks=False, hidden=True)
    assert {entry.root for entry in anatomy.refused} == {"0", "3"}


def test_weights_that_cross_themselves_stay() -> None:
    """Shared by two layers in a row: a channel would lie along both dimensions of one weight."""

    class Crossed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.left, self.right, self.head = (
                nn.Linear(i, o) for i, o in ((4, 6), (6, 6), (6, 6), (6, 3))
            )
            self.right.weight = self.left.weight
            self.last = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.head(self.right(self.left(self.first(x)).relu()).relu()).relu())

    anatomy = discover(randomised(Crossed()), torch.randn(2, 4), blocks=False, hidden=True)
    assert [group.root for group in anatomy.groups] == ["head"]
    assert {entry.root: entry.reason for entry in anatomy.refused}["first"] == "left and right share their weights"
