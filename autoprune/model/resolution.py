"""Smaller inputs: at which sizes a model of images runs, and a model that resizes its input first. In our own copies.

The resizing is a hook of the model itself: names of modules and the state stay, exporters see it as the first step, and
whoever calls the model hands it what the dense one takes.
"""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional

from autoprune.model.coupling import CONVOLUTIONS
from autoprune.model.observe import calls
from autoprune.nest import tensors_of

Size = tuple[int, int]
"""Height and width."""
STEPS, LEAST_SHARE = 16, 0.25
"""At most so many sizes are tried, down to this share of the side."""


def resized(images: Tensor, size: Size) -> Tensor:
    """`images` (N, C, h, w) at `size`, bilinear with antialiasing, pixels' centres aligned as areas."""
    return functional.interpolate(images, size=size, mode="bilinear", antialias=True)


@final
class _Resizes:
    """Resizes what a model reads."""

    def __init__(self, size: Size) -> None:
        self.size = size

    def __call__(self, _model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (resized(inputs[0], self.size), *inputs[1:])


def resize_input(model: nn.Module, size: Size) -> None:
    """Let `model` (our own copy) resize its input to `size` before anything else."""
    model.register_forward_pre_hook(_Resizes(size))


def smaller_inputs(model: nn.Module, example: Tensor) -> dict[int, Size]:
    """Heights below that of `example` (N, C, h, w) to sizes at which `model` gives outputs of the same shapes, largest
    first; both sides are whole multiples of the model's total stride. Empty where it takes no images or no other size.
    """
    if example.ndim != 4 or not example.is_floating_point():
        return {}
    height, width = example.shape[2:]
    stride = _stride(model, example)
    step = stride * math.ceil(height / stride / STEPS)
    wanted = _shapes(model, example)
    found: dict[int, Size] = {}
    for side in range((height - 1) // step * step, max(stride, math.ceil(LEAST_SHARE * height)) - 1, -step):
        size = (side, max(stride, round(width * side / height / stride) * stride))
        try:
            fits = _shapes(model, resized(example, size)) == wanted
        except Exception:  # noqa: BLE001 (whatever a foreign forward raises: it does not take this size)
            fits = False
        if fits:
            found[side] = size
    return found


def _shapes(model: nn.Module, example: Tensor) -> list[torch.Size]:
    with torch.no_grad():
        return [tensor.shape for tensor in tensors_of(model(example))]


def _stride(model: nn.Module, example: Tensor) -> int:
    """How many rows of the input become one of the coarsest map; squeezed maps of one row do not count."""
    modules = dict(model.named_modules())
    maps = [call for call in calls(model, example) if isinstance(modules[call.name], CONVOLUTIONS)]
    rows = [call.output.shape[2] for call in maps if call.output.ndim == 4 and call.inputs.shape[2] > 1]
    return max(1, math.ceil(example.shape[2] / min(rows))) if rows else 1
