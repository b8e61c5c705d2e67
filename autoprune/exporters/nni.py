"""NNI 3 and 2: a config list from which its pruners choose, and the masks themselves, which they take as they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final, final

import torch
from torch import Tensor, fx

from autoprune.core.pattern import Pattern, parse_pattern
from autoprune.errors import PolicyError
from autoprune.exporters.base import (
    EXACT,
    Aspect,
    Exported,
    Fidelity,
    Grade,
    LayerCut,
    Resolved,
    UnitCut,
    approximated,
    dropped,
    final_weights,
)
from autoprune.exporters.loaders import loader
from autoprune.exporters.masks import dense_state, layer_masks, share, zeros
from autoprune.exporters.texts import about, json_bytes, state_bytes

_MASKED: Final = approximated("set to zero by masks: NNI's speedup cannot cut here")


@final
class NNI:
    """`config_list.json` for `L1NormPruner` and friends, and `masks.pt` for any pruner and for `ModelSpeedup`.

    One entry a coupled group (`dependency_group_id`), one a layer with zeros: blocks as `granularity`, N:M as a group
    of its own with `internal_metric_block`. `load.py` lets NNI choose, or loads the exact masks, or cuts by them.
    """

    __slots__ = ()

    name: str = "nni"
    tested: tuple[str, ...] = ("nni 3.0",)

    def export(self, resolved: Resolved) -> Exported:
        """Widths, channels and zeros exactly; dropped blocks as masks of zeros."""
        found = _needed(layer_masks(resolved, gone=True), self.name)
        cuts = _cuts(resolved) and _traced(resolved.dense)
        depth = approximated("the block's weights are masked, and its layers stay")
        groups = _groups(resolved)
        inside = _zeros(resolved, found, {name for each in groups for name in _ops(each)})
        content = {**about(resolved, self.tested), "cut": cuts, "config_list": [*groups, *inside]}
        return _exported(resolved, found, content, "nni", _graded(resolved, depth, cuts=cuts))


@final
class NNI2:
    """`config_list.json` for `L1NormPruner` (by dependency) and `LevelPruner` of NNI 2, and `masks.pt` for both and for
    `ModelSpeedup`. `load.py` lets NNI choose, or loads the exact masks, or cuts by them.
    """

    __slots__ = ()

    name: str = "nni2"
    tested: tuple[str, ...] = ("nni 2.10.1",)

    def export(self, resolved: Resolved) -> Exported:
        """Widths, channels and zeros exactly; no depth."""
        found = _needed(layer_masks(resolved, gone=False), self.name)
        cuts = _cuts(resolved) and all(
            name.rpartition(".")[0] in resolved.layers for name in resolved.dense.state_dict()
        )
        norm = [
            {"op_types": sorted({resolved.layers[name].kind for name in names}), "op_names": names,
             "sparsity_per_layer": entry["sparse_ratio"]}
            for entry in _groups(resolved) if entry["granularity"] == "out_channel"
            for names in [[name for name in _ops(entry) if _tied(resolved.layers[name])]] if names
        ]  # fmt: skip
        narrowed = {name for entry in norm for name in _ops(entry)}
        level = [
            {"op_types": [layer.kind], "op_names": [name], "sparsity_per_layer": zeros(found[layer.weight])}
            for name, layer in _sparse(resolved, narrowed)
        ]
        content = {**about(resolved, self.tested), "cut": cuts, "l1_norm": norm, "level": level}
        depth = dropped("its masks are for convolutions and linear layers, and the block's norms would still speak")
        return _exported(resolved, found, content, "nni2", _graded(resolved, depth, cuts=cuts))


def _exported(
    resolved: Resolved, found: Mapping[str, Tensor], content: Mapping[str, object], script: str, fidelity: Fidelity
) -> Exported:
    files = {
        "config_list.json": json_bytes(content),
        "masks.pt": state_bytes(found),
        "load.py": loader(script),
    }
    if resolved.mended and not any(remark.aspect == "weights" and remark.grade != EXACT for remark in fidelity.remarks):
        files["state.pt"] = state_bytes(dense_state(resolved))
    return Exported(files, fidelity)


def _needed(found: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    if not found:
        raise PolicyError(
            f"nothing of this policy is a mask, so there is nothing to write for {name}: it removes no channels and "
            "sets no weights to zero. Export it for a tool that quantises or splits layers."
        )
    return found


def _cuts(resolved: Resolved) -> bool:
    """Whether NNI's speedup may make the model that we cut: it knows no heads, and not that a block is gone."""
    drops = any(unit.decision.kind == "block" for unit in resolved.units)
    narrowed = [unit.decision.kind for unit in resolved.units if unit.narrows]
    return bool(narrowed) and not drops and "heads" not in narrowed


