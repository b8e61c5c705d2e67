"""Peak signal-to-noise ratio of images."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from autoprune.errors import ConfigError
from autoprune.evaluators.shapes import check_same

LARGEST_DB = 100.0
"""What equal images count as, so that means stay finite; as far below zero ends an output that is no number."""


@final
class PSNR:
    """10 log10(data_range^2 / mean squared error) of each image in dB, the metric being their mean."""

    __slots__ = ("data_range",)

    name: str = "psnr"
    higher_is_better: bool = True

    def __init__(self, data_range: float = 1.0) -> None:
        """`data_range` is that of the targets: 1 for images in 0 to 1, 2 for -1 to 1, 255 for bytes."""
        if not 0 < data_range < float("inf"):
            raise ConfigError(f"psnr needs a data range above 0, not {data_range}")
        self.data_range = data_range

    def per_sample(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """dB for each sample, (samples,) float64, within +-100, from two tensors (samples, ...) of one shape."""
        check_same(self.name, outputs, targets)
        errors = (outputs.to(torch.float64) - targets.to(torch.float64)) / self.data_range
        noise = errors.square().reshape(len(errors), -1).mean(dim=1).nan_to_num(nan=torch.inf)
        return (-10.0 * noise.log10()).clamp(-LARGEST_DB, LARGEST_DB)
