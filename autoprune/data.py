"""The user's data as tensors, samples first: calibration to measure with, validation to choose and to judge by.

Knows what shapes of data a user may hand in and what can be wrong with them. Does not import the user's files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from autoprune.errors import DataError
from autoprune.nest import tensors_of

MAX_CALIBRATION = 2048
SPLIT_SEED = 0
MAJOR_SHARE = 0.02
"""A class with this share of the held-out samples must be among the selection samples too."""

_ACCEPTED = (
    "a tensor, a numpy array, a tuple (inputs, targets), "
    "a torch Dataset of (x, y), or a DataLoader of (inputs, targets)"
)
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Data:
    """Samples first: inputs (samples, ...) float32 or tokens (samples, tokens) int64, targets (samples, ...) int64 or
    float32.
    """

    calibration_inputs: Tensor
    calibration_targets: Tensor | None
    validation_inputs: Tensor
    validation_targets: Tensor


@dataclass(frozen=True, slots=True)
class Part:
    """Inputs (samples, ...) and their targets (samples, ...)."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return int(self.inputs.shape[0])


@dataclass(frozen=True, slots=True)
class Split:
    """The validation samples in two: `selection` to choose a policy by, `held_out` to judge it by."""

    selection: Part
    held_out: Part
    note: str | None


def as_data(calibration: object, validation: object, *, max_calibration: int = MAX_CALIBRATION) -> Data:
    """Data from whatever the user has. Raises DataError naming the part, what was given and what is allowed."""
    calibration_inputs, calibration_targets = _read(calibration, "calibration", limit=max_calibration)
    validation_inputs, validation_targets = _read(validation, "validation", limit=None)
    if validation_targets is None:
        raise DataError("validation: targets are missing; give (inputs, targets), so that accuracy can be measured")
    ours, theirs = calibration_inputs.shape[1:], validation_inputs.shape[1:]
    if ours != theirs:
        raise DataError(
            f"calibration samples have shape {tuple(ours)}, validation samples {tuple(theirs)}; make them equal"
        )
    return Data(calibration_inputs, calibration_targets, validation_inputs, validation_targets)


def from_factory(returned: object, *, name: str = "data", max_calibration: int = MAX_CALIBRATION) -> Data:
    """Data from what the user's function returned: `{"calibration": ..., "validation": ...}` or a tuple of the two."""
    wanted = f'{name} must return {{"calibration": ..., "validation": ...}} or a tuple (calibration, validation)'
    if isinstance(returned, Mapping):
        if set(returned) != {"calibration", "validation"}:
            keys = ", ".join(repr(key) for key in returned) or "none"
            raise DataError(f"{wanted}; it returned a dict with the keys: {keys}")
        return as_data(returned["calibration"], returned["validation"], max_calibration=max_calibration)
    if isinstance(returned, Data):
        return returned
    if isinstance(returned, tuple) and len(returned) == 2:
        return as_data(returned[0], returned[1], max_calibration=max_calibration)
    raise DataError(f"{wanted}; it returned {_kind(returned)}")


def check_fits(model: nn.Module, data: Data) -> None:
    """Run one sample through `model`. Raises DataError when it fails, gives no finite tensor, or labels do not fit."""
    sample = data.validation_inputs[:1]  # (1, ...)
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        with torch.no_grad():
            output = model(sample)
    except Exception as error:
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise DataError(f"the model does not take inputs of shape {tuple(sample.shape)}: {text}") from error
    finally:
        for module in training:
            module.training = True
    found = tensors_of(output)
    if not found:
        raise DataError(f"the model returns {_kind(output)}; it must return a tensor (or a tuple or dict of tensors)")
    first = found[0]
    if not bool(torch.isfinite(first).all()):
        raise DataError("the model's output for the first validation sample is not finite (NaN or infinity)")
    _check_labels(first, data.validation_targets)


def split(data: Data, *, selection_share: float = 0.4) -> Split:
    """The first `selection_share` of the validation samples to select by, the rest held out.

    Shuffled with a fixed seed first, with a note, when labels are sorted by class. Raises DataError below two samples.
    """
    inputs, targets = data.validation_inputs, data.validation_targets
    count = int(inputs.shape[0])
    if count < 2:
        raise DataError(
            f"validation: {count} sample(s); at least 2 are needed, some to choose by and others to judge by"
        )
    size = min(count - 1, max(1, int(count * selection_share)))
    note = None
    if _is_sorted_by_class(targets, size):
        order = torch.randperm(count, generator=torch.Generator().manual_seed(SPLIT_SEED))
        inputs, targets = inputs[order], targets[order]
        note = "validation samples are sorted by class; they were shuffled (seed 0) before the split"
    return Split(Part(inputs[:size], targets[:size]), Part(inputs[size:], targets[size:]), note)


def _read(source: object, part: str, *, limit: int | None) -> tuple[Tensor, Tensor | None]:
    inputs, targets = _gather(source, part, limit=limit)
    if inputs.ndim < 2:
        raise DataError(f"{part}: inputs have shape {tuple(inputs.shape)}; they must be (samples, ...)")
    if inputs.shape[0] == 0:
        raise DataError(f"{part}: there are no samples")
    if inputs.dtype != torch.int64 or inputs.ndim != 2:  # not tokens
        if inputs.dtype not in _FLOATS:
            raise DataError(
                f"{part}: inputs are {inputs.dtype}; give float32, normalised as in training, or tokens "
                "(samples, tokens) int64"
            )
        inputs = inputs.to(torch.float32)
        _check_finite(inputs, f"{part}: inputs")
    if targets is None:
        return inputs[:limit], None
    if targets.ndim < 1 or targets.shape[0] != inputs.shape[0]:
        given = targets.shape[0] if targets.ndim else "a single number of"
        raise DataError(f"{part}: {inputs.shape[0]} inputs but {given} targets; each input needs one")
    targets = _typed_targets(targets, part)
    return inputs[:limit], targets[:limit]


