"""A bank on disk: safetensors, one file, keyed by what it was made from. A damaged or foreign file is made anew."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from autoprune.bank.build import Bank
from autoprune.bank.calibrate import LayerStatistics
from autoprune.bank.depth import Run
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


def pack(bank: Bank) -> dict[str, Tensor]:
    """A bank as named tensors: `layer/...` statistics, `order/...` removal orders, `run/...` depth compensation."""
    tensors: dict[str, Tensor] = {}
    for layer, values in bank.statistics.items():
        for field in _FIELDS:
            tensors[f"layer/{layer}/{field}"] = getattr(values, field)
        if values.second is not None:
            tensors[f"layer/{layer}/second"] = values.second
    for unit, methods in bank.orders.items():
        tensors |= {f"order/{unit}/{method}": order for method, order in methods.items()}
    for layer, runs in bank.runs.items():
        for run in runs:
            tensors[f"run/{layer}/{'+'.join(run.blocks)}/cross"] = run.cross
            tensors[f"run/{layer}/{'+'.join(run.blocks)}/shift"] = run.shift
    return tensors


def unpack(tensors: Mapping[str, Tensor], norms: Mapping[str, str]) -> Bank:
    """The inverse of `pack`; `norms` is the model's own."""
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
    statistics = {
        layer: LayerStatistics(second=fields.get("second"), **{field: fields[field] for field in _FIELDS})
        for layer, fields in layers.items()
    }
    return Bank(statistics, orders, norms, {layer: _runs(known) for layer, known in runs.items()})


def _runs(known: Mapping[str, Mapping[str, Tensor]]) -> tuple[Run, ...]:
    found = [Run(tuple(blocks.split("+")), fields["cross"], fields["shift"]) for blocks, fields in known.items()]
    return tuple(sorted(found, key=lambda run: len(run.blocks)))
