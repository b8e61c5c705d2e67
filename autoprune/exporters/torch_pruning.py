"""Torch-Pruning: ratios by layer, and the history of exact indices that it replays on a fresh model."""

from __future__ import annotations

from typing import final

from autoprune.exporters.base import EXACT, Aspect, Exported, Grade, Resolved, UnitCut, dropped
from autoprune.exporters.loaders import loader
from autoprune.exporters.texts import about, json_bytes, state_bytes


@final
class TorchPruning:
    """`pruning.json` with `pruning_ratio_dict` by module name and `pruning_history`; the final state beside it.

    The history is `DependencyGraph.pruning_history()`: (module, whether outputs go, indices), one entry a unit; what is
    coupled to the root goes by Torch-Pruning's own graph. `load.py` replays it and loads the state.
    """

    __slots__ = ()

    name: str = "torch-pruning"
    tested: tuple[str, ...] = ("torch-pruning 1.6.1",)

    def export(self, resolved: Resolved) -> Exported:
        """Widths and channels exactly, mended values as a state dict; no depth, nothing inside layers."""
        narrowed = [unit for unit in resolved.units if unit.narrows]
        content = {
            **about(resolved, self.tested),
            "pruning_ratio_dict": {unit.name: 1 - unit.decision.keep / unit.decision.of for unit in narrowed},
            "pruning_history": [[root, True, list(gone)] for unit in narrowed for root, gone in _entries(unit)],
        }
        own = {unit.name: _heads(unit) for unit in narrowed if unit.decision.kind == "heads"}
        whole = all(aspect in ("width", "channels", "weights") for _, aspect in resolved.aspects) and not own
        weights = EXACT if whole else dropped("they fit only the model that the whole policy makes")
        fidelity = resolved.graded({"width": EXACT, "channels": EXACT, "weights": weights}, units=own)
        files = {"pruning.json": json_bytes(content), "load.py": loader("torch_pruning")}
        if whole and resolved.mended:
            files["state.pt"] = state_bytes(resolved.model.state_dict())
        return Exported(files, fidelity)


def _entries(unit: UnitCut) -> list[tuple[str, tuple[int, ...]]]:
    """What is pruned by name: the root; all others follow."""
    producers = unit.producers or {}
    return [(root, gone) for root, gone in list(producers.items())[:1] if gone and unit.decision.kind != "heads"]


def _heads(_unit: UnitCut) -> dict[Aspect, Grade]:
    nothing = dropped("its graph does not tie query, key and value of a written-out attention")
    return {"width": nothing, "channels": nothing}
