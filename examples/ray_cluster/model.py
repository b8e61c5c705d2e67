"""A small CNN that reads handwritten digits, as a job of a cluster takes it along.

`python model.py` trains it in seconds and writes weights.safetensors, which is part of what is submitted: all jobs see
the same weights, and a search that is submitted again goes on where the last one stopped.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from autoprune.demo.data import PIXEL_MAX, Part, digits

WEIGHTS = Path(__file__).with_name("weights.safetensors")
EPOCHS = 8
BATCH = 32


def samples(part: Part) -> tuple[Tensor, Tensor]:
    """Digits (samples, 1, 8, 8) from 0 to 1, and labels (samples,)."""
    images, labels = digits(part)
    return images.unsqueeze(1).float() / PIXEL_MAX, labels


def network() -> nn.Sequential:
    """The untrained network."""
    return nn.Sequential(
        nn.Conv2d(1, 48, 3, padding=1), nn.ReLU(),
        nn.Conv2d(48, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 96, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(96, 10),
    )  # fmt: skip


def train() -> nn.Sequential:
    """A network trained on the calibration part, from a fixed seed."""
    torch.manual_seed(0)
    inputs, labels = samples("calibration")
    trained = network()
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(inputs)).split(BATCH):
            optimizer.zero_grad()
            functional.cross_entropy(trained(inputs[batch]), labels[batch]).backward()
            optimizer.step()
    return trained


def model() -> nn.Module:
    """The trained network."""
    trained = network()
    trained.load_state_dict(load_file(WEIGHTS))
    return trained


def data() -> dict[str, tuple[Tensor, Tensor]]:
    """Calibration samples, which the network was trained on, and validation samples, which it never saw."""
    return {"calibration": samples("calibration"), "validation": samples("validation")}


if __name__ == "__main__":
    save_file(train().state_dict(), WEIGHTS)
