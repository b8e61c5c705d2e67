"""Huawei AMCT: `prune.cfg`, a text of its proto message `AMCTRetrainConfig` with a ratio for each layer by name."""

from __future__ import annotations

from typing import Final, final

from autoprune.errors import PolicyError
from autoprune.exporters.base import (
    EXACT,
    Aspect,
    Exported,
    Grade,
    LayerCut,
    Resolved,
    UnitCut,
    dropped,
)
from autoprune.exporters.texts import comment

PRUNABLE: Final = ("Conv2d", "Linear")
"""Classes of layers whose outputs AMCT prunes; of depthwise convolutions it does not, they follow."""
DEFAULT: Final = 0.3
"""What AMCT does to layers that are neither overridden nor skipped; there are none."""


@final
class AMCT:
    """`prune.cfg`, as `create_prune_retrain_model(model, inputs, "prune.cfg", record_file)` reads it, and as AMCT's own
    search of channels writes it: a ratio by layer, the other layers skipped.

    From `retrain_config_pytorch.proto` of https://github.com/hicann/amct (commit 2be20da). `ascend_optimized` is off:
    AMCT would round kept channels up to a multiple of 16.
    """

    __slots__ = ()

    name: str = "amct"
    tested: tuple[str, ...] = ("amct 2be20da, its proto and its reader",)

    def export(self, resolved: Resolved) -> Exported:
        """Widths by ratio and 2:4. Raises PolicyError where the policy has neither."""
        narrowed = {unit.name: _narrowed(resolved, unit) for unit in resolved.units if unit.narrows}
        ratios = {layer: 1 - unit.decision.keep / unit.decision.of
                  for unit in resolved.units for layer in narrowed.get(unit.name, ())}  # fmt: skip
        halved = [unit.layers[0] for unit in resolved.units if unit.decision.pattern == "2:4"]
        halved = [layer for layer in halved if resolved.layers[layer].kind in PRUNABLE and layer not in ratios]
        if not ratios and not halved:
            raise PolicyError(f"{resolved.title}: AMCT prunes channels of Conv2d and Linear, or 2:4; this has neither")
        text = comment(resolved, self.tested) + _text(resolved, ratios, halved)
        units = {name: _width(layers) for name, layers in narrowed.items()}
        units |= {unit.name: _sparse(unit, ratios, halved) for unit in resolved.units if unit.decision.pattern}
        grades: dict[Aspect, Grade] = {
            "channels": dropped("AMCT keeps those of the largest L2 norms"),
            "mask": dropped("AMCT keeps the largest weights"),
            "weights": dropped("AMCT trains them again"),
        }
        return Exported({"prune.cfg": text.encode()}, resolved.graded(grades, units=units))


def _narrowed(resolved: Resolved, unit: UnitCut) -> tuple[str, ...]:
    """The layers that get the unit's ratio: all that make its channels, for AMCT takes the least ratio of a group. None
    where they have other outputs besides.
    """
    made = [resolved.layers[name] for name in unit.producers or {}]
    active = [cut for cut in made if not _depthwise(cut)]
    whole = all(cut.kind in PRUNABLE and cut.shape[0] == unit.decision.of for cut in active)
    return tuple(cut.name for cut in active) if whole and unit.decision.kind != "heads" else ()


def _depthwise(cut: LayerCut) -> bool:
    return cut.groups > 1 and cut.shape[1] == 1


def _width(layers: tuple[str, ...]) -> dict[Aspect, Grade]:
    return {"width": EXACT if layers else dropped("AMCT prunes whole outputs of Conv2d and Linear")}


def _sparse(unit: UnitCut, ratios: dict[str, float], halved: list[str]) -> dict[Aspect, Grade]:
    if unit.layers[0] in halved:
        return {"sparsity": EXACT}
    if unit.decision.pattern == "2:4" and unit.layers[0] in ratios:
        return {"sparsity": dropped("AMCT prunes a layer by channels or 2:4, not both")}
    return {"sparsity": dropped("AMCT knows 2:4 alone"), "mask": dropped("AMCT knows 2:4 alone")}


def _text(resolved: Resolved, ratios: dict[str, float], halved: list[str]) -> str:
    skipped = [cut.name for cut in resolved.layers.values()
               if cut.kind in PRUNABLE and not _depthwise(cut) and cut.name not in ratios]  # fmt: skip
    overrides = {layer: _filters(ratio) for layer, ratio in ratios.items()} | dict.fromkeys(halved, _halves())
    order = [name for name in resolved.layers if name in overrides]
    parts = [f"prune_config {{\n{_indented(_filters(DEFAULT) if ratios else _halves())}}}\n"]
    parts += [f'regular_prune_skip_layers: "{name}"\n' for name in skipped if name not in overrides]
    parts += [f'override_layer_configs {{\n  layer_name: "{name}"\n  prune_config {{\n'
              f"{_indented(overrides[name], 4)}  }}\n}}\n" for name in order]  # fmt: skip
    return "".join(parts)


def _filters(ratio: float) -> str:
    inner = f"prune_ratio: {ratio:.6g}\nascend_optimized: false\n"
    return f"filter_pruner {{\n  balanced_l2_norm_filter_prune {{\n{_indented(inner, 4)}  }}\n}}\n"


def _halves() -> str:
    return "n_out_of_m_pruner {\n  l1_selective_prune {\n    n_out_of_m_type: M4N2\n  }\n}\n"


def _indented(text: str, by: int = 2) -> str:
    return "".join(f"{' ' * by}{line}\n" for line in text.splitlines())
