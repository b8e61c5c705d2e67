"""The words of the grammar: one small module for each pattern that networks are written in.

Knows torch alone, and nothing of units or cutting. Variants are numbers: each word reads its choices off them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

T = TypeVar("T")


def pick(number: int, choices: Sequence[T]) -> T:
    """One of `choices`, by a number of any size."""
    return choices[number % len(choices)]


ACTIVATIONS: tuple[Callable[[], nn.Module], ...] = (
    nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.GELU, nn.LeakyReLU, nn.Identity, nn.ELU, nn.Mish,
    lambda: nn.ReLU(inplace=True), lambda: nn.Hardtanh(0.0, 1.0), nn.Tanh, nn.Softplus,
)  # fmt: skip
NORM_NAMES = ("batch", "none", "batch plain", "group", "instance")


def norm(name: str, width: int, space: int = 2) -> nn.Module:
    batch = (nn.BatchNorm1d, nn.BatchNorm2d)[space - 1]
    instance = (nn.InstanceNorm1d, nn.InstanceNorm2d)[space - 1]
    made: dict[str, Callable[[], nn.Module]] = {
        "batch": lambda: batch(width),
        "batch plain": lambda: batch(width, affine=False),
        "none": nn.Identity,
        "group": lambda: nn.GroupNorm(2, width),
        "instance": lambda: instance(width, affine=True),
    }
    return made[name]()


def conv(inputs: int, outputs: int, kernel: int = 3, **options: int) -> list[nn.Module]:
    """A padded convolution without bias and its norm."""
    return [nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False, **options), nn.BatchNorm2d(outputs)]


class Plain(nn.Sequential):
    """Convolution, norm, activation; all variants of each. `space` 1 or 2."""

    def __init__(self, inputs: int, outputs: int, variant: int, space: int = 2) -> None:
        layer = (nn.Conv1d, nn.Conv2d)[space - 1]
        name, kernel = pick(variant, NORM_NAMES), pick(variant // 2, (3, 1, 5))
        super().__init__(
            layer(inputs, outputs, kernel, padding=kernel // 2, bias=variant % 3 == 0 or name == "none"),
            norm(name, outputs, space),
            pick(variant, ACTIVATIONS)(),
        )


class Basic(nn.Module):
    """A basic residual block; the shortcut is the identity, a projection, or zero-padded channels."""

    def __init__(self, inputs: int, outputs: int, variant: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*conv(inputs, outputs), nn.ReLU(), *conv(outputs, outputs))
        self.shortcut = nn.Sequential(*conv(inputs, outputs, 1)) if inputs > outputs or variant % 2 else nn.Identity()
        self.more = 0 if isinstance(self.shortcut, nn.Sequential) else outputs - inputs
        self.last = pick(variant // 2, ACTIVATIONS[:3])()

    def forward(self, x: Tensor) -> Tensor:
        rest = self.shortcut(x)
        if self.more:
            rest = functional.pad(rest, (0, 0, 0, 0, self.more // 2, self.more - self.more // 2))
        return self.last(self.body(x) + rest)


class Around(nn.Module):
    """A residual block of any body that keeps the width; what comes after the addition."""

    def __init__(self, body: nn.Module, last: nn.Module | None = None) -> None:
        super().__init__()
        self.body, self.last = body, last or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x + self.body(x))


def bottleneck(inputs: int, inner: int, variant: int) -> nn.Module:
    """1x1, 3x3 (grouped), 1x1, and the identity; or the norms and activations first."""
    groups = pick(variant, (1, 2, 1, 4))
    if variant % 3 == 2:
        return Around(
            nn.Sequential(
                nn.BatchNorm2d(inputs), nn.ReLU(), nn.Conv2d(inputs, inner, 1, bias=False),
                nn.BatchNorm2d(inner), nn.ReLU(), nn.Conv2d(inner, inputs, 3, padding=1, bias=False),
            )
        )  # fmt: skip
    body = [*conv(inputs, inner, 1), nn.ReLU(), *conv(inner, inner, groups=groups), nn.ReLU(), *conv(inner, inputs, 1)]
    return Around(nn.Sequential(*body), nn.ReLU())


class Gate(nn.Module):
    """Squeeze and excite: every channel scaled by a function of all."""

    def __init__(self, width: int, inner: int, variant: int) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(width, inner, 1), nn.Conv2d(inner, width, 1)
        self.inside, self.last = pick(variant, (nn.ReLU, nn.SiLU))(), pick(variant, (nn.Hardsigmoid, nn.Sigmoid))()

    def forward(self, x: Tensor) -> Tensor:
        mean = functional.adaptive_avg_pool2d(x, 1)
        return x * self.last(self.excite(self.inside(self.squeeze(mean))))


def separable(inputs: int, outputs: int, variant: int) -> nn.Module:
    active = pick(variant, ACTIVATIONS[:4])
    return nn.Sequential(*conv(inputs, inputs, 3, groups=inputs), active(), *conv(inputs, outputs, 1), active())


def inverted(inputs: int, inner: int, variant: int) -> nn.Module:
    """Widen, depthwise, gate, narrow, and the identity (MobileNetV3)."""
    active = pick(variant, (nn.Hardswish, nn.ReLU6, nn.SiLU))
    gate = Gate(inner, 4, variant) if variant % 2 == 0 else nn.Identity()
    depthwise = conv(inner, inner, groups=inner)
    body = [*conv(inputs, inner, 1), active(), *depthwise, active(), gate, *conv(inner, inputs, 1)]
    return Around(nn.Sequential(*body))


class Interleaved(nn.Module):
    """Grouped convolutions with their channels shuffled between them (ShuffleNet)."""

    def __init__(self, inputs: int, outputs: int, variant: int) -> None:
        super().__init__()
        self.entry = nn.Sequential(*conv(inputs, outputs, 1), nn.ReLU())
        self.first = nn.Sequential(*conv(outputs, outputs, groups=2))
        self.second = nn.Conv2d(outputs, outputs, 1, groups=2)
        self.variant = variant

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.entry(x))
        n, c, h, w = x.shape
        if self.variant % 3 == 0:
            x = functional.channel_shuffle(x, 2)
        elif self.variant % 3 == 1:
            x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        else:
            x = x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
        return functional.relu(self.second(x))


class Shuffle(nn.Module):
    """A ShuffleNetV2 unit: half passes, half goes through convolutions, both are interleaved."""

    def __init__(self, inputs: int, outputs: int, variant: int) -> None:
        super().__init__()
        self.entry = nn.Sequential(*conv(inputs, outputs, 1), nn.ReLU())
        half = outputs // 2

        def branch() -> nn.Module:
            depthwise = conv(half, half, groups=half)
            return nn.Sequential(*conv(half, half, 1), nn.ReLU(), *depthwise, *conv(half, half, 1), nn.ReLU())

        self.units = nn.ModuleList(branch() for _ in range(1 + variant % 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        for unit in self.units:
            left, right = x.chunk(2, 1)
            x = torch.cat((left, unit(right)), 1).unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
        return x


class Dense(nn.Module):
    """Every layer reads all before it (DenseNet), the norm first or last."""

    def __init__(self, inputs: int, growth: int, variant: int) -> None:
        super().__init__()
        widths = [inputs + growth * index for index in range(2)]
        before = variant % 2 == 0
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, growth, 3, padding=1, bias=False))
            if before else nn.Sequential(*conv(width, growth), nn.ReLU())
            for width in widths
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat((x, layer(x)), 1)
        return x


class Branches(nn.Module):
    """Branches that are joined: Fire (squeeze, then two), Inception (one of them a pool), or dilated sums (ESP)."""

    def __init__(self, inputs: int, outputs: int, variant: int) -> None:
        super().__init__()
        self.kind = pick(variant, ("fire", "inception", "sums"))
        half = outputs // 2
        self.squeeze = nn.Sequential(nn.Conv2d(inputs, half, 1), nn.ReLU())
        dilation, right = (2, half) if self.kind == "sums" else (1, outputs - half)
        self.left = nn.Conv2d(half, half, 1)
        self.right = nn.Conv2d(half, right, 3, padding=dilation, dilation=dilation)
        self.pooled = nn.Conv2d(inputs, 4, 1) if self.kind == "inception" else None

    def forward(self, x: Tensor) -> Tensor:
        inside = self.squeeze(x)
        left, right = self.left(inside), self.right(inside)
        if self.kind == "sums":
            right = right + left
        parts = [left, right]
        if self.pooled is not None:
            parts.append(self.pooled(functional.max_pool2d(x, 3, 1, 1)))
        return functional.relu(torch.cat(parts, 1))


class Skip(nn.Module):
    """Down, through, up, joined with what was before (U-Net); the way up has five variants."""

    def __init__(self, inputs: int, inner: int, variant: int) -> None:
        super().__init__()
        self.up = pick(variant, ("nearest", "bilinear", "pixels", "transposed", "transposed grouped"))
        self.down = nn.Sequential(nn.MaxPool2d(2), *conv(inputs, inner), nn.ReLU())
        self.through = nn.Sequential(*conv(inner, 4 * inner if self.up == "pixels" else inner, 1), nn.ReLU())
        groups = inner if self.up == "transposed grouped" else 1
        self.transposed = nn.ConvTranspose2d(inner, inner, 2, 2, groups=groups) if "transposed" in self.up else None
        self.last = nn.Sequential(*conv(inputs + inner, inputs), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        below = self.through(self.down(x))
        if self.transposed is not None:
            below = self.transposed(below)
        elif self.up == "pixels":
            below = functional.pixel_shuffle(below, 2)
        else:
            below = functional.interpolate(below, scale_factor=2.0, mode=self.up)
        return self.last(torch.cat((x, below), 1))


class Sliced(nn.Module):
    """The first channels go through a convolution, the others pass (FasterNet); or a chunk, all joined (C2f)."""

    def __init__(self, inputs: int, outputs: int, variant: int) -> None:
        super().__init__()
        self.entry, self.chunks = nn.Sequential(*conv(inputs, outputs, 1), nn.ReLU()), variant % 2 == 0
        self.taken = outputs // 2
        self.part = nn.Sequential(*conv(self.taken, self.taken), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        if self.chunks:
            left, right = x.chunk(2, 1)
            return torch.cat((left, right, self.part(right)), 1)
        return torch.cat((self.part(x[:, : self.taken]), x[:, self.taken :]), 1)


class Gated(nn.Module):
    """A gated linear unit over channels, by `glu` or by hand."""

    def __init__(self, inputs: int, outputs: int, variant: int) -> None:
        super().__init__()
        self.layer, self.by_hand = nn.Conv2d(inputs, 2 * outputs, 3, padding=1), variant % 2 == 1

    def forward(self, x: Tensor) -> Tensor:
        if self.by_hand:
            value, gate = self.layer(x).chunk(2, 1)
            return value * gate.sigmoid()
        return functional.glu(self.layer(x), 1)


class ConvNext(nn.Module):
    """Depthwise, layer norm over channels, two linear layers, a learned scale for each channel, the identity."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(width, width, 3, padding=1, groups=width), nn.LayerNorm(width)
        self.wide, self.narrow = nn.Linear(width, inner), nn.Linear(inner, width)
        self.scale = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + (self.scale * self.narrow(functional.gelu(self.wide(y)))).permute(0, 3, 1, 2)


