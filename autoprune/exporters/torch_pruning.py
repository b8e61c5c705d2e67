"""Torch-Pruning: ratios by layer, and the history of exact indices that it replays on a fresh model."""

from __future__ import annotations

from typing import final

from autoprune.exporters.base import EXACT, Aspect, Exported, Grade, Resolved, UnitCut, dropped, final_weights
from autoprune.exporters.loaders import loader
from autoprune.exporters.texts import about, json_bytes, state_bytes


@final
class TorchPruning:
    """`pruning.json` with `pruning_ratio_dict` by module name and `pruning_history`; the final state beside it.

    The history is `DependencyGraph.pruning_history()`: (module, whether outputs go, indices), one entry a unit; what is
    coupled to the root goes by Torch-Pruning's own graph. `load.py` replays it, sets the `attributes` that forward
    passes read (how many heads there are) and loads the state.
    """

    __slots__ = ()

    name: str = "torch-pruning"
    tested: tuple[str, ...] = ("torch-pruning 1.6.1",)

    def export(self, resolved: Resolved) -> Exported:
        """Widths and channels exactly, mended values as a state dict; no depth, nothing inside layers."""
        narrowed = [unit for unit in resolved.units if unit.narrows]
        refused = {unit.name: why for unit in narrowed if (why := _refusal(unit, resolved)) is not None}
        told = [unit for unit in narrowed if unit.name not in refused]
        whole = not refused and resolved.says_only("width", "channels", "weights")
        content = {
            **about(resolved, self.tested),
            "pruning_ratio_dict": {unit.name: 1 - unit.decision.keep / unit.decision.of for unit in told},
            "pruning_history": [[unit.name, True, list(gone)] for unit in told for gone in _removed(unit)],
            "attributes": {
                module: dict(numbers)
                for unit in told
                for module, numbers in resolved.surgery.numbers.items()
                if module in unit.modules
            },
        }
        files = {"pruning.json": json_bytes(content), "load.py": loader("torch_pruning")}
        if whole and resolved.mended:
            files["state.pt"] = state_bytes(resolved.model.state_dict())
        own: dict[str, dict[Aspect, Grade]] = {
            name: {"width": dropped(why), "channels": dropped(why)} for name, why in refused.items()
        }
        grades: dict[Aspect, Grade] = {"width": EXACT, "channels": EXACT, "weights": final_weights(whole=whole)}
        return Exported(files, resolved.graded(grades, units=own))


def _removed(unit: UnitCut) -> list[tuple[int, ...]]:
    """What goes of the root's outputs; all else follows."""
    return [gone for gone in ((unit.producers or {})[unit.name],) if gone]


def _refusal(unit: UnitCut, resolved: Resolved) -> str | None:
    """Why the tool's graph would not do what the policy says, if so."""
    producers = unit.producers or {}
    if unit.name not in producers:
        return "its root is no layer that the tool prunes"
    if unit.decision.kind != "heads":
        return None
    if len(set(producers.values())) > 1:
        return "queries and keys of other widths (grouped queries) are not tied by its graph"
    numbers = [name for module in unit.modules for name in resolved.surgery.numbers.get(module, {})]
    return "the number of heads is not a plain attribute" if any("." in name for name in numbers) else None
