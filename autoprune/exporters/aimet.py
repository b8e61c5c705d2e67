"""AIMET: pairs of a convolution and the share of its inputs that stays, for channel pruning in manual mode."""

from __future__ import annotations

from typing import Final, final

from autoprune.errors import PolicyError
from autoprune.exporters.base import EXACT, Aspect, Exported, Grade, LayerCut, Resolved, UnitCut, dropped, final_weights
from autoprune.exporters.loaders import loader
from autoprune.exporters.masks import share
from autoprune.exporters.texts import about, json_bytes, state_bytes

LINEAR: Final = dropped("AIMET's channel pruning takes inputs of convolutions alone")
SHARED: Final = dropped("AIMET leaves channels whole that several layers make or read")
GROUPED: Final = dropped("AIMET picks channels one by one, where a grouped convolution needs them by group")
INSIDE: Final = dropped("channel pruning says nothing of a layer's weights")


@final
class Aimet:
    """`aimet.json` with `pairs` for `ModuleCompRatioPair`, multiplicity 1; the final state beside it where it fits.

    A `comp_ratio` is the kept share of a convolution's *inputs*, rounded down: `max(1, int(in_channels * comp_ratio))`.
    AIMET takes the outputs of what makes them, too. `kept` and `rows` are what `load.py` needs to have it keep ours.
    """

    __slots__ = ()

    name: str = "aimet"
    tested: tuple[str, ...] = ("aimet-torch 2.42.0",)

    def export(self, resolved: Resolved) -> Exported:
        """Widths and channels exactly between one convolution and the next; no shared channels, nothing else."""
        narrowed = [unit for unit in resolved.units if unit.narrows]
        readers = {unit.name: _reader(resolved, unit) for unit in narrowed}
        pairs = [(unit, reader) for unit in narrowed if isinstance(reader := readers[unit.name], LayerCut)]
        if not pairs:
            raise PolicyError(f"{resolved.title}: no channels lie between just two convolutions; AIMET takes no others")
        content = {
            **about(resolved, self.tested), "multiplicity": 1,
            "pairs": [_pair(reader, reader.name in {unit.name for unit, _ in pairs}) for _, reader in pairs],
        }  # fmt: skip
        own: dict[str, dict[Aspect, Grade]] = {
            name: {"width": found, "channels": found} for name, found in readers.items() if isinstance(found, Grade)
        }
        whole = not own and resolved.says_only("width", "channels", "weights")
        grades: dict[Aspect, Grade] = {
            "width": EXACT, "channels": EXACT, "sparsity": INSIDE, "mask": INSIDE, "bits": INSIDE, "arithmetic": INSIDE,
            "weights": final_weights(whole=whole),
            "rank": dropped("channel pruning leaves one layer one; AIMET's schemes of SVD choose factors themselves"),
        }  # fmt: skip
        files = {"aimet.json": json_bytes(content), "load.py": loader("aimet")}
        if whole and resolved.mended:
            files["state.pt"] = state_bytes(resolved.model.state_dict())
        return Exported(files, resolved.graded(grades, units=own))


def _pair(reader: LayerCut, made: bool) -> dict[str, object]:
    """A convolution whose inputs go, and the outputs that stay where it is the root of another such unit."""
    kept = list(reader.inputs.positions) if reader.inputs else []
    rows = list(reader.outputs.positions) if made and reader.outputs else None
    return {"module": reader.name, "comp_ratio": share(len(kept), reader.shape[1]), "kept": kept, "rows": rows}


def _reader(resolved: Resolved, unit: UnitCut) -> LayerCut | Grade:
    """The one convolution that reads what just one other makes, perhaps through depthwise ones; or why there is none
    that AIMET can be told of.
    """
    layers = [resolved.layers[name] for name in unit.layers if name in resolved.layers]
    made = [layer for layer in layers if layer.name in (unit.producers or {})]
    read = [layer for layer in layers if layer not in made and len(layer.shape) > 1]
    if not all(layer.kind == "Conv2d" for layer in (*made, *read)) or unit.decision.kind != "channels":
        return LINEAR
    makers = [layer for layer in made if not layer.is_depthwise]
    if any(layer.groups > 1 for layer in (*makers, *read)):
        return GROUPED
    if len(makers) != 1 or len(read) != 1 or read[0].inputs is None:
        return SHARED
    others = [each for each in resolved.units if each.narrows and each != unit and read[0].name in each.layers]
    if any(read[0].name not in (each.producers or {}) for each in others):
        return SHARED
    return read[0]
