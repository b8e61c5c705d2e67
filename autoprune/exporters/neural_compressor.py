"""Intel Neural Compressor: pruning configs from which it chooses while training, and masks that it locks."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Final, final

from torch import Tensor

from autoprune.core.pattern import Pattern, parse_pattern
from autoprune.errors import PolicyError
from autoprune.exporters.base import (
    EXACT,
    Aspect,
    Exported,
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

_MOST: Final = 0.98
"""What the tool lets a layer lose, unless told otherwise."""


@final
class NeuralCompressor:
    """`pruning.json` with `pruning_configs` for `WeightPruningConfig`, and `masks.pt` with the weights that count.

    Its blocks are outputs by inputs, as ours; whole outputs are blocks of one output by all its weights; its N:M says
    how many go, ours how many stay. `load.py` prunes as configured, or locks the exact zeros (`pattern_lock`).
    """

    __slots__ = ()

    name: str = "neural-compressor"
    tested: tuple[str, ...] = ("neural-compressor 3.7.1",)

    def export(self, resolved: Resolved) -> Exported:
        """Zeros exactly; channels and kernels as zeros; nothing else."""
        masks = {name: mask for name, mask in layer_masks(resolved, gone=False).items() if name.endswith(".weight")}
        if not masks:
            raise PolicyError(
                f"nothing of this policy is zeros in weights, so there is nothing to write for {self.name}: it removes "
                "no channels and no weights. Export it for a tool that quantises or splits layers."
            )
        narrowed = [entry for unit in resolved.units for entry in _outputs(unit, resolved)]
        names = {name for entry in narrowed for name in _ops(entry)}
        inside = [
            _inside(layer, masks) for name, layer in resolved.layers.items() if _sparse(layer) and name not in names
        ]
        locked = _entry([name.removesuffix(".weight") for name in masks], "1x1", 0.0, "pattern_lock")
        content = {
            **about(resolved, self.tested),
            "pruning_configs": [*narrowed, *inside],
            "lock_configs": [{**locked, "start_step": 0, "end_step": 0}],
        }
        files = {
            "pruning.json": json_bytes(content),
            "masks.pt": state_bytes(masks),
            "load.py": loader("neural_compressor"),
        }
        grades = _grades(resolved)
        if resolved.mended and grades["weights"] == EXACT:
            files["state.pt"] = state_bytes(dense_state(resolved))
        return Exported(files, resolved.graded(grades))


def _grades(resolved: Resolved) -> dict[Aspect, Grade]:
    whole = resolved.says_only("width", "channels", "sparsity", "mask", "kernel", "weights")
    return {
        "width": approximated("outputs are set to zero, and layers keep their size"),
        "channels": EXACT,
        "depth": dropped("its masks are for weights, and the block's norms would still speak"),
        "sparsity": EXACT,
        "mask": EXACT,
        "kernel": approximated("the outer taps are set to zero, and the kernel keeps its size"),
        "bits": dropped("its pruning does not quantise"),
        "arithmetic": dropped("its pruning does not quantise"),
        "rank": dropped("zeros cannot make two layers of one"),
        "resolution": dropped("zeros cannot resize an input"),
        "weights": final_weights(whole=whole),
    }


def _entry(names: list[str], pattern: str, target: float, kind: str = "magnitude") -> dict[str, object]:
    """One pruner. `op_names` are searched for in names, so each is anchored; `cube` ends on the target. It goes
    by magnitudes: scores from gradients tie at zero where a channel is silent, and all that tie would go.
    """
    return {
        "op_names": [f"^{re.escape(name)}$" for name in names],
        "excluded_op_names": [],
        "pattern": pattern,
        "target_sparsity": target,
        "min_sparsity_ratio_per_op": 0.0,
        "max_sparsity_ratio_per_op": max(_MOST, target),
        "pruning_type": kind,
        "pruning_scope": "local",
        "pruning_frequency": 1,
        "sparsity_decay_type": "cube",
        "start_step": 1,
        "end_step": 1000,
    }


def _ops(entry: Mapping[str, object]) -> list[str]:
    names = entry["op_names"]
    assert isinstance(names, list)
    return [re.sub(r"\\(.)", r"\1", name[1:-1]) for name in names]


def _outputs(unit: UnitCut, resolved: Resolved) -> Iterator[dict[str, object]]:
    """One entry for each size of row among the layers whose outputs go: whole rows, those of one head together."""
    alike: dict[tuple[str, float], list[str]] = {}
    for name, gone in (unit.producers or {}).items():
        layer = resolved.layers[name]
        side = len(gone) // (unit.decision.of - unit.decision.keep) if unit.decision.kind == "heads" else 1
        if gone and not layer.gone and side and layer.shape[0] % side == 0:
            pattern = f"{side}x{math.prod(layer.shape[1:])}"
            alike.setdefault((pattern, share(len(gone) // side, layer.shape[0] // side)), []).append(name)
    for (pattern, target), names in alike.items():
        yield _entry(names, pattern, target)


def _sparse(layer: LayerCut) -> bool:
    return bool(layer.pattern) and not layer.gone


def _inside(layer: LayerCut, masks: Mapping[str, Tensor]) -> dict[str, object]:
    """Zeros inside one layer: in its pattern, where the layer is whole and divides into it, else as many anywhere."""
    said = None if layer.is_cut else _pattern(layer, parse_pattern(layer.pattern))
    text, target = said or ("1x1", zeros(masks[layer.weight]))
    return _entry([layer.name], text, target)


def _pattern(layer: LayerCut, pattern: Pattern) -> tuple[str, float] | None:
    outputs, inputs = layer.shape[:2]
    if pattern.kind == "n:m" and inputs % pattern.columns == 0:
        gone = pattern.columns - pattern.keep
        return f"{gone}:{pattern.columns}", gone / pattern.columns
    if pattern.kind == "block" and outputs % pattern.rows == 0 and inputs % pattern.columns == 0:
        blocks = math.prod(layer.shape) // (pattern.rows * pattern.columns)
        return f"{pattern.rows}x{pattern.columns}", share(round(pattern.sparsity * blocks), blocks)
    return None
