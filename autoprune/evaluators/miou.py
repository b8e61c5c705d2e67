"""Intersection over union of a semantic segmentation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from autoprune.evaluators.shapes import check_classes

IGNORED = 255
"""The target of positions that do not count, as data sets mark borders and what nobody labelled."""
_NO_CLASS = -1


@dataclass(frozen=True, slots=True)
class _Counts:
    """Positions of each class, (samples, classes): in truth and prediction both, and in either of them."""

    both: Tensor
    either: Tensor

    @classmethod
    def of(cls, name: str, outputs: Tensor, targets: Tensor) -> _Counts:
        counted = check_classes(
            name, outputs, targets, class_dim=1, ignored=IGNORED,
            expected="(samples, classes, ...) and (samples, ...)",
            remedy=": positions must be the same, so let the model scale its logits up",
        )  # fmt: skip
        # A position with NaN is predicted to be of no class.
        found = torch.where(outputs.isnan().any(dim=1), _NO_CLASS, outputs.argmax(dim=1))
        samples, classes = outputs.shape[:2]
        rows = torch.arange(samples, device=outputs.device).reshape(-1, *[1] * (targets.ndim - 1)) * classes

        def histogram(values: Tensor, which: Tensor) -> Tensor:
            places = (rows + values)[which & (values >= 0)]
            return torch.bincount(places, minlength=samples * classes).reshape(samples, classes).to(torch.float64)

        both = histogram(targets, counted & (found == targets))
        return cls(both, histogram(targets, counted) + histogram(found, counted) - both)


def _mean_iou(both: Tensor, either: Tensor) -> Tensor:
    """(..., classes) -> (...): over the classes that are in truth or prediction."""
    present = either > 0
    shares = torch.where(present, both / either.clamp_min(1.0), 0.0)
    return shares.sum(dim=-1) / present.sum(dim=-1)


@final
class ImageMeanIoU:
    """Mean over samples of each sample's mean IoU over the classes present in its truth or its prediction.

    Small objects count as much as large ones: mIoU^I of arXiv:2310.19252. Positions of target 255 do not count.
    """

    __slots__ = ()

    name: str = "miou_image"
    higher_is_better: bool = True

    def per_sample(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """0 to 1 for each sample, (samples,) float64, from logits (samples, classes, ...) and classes (samples, ...).

        Raises DataError on other shapes, targets that are no classes, and samples in which no position counts.
        """
        counts = _Counts.of(self.name, outputs, targets)
        return _mean_iou(counts.both, counts.either)


@final
class MeanIoU:
    """The mean over classes of the IoU that all samples together have, as benchmarks publish it.

    Classes in neither the truth nor the predictions are left out; positions of target 255 do not count. `per_sample`
    is what `ImageMeanIoU` says.
    """

    __slots__ = ()

    name: str = "miou"
    higher_is_better: bool = True

    def per_sample(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Each sample's own mean IoU, (samples,) float64; see `ImageMeanIoU`. Its mean is not the metric."""
        counts = _Counts.of(self.name, outputs, targets)
        return _mean_iou(counts.both, counts.either)

    def total(self, outputs: Tensor, targets: Tensor) -> float:
        """The metric, 0 to 1: intersections and unions are summed over samples first."""
        counts = _Counts.of(self.name, outputs, targets)
        return float(_mean_iou(counts.both.sum(dim=0), counts.either.sum(dim=0)))
