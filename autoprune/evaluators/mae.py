"""Mean absolute error of a regression."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from autoprune.evaluators.shapes import check_same


@final
class MAE:
    """Mean over a sample's outputs of the absolute difference; lower is better."""

    __slots__ = ()

    name: str = "mae"
    higher_is_better: bool = False

    def per_sample(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """One mean absolute error for each sample, (samples,) float64, from two tensors (samples, ...) of one shape."""
        check_same(self.name, outputs, targets)
        errors = (outputs.to(torch.float64) - targets.to(torch.float64)).abs()
        return errors.reshape(len(errors), -1).mean(dim=1)
