"""ONNX: the cut model, integers stored as such, and the policy in the file's own metadata."""

from __future__ import annotations

import json
from typing import Final, final

import onnx

from autoprune.exporters.base import EXACT, Aspect, Exported, Grade, Resolved, approximated
from autoprune.exporters.texts import about
from autoprune.files import policy_text

POLICY: Final = "autoprune.policy"
"""Key of the metadata entry that holds the policy file's text."""
KEPT: Final = "autoprune.kept"
"""Key of the entry that holds, as JSON, the kept channels of every narrowed unit."""


@final
class OnnxModel:
    """`model.onnx`: what runtimes run. `metadata_props` says which policy it is, so that the file needs no company."""

    __slots__ = ()

    name: str = "onnx"
    tested: tuple[str, ...] = ("onnx 1.23.2", "onnxruntime 1.31.1")

    def export(self, resolved: Resolved) -> Exported:
        """Everything. Raises TargetError where the model cannot be written as ONNX."""
        model = onnx.load_model_from_string(resolved.onnx())
        kept = {unit.name: list(unit.kept) for unit in resolved.units if unit.narrows}
        entries = {POLICY: policy_text(resolved.policy), KEPT: json.dumps(kept)}
        entries |= {f"autoprune.{key}": text for key, text in about(resolved, self.tested).items() if key != "policy"}
        for key, value in entries.items():
            model.metadata_props.add(key=key, value=value)
        onnx.checker.check_model(model)
        grades: dict[Aspect, Grade] = {aspect: EXACT for _, aspect in resolved.aspects}
        odd = [unit for unit in resolved.units if unit.decision.bits not in (8, 16, 32)]
        own: dict[str, dict[Aspect, Grade]] = {
            unit.name: {"bits": approximated("integers of fewer bits are stored in 8")} for unit in odd
        }
        return Exported({"model.onnx": model.SerializeToString()}, resolved.graded(grades, units=own))
