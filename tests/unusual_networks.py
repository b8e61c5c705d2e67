"""Small networks whose cost is not that of convolutions and linear layers alone. Random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


class Attention(nn.Module):
    """Fused projection of query, key and value; causal by a stored mask, or not."""

    def __init__(self, width: int, heads: int, *, context: int = 0) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.register_buffer("mask", torch.ones(context, context).tril() if context else None)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
        if self.mask is not None:
            scores = scores.masked_fill(self.mask[:t, :t] == 0, -1e9)
        return self.output((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, t, -1))


class Block(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, width: int, heads: int, *, context: int = 0) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads, context=context)
        self.norm2, self.feed = (
            nn.LayerNorm(width),
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.feed(self.norm2(x))


class Vit(nn.Module):
    """Patches by convolution, a class token and positions as bare parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 16)), nn.Parameter(torch.randn(1, 5, 16))
        self.blocks = nn.Sequential(*(Block(16, 4) for _ in range(3)))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(len(x), -1, -1), x), 1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


class Gpt(nn.Module):
    """A decoder whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(200, 24), nn.Embedding(8, 24)
        self.blocks = nn.ModuleList(Block(24, 3, context=8) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, 200, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Grouped(nn.Module):
    """Grouped-query attention, rotated by halves, and a gated feed-forward, as LLaMA has them."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.heads, self.shared, self.each = 4, 2, 4
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.o = nn.Linear(width, 16, bias=False), nn.Linear(16, width, bias=False)
        self.k, self.v = nn.Linear(width, 8, bias=False), nn.Linear(width, 8, bias=False)
        self.gate, self.up, self.down = nn.Linear(width, 20), nn.Linear(width, 20), nn.Linear(20, width)

    def attend(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q = self.q(x).view(n, t, self.heads, self.each).transpose(1, 2)
        k, v = (layer(x).view(n, t, self.shared, self.each).transpose(1, 2) for layer in (self.k, self.v))
        angles = torch.outer(torch.arange(t), torch.tensor([1.0, 0.1])).repeat(1, 2)
        q, k = (part * angles.cos() + self._turned(part) * angles.sin() for part in (q, k))
        k, v = (part[:, :, None].expand(n, -1, 2, t, -1).flatten(1, 2) for part in (k, v))
        return self.o(
            functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(n, t, -1)
        )

    @staticmethod
    def _turned(x: Tensor) -> Tensor:
        first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
        return torch.cat((-second, first), -1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x))
        y = self.norm2(x)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.blocks = nn.Embedding(30, 16), nn.Sequential(Grouped(), Grouped())
        self.head = nn.Linear(16, 30, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.blocks(self.embedding(tokens)))


class Encoder(nn.Module):
    """torch's own layer, whose attention takes weights from parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(1))


class Bare(nn.Module):
    """Products of bare parameters, an einsum, a transposed convolution, an LSTM and a layer that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.bias = nn.Parameter(torch.randn(8, 12) / 3), nn.Parameter(torch.zeros(12))
        self.mixing, self.twice = nn.Parameter(torch.randn(3, 12, 6) / 3), nn.Linear(6, 6)
        self.wider = nn.ConvTranspose1d(6, 4, 2, 2, groups=2)
        self.memory, self.first, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 7), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        x = torch.addmm(self.bias, x.reshape(n * t, -1), self.matrix).view(n, t, 12)
        x = torch.einsum("ntc,gcd->ntd", x, self.mixing)
        x = self.twice(self.twice(x).relu()).relu()
        x = self.wider(x.transpose(1, 2)).transpose(1, 2)
        return self.head(self.first(self.memory(x)[0][:, -1]).relu())


class Outside(nn.Module):
    """Channels that reach an embedding, positions, slopes, a bare scale, and norms of groups; nothing is normalised
    over them all.
    """

    def __init__(self) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(30, 24), nn.Parameter(torch.randn(6, 24))
        self.inner, self.slope = nn.Linear(24, 48), nn.PReLU(48)
        self.scale, self.norm = nn.Parameter(torch.linspace(0.5, 1.5, 48)), nn.GroupNorm(6, 48)
        self.last, self.slopes, self.head = nn.Linear(48, 36), nn.PReLU(36, init=0.1), nn.Linear(36, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = (self.table(tokens) + self.places).mean(1)
        x = self.norm(self.slope(self.inner(x)) * self.scale)
        return self.head(self.slopes(self.last(x)))


class Slopes(nn.Module):
    """Convolutions with a slope for each channel and one for all, in a block that may go."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.slope = nn.Conv2d(3, 24, 3, padding=1), nn.PReLU(24)
        self.block = Slopes.Inner()
        self.head = nn.Linear(24, 5)

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.slope, self.last = nn.Conv2d(24, 32, 3, padding=1), nn.PReLU(32), nn.Conv2d(32, 24, 1)
            self.gain, self.one = nn.Parameter(torch.ones(24, 1, 1)), nn.PReLU()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.one(self.gain * self.last(self.slope(self.first(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.slope(self.stem(x))).mean((2, 3)))


def _tokens(vocabulary: int, length: int) -> Callable[[int], Tensor]:
    return lambda count: torch.randint(vocabulary, (count, length), generator=torch.Generator().manual_seed(count))


def _numbers(*shape: int) -> Callable[[int], Tensor]:
    return lambda count: torch.randn(count, *shape, generator=torch.Generator().manual_seed(count))


@dataclass(frozen=True)
class Network:
    """How to make a network and its samples, and by hand the units (blocks without a width) it has."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]
    units: dict[str, int]


def _blocks(count: int, channels: dict[str, int]) -> dict[str, int]:
    return {f"blocks.{i}.{name}".rstrip("."): width for i in range(count) for name, width in channels.items()}


NETWORKS = {
    "vit": Network(Vit, _numbers(3, 8, 8), _blocks(3, {"": 1, "attention.qkv": 4, "feed.0": 64})),
    "gpt": Network(Gpt, _tokens(200, 8), _blocks(3, {"": 1, "attention.qkv": 3, "feed.0": 96})),
    "llama": Network(Llama, _tokens(30, 7), _blocks(2, {"": 1, "q": 2, "gate": 20})),
    "encoder": Network(Encoder, _numbers(6, 12), {"layer.linear1": 20}),
    "bare": Network(Bare, _numbers(6, 8), {"first": 7, "memory": 5, "wider": 2}),
    "outside": Network(Outside, _tokens(30, 6), {"table": 24, "inner": 6, "last": 36}),
    "slopes": Network(Slopes, _numbers(3, 8, 8), {"stem": 24, "block": 1, "block.first": 32}),
}
