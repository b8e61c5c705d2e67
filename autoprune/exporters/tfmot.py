"""TensorFlow Model Optimization: how many weights of each layer are zero, for Keras layers of the same names."""

from __future__ import annotations

from typing import Final, final

from autoprune.core.pattern import parse_pattern
from autoprune.errors import PolicyError
from autoprune.exporters.base import EXACT, Aspect, Exported, Grade, LayerCut, Resolved, approximated, dropped
from autoprune.exporters.dense_shape import sparsity_of
from autoprune.exporters.loaders import loader
from autoprune.exporters.texts import about, json_bytes

OWN_ZEROS: Final = dropped("tfmot takes the smallest weights itself")
NARROWED: Final = dropped("tfmot zeroes weights alone")


@final
class TFMOT:
    """`sparsity.json`: the arguments of `prune_low_magnitude` by name of a Keras layer, for a constant sparsity.

    Its kernels are (..., inputs, outputs): a block of 4 outputs by 1 input is `block_size` [1, 4]. Its
    `sparsity_m_by_n` counts zeros: 2 kept of 4 is [2, 4], 1 of 4 is [3, 4]; the share is not used then.
    """

    __slots__ = ()

    name: str = "tfmot"
    tested: tuple[str, ...] = ("tensorflow-model-optimization 0.8.1",)

    def export(self, resolved: Resolved) -> Exported:
        """Zeros of whole layers. Raises PolicyError where no layer has a pattern."""
        sparse = {unit.name: resolved.layers[unit.layers[0]] for unit in resolved.units if unit.decision.pattern}
        said = {cut.name: _arguments(resolved, cut) for cut in sparse.values() if len(cut.shape) in (2, 4)}
        if not said:
            raise PolicyError(f"{resolved.title}: has no zeros inside layers, and tfmot knows nothing else")
        units: dict[str, dict[Aspect, Grade]] = {name: {"sparsity": _sparsity(cut)} for name, cut in sparse.items()}
        grades: dict[Aspect, Grade] = {
            "width": NARROWED, "channels": NARROWED, "depth": NARROWED, "kernel": NARROWED, "mask": OWN_ZEROS,
            "weights": dropped("a Keras model has its own"),
        }  # fmt: skip
        files = {
            "sparsity.json": json_bytes({**about(resolved, self.tested), "layers": said}),
            "load.py": loader("tfmot"),
        }
        return Exported(files, resolved.graded(grades, units=units))


def _arguments(resolved: Resolved, cut: LayerCut) -> dict[str, object]:
    """Of the layer as it is when the policy's channels stay: its pattern, or the share that is zero."""
    pattern = parse_pattern(cut.pattern)
    if pattern.kind == "n:m":
        return {"sparsity": pattern.sparsity, "sparsity_m_by_n": [pattern.columns - pattern.keep, pattern.columns]}
    if pattern.kind == "block" and len(cut.shape) == 2:
        return {"sparsity": pattern.sparsity, "block_size": [pattern.columns, pattern.rows]}
    return {"sparsity": pattern.sparsity if cut.is_cut else sparsity_of(resolved, cut)}


def _sparsity(cut: LayerCut) -> Grade:
    if len(cut.shape) not in (2, 4):
        return dropped("tfmot prunes convolutions and dense layers")
    if parse_pattern(cut.pattern).kind == "block" and len(cut.shape) != 2:
        return approximated("the share alone: it knows blocks of dense layers")
    if cut.is_cut:
        return approximated("of the whole layer: what is cut off it stays")
    return EXACT
