"""Small networks, one for each pattern that a cut must understand or refuse. Random weights and norm statistics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from autoprune.apply import Applied
from autoprune.core.target import Target
from autoprune.core.unit import Unit
from autoprune.costing import Stages, measured_costs
from autoprune.data import as_data
from autoprune.engines.local import Local
from autoprune.evaluators import evaluator
from autoprune.model.coupling import CONVOLUTIONS, NORMS
from autoprune.model.discover import Anatomy
from autoprune.progress import Silent
from autoprune.run import Run
from autoprune.ship import write_model
from autoprune.spaces import load_space
from autoprune.subject import Subject, Task, subject_of
from autoprune.workbench import Workbench, prepare

SIDE = 8


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """`model` in evaluation mode with norms and biases that do something."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return torch.rand(like.shape, generator=generator) * (high - low) + low

    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, NORMS) and layer.track_running_stats:
                assert layer.running_mean is not None
                assert layer.running_var is not None
                layer.running_mean.copy_(uniform(layer.running_mean, -0.3, 0.3))
                layer.running_var.copy_(uniform(layer.running_var, 0.5, 1.5))
                if layer.affine:
                    layer.weight.copy_(uniform(layer.weight, 0.5, 1.5))
                    layer.bias.copy_(uniform(layer.bias, -0.3, 0.3))
            elif isinstance(layer, (*CONVOLUTIONS, nn.Linear)):
                fan_in = layer.weight[0].numel()
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * (2 / fan_in) ** 0.5)
                if layer.bias is not None:
                    layer.bias.copy_(uniform(layer.bias, -0.3, 0.3))
    return model.eval()


def conv(inputs: int, outputs: int, kernel: int = 3, *, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)


class Vgg(nn.Sequential):
    """Convolutions with and without norm, a pool, a flatten into two linear layers."""

    def __init__(self, *, inplace: bool = False, norm: bool = True) -> None:
        second = [nn.BatchNorm2d(12)] if norm else []
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.ReLU(inplace=inplace),
            nn.Conv2d(8, 12, 3, padding=1, bias=not norm),
            *second,
            nn.ReLU(inplace=inplace),
            nn.MaxPool2d(2),
            nn.Conv2d(12, 8, 3, padding=1, stride=2),
            nn.ReLU(inplace=inplace),
            nn.Flatten(),
            nn.Linear(8 * 4, 16),
            nn.ReLU(inplace=inplace),
            nn.Linear(16, 5),
        )


class Basic(nn.Module):
    """Two 3x3 convolutions and a shortcut. `style`: functional, module, inplace (as torchvision writes it)."""

    def __init__(self, inputs: int, outputs: int, *, style: str = "functional", stride: int = 1) -> None:
        super().__init__()
        self.style = style
        self.conv1 = conv(inputs, outputs, stride=stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=style == "inplace")
        self.conv2 = conv(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module | None = None
        if inputs != outputs or stride != 1:
            self.shortcut = nn.Sequential(conv(inputs, outputs, 1, stride=stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        if self.style == "functional":
            out = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
            rest = x if self.shortcut is None else self.shortcut(x)
            return functional.relu(out + rest)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        rest = x if self.shortcut is None else self.shortcut(x)
        if self.style == "inplace":
            out += rest
            return self.relu(out)
        return self.relu(rest + out)


class Residual(nn.Module):
    """A stem, two identity blocks, a projection block, an identity block, a head."""

    def __init__(self, *, style: str = "functional", width: int = 8, blocks: int = 2) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, width), nn.BatchNorm2d(width), nn.ReLU(inplace=style == "inplace"))
        self.layer1 = nn.Sequential(*(Basic(width, width, style=style) for _ in range(blocks)))
        self.layer2 = nn.Sequential(
            Basic(width, 12, style=style, stride=2), *(Basic(12, 12, style=style) for _ in range(blocks - 1))
        )
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer2(self.layer1(self.stem(x))).mean((2, 3)))


class BottleneckBlock(nn.Module):
    """1x1, 3x3 (grouped if asked), 1x1, and the shortcut."""

    def __init__(self, width: int, inner: int, groups: int = 1) -> None:
        super().__init__()
        self.reduce, self.bn1 = conv(width, inner, 1), nn.BatchNorm2d(inner)
        self.spatial, self.bn2 = conv(inner, inner, groups=groups), nn.BatchNorm2d(inner)
        self.expand, self.bn3 = conv(inner, width, 1), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        out = functional.relu(self.bn1(self.reduce(x)))
        out = functional.relu(self.bn2(self.spatial(out)))
        return functional.relu(self.bn3(self.expand(out)) + x)


