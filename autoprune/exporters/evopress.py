"""EvoPress: `levels.txt`, a level for each layer; the weights that levels name; `depth.txt`, the dropped parts."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Final, final

from torch import Tensor, nn

from autoprune.errors import PolicyError
from autoprune.exporters.base import EXACT, Aspect, Exported, Grade, LayerCut, Resolved, UnitCut, approximated, dropped
from autoprune.exporters.dense_shape import in_place, sparse_layers, sparsity_of, zeros_of
from autoprune.exporters.loaders import loader
from autoprune.exporters.texts import about, json_bytes, state_bytes

STACK: Final = "model.layers"
"""Where EvoPress finds the blocks of a Llama or Mistral."""
PARTS: Final[Mapping[str, str]] = {"": "attn+mlp", ".self_attn": "attn", ".mlp": "mlp"}
"""A module of a block, and EvoPress's token for its loss."""
NOT_SAID: Final = dropped("EvoPress drops attention, feed-forward part or all of a block of model.layers")
AS_ZEROS: Final = approximated("as zeros in weights of the dense shape")


@final
class EvoPress:
    """`levels.txt`: `model.layers.0.self_attn.q_proj: 6`, and the weights that `load.py` makes EvoPress's database of.

    A level l means a share of `sparsity + l * weights_diff / (weights of the layer)` zeros (`metadata` in
    `levels.json`): here the base is 0 and the step is the greatest that divides the zeros of all layers, so that levels
    say them exactly. No comments in the texts: their reader splits each line at its colon. The format of
    https://github.com/IST-DASLab/EvoPress (commit 50888a0), arXiv:2410.14649.
    """

    __slots__ = ()

    name: str = "evopress"
    tested: tuple[str, ...] = ("EvoPress 50888a0, its load_sparse_weights and drop_layers_from_config",)

    def export(self, resolved: Resolved) -> Exported:
        """Zeros, masks and final weights of layers; dropped blocks. Raises PolicyError where there are neither."""
        sparse = [cut for cut in sparse_layers(resolved) if _weighty(resolved, cut)]
        files = _levels(resolved, sparse, about(resolved, self.tested)) if sparse else {}
        depth, said = _depth(resolved)
        if said:
            files["depth.txt"] = depth.encode()
        if not files:
            raise PolicyError(
                f"{resolved.title}: EvoPress is told zeros and dropped blocks of a transformer; this has neither"
            )
        kept = {cut.weight for cut in sparse}
        units = {unit.name: _grades(unit, said, {cut.name for cut in sparse}) for unit in resolved.units}
        grades: dict[Aspect, Grade] = {"weights": _mended(resolved, kept)}
        return Exported(files, resolved.graded(grades, units=units))


def _weighty(resolved: Resolved, cut: LayerCut) -> bool:
    """Whether the cut model has a weight of this layer: one that is split in two has not."""
    return cut.weight in resolved.model.state_dict()


def _levels(resolved: Resolved, sparse: list[LayerCut], head: dict[str, str]) -> dict[str, bytes]:
    zeros = {cut.name: zeros_of(resolved, cut.name) for cut in sparse}
    step = math.gcd(*zeros.values())
    levels = {name: count // step for name, count in zeros.items()}
    shares = {cut.name: round(sparsity_of(resolved, cut), 6) for cut in sparse}
    grid = {"sparsity": 0.0, "weights_diff": step, "num_levels": max(levels.values())}
    return {
        "levels.txt": "".join(f"{name}: {level}\n" for name, level in levels.items()).encode(),
        "levels.json": json_bytes({**head, "metadata": grid, "sparsity_by_layer": shares}),
        "weights.pt": state_bytes({cut.name: _weight(resolved, cut) for cut in sparse}),
        "load.py": loader("evopress"),
    }


def _weight(resolved: Resolved, cut: LayerCut) -> Tensor:
    return in_place(resolved, cut.weight) * resolved.mask(cut.name)


def _depth(resolved: Resolved) -> tuple[str, tuple[str, ...]]:
    """The text, a token for each block, and the units that it speaks of."""
    blocks = dict(resolved.dense.named_modules()).get(STACK)
    if not isinstance(blocks, nn.ModuleList):
        return "", ()
    gone: dict[int, set[str]] = {}
    said = []
    for unit in resolved.units:
        found = re.fullmatch(re.escape(STACK) + r"\.(\d+)(\.self_attn|\.mlp|)", unit.name)
        if unit.decision.kind == "block" and found is not None:
            gone.setdefault(int(found[1]), set()).add(PARTS[found[2]])
            said.append(unit.name)
    return "".join(f"{_token(gone.get(block, set()))}\n" for block in range(len(blocks))), tuple(said)


def _token(gone: set[str]) -> str:
    return "attn+mlp" if len(gone) > 1 else next(iter(gone), "none")


def _grades(unit: UnitCut, said: tuple[str, ...], sparse: set[str]) -> dict[Aspect, Grade]:
    if unit.narrows:
        return {"width": AS_ZEROS, "channels": EXACT}
    if unit.decision.kind == "block":
        return {"depth": EXACT if unit.name in said else NOT_SAID}
    if unit.layers[:1] and unit.layers[0] in sparse:
        bits = dropped("weights are stored as floats, rounded as they are")
        return {"sparsity": EXACT, "mask": EXACT, "kernel": AS_ZEROS, "bits": bits}
    return {}


def _mended(resolved: Resolved, kept: set[str]) -> Grade:
    if set(resolved.mended) <= kept:
        return EXACT
    return approximated("those of weights with zeros alone: EvoPress has no place for others, nor for biases")
