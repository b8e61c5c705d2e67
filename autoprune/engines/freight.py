"""Values on their way to other processes: a pickle and, beside it, the tensors' memory as it lies.

What is unpacked shares that memory: put once into shared memory (an object store, a mapped file), a value of gigabytes
is there once for all processes of a machine. Unpacked tensors must not be written to. Classes and functions that were
read from a person's own files travel by value, as other processes cannot import them. Freight is for processes of one
search alone; nothing that is read from a file of a person is ever unpickled.
"""

from __future__ import annotations

import io
import pickle
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import cloudpickle
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

ALIGNMENT = 64
"""Bytes at whose multiples tensors begin in a file."""

_PACKAGES = tuple(Path(path) for path in {*map(sysconfig.get_path, ("purelib", "platlib", "stdlib", "platstdlib"))})
_OWN = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True)
class Freight:
    """A value as bytes: its pickle, and the memory of its tensors and arrays, (bytes,) each."""

    head: bytes
    buffers: tuple[NDArray[np.uint8], ...]

    @property
    def size_bytes(self) -> int:
        """All of it."""
        return len(self.head) + sum(buffer.nbytes for buffer in self.buffers)


def pack(value: object) -> Freight:
    """`value` as freight. Memory of tensors is not copied; tensors that share memory still do when unpacked."""
    buffers: list[pickle.PickleBuffer] = []
    file = io.BytesIO()
    with _by_value(_personal_modules()):
        _Packer(file, protocol=5, buffer_callback=buffers.append).dump(value)
    arrays = tuple(np.frombuffer(buffer.raw(), dtype=np.uint8) for buffer in buffers)
    return Freight(file.getvalue(), arrays)


def unpack(freight: Freight) -> Any:
    """The value; its tensors lie in the buffers of `freight`."""
    return pickle.loads(freight.head, buffers=freight.buffers)


def write(freight: Freight, path: Path) -> None:
    """Into one file, to be mapped by `read`."""
    with path.open("wb") as file:
        sizes = np.array([len(freight.head), *(buffer.nbytes for buffer in freight.buffers)], dtype=np.int64)
        np.save(file, sizes)
        for part in (freight.head, *freight.buffers):
            file.write(b"\0" * (-file.tell() % ALIGNMENT))
            file.write(memoryview(part))  # type: ignore[arg-type]


def read(path: Path) -> Freight:
    """Map the file: all processes that do so share its pages."""
    with path.open("rb") as file:
        sizes = np.load(file, allow_pickle=False)
        start = file.tell()
    mapped = np.memmap(path, dtype=np.uint8, mode="r")
    parts = []
    for size in sizes.tolist():
        start += -start % ALIGNMENT
        parts.append(mapped[start : start + size])
        start += size
    return Freight(parts[0].tobytes(), tuple(parts[1:]))


class _Store:
    """The memory of one or more tensors."""

    def __init__(self, memory: NDArray[np.uint8]) -> None:
        self.memory = memory

    def __reduce_ex__(self, protocol: object) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _Store._of, (pickle.PickleBuffer(memoryview(self.memory)),)  # type: ignore[arg-type]

    @staticmethod
    def _of(buffer: Any) -> _Store:
        return _Store(np.frombuffer(buffer, dtype=np.uint8))

    def storage(self) -> torch.UntypedStorage:
        """The same memory, as torch has it."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            return torch.frombuffer(self.memory, dtype=torch.uint8).untyped_storage()


class _Packer(cloudpickle.Pickler):  # type: ignore[misc]
    """Pickles tensors in main memory by what they are, and their memory beside the pickle."""

    def __init__(self, file: io.BytesIO, **options: Any) -> None:
        super().__init__(file, **options)
        self._stores: dict[int, _Store] = {}
        self._held: list[Tensor] = []

    def reducer_override(self, obj: Any) -> Any:
        """Plain tensors and parameters; everything else as usual."""
        if type(obj) in (Tensor, nn.Parameter) and _is_plain(obj):
            return self._reduced(obj)
        return super().reducer_override(obj)

    def _reduced(self, tensor: Tensor) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key not in self._stores:
            whole = torch.empty(0, dtype=torch.uint8).set_(storage)
            self._held.append(whole)
            self._stores[key] = _Store(whole.numpy())
        return _tensor, (
            self._stores[key], tensor.dtype, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(),
            tensor.requires_grad, isinstance(tensor, nn.Parameter),
        )  # fmt: skip


def _is_plain(tensor: Tensor) -> bool:
    return (
        tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_quantized
        and tensor.is_leaf
        and not tensor.is_conj()
        and not tensor.is_neg()
        and tensor.untyped_storage().nbytes() > 0
        and not vars(tensor)
        and not tensor._backward_hooks
    )


def _tensor(
    store: _Store, dtype: torch.dtype, offset: int, shape: Sequence[int], strides: Sequence[int], requires_grad: bool,
    parameter: bool,
) -> Tensor:  # fmt: skip
    tensor = torch.empty(0, dtype=dtype).set_(store.storage(), offset, shape, strides)
    if parameter:
        return nn.Parameter(tensor, requires_grad=requires_grad)
    found: Tensor = tensor.requires_grad_(requires_grad)
    return found


def _personal_modules() -> list[ModuleType]:
    """Modules of files that are neither ours nor an installed package's."""
    found = []
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file is None or name == "__main__" or name != getattr(module, "__name__", None):
            continue
        path = Path(file)
        if not any(path.is_relative_to(place) for place in (*_PACKAGES, _OWN)):
            found.append(module)
    return found


@contextmanager
def _by_value(modules: Sequence[ModuleType]) -> Iterator[None]:
    known = cloudpickle.list_registry_pickle_by_value()
    ours = [module for module in modules if module.__name__ not in known]
    for module in ours:
        cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in ours:
            cloudpickle.unregister_pickle_by_value(module)
