"""What evaluators check of outputs and targets before they compute."""

from __future__ import annotations

from torch import Tensor

from autoprune.errors import DataError


def check_same(name: str, outputs: Tensor, targets: Tensor) -> None:
    """Raises DataError unless both are (samples, ...) of one shape."""
    if outputs.ndim < 1 or outputs.shape != targets.shape:
        raise DataError(
            f"{_given(name, outputs, targets)}; expected the same shape (samples, ...), nothing is broadcast"
        )


def check_classes(
    name: str, outputs: Tensor, targets: Tensor, *, class_dim: int, expected: str, ignored: int, remedy: str
) -> Tensor:
    """Which targets count, a mask of their shape: integer classes for logits whose classes are in `class_dim`.

    Raises DataError on other shapes (`expected` and `remedy` are what its text says), on targets that are not
    integers, on classes that do not exist other than `ignored`, and on a sample in which nothing counts.
    """
    positions = [size for dim, size in enumerate(outputs.shape) if dim != class_dim % max(outputs.ndim, 1)]
    if outputs.ndim < 3 or positions != list(targets.shape):
        raise DataError(f"{_given(name, outputs, targets)}; expected {expected}{remedy}")
    if targets.is_floating_point() or targets.is_complex():
        raise DataError(f"{name}: targets are {targets.dtype}; expected integer classes")
    counted, classes = targets != ignored, outputs.shape[class_dim]
    wrong = targets[counted & ((targets < 0) | (targets >= classes))]
    if len(wrong):
        raise DataError(
            f"{name}: target {int(wrong[0])} but {classes} classes; expected 0 to {classes - 1}, or {ignored} for what "
            "does not count"
        )
    empty = ~counted.reshape(len(counted), -1).any(dim=1)
    if bool(empty.any()):
        first = int(empty.nonzero()[0])
        raise DataError(f"{name}: in sample {first} nothing counts (all targets are {ignored}); leave the sample out")
    return counted


def _given(name: str, outputs: Tensor, targets: Tensor) -> str:
    return f"{name}: outputs are {tuple(outputs.shape)} and targets {tuple(targets.shape)}"
