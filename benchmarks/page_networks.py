"""Networks that no library has, for the page of models: small, by their papers' patterns. Knows nothing of pruning."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def _conv(inputs: int, outputs: int, kernel: int = 3, *, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    padding = dilation * (kernel // 2)
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation=dilation, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())


class UNet(nn.Module):
    """Two levels down and up, joined at each (arXiv:1505.04597); up by a transposed convolution or by pixels."""

    def __init__(self, *, transposed: bool, width: int = 16) -> None:
        super().__init__()
        self.enter = nn.Sequential(_conv(3, width), _conv(width, width))
        self.first = nn.Sequential(_conv(width, 2 * width), _conv(2 * width, 2 * width))
        self.second = nn.Sequential(_conv(2 * width, 4 * width), _conv(4 * width, 4 * width))

        def up(inputs: int, outputs: int) -> nn.Module:
            if transposed:
                return nn.ConvTranspose2d(inputs, outputs, 2, 2)
            return nn.Sequential(nn.Upsample(scale_factor=2.0, mode="bilinear"), nn.Conv2d(inputs, outputs, 1))

        self.up_second, self.merge_second = up(4 * width, 2 * width), _conv(4 * width, 2 * width)
        self.up_first, self.merge_first = up(2 * width, width), _conv(2 * width, width)
        self.last = nn.Conv2d(width, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        top = self.enter(x)
        middle = self.first(functional.max_pool2d(top, 2))
        bottom = self.second(functional.max_pool2d(middle, 2))
        middle = self.merge_second(torch.cat((middle, self.up_second(bottom)), 1))
        return self.last(self.merge_first(torch.cat((top, self.up_first(middle)), 1)))


class EspBlock(nn.Module):
    """Reduce, four dilated branches summed up one after the other, joined, and the identity (arXiv:1803.06815)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        part = width // 4
        self.reduce = nn.Conv2d(width, part, 1, bias=False)
        self.branches = nn.ModuleList(
            nn.Conv2d(part, part, 3, padding=dilation, dilation=dilation, bias=False) for dilation in (1, 2, 4, 8)
        )
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        reduced = self.reduce(x)
        sums = [self.branches[0](reduced)]
        for branch in list(self.branches)[1:]:
            sums.append(sums[-1] + branch(reduced))
        return functional.relu(x + self.norm(torch.cat(sums, 1)))


class EspNet(nn.Module):
    """Stem, ESP blocks at two sizes, classes for every pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = _conv(3, 16, stride=2), _conv(16, 64, stride=2)
        self.first, self.second = nn.Sequential(EspBlock(16)), nn.Sequential(EspBlock(64), EspBlock(64))
        self.last = nn.Conv2d(64, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.down(self.first(self.stem(x))))
        return functional.interpolate(self.last(x), scale_factor=4.0, mode="bilinear")


class Detector(nn.Module):
    """A backbone of three sizes, a pyramid on top, and scores and boxes of its own for each size, in a dict."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        widths = (16, 32, 64)
        self.stem = _conv(3, 16, stride=2)
        self.stages = nn.ModuleList(_conv(inputs, made, stride=2) for inputs, made in ((16, 16), (16, 32), (32, 64)))
        self.lateral = nn.ModuleList(nn.Conv2d(made, width, 1) for made in widths)
        self.towers = nn.ModuleList(_conv(width, width) for _ in widths)
        self.scores = nn.ModuleList(nn.Conv2d(width, 6, 1) for _ in widths)
        self.boxes = nn.ModuleList(nn.Conv2d(width, 4, 1) for _ in widths)

    def forward(self, x: Tensor) -> dict[str, list[Tensor]]:
        x, levels = self.stem(x), []
        for stage in self.stages:
            x = stage(x)
            levels.append(x)
        merged = [lateral(level) for lateral, level in zip(self.lateral, levels, strict=True)]
        for index in (1, 0):
            merged[index] = merged[index] + functional.interpolate(merged[index + 1], scale_factor=2.0)
        towers = [tower(level) for tower, level in zip(self.towers, merged, strict=True)]
        return {
            "scores": [head(level) for head, level in zip(self.scores, towers, strict=True)],
            "boxes": [head(level).flatten(2) for head, level in zip(self.boxes, towers, strict=True)],
        }


class DnCnn(nn.Module):
    """Six convolutions that say what the noise is; the image without it (arXiv:1608.03981)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        first, last = nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, 1, 3, padding=1)
        self.layers = nn.Sequential(first, nn.ReLU(), *(_conv(width, width) for _ in range(4)), last)

    def forward(self, x: Tensor) -> Tensor:
        return x - self.layers(x)


class Keyword(nn.Sequential):
    """Convolutions over raw sound, 1-d, with norms and pools (M5, arXiv:1610.00087)."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for inputs, outputs, kernel, stride in ((1, 32, 80, 4), (32, 32, 3, 1), (32, 64, 3, 1), (64, 64, 3, 1)):
            layers += [nn.Conv1d(inputs, outputs, kernel, stride), nn.BatchNorm1d(outputs), nn.ReLU(), nn.MaxPool1d(4)]
        super().__init__(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(64, 10))


class Encoder(nn.Module):
    """torch's own encoder on vectors, and classes of their mean."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True, norm_first=True)
        self.enter, self.layers = nn.Linear(20, width), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.enter(x)).mean(1))


class Recurrent(nn.Module):
    """Convolution over time, two recurrent layers, a hidden layer, classes of the last step."""

    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU], width: int = 64) -> None:
        super().__init__()
        self.enter, self.layers = nn.Conv1d(20, 32, 3, padding=1), kind(32, width, 2, batch_first=True)
        self.hidden, self.head = nn.Linear(width, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        found, _ = self.layers(functional.relu(self.enter(x)).transpose(1, 2))
        return self.head(functional.relu(self.hidden(found[:, -1])))


class First(nn.Module):
    """A model of the transformers library, its first output alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.model(x)[0]
        return found
