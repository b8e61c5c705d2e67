"""A bank on disk: safetensors, keyed by what it was made from. A damaged or foreign file is made anew.

Second moments, which are most of it, have a file for each layer; they are read as they are needed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import final
from urllib.parse import quote

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from autoprune.bank.build import Bank
from autoprune.bank.calibrate import LayerStatistics
from autoprune.bank.depth import Run
from autoprune.core.budget import shown
from autoprune.engines.base import EachTensor, Item, Shared
from autoprune.files import write_bytes
from autoprune.progress import Progress

_SAVE_EVERY_S = 5.0

_FIELDS = ("mean", "diagonal", "mean_abs", "zero_share", "per_sample", "taylor", "output_fisher")


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write atomically. Raises RunError when the disk is full or the folder read-only; an old file stays intact."""
    distinct = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    write_bytes(path, save(distinct, dict(metadata)))


def load_tensors(path: Path, *, key: str) -> dict[str, Tensor] | None:
    """The tensors of a file whose metadata names `key`, or None where there is none such or it is damaged."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("key") != key:
                return None
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError):
        return None


@final
class Pieces:
    """Work in many pieces whose results are kept as they come in: what a killed process had done is not done again."""

    def __init__(self, path: Path, key: str, each: EachTensor, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._key = key
        self._each = each
        self._clock = clock

    def __call__(
        self, work: Callable[[Shared, Item], Tensor], shared: Shared, items: Sequence[Item]
    ) -> Iterator[Tensor]:
        """`work(shared, item)` of every item, in their order; what the file has of them is read."""
        done = load_tensors(self._path, key=self._key) or {}
        missing = [item for item in items if str(item) not in done]
        results = self._each(work, shared, missing)
        saved = self._clock()
        for item in items:
            if str(item) not in done:
                done[str(item)] = next(results)
                if self._clock() - saved > _SAVE_EVERY_S:
                    save_tensors(self._path, done, {"key": self._key})
                    saved = self._clock()
            yield done[str(item)]

    def forget(self) -> None:
        """Remove the file: the whole is kept elsewhere."""
        self._path.unlink(missing_ok=True)


@final
class Moments:
    """Second moments of a bank: on disk all of them, in memory `memory_bytes` at most."""

    def __init__(self, folder: Path, key: str, *, memory_bytes: int, progress: Progress) -> None:
        self._folder = folder / f"{key[:16]}.moments"
        self._key = key
        self._memory_bytes = memory_bytes
        self._progress = progress
        self._held = 0
        self._told = False

    def keep(self, layer: str, second: Tensor) -> Tensor:
        """Write a layer's; they come back in memory while there is room, else mapped from their file."""
        save_tensors(self._path(layer), {"second": second}, {"key": self._key})
        size = second.numel() * second.element_size()
        if self._held + size <= self._memory_bytes:
            self._held += size
            return second
        if not self._told:
            self._told = True
            self._progress.note(
                f"second moments take more than the {shown('size', self._memory_bytes)} that the bank may have in "
                f"memory (--bank-memory); the rest is kept on disk, in {self._folder}"
            )
        mapped = self.load(layer)
        return second if mapped is None else mapped

    def load(self, layer: str) -> Tensor | None:
        """A layer's, mapped from its file; None where that is not there."""
        tensors = load_tensors(self._path(layer), key=self._key)
        return None if tensors is None else tensors.get("second")

    def _path(self, layer: str) -> Path:
        return self._folder / f"{quote(layer, safe='')}.safetensors"


def pack(bank: Bank) -> dict[str, Tensor]:
    """A bank as named tensors: `layer/...` statistics, `order/...` removal orders, `run/...` depth compensation.

    Second moments are not among them; where a layer has some, `layer/.../second` is empty.
    """
    tensors: dict[str, Tensor] = {}
    for layer, values in bank.statistics.items():
        for field in _FIELDS:
            tensors[f"layer/{layer}/{field}"] = getattr(values, field)
        if values.second is not None:
            tensors[f"layer/{layer}/second"] = torch.empty(0)
        if values.movement is not None:
            tensors[f"layer/{layer}/movement"] = values.movement
    for unit, methods in bank.orders.items():
        tensors |= {f"order/{unit}/{method}": order for method, order in methods.items()}
    for layer, runs in bank.runs.items():
        for run in runs:
            tensors[f"run/{layer}/{'+'.join(run.blocks)}/cross"] = run.cross
            tensors[f"run/{layer}/{'+'.join(run.blocks)}/shift"] = run.shift
    return tensors


def unpack(tensors: Mapping[str, Tensor], norms: Mapping[str, str], moments: Moments) -> Bank | None:
    """The inverse of `pack`; `norms` is the model's own. None where a layer's second moments are lost."""
    layers: dict[str, dict[str, Tensor]] = {}
    orders: dict[str, dict[str, Tensor]] = {}
    runs: dict[str, dict[str, dict[str, Tensor]]] = {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition("/")
        owner, field = rest.rsplit("/", 1)
        if kind == "layer":
            layers.setdefault(owner, {})[field] = tensor
        elif kind == "order":
            orders.setdefault(owner, {})[field] = tensor
        else:
            layer, blocks = owner.rsplit("/", 1)
            runs.setdefault(layer, {}).setdefault(blocks, {})[field] = tensor
    statistics: dict[str, LayerStatistics] = {}
    for layer, fields in layers.items():
        second = moments.load(layer) if "second" in fields else None
        if "second" in fields and second is None:
            return None
        known = {field: fields[field] for field in _FIELDS}
        statistics[layer] = LayerStatistics(second=second, movement=fields.get("movement"), **known)
    return Bank(statistics, orders, norms, {layer: _runs(known) for layer, known in runs.items()})


def _runs(known: Mapping[str, Mapping[str, Tensor]]) -> tuple[Run, ...]:
    found = [Run(tuple(blocks.split("+")), fields["cross"], fields["shift"]) for blocks, fields in known.items()]
    return tuple(sorted(found, key=lambda run: len(run.blocks)))