class Bottleneck(nn.Module):
    """Two bottleneck blocks between a stem and a head."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 12), nn.BatchNorm2d(12), nn.ReLU())
        self.blocks = nn.Sequential(BottleneckBlock(12, 8, groups), BottleneckBlock(12, 8, groups))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Mobile(nn.Sequential):
    """Depthwise separable convolutions."""

    def __init__(self) -> None:
        super().__init__(
            nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU6()),
            nn.Sequential(conv(8, 8, groups=8), nn.BatchNorm2d(8), nn.ReLU6(), conv(8, 12, 1), nn.BatchNorm2d(12)),
            nn.Sequential(nn.ReLU6(), nn.Conv2d(12, 12, 3, 2, 1, groups=12), nn.ReLU6(), nn.Conv2d(12, 10, 1)),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(10, 5),
        )


class Dense(nn.Module):
    """Every layer reads all before it, joined."""

    def __init__(self, *, norms: bool = True) -> None:
        super().__init__()
        widths = (6, 8, 6)
        reads = (6, 14)
        self.stem = conv(3, widths[0])
        self.convs = nn.ModuleList(conv(entering, width) for entering, width in zip(reads, widths[1:], strict=True))
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) if norms else nn.Identity() for n in reads)
        self.head = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        seen = self.stem(x)
        for layer, norm in zip(self.convs, self.norms, strict=True):
            seen = torch.cat((seen, layer(functional.relu(norm(seen)))), 1)
        return self.head(seen.mean((2, 3)))


class Joined(nn.Module):
    """Two branches joined and read by one convolution, without norms: the simplest shared consumer."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 8, 3, padding=1)
        self.right = nn.Conv2d(3, 8, 1)
        self.join = nn.Conv2d(16, 8, 3, padding=1, groups=groups)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat((functional.relu(self.left(x)), functional.relu(self.right(x))), 1)
        return self.head(functional.relu(self.join(both)).mean((2, 3)))


class UNet(nn.Module):
    """Down, up, and a skip that is joined; one logit map a class. (N, 3, 8, 8) -> (N, 4, 8, 8)."""

    def __init__(self, *, pooled: bool = True) -> None:
        super().__init__()
        self.pooled = pooled
        self.down1 = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU())
        self.down2 = nn.Sequential(conv(8, 12), nn.BatchNorm2d(12), nn.ReLU())
        self.up = nn.Sequential(conv(20, 8), nn.BatchNorm2d(8), nn.ReLU())
        self.out = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        high = self.down1(x)
        low = self.down2(functional.max_pool2d(high, 2))
        low = functional.interpolate(low, scale_factor=2.0, mode="nearest")
        maps = self.out(self.up(torch.cat((high, low), 1)))
        return maps.mean((2, 3)) if self.pooled else maps


class Feed(nn.Module):
    """A transformer block, before its norm: attention over 4 heads of 4, then 24 features; both residual."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.heads = 4
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 24), nn.Linear(24, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.output(mixed)
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Two blocks over patches of an image (N, 3, 16, 16) -> (N, 5), or over tokens (N, T) -> (N, T, 20)."""

    def __init__(self, *, seen: bool) -> None:
        super().__init__()
        self.seen = seen
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 4, 4), nn.GELU(), nn.Conv2d(12, 16, 1)) if seen else None
        self.look_up = None if seen else nn.Embedding(20, 16)
        self.blocks = nn.Sequential(Feed(), Feed())
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5 if seen else 20)

    def forward(self, x: Tensor) -> Tensor:
        if self.look_up is not None:
            return self.head(self.norm(self.blocks(self.look_up(x))))
        assert self.stem is not None
        x = self.blocks(self.stem(x).flatten(2).transpose(1, 2))
        return self.head(self.norm(x).mean(1))


class Mlp(nn.Sequential):
    """Linear layers, with a norm over features."""

    def __init__(self) -> None:
        super().__init__(
            nn.Linear(10, 16),
            nn.BatchNorm1d(16),
            nn.ReLU(),
            nn.Linear(16, 12),
            nn.ReLU(),
            nn.Linear(12, 5),
        )


