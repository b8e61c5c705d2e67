"""A small MLP that reads handwritten digits: what a model file for autoprune looks like.

The network is trained in seconds the first time and kept beside this file, so that every command sees the same weights.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from autoprune.demo.data import PIXEL_MAX, Part, digits

WEIGHTS = Path(__file__).with_name("weights.safetensors")
EPOCHS = 30
BATCH = 64


def samples(part: Part) -> tuple[Tensor, Tensor]:
    """Flat digits (samples, 64) from 0 to 1, and labels (samples,)."""
    images, labels = digits(part)
    return images.flatten(1).float() / PIXEL_MAX, labels


def network() -> nn.Sequential:
    """The untrained network."""
    return nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
    )


def train() -> nn.Sequential:
    """A network trained on the calibration part, from a fixed seed."""
    torch.manual_seed(0)
    inputs, labels = samples("calibration")
    trained = network()
    optimizer = torch.optim.AdamW(trained.parameters(), lr=2e-3)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(inputs)).split(BATCH):
            optimizer.zero_grad()
            functional.cross_entropy(trained(inputs[batch]), labels[batch]).backward()
            optimizer.step()
    return trained


def model() -> nn.Module:
    """The trained network."""
    if not WEIGHTS.exists():
        save_file(train().state_dict(), WEIGHTS)
    trained = network()
    trained.load_state_dict(load_file(WEIGHTS))
    return trained


def data() -> dict[str, tuple[Tensor, Tensor]]:
    """Calibration samples, which the network was trained on, and validation samples, which it never saw."""
    return {"calibration": samples("calibration"), "validation": samples("validation")}