class Scaled(nn.Module):
    """Learned slopes and scales, for each channel or for all; or both signs of everything (CReLU)."""

    def __init__(self, inputs: int, outputs: int, variant: int) -> None:
        super().__init__()
        self.kind = pick(variant, ("slopes", "scale", "all", "signs"))
        self.layer = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.slopes = nn.PReLU(outputs if self.kind == "slopes" else 1)
        self.scale = nn.Parameter(torch.rand(outputs if self.kind == "scale" else 1, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x) * self.scale
        return torch.cat((x, -x), 1).relu() if self.kind == "signs" else self.slopes(x)


class Seen(nn.Module):
    """Channels that something looks at by number, or mixes: attention over space, over channels, an order, a focus."""

    def __init__(self, inputs: int, outputs: int, variant: int) -> None:
        super().__init__()
        self.kind = pick(variant, ("space", "softmax", "order", "focus", "twice"))
        self.layer = nn.Conv2d(inputs * (4 if self.kind == "focus" else 1), outputs, 3, padding=1)
        self.look = nn.Conv2d(2, 1, 3, padding=1)
        self.again = nn.Conv2d(outputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "focus":
            parts = [x[..., row::2, column::2] for row in range(2) for column in range(2)]
            return functional.interpolate(self.layer(torch.cat(parts, 1)).relu(), scale_factor=2.0)
        x = self.layer(x)
        if self.kind == "space":
            return x * self.look(torch.cat((x.mean(1, keepdim=True), x.amax(1, keepdim=True)), 1)).sigmoid()
        if self.kind == "softmax":
            return x.softmax(1)
        if self.kind == "twice":
            return self.again(self.again(x).relu()).relu()
        return x[:, [*range(1, x.shape[1]), 0]].relu()


class Odd(nn.Module):
    """What people write besides: bare and reparametrised weights, unfolded windows, lengths, uneven parts, and more."""

    KINDS = (
        "weight norm", "multiplier", "circular", "unfold", "unit length", "bare", "einsum", "across", "every other",
        "parts", "group means", "buffer", "masked", "batch statistics", "local response", "stacked", "gather",
        "expanded", "film", "bilinear", "cumulative", "twice read",
    )  # fmt: skip

    def __init__(self, inputs: int, outputs: int, variant: int) -> None:
        super().__init__()
        self.kind = pick(variant, self.KINDS)
        self.layer = nn.Conv2d(inputs, outputs, 3, padding=1, padding_mode="circular" if variant == 2 else "zeros")
        if self.kind == "weight norm":
            self.layer = nn.utils.parametrizations.weight_norm(self.layer)
        times = {"multiplier": 2, "unfold": 9, "every other": 0.5, "group means": 0.5, "stacked": 2}.get(self.kind, 1)
        self.doubled = nn.Conv2d(outputs, 2 * outputs, 3, padding=1, groups=outputs)
        self.weight = nn.Parameter(torch.randn(outputs, outputs, 1, 1) / 4)
        self.bare = nn.Linear(outputs, outputs)
        self.norm = nn.BatchNorm2d(outputs, track_running_stats=False)
        self.both = nn.Bilinear(outputs, outputs, outputs)
        self.register_buffer("factor", torch.linspace(0.5, 1.5, outputs)[:, None, None])
        self.sizes = [outputs // 4, outputs - outputs // 4]
        self.last = nn.Conv2d(int(times * outputs), outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(getattr(self, "_" + self.kind.replace(" ", "_"), self._plain)(self.layer(x)))

    def _plain(self, x: Tensor) -> Tensor:
        return x.relu()

    def _multiplier(self, x: Tensor) -> Tensor:
        return self.doubled(x).relu()

    def _unfold(self, x: Tensor) -> Tensor:
        return functional.unfold(x, 3, padding=1).unflatten(-1, x.shape[-2:])

    def _unit_length(self, x: Tensor) -> Tensor:
        return functional.normalize(x, dim=1)

    def _bare(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, self.weight).relu()

    def _einsum(self, x: Tensor) -> Tensor:
        return torch.einsum("nchw,oc->nohw", x, self.weight[..., 0, 0])

    def _across(self, x: Tensor) -> Tensor:
        means = x.mean((2, 3))[:, None]  # (N, 1, C): efficient channel attention
        return x * functional.avg_pool1d(means, 3, 1, 1).sigmoid()[:, 0, :, None, None]

    def _every_other(self, x: Tensor) -> Tensor:
        return x[:, ::2] * x[:, 1::2]

    def _parts(self, x: Tensor) -> Tensor:
        small, large = torch.split(x, self.sizes, 1)
        return torch.cat((large.relu(), small.tanh()), 1)

    def _group_means(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1, 2, *x.shape[2:]).mean(2)

    def _buffer(self, x: Tensor) -> Tensor:
        return x * self.factor

    def _masked(self, x: Tensor) -> Tensor:
        return torch.where(x > 0.2, x, 0.1 * x) * (x < 1)

    def _batch_statistics(self, x: Tensor) -> Tensor:
        return self.norm(x).relu()

    def _local_response(self, x: Tensor) -> Tensor:
        return functional.local_response_norm(x, 3)

    def _stacked(self, x: Tensor) -> Tensor:
        return torch.stack((x, x.relu()), 2).flatten(1, 2)

    def _gather(self, x: Tensor) -> Tensor:
        return x.gather(1, torch.zeros_like(x, dtype=torch.int64)) + x

    def _expanded(self, x: Tensor) -> Tensor:
        return x.amax((2, 3), keepdim=True).expand_as(x) - x

    def _film(self, x: Tensor) -> Tensor:
        return x * self.bare(x.mean((2, 3)))[:, :, None, None] + x

    def _bilinear(self, x: Tensor) -> Tensor:
        channels = x.permute(0, 2, 3, 1).contiguous()
        return self.both(channels, channels).permute(0, 3, 1, 2)

    def _cumulative(self, x: Tensor) -> Tensor:
        return x.cumsum(1)

    def _twice_read(self, x: Tensor) -> Tensor:
        return x.relu() + x.flip(1)


class Pooled(nn.Module):
    """Half the size, by a pool of any kind or a stride."""

    def __init__(self, width: int, variant: int) -> None:
        super().__init__()
        kinds: tuple[Callable[[], nn.Module], ...] = (
            lambda: nn.MaxPool2d(2), lambda: nn.AvgPool2d(3, 2, 1), lambda: nn.Conv2d(width, width, 3, 2, 1),
            lambda: nn.AdaptiveAvgPool2d(4), lambda: nn.Conv2d(width, width, 2, 2, groups=width),
            lambda: nn.MaxPool2d(3, 2, 1),
        )  # fmt: skip
        self.pool = pick(variant, kinds)()

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x)


# ---- signals (N, C, T) ---------------------------------------------------------------------------------------------


class Temporal(nn.Module):
    """A causal dilated block (TCN), a separable one, or a gated one (WaveNet), with the identity where it fits."""

    def __init__(self, inputs: int, outputs: int, variant: int) -> None:
        super().__init__()
        self.kind = pick(variant, ("causal", "separable", "gated"))
        self.first = nn.Conv1d(inputs, 2 * outputs if self.kind == "gated" else outputs, 3, padding=4, dilation=2)
        groups = outputs if self.kind == "separable" else 1
        self.second, self.norm = nn.Conv1d(outputs, outputs, 3, padding=1, groups=groups), nn.BatchNorm1d(outputs)
        self.project = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)[..., : x.shape[-1]]
        if self.kind == "gated":
            left, right = y.chunk(2, 1)
            y = left.tanh() * right.sigmoid()
        return functional.relu(self.norm(self.second(y.relu())) + self.project(x))


class Recurrent(nn.Module):
    """A recurrent layer over time, (N, C, T) to (N, width, T)."""

    def __init__(self, inputs: int, width: int, variant: int) -> None:
        super().__init__()
        self.layer = pick(variant, (nn.GRU, nn.LSTM))(inputs, width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.transpose(1, 2))[0].transpose(1, 2)


# ---- vectors (N, T, D) ---------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Self-attention: one projection or three, head counts as written by timm, BERT and others; or torch's own."""

    def __init__(self, width: int, heads: int, variant: int) -> None:
        super().__init__()
        self.kind = pick(variant, ("fused", "separate", "torch", "by hand", "einsum"))
        self.num_heads, self.head_dim = heads, 4
        self.inner = heads * self.head_dim
        if self.kind == "torch":
            self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
            return
        self.qkv = nn.Linear(width, 3 * self.inner) if self.kind == "fused" else None
        self.query, self.key, self.value = (
            nn.Linear(width, self.inner) if self.kind != "fused" else nn.Identity() for _ in range(3)
        )
        self.output = nn.Linear(self.inner, width)

    def _parts(self, x: Tensor) -> list[Tensor]:
        n, t, _ = x.shape
        if self.qkv is not None:
            return list(self.qkv(x).reshape(n, t, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0))
        layers = (self.query, self.key, self.value)
        return [layer(x).view(n, t, self.num_heads, self.head_dim).transpose(1, 2) for layer in layers]

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "torch":
            return self.attention(x, x, x, need_weights=False)[0]
        q, k, v = self._parts(x)
        if self.kind == "by hand":
            mixed = ((q @ k.transpose(-2, -1)) / math.sqrt(self.head_dim)).softmax(-1) @ v
        elif self.kind == "einsum":
            scores = torch.einsum("nhqd,nhkd->nhqk", q, k) * self.head_dim**-0.5
            mixed = torch.einsum("nhqk,nhkd->nhqd", scores.softmax(-1), v)
        else:
            mixed = functional.scaled_dot_product_attention(q, k, v)
        return self.output(mixed.transpose(1, 2).reshape(*x.shape[:2], -1))


class Grouped(nn.Module):
    """Causal attention with fewer key and value heads, and rotary positions (LLaMA)."""

    def __init__(self, width: int, heads: int, variant: int) -> None:
        super().__init__()
        self.heads, self.shared, self.head_dim, self.variant = 2 * heads, heads, 4, variant
        self.q, self.o = nn.Linear(width, 8 * heads, bias=False), nn.Linear(8 * heads, width, bias=False)
        self.k, self.v = (nn.Linear(width, 4 * heads, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q = self._turned(self.q(x).view(n, t, self.heads, self.head_dim).transpose(1, 2))
        k = self._turned(self.k(x).view(n, t, self.shared, self.head_dim).transpose(1, 2))
        v = self.v(x).view(n, t, self.shared, self.head_dim).transpose(1, 2)
        times = self.heads // self.shared
        if self.variant % 2:
            k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
        else:
            k, v = (part[:, :, None].expand(n, self.shared, times, t, self.head_dim).reshape(n, self.heads, t, -1)
                    for part in (k, v))  # fmt: skip
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(mixed.transpose(1, 2).reshape(n, t, -1))

    @staticmethod
    def _turned(x: Tensor) -> Tensor:
        angles = torch.outer(torch.arange(x.shape[-2]), torch.tensor([1.0, 0.1])).repeat(1, 2).to(x.dtype)
        first, second = x.chunk(2, -1)
        return x * angles.cos() + torch.cat((-second, first), -1) * angles.sin()


class Feed(nn.Module):
    """Two linear layers, or a gate and a value: apart, or in one."""

    def __init__(self, width: int, inner: int, variant: int) -> None:
        super().__init__()
        self.kind = pick(variant, ("two", "gated", "fused", "fused glu"))
        self.wide = nn.Linear(width, 2 * inner if "fused" in self.kind else inner)
        self.gate = nn.Linear(width, inner, bias=False) if self.kind == "gated" else None
        self.narrow = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.wide(x)
        if self.gate is not None:
            y = y * functional.silu(self.gate(x))
        elif self.kind == "fused":
            value, gate = y.chunk(2, -1)
            y = value * functional.gelu(gate)
        else:
            y = functional.glu(y, -1) if self.kind == "fused glu" else functional.gelu(y)
        return self.narrow(y)


class Normed(nn.Module):
    """A residual part with the norm before it, after the addition, or with a learned scale."""

    def __init__(self, part: nn.Module, width: int, variant: int) -> None:
        super().__init__()
        self.kind, self.part = pick(variant, ("before", "after", "scaled")), part
        self.norm = pick(variant // 2, (nn.LayerNorm, nn.RMSNorm))(width)
        self.scale = nn.Parameter(torch.full((width,), 0.5)) if self.kind == "scaled" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "after":
            return self.norm(x + self.part(x))
        y = self.part(self.norm(x))
        return x + (y if self.scale is None else self.scale * y)


class Mixer(nn.Module):
    """A feed-forward part over positions (MLP-Mixer)."""

    def __init__(self, positions: int, inner: int, variant: int) -> None:
        super().__init__()
        self.feed = Feed(positions, inner, variant)

    def forward(self, x: Tensor) -> Tensor:
        return self.feed(x.transpose(1, 2)).transpose(1, 2)


# ---- heads ---------------------------------------------------------------------------------------------------------


class Classes(nn.Module):
    """(N, C, H, W) to five classes: a global pool, all positions, or a hidden layer."""

    def __init__(self, width: int, side: int, variant: int) -> None:
        super().__init__()
        self.kind = pick(variant, ("mean", "flatten", "hidden", "both", "conv"))
        inputs = {"flatten": width * side * side, "both": 2 * width}.get(self.kind, width)
        if self.kind == "conv":
            self.layers: nn.Module = nn.Sequential(nn.Conv2d(width, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        elif self.kind == "hidden":
            self.layers = nn.Sequential(nn.Linear(inputs, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 5))
        else:
            self.layers = nn.Linear(inputs, 5)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "conv":
            return self.layers(x)
        if self.kind == "flatten":
            return self.layers(x.flatten(1))
        mean = x.mean((2, 3)) if self.kind != "both" else functional.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.layers(torch.cat((mean, x.amax((2, 3))), 1) if self.kind == "both" else mean)


class Detector(nn.Module):
    """Several outputs, as a dict or a tuple: scores and boxes at two scales."""

    def __init__(self, width: int, inner: int, variant: int) -> None:
        super().__init__()
        self.kind = pick(variant, ("dict", "tuple", "list"))
        self.down = nn.Sequential(nn.Conv2d(width, inner, 3, 2, 1), nn.ReLU())
        self.lateral = nn.Conv2d(width, inner, 1)
        self.tower = nn.Sequential(*conv(inner, inner), nn.ReLU())
        self.scores, self.boxes, self.coarse = nn.Conv2d(inner, 3, 1), nn.Conv2d(inner, 4, 1), nn.Conv2d(inner, 3, 1)

    def forward(self, x: Tensor) -> object:
        low = self.down(x)
        high = self.tower(self.lateral(x) + functional.interpolate(low, size=x.shape[-2:]))
        found = {"scores": self.scores(high), "boxes": self.boxes(high).flatten(2), "coarse": self.coarse(low)}
        if self.kind == "dict":
            return found
        return tuple(found.values()) if self.kind == "tuple" else [found["scores"], (found["boxes"], found["coarse"])]


class Denoiser(nn.Module):
    """The input minus what the body and a last convolution say (DnCNN); or the last one upscales it (ESPCN)."""

    def __init__(self, body: nn.Module, width: int, variant: int) -> None:
        super().__init__()
        self.body, self.scale = body, 1 + variant % 2
        self.last = nn.Conv2d(width, 3 * self.scale**2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        found = self.last(self.body(x))
        if self.scale == 1:
            return x - found
        return functional.pixel_shuffle(found, 2) + functional.interpolate(x, scale_factor=2.0)
