"""Convolutions without norms, one of them depthwise, and linear layers; and data for it. Needs torch alone."""

import torch
from torch import Tensor, nn


class Plain(nn.Module):
    """A chain."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.conv2 = nn.Conv2d(16, 32, 1)
        self.conv3 = nn.Conv2d(32, 24, 3, stride=2, padding=1)
        self.relu = nn.ReLU()
        self.fc1, self.fc2 = nn.Linear(24 * 16, 40), nn.Linear(40, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.depthwise(self.relu(self.conv1(x))))
        x = self.relu(self.conv3(self.relu(self.conv2(x))))
        logits: Tensor = self.fc2(self.relu(self.fc1(x.flatten(1))))
        return logits


def model() -> nn.Module:
    """With weights as they are drawn."""
    torch.manual_seed(0)
    return Plain().eval()


def data() -> dict[str, object]:
    """Random images, and classes that the model itself sees in them."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(384, 3, 8, 8, generator=generator)
    with torch.no_grad():
        targets = model()(inputs).argmax(1)
    return {"calibration": (inputs[:256], targets[:256]), "validation": (inputs[256:], targets[256:])}
