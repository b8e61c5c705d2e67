"""llm-compressor: a recipe with the sparsity of every linear layer, and in how many bits it is stored."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final, final

from autoprune.core.pattern import Pattern, parse_pattern
from autoprune.errors import PolicyError
from autoprune.exporters.base import EXACT, Aspect, Exported, Grade, LayerCut, Resolved, approximated, dropped
from autoprune.exporters.loaders import loader
from autoprune.exporters.masks import share
from autoprune.exporters.texts import comment, yaml_bytes

_MODIFIERS: Final[Mapping[str, str]] = {"sparsegpt": "SparseGPTModifier", "wanda": "WandaPruningModifier"}
_NEAREST: Final[Mapping[str, str]] = {"magnitude": "wanda"}
"""Of other methods; where nothing is said, `sparsegpt`."""
_COLUMNS: Final = 128
"""Its SparseGPT counts in blocks of so many columns, and takes one weight more than asked in each."""
_INTEGERS: Final = (3, 4, 5, 6, 8)
_ELSEWHERE: Final = dropped("it prunes and quantises linear layers alone")
_AGAIN: Final = approximated("chosen again by its own run of the same method, on its own calibration data")


@final
class LLMCompressor:
    """`recipe.yaml`: one modifier for each method and mask structure, one sparsity a layer; then one that quantises.

    A modifier's list of sparsities goes by the order of the model's modules, whatever the order of its targets. Its
    N:M says how many weights go, ours how many stay. `load.py` runs the recipe.
    """

    __slots__ = ()

    name: str = "llm-compressor"
    tested: tuple[str, ...] = ("llmcompressor 0.14.0.1",)

    def export(self, resolved: Resolved) -> Exported:
        """Shares of zeros and bits of linear layers; the tool chooses which weights go. No widths, no depth."""
        linear = [layer for layer in resolved.layers.values() if layer.kind == "Linear" and not layer.gone]
        groups = {**_sparsities(linear, resolved), **_bits(linear)}
        if not groups:
            raise PolicyError(
                f"nothing of this policy is zeros or integers in linear layers, and {self.name} knows nothing else. "
                "Export it for a tool that cuts models (torch-pruning, onnx)."
            )
        head = comment(resolved, self.tested)
        files = {"recipe.yaml": yaml_bytes({"autoprune_stage": groups}, head=head), "load.py": loader("llm_compressor")}
        units = {
            unit.name: _grades(resolved.layers[unit.layers[0]])
            for unit in resolved.units
            if _inside(unit.name, resolved)
        }
        weights = dropped("it makes its own")
        width = dropped("it does not cut models")
        return Exported(files, resolved.graded({"weights": weights, "width": width, "channels": width}, units=units))


def _inside(name: str, resolved: Resolved) -> bool:
    return name.removesuffix(".weight") in resolved.layers and name.endswith(".weight")


def _method(layer: LayerCut) -> str:
    assert layer.decision is not None
    method = layer.decision.method
    return method if method in _MODIFIERS else _NEAREST.get(method, "sparsegpt")


def _structure(layer: LayerCut, pattern: Pattern) -> str:
    """`0:0` is anywhere."""
    divides = pattern.kind == "n:m" and layer.shape[1] % pattern.columns == 0
    return f"{pattern.columns - pattern.keep}:{pattern.columns}" if divides else "0:0"


def _sparsities(linear: list[LayerCut], resolved: Resolved) -> dict[str, object]:
    """Groups of modifiers; layers in the model's order, which is that of the sparsities."""
    alike: dict[tuple[str, str], dict[str, float]] = {}
    for layer in linear:
        if layer.pattern:
            pattern = parse_pattern(layer.pattern)
            key = (_method(layer), _structure(layer, pattern))
            alike.setdefault(key, {})[layer.name] = _share(layer, pattern, resolved, *key)
    return {
        f"{method}_{'any' if structure == '0:0' else structure.replace(':', '_')}_modifiers": {
            _MODIFIERS[method]: {
                "sparsity": list(layers.values()) if structure == "0:0" else next(iter(layers.values())),
                "mask_structure": structure,
                "targets": list(layers),
            }
        }
        for (method, structure), layers in alike.items()
    }


def _share(layer: LayerCut, pattern: Pattern, resolved: Resolved, method: str, structure: str) -> float:
    """The sparsity to ask for, so that as many weights go as went here. A layer that is also narrowed stays whole
    there, and has its pattern's share; so has one whose small weights are zeros only for being rounded.
    """
    outputs, inputs = layer.shape
    if structure != "0:0":
        return pattern.sparsity
    assert layer.decision is not None
    whole = layer.inputs is None and layer.outputs is None and layer.decision.bits >= 16
    gone = int((~resolved.mask(layer.name)).sum()) if whole else round(pattern.sparsity * outputs * inputs)
    if method == "wanda":  # it takes the same number in every row
        return share(round(gone / outputs), inputs)
    return share(max(0, gone - math.ceil(inputs / _COLUMNS)), outputs * inputs)


def _bits(linear: list[LayerCut]) -> dict[str, object]:
    """Integers of so many bits with one scale an output; zeros stay zeros, for it rounds to the nearest."""
    groups: dict[str, dict[str, object]] = {}
    for layer in linear:
        if layer.decision is not None and layer.decision.bits in _INTEGERS:
            whole = layer.decision.inputs == 8
            name = f"int{layer.decision.bits}{'_arithmetic' if whole else ''}"
            scheme: dict[str, object] = {
                "targets": [],
                "weights": _integers(layer.decision.bits, "channel", symmetric=True),
            }
            if whole:
                scheme["input_activations"] = _integers(8, "tensor", symmetric=False)
            targets = groups.setdefault(name, scheme)["targets"]
            assert isinstance(targets, list)
            targets.append(layer.name)
    return {"quantise_modifiers": {"QuantizationModifier": {"config_groups": groups}}} if groups else {}


def _integers(bits: int, strategy: str, *, symmetric: bool) -> dict[str, object]:
    return {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy}


def _grades(layer: LayerCut) -> dict[Aspect, Grade]:
    """Of the unit that is one layer's weights."""
    decision = layer.decision
    rank = dropped("it cannot make two layers of one")
    if layer.kind != "Linear" or decision is None:
        return {"sparsity": _ELSEWHERE, "mask": _ELSEWHERE, "bits": _ELSEWHERE, "arithmetic": _ELSEWHERE, "rank": rank}
    return {
        "sparsity": _sparsity_grade(layer),
        "mask": _AGAIN
        if decision.method in _MODIFIERS
        else approximated(f"chosen again by {_MODIFIERS[_method(layer)]}"),
        "bits": EXACT if decision.bits in _INTEGERS else dropped("16-bit floats are the model's own type there"),
        "arithmetic": approximated("inputs have ranges of its own calibration, and outputs stay floats"),
        "rank": rank,
    }


def _sparsity_grade(layer: LayerCut) -> Grade:
    assert layer.decision is not None
    if not layer.decision.pattern:
        return EXACT
    pattern = parse_pattern(layer.decision.pattern)
    method = _method(layer)
    if layer.inputs is not None or layer.outputs is not None:
        return approximated("the pattern's share of the whole layer, which is not cut there")
    if pattern.kind != "unstructured":
        return EXACT if _structure(layer, pattern) != "0:0" else approximated("as many zeros, but not in blocks")
    if method == "wanda" and layer.decision.method != method:
        return approximated("as many zeros, and the same number in each row")
    if method == "sparsegpt" and layer.shape[1] > _COLUMNS:
        return approximated(f"to within one weight in every {_COLUMNS} columns")
    return EXACT
