"""The demo network: a small residual CNN for the handwritten digits, with its trained weights.

Knows the architecture and where its weights lie. Does not know the data, how the network was trained, or pruning.
"""

from pathlib import Path
from typing import Final

from safetensors.torch import load_file
from torch import Tensor, nn

WEIGHTS_PATH: Final = Path(__file__).with_name("weights.safetensors")
WIDTHS: Final = (32, 64, 96)
BLOCKS_PER_STAGE: Final = 4
CLASS_COUNT: Final = 10


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (arXiv:1512.03385, figure 2).

    The shortcut is the identity where shapes allow it, else a strided 1x1 projection.
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in, H, W) to (N, out, H / stride, W / stride)."""
        branch = self.relu1(self.bn1(self.conv1(x)))
        branch = self.bn2(self.conv2(branch))
        out: Tensor = self.relu2(branch + self.shortcut(x))
        return out


def _stage(in_channels: int, out_channels: int, *, stride: int) -> nn.Sequential:
    """Chain `BLOCKS_PER_STAGE` blocks; only the first one changes the width or the resolution."""
    first = ResidualBlock(in_channels, out_channels, stride=stride)
    others = [ResidualBlock(out_channels, out_channels, stride=1) for _ in range(BLOCKS_PER_STAGE - 1)]
    return nn.Sequential(first, *others)


class DemoNet(nn.Module):
    """A ResNet of twelve basic blocks in three stages, for one-channel images of ten classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, WIDTHS[0], 3, padding=1, bias=False),
            nn.BatchNorm2d(WIDTHS[0]),
            nn.ReLU(),
        )
        self.stage1 = _stage(WIDTHS[0], WIDTHS[0], stride=1)
        self.stage2 = _stage(WIDTHS[0], WIDTHS[1], stride=2)
        self.stage3 = _stage(WIDTHS[1], WIDTHS[2], stride=2)
        self.head = nn.Linear(WIDTHS[2], CLASS_COUNT)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 1, H, W) to logits (N, 10)."""
        features = self.stage3(self.stage2(self.stage1(self.stem(x))))  # (N, 96, H / 4, W / 4)
        logits: Tensor = self.head(features.mean(dim=(2, 3)))
        return logits


def model() -> nn.Module:
    """Return the trained demo network in evaluation mode.

    The weights are stored in half precision; `load_state_dict` copies them into single precision.
    """
    network = DemoNet()
    network.load_state_dict(load_file(WEIGHTS_PATH))
    return network.eval()
