"""Mean average precision of a detector, as COCO counts it. Needs the optional package pycocotools."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from typing import Any, final

import torch
from torch import Tensor

from autoprune.errors import DataError
from autoprune.plugins import optional

Annotations = list[dict[str, Any]]
_MOST_BOXES = 100
"""Detections that count in an image, those with the highest scores."""
_LARGEST_AREA = 1e10


@final
class MeanAveragePrecision:
    """AP over IoU 0.50 to 0.95 and all classes that are in the truth (COCO's first number), by pycocotools.

    The model puts out what is left after its non-maximum suppression: boxes (samples, boxes, 6), each x1, y1, x2, y2,
    score, class; rows with a score of zero or less are padding. Targets are (samples, boxes, 5): x1, y1, x2, y2, class;
    rows with a negative class are padding.
    """

    __slots__ = ("_coco", "_evaluation")

    name: str = "map"
    higher_is_better: bool = True

    def __init__(self) -> None:
        """Raises ConfigError when pycocotools is not installed."""
        self._coco: Any = optional("pycocotools.coco", needed_by="metric: map", extra="detection").COCO
        evaluation = optional("pycocotools.cocoeval", needed_by="metric: map", extra="detection")
        self._evaluation: Any = evaluation.COCOeval

    def per_sample(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Each image's own AP, (samples,) float64; where nothing is to be found, 1 if nothing was and 0 otherwise.

        Its mean is not the metric. Raises DataError on other shapes.
        """
        _check(outputs, targets)
        pairs = zip(outputs, targets, strict=True)
        values = [self._precision(found[None], truth[None]) for found, truth in pairs]
        return torch.tensor(values, dtype=torch.float64)

    def total(self, outputs: Tensor, targets: Tensor) -> float:
        """The metric, 0 to 1, over all images."""
        _check(outputs, targets)
        return self._precision(outputs, targets)

    def _precision(self, outputs: Tensor, targets: Tensor) -> float:
        found, truth = _detections(outputs), _truth(targets)
        if not truth:
            return 0.0 if found else 1.0
        categories = sorted({entry["category_id"] for entry in truth})
        with redirect_stdout(io.StringIO()):  # it reports as it goes
            judge = self._evaluation(
                self._indexed(truth, categories, len(targets)), self._indexed(found, categories, len(targets)), "bbox"
            )
            judge.params.areaRng, judge.params.areaRngLbl = [[0.0, _LARGEST_AREA]], ["all"]
            judge.params.maxDets = [_MOST_BOXES]
            judge.evaluate()
            judge.accumulate()
        precision = judge.eval["precision"]  # (IoU thresholds, recalls, classes, 1, 1), -1 where undefined
        return float(precision[precision > -1].mean())

    def _indexed(self, entries: Annotations, categories: list[int], images: int) -> Any:
        known = self._coco()
        known.dataset = {
            "images": [{"id": image} for image in range(images)],
            "categories": [{"id": category} for category in categories],
            "annotations": entries,
        }
        known.createIndex()
        return known


def _detections(outputs: Tensor) -> Annotations:
    """Rows of (samples, boxes, 6) that are detections. NaN is none."""
    entries: Annotations = []
    for image, rows in enumerate(outputs.to(torch.float64)):
        for *corners, score, label in rows[(rows[:, 4] > 0) & rows.isfinite().all(dim=1)].tolist():
            entries.append(_entry(len(entries), image, corners, label) | {"score": score})
    return entries


def _truth(targets: Tensor) -> Annotations:
    """Rows of (samples, boxes, 5) that are objects."""
    entries: Annotations = []
    for image, rows in enumerate(targets.to(torch.float64)):
        for *corners, label in rows[rows[:, 4] >= 0].tolist():
            entries.append(_entry(len(entries), image, corners, label) | {"iscrowd": 0})
    return entries


def _entry(number: int, image: int, corners: list[float], label: float) -> dict[str, Any]:
    left, top, right, bottom = corners
    width, height = right - left, bottom - top
    return {
        "id": number + 1, "image_id": image, "category_id": round(label), "bbox": [left, top, width, height],
        "area": width * height,
    }  # fmt: skip


def _check(outputs: Tensor, targets: Tensor) -> None:
    shapes = (outputs.ndim, targets.ndim) == (3, 3) and (outputs.shape[2], targets.shape[2]) == (6, 5)
    if not shapes or len(outputs) != len(targets):
        raise DataError(
            f"map: outputs are {tuple(outputs.shape)} and targets {tuple(targets.shape)}; "
            "expected (samples, boxes, 6), each x1, y1, x2, y2, score, class, and (samples, boxes, 5), "
            "each x1, y1, x2, y2, class. For any other output write a function (metric: file.py:function)"
        )