def _traced(model: torch.nn.Module) -> bool:
    """Whether NNI 3's speedup gets the graph it needs."""
    try:
        fx.symbolic_trace(model)
    except Exception:  # noqa: BLE001 - whatever a foreign forward raises when it is traced
        return False
    return True


def _graded(resolved: Resolved, depth: Grade, *, cuts: bool) -> Fidelity:
    masks: tuple[Aspect, ...] = ("width", "channels", "sparsity", "mask", "kernel", "weights")
    whole = resolved.says_only(*masks, *(("depth",) if depth.level != "dropped" else ()))
    grades: dict[Aspect, Grade] = {
        "width": EXACT if cuts else _MASKED,
        "channels": EXACT,
        "depth": depth,
        "sparsity": EXACT,
        "mask": EXACT,
        "kernel": approximated("the outer taps are set to zero, and the kernel keeps its size"),
        "bits": dropped("its pruners do not quantise"),
        "arithmetic": dropped("its pruners do not quantise"),
        "rank": dropped("a mask cannot make two layers of one"),
        "resolution": dropped("a mask cannot resize an input"),
        "weights": final_weights(whole=whole),
    }
    return resolved.graded(grades)


def _tied(layer: LayerCut) -> bool:
    """Whether NNI 2 ties it to others by itself: depthwise convolutions it does not, and they follow in its speedup."""
    return layer.kind in ("Conv2d", "Linear") and layer.groups == 1


def _ops(entry: Mapping[str, object]) -> list[str]:
    names = entry["op_names"]
    assert isinstance(names, list)
    return names


def _groups(resolved: Resolved) -> list[dict[str, object]]:
    """One entry for each set of layers that lose the same outputs; those of one unit that differ have groups apart."""
    entries: list[dict[str, object]] = []
    for unit in resolved.units:
        alike: dict[tuple[int, int, tuple[int, ...]], list[str]] = {}
        for name, gone in (unit.producers or {}).items():
            layer = resolved.layers[name]
            if gone and not layer.gone:
                alike.setdefault((len(layer.shape), layer.shape[0], tuple(sorted(gone))), []).append(name)
        for place, ((dims, rows, gone), names) in enumerate(alike.items()):
            side = _run(unit, rows, gone)
            if side:
                entries.append(
                    {
                        "op_names": names,
                        "sparse_ratio": share(len(gone) // side, rows // side),
                        "granularity": "out_channel" if side == 1 else [side] + [-1] * (dims - 1),
                        "dependency_group_id": unit.name if place == 0 else f"{unit.name} {place + 1}",
                    }
                )
    return entries


def _run(unit: UnitCut, rows: int, gone: tuple[int, ...]) -> int:
    """How many outputs in a row go together: 1, or those of one head; 0 where they do not lie so."""
    if unit.decision.kind != "heads":
        return 1
    side = len(gone) // (unit.decision.of - unit.decision.keep)
    whole = [row for first in range(0, rows, side) if first in gone for row in range(first, first + side)]
    return side if rows % side == 0 and tuple(whole) == gone else 0


def _sparse(resolved: Resolved, narrowed: set[str]) -> Iterator[tuple[str, LayerCut]]:
    """Layers with zeros inside, but for those that lose outputs, too: a pruner takes one entry a layer."""
    for name, layer in resolved.layers.items():
        if layer.pattern and not layer.gone and name not in narrowed:
            yield name, layer


def _zeros(resolved: Resolved, found: Mapping[str, Tensor], narrowed: set[str]) -> Iterator[dict[str, object]]:
    for name, layer in _sparse(resolved, narrowed):
        entry: dict[str, object] = {
            "op_names": [name],
            "sparse_ratio": zeros(found[layer.weight]),
            "granularity": [1] * len(layer.shape),
        }
        if layer.inputs is None and layer.kernel is None:
            entry |= _pattern(layer, parse_pattern(layer.pattern))
        yield entry


def _pattern(layer: LayerCut, pattern: Pattern) -> dict[str, object]:
    """What of an entry says blocks or N:M, where the layer divides into them."""
    outputs, inputs, *sides = layer.shape
    numel = torch.Size(layer.shape).numel()
    if pattern.kind == "block" and outputs % pattern.rows == 0 and inputs % pattern.columns == 0:
        blocks = numel // (pattern.rows * pattern.columns)
        return {
            "granularity": [pattern.rows, pattern.columns] + [1] * len(sides),
            "sparse_ratio": share(round(pattern.sparsity * blocks), blocks),
        }
    if pattern.kind == "n:m" and inputs % pattern.columns == 0 and all(side == 1 for side in sides):
        return {
            "sparse_ratio": share(pattern.columns - pattern.keep, pattern.columns),
            "dependency_group_id": layer.weight,
            "internal_metric_block": numel // pattern.columns,
        }
    return {}
