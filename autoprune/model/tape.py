"""What a forward pass does to memory, found without running it: every operation, what it reads and what it makes.

Knows shapes and the order of things. `planned` says for whom: a runtime that plans its memory computes what is constant
beforehand and copies what PyTorch only views (a slice, a transpose); PyTorch does neither.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from autoprune.errors import ModelError

INPUT = 0
"""The value that the caller hands in, and keeps."""
_IMAGE_DIMS = 4


@dataclass(frozen=True, slots=True)
class Step:
    """One operation: the values it reads and makes, by index, and the watched modules around it, outermost first."""

    name: str
    is_pointwise: bool
    within: tuple[str, ...]
    reads: tuple[int, ...]
    makes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Tape:
    """One forward pass: its steps, the bytes and channels of each value, and which values it returns."""

    steps: tuple[Step, ...]
    bytes: tuple[int, ...]
    channels: tuple[int, ...]
    """Of images (batch, channels, height, width); 0 of everything else."""
    returned: tuple[int, ...]


def record(model: nn.Module, example: Tensor, *, watched: Collection[str] = (), planned: bool) -> Tape:
    """The pass of `model` in eval mode on `example`: of a copy without weights, or with them where it looks at numbers.

    `watched` are the modules whose steps are marked. Raises ModelError when the model does not run on `example`.
    """
    try:
        return _record(copy.deepcopy(model).to("meta"), example.to("meta"), watched, planned)
    except Exception:  # noqa: BLE001 (a foreign forward without numbers raises anything: now it gets them)
        try:
            return _record(copy.deepcopy(model), example, watched, planned)
        except Exception as error:
            raise ModelError(
                f"the model does not run on inputs of shape {tuple(example.shape)} ({type(error).__name__}: {error})"
            ) from error


def _record(model: nn.Module, example: Tensor, watched: Collection[str], planned: bool) -> Tape:
    """Consumes `model`: its hooks stay."""
    recorder = _Recorder(example, planned)
    modules = dict(model.eval().named_modules())
    for name in watched:
        modules[name].register_forward_pre_hook(recorder.enter(name))
        modules[name].register_forward_hook(recorder.leave())
    with torch.no_grad(), recorder:
        output = model(example)
    return recorder.tape(output)


@final
class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Numbers the values. Keeps every tensor until the end, so that no two have one identity."""

    def __init__(self, example: Tensor, planned: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._planned = planned
        self._kept: list[object] = [example]
        self._tensors = {id(example): INPUT}
        self._storages = {_storage(example): INPUT}
        self._bytes = [_bytes(example)]
        self._channels = [_channels(example)]
        self._steps: list[Step] = []
        self._within: list[str] = []

    def enter(self, name: str) -> Callable[[nn.Module, object], None]:
        """A hook for the start of a watched module."""
        return lambda _module, _inputs: self._within.append(name)

    def leave(self) -> Callable[[nn.Module, object, object], None]:
        """A hook for its end."""

        def hook(_module: nn.Module, _inputs: object, _output: object) -> None:
            self._within.pop()

        return hook

    def tape(self, output: object) -> Tape:
        """What was recorded, once the model has returned `output`."""
        found = (self._value_of(leaf) for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
        returned = tuple(dict.fromkeys(value for value in found if value is not None))
        return Tape(tuple(self._steps), tuple(self._bytes), tuple(self._channels), returned)

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        output = func(*args, **given)
        inputs = [leaf for leaf in tree_leaves((args, given)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        self._kept.append((inputs, outputs))
        values = [self._value_of(tensor) for tensor in inputs]
        reads = tuple(dict.fromkeys(value for value in values if value is not None))
        if not reads and self._planned:
            return output
        constants = {_storage(tensor) for tensor, value in zip(inputs, values, strict=True) if value is None}
        made = [self._make(tensor) for tensor in outputs if _storage(tensor) not in constants]
        makes = tuple(value for value in made if value is not None)
        pointwise = torch.Tag.pointwise in func.tags
        self._steps.append(Step(str(func._schema.name), pointwise, tuple(self._within), reads, makes))
        return output

    def _value_of(self, tensor: Tensor) -> int | None:
        """The value that `tensor` is or views; None for weights and other constants."""
        return self._tensors.get(id(tensor), self._storages.get(_storage(tensor)))

    def _make(self, tensor: Tensor) -> int | None:
        """The new value that an operation's output is; None where it is one that is there."""
        known = self._value_of(tensor)
        if known is not None and (id(tensor) in self._tensors or not self._planned or _is_whole(tensor)):
            self._tensors[id(tensor)] = known
            return None
        value = len(self._bytes)
        self._bytes.append(_bytes(tensor))
        self._channels.append(_channels(tensor))
        self._tensors[id(tensor)] = value
        self._storages.setdefault(_storage(tensor), value)
        return value


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _channels(tensor: Tensor) -> int:
    return tensor.shape[1] if tensor.ndim == _IMAGE_DIMS else 0


def _is_whole(tensor: Tensor) -> bool:
    """Whether it is all of its storage, in order."""
    in_order = tensor.is_contiguous() or (
        tensor.ndim == _IMAGE_DIMS and tensor.is_contiguous(memory_format=torch.channels_last)
    )
    return in_order and _bytes(tensor) == tensor.untyped_storage().nbytes()
