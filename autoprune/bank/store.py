"""A bank on disk: safetensors, one file, keyed by what it was made from. A damaged or foreign file is made anew."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from autoprune.bank.calibrate import LayerStatistics
from autoprune.files import write_bytes

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


def flatten(statistics: Mapping[str, LayerStatistics]) -> dict[str, Tensor]:
    """Statistics as named tensors."""
    tensors: dict[str, Tensor] = {}
    for layer, values in statistics.items():
        for field in _FIELDS:
            tensors[f"layer/{layer}/{field}"] = getattr(values, field)
        if values.second is not None:
            tensors[f"layer/{layer}/second"] = values.second
    return tensors


def unflatten(tensors: Mapping[str, Tensor]) -> dict[str, LayerStatistics]:
    """The inverse of `flatten`."""
    grouped: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("layer/"):
            layer, field = name[len("layer/") :].rsplit("/", 1)
            grouped.setdefault(layer, {})[field] = tensor
    return {
        layer: LayerStatistics(second=fields.get("second"), **{field: fields[field] for field in _FIELDS})
        for layer, fields in grouped.items()
    }