class Waves(nn.Sequential):
    """One-dimensional convolutions. (N, 2, 24) -> (N, 5)."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv1d(2, 8, 5, padding=2),
            nn.BatchNorm1d(8),
            nn.ReLU(),
            nn.Conv1d(8, 8, 3, stride=2, padding=2, dilation=2),
            nn.ReLU(),
            nn.Conv1d(8, 10, 3),
            nn.ReLU(),
            nn.AdaptiveAvgPool1d(1),
            nn.Flatten(),
            nn.Linear(10, 5),
        )


class OptionA(nn.Module):
    """A shortcut that is padded with zero channels on both sides: the others line up with those between."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.conv1, self.bn1 = conv(8, 12, stride=2), nn.BatchNorm2d(12)
        self.conv2, self.bn2 = conv(12, 12), nn.BatchNorm2d(12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.stem(x))
        out = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        padded = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        return self.head(functional.relu(out + padded).mean((2, 3)))


class Twice(nn.Module):
    """One layer that is run two times in a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.shared = conv(8, 8)
        self.last = conv(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.stem(x))
        x = functional.relu(self.shared(functional.relu(self.shared(x))))
        return self.head(functional.relu(self.last(x)).mean((2, 3)))


class HardView(nn.Module):
    """A width written down in the forward pass; the first layer's is not."""

    def __init__(self) -> None:
        super().__init__()
        self.free = conv(3, 8)
        self.fixed = conv(8, 12)
        self.head = nn.Linear(12 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.fixed(functional.relu(self.free(x))))
        return self.head(functional.max_pool2d(x, 2).view(-1, 12 * 16))


class Asserting(HardView):
    """The same, checked with an assertion that a narrower layer trips."""

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.fixed(functional.relu(self.free(x))))
        assert x.shape[1] == 12
        return self.head(functional.max_pool2d(x, 2).flatten(1))


class ChannelMean(nn.Module):
    """The mean over channels is read by no layer: cutting changes it, masking does not."""

    def __init__(self) -> None:
        super().__init__()
        self.free, self.averaged = conv(3, 8), conv(8, 8)
        self.head = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.averaged(functional.relu(self.free(x))).abs().mean(1).flatten(1))


