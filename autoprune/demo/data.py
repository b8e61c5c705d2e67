"""The demo data: 1,797 handwritten digits of 8x8 pixels, split into a calibration and a validation part.

Knows the packaged file and how an image becomes an input of the network. Needs no scikit-learn: the script
`examples/train_demo.py` took the digits from there. Does not know the network.
"""

from pathlib import Path
from typing import Final, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

DIGITS_PATH: Final = Path(__file__).with_name("digits.safetensors")
IMAGE_SIZE: Final = 60
"""Height and width in pixels of the network's input: many times the digits' own, so that a forward takes some time."""

PIXEL_MAX: Final = 16.0
PIXEL_MEAN: Final = 0.305
PIXEL_STD: Final = 0.325
"""Mean and standard deviation of the upsampled calibration images, whose pixels lie from 0 to 1."""

Part = Literal["calibration", "validation"]


def digits(part: Part) -> tuple[Tensor, Tensor]:
    """Return one part's digits as stored: images (N, 8, 8) uint8 from 0 to 16, and labels (N,) int64."""
    stored = load_file(DIGITS_PATH)
    indices = stored[f"{part}_indices"].long()
    return stored["images"][indices], stored["labels"][indices].long()


def upsample(images: Tensor, *, size: int = IMAGE_SIZE) -> Tensor:
    """Map digits (N, 8, 8) uint8 to images (N, 1, size, size) float32 from 0 to 1, bilinearly."""
    pixels = images.unsqueeze(1).to(torch.float32) / PIXEL_MAX
    return functional.interpolate(pixels, size=(size, size), mode="bilinear", align_corners=False)


def normalise(images: Tensor) -> Tensor:
    """Shift and scale images from 0 to 1 into inputs of the network."""
    return (images - PIXEL_MEAN) / PIXEL_STD


def data() -> dict[str, tuple[Tensor, Tensor]]:
    """Return the parts "calibration" and "validation", each inputs (N, 1, 60, 60) float32 and labels (N,) int64.

    The network was trained on the calibration part and never saw the validation part. Both are in shuffled order.
    """
    parts: dict[str, tuple[Tensor, Tensor]] = {}
    for part in ("calibration", "validation"):
        images, labels = digits(part)
        parts[part] = (normalise(upsample(images)), labels)
    return parts