def _gather(source: object, part: str, *, limit: int | None) -> tuple[Tensor, Tensor | None]:
    """Inputs and targets as they are, still unchecked."""
    if isinstance(source, tuple) and len(source) == 2:
        inputs, targets = source
        return _tensor(inputs, f"{part}: inputs"), None if targets is None else _tensor(targets, f"{part}: targets")
    if isinstance(source, Tensor | np.ndarray):
        return _tensor(source, f"{part}: inputs"), None
    if isinstance(source, DataLoader):
        return _concatenated(_guarded(source, part), part, limit=limit)
    if isinstance(source, Dataset):
        return _concatenated(
            (_as_batch(item, part) for item in _guarded(_items(source, part), part)), part, limit=limit
        )
    raise DataError(f"{part}: given {_kind(source)}, allowed: {_ACCEPTED}")


def _items(dataset: Dataset[object], part: str) -> Iterator[object]:
    """A dataset's samples, by index where it has a length."""
    if isinstance(dataset, IterableDataset):
        yield from dataset
        return
    length = getattr(dataset, "__len__", None)
    if length is None:
        raise DataError(f"{part}: the Dataset {type(dataset).__name__} has no length (__len__)")
    for index in range(length()):
        yield dataset[index]


def _guarded(source: Iterable[object], part: str) -> Iterator[object]:
    """The same items; what the user's code raises becomes a DataError that says which item."""
    count = 0
    try:
        for item in source:
            yield item
            count += 1
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{part}: reading item {count} failed: {type(error).__name__}: {error}") from error


def _as_batch(item: object, part: str) -> object:
    """A sample as a batch of one."""
    if isinstance(item, tuple | list) and len(item) == 2:
        return _tensor(item[0], f"{part}: inputs")[None], _tensor(item[1], f"{part}: targets")[None]
    return _tensor(item, f"{part}: inputs")[None]


def _concatenated(batches: Iterable[object], part: str, *, limit: int | None) -> tuple[Tensor, Tensor | None]:
    inputs: list[Tensor] = []
    targets: list[Tensor] = []
    count = 0
    for batch in batches:
        pair = isinstance(batch, tuple | list) and len(batch) == 2
        inputs.append(_tensor(batch[0] if pair else batch, f"{part}: inputs"))  # type: ignore[index]
        if pair:
            targets.append(_tensor(batch[1], f"{part}: targets"))  # type: ignore[index]
        count += inputs[-1].shape[0] if inputs[-1].ndim else 0
        if limit is not None and count >= limit:
            break
    if not inputs:
        raise DataError(f"{part}: there are no samples")
    if targets and len(targets) != len(inputs):
        raise DataError(f"{part}: {len(inputs)} batches of inputs but {len(targets)} of targets; each needs both")
    return _joined(inputs, f"{part}: inputs"), _joined(targets, f"{part}: targets") if targets else None


def _joined(tensors: list[Tensor], what: str) -> Tensor:
    try:
        return torch.cat(tensors)
    except RuntimeError as error:
        shapes = sorted({str(tuple(tensor.shape[1:])) for tensor in tensors})
        raise DataError(f"{what}: samples must all have one shape; found {', '.join(shapes[:4])}") from error


def _tensor(value: object, what: str) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    try:
        array = np.asarray(value)
        return torch.from_numpy(np.array(array))
    except (TypeError, ValueError) as error:
        raise DataError(f"{what}: given {_kind(value)}, allowed: a tensor or a numeric numpy array") from error


def _typed_targets(targets: Tensor, part: str) -> Tensor:
    if targets.dtype in _FLOATS:
        targets = targets.to(torch.float32)
        _check_finite(targets, f"{part}: targets")
        return targets
    if targets.is_complex():
        raise DataError(f"{part}: targets are {targets.dtype}; give integer classes or float32 values")
    return targets.to(torch.int64)


def _check_finite(values: Tensor, what: str) -> None:
    bad = ~torch.isfinite(values).reshape(values.shape[0], -1).all(dim=1)  # (samples,)
    if bool(bad.any()):
        first = int(bad.nonzero()[0])
        raise DataError(f"{what} hold NaN or infinity in {int(bad.sum())} sample(s), first in number {first}")


def _check_labels(output: Tensor, targets: Tensor) -> None:
    """Integer labels of a classifier, outputs (1, classes), must name one of its classes."""
    if targets.dtype != torch.int64 or targets.ndim != 1 or output.ndim != 2:
        return
    low, high, classes = int(targets.min()), int(targets.max()), int(output.shape[1])
    if low < 0 or high >= classes:
        raise DataError(
            f"validation: labels go from {low} to {high}, but the model has {classes} outputs (0 to {classes - 1})"
        )


def _is_sorted_by_class(targets: Tensor, size: int) -> bool:
    if targets.dtype != torch.int64 or targets.ndim != 1:
        return False
    classes, counts = torch.unique(targets[size:], return_counts=True)
    major = classes[counts >= MAJOR_SHARE * (targets.shape[0] - size)]
    return not bool(torch.isin(major, targets[:size]).all())


def _kind(value: object) -> str:
    kind = type(value)
    name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
    return f"{name} of length {len(value)}" if isinstance(value, tuple | list) else name