@dataclass(frozen=True)
class Case:
    """A network, the shape of one sample, and the units it has: name -> (kind, width, parent)."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    units: Mapping[str, tuple[str, int, str | None]]
    refused: Sequence[str] = ()

    def model(self, seed: int = 0) -> nn.Module:
        return randomised(self.make(), seed)

    def example(self, samples: int = 4, seed: int = 0) -> Tensor:
        return torch.randn(samples, *self.shape, generator=torch.Generator().manual_seed(seed))


IMAGE = (3, SIDE, SIDE)


def _channels(width: int, parent: str | None = None) -> tuple[str, int, str | None]:
    return "channels", width, parent


def _features(width: int) -> tuple[str, int, str | None]:
    return "ffn", width, None


BLOCK: tuple[str, int, str | None] = ("block", 1, None)
RESIDUAL = {
    "stem.0": _channels(8),
    "layer1.0": BLOCK,
    "layer1.0.conv1": _channels(8, "layer1.0"),
    "layer1.1": BLOCK,
    "layer1.1.conv1": _channels(8, "layer1.1"),
    "layer2.0.conv1": _channels(12),
    "layer2.0.conv2": _channels(12),
    "layer2.1": BLOCK,
    "layer2.1.conv1": _channels(12, "layer2.1"),
}


def _bottleneck(groups: int) -> dict[str, tuple[str, int, str | None]]:
    units = {"stem.0": _channels(12)}
    for index in range(2):
        name = f"blocks.{index}"
        units[name] = BLOCK
        units |= {f"{name}.{layer}": _channels(8 // groups, name) for layer in ("reduce", "spatial")}
    return units


CASES: dict[str, Case] = {
    "vgg": Case(Vgg, IMAGE, {"0": _channels(8), "2": _channels(12), "6": _channels(8), "9": _features(16)}),
    "vgg in place": Case(
        lambda: Vgg(inplace=True), IMAGE, {"0": _channels(8), "2": _channels(12), "6": _channels(8), "9": _features(16)}
    ),
    "residual functional": Case(Residual, IMAGE, RESIDUAL),
    "residual module": Case(lambda: Residual(style="module"), IMAGE, RESIDUAL),
    "residual in place": Case(lambda: Residual(style="inplace"), IMAGE, RESIDUAL),
    "bottleneck": Case(Bottleneck, IMAGE, _bottleneck(1)),
    "grouped 2": Case(lambda: Bottleneck(2), IMAGE, _bottleneck(2)),
    "grouped 4": Case(lambda: Bottleneck(4), IMAGE, _bottleneck(4)),
    "mobile": Case(Mobile, IMAGE, {"0.0": _channels(8), "1.3": _channels(12), "2.3": _channels(10)}),
    "dense": Case(Dense, IMAGE, {"stem": _channels(6), "convs.0": _channels(8), "convs.1": _channels(6)}),
    "joined": Case(Joined, IMAGE, {"left": _channels(8), "right": _channels(8), "join": _channels(8)}),
    "unet": Case(UNet, IMAGE, {"down1.0": _channels(8), "down2.0": _channels(12), "up.0": _channels(8)}),
    "mlp": Case(Mlp, (10,), {"0": _features(16), "3": _features(12)}),
    "waves": Case(Waves, (2, 24), {"0": _channels(8), "3": _channels(8), "5": _channels(10)}),
    "option A": Case(OptionA, IMAGE, {"stem": _channels(8), "conv1": _channels(12)}, ("conv2",)),
    "hard view": Case(HardView, IMAGE, {"free": _channels(8)}, ("fixed",)),
    "asserting": Case(Asserting, IMAGE, {"free": _channels(8)}, ("fixed",)),
    "channel mean": Case(ChannelMean, IMAGE, {"free": _channels(8)}, ("averaged",)),
}


def shown(units: Sequence[Unit]) -> dict[str, tuple[str, int, str | None]]:
    return {unit.name: (unit.kind, unit.width, unit.parent) for unit in units}


@contextmanager
def masked(model: nn.Module, anatomy: Anatomy, kept: Mapping[str, Tensor]):  # type: ignore[no-untyped-def]
    """For the time of the block every layer that reads a unit sees zeros in the channels that are not kept.

    Independent of `cut`: the activations are zeroed on their way in, no weight is touched.
    """
    gone: dict[str, list[int]] = {}
    for group in anatomy.groups:
        if group.root in kept:
            removed = sorted(set(range(group.width)) - set(kept[group.root].tolist()))
            for member in group.members:
                if member.axis == "in":
                    gone.setdefault(member.layer, []).extend(member.positions[removed].flatten().tolist())

    def zero(positions: list[int]) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        def before(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            changed = inputs[0].clone()
            if isinstance(layer, nn.Linear):
                changed[..., positions] = 0
            else:
                changed[:, positions] = 0
            return (changed, *inputs[1:])

        return before

    modules = dict(model.named_modules())
    handles = [modules[layer].register_forward_pre_hook(zero(positions)) for layer, positions in gone.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def data_of(
    model: nn.Module, shape: Sequence[int], *, calibration: int = 96, validation: int = 160, seed: int = 3
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Random inputs with the dense model's own answers as labels: calibration and validation."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(calibration + validation, *shape, generator=generator)
    with torch.no_grad():
        labels = model.eval()(inputs).argmax(1)
    return (inputs[:calibration], labels[:calibration]), (inputs[calibration:], labels[calibration:])


def workbench_of(model: nn.Module, shape: Sequence[int], folder: Path, **sizes: int) -> Workbench:
    """Everything measured about `model` but its latency, on random data."""
    data = as_data(*data_of(model, shape, **sizes))
    task = Task(model, "tested", data, evaluator("top1"), Target(runtime="torch"), load_space("cnn-channels", folder))
    subject, stages, progress = subject_of(task, Silent()), Stages(), Silent()
    run = Run(folder, Local())
    space, costs, table = measured_costs(subject, run, latency=False, stages=stages, progress=progress)
    return prepare(subject, space, costs, table, run=run, stages=stages, progress=progress)


def residual_files(applied: Applied, subject: Subject, folder: Path) -> dict[str, Path]:
    """A pruned `Residual` of this file, written into `folder`: kind -> file."""
    source = Path(__file__).parent
    return write_model(
        applied, example=subject.example, factory="networks.py:Residual", source=source, folder=folder,
        progress=Silent(),
    )  # fmt: skip


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_untouched(model: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Bit-identical state, no hook left, all gradients flags and gradients as they were in a fresh model."""
    after = model.state_dict()
    assert list(after) == list(before)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), f"{name} was written"
    for name, module in model.named_modules():
        assert not module._forward_hooks, f"{name} still has a hook"
        assert not module._forward_pre_hooks, f"{name} still has a hook"
    for name, parameter in model.named_parameters():
        assert parameter.grad is None, f"{name} has a gradient"
        assert parameter.requires_grad, f"{name} no longer wants gradients"
