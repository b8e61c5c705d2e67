"""What a proof by a real tool starts from: a dense model, inputs, and what our own cut of it is and gives.

Runs in the tool's own environment: needs torch alone. A case is a folder that `make_cases.py` wrote.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn


class Case:
    """One policy on one model."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.name = self.folder.name
        content = torch.load(self.folder / "case.pt", weights_only=True)
        self.inputs: Tensor = content["inputs"]
        self.logits: Tensor = content["logits"]
        self.state: dict[str, Tensor] = content["state"]
        """Of the dense model."""
        self.cut: dict[str, Tensor] = content["cut"]
        """Our cut model's final state."""
        self.masks: dict[str, Tensor] = content["masks"]
        """By layer, in the dense weight's shape: which weights count."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of our cut model's state."""
        return {name: tuple(tensor.shape) for name, tensor in self.cut.items()}

    def error(self, network: nn.Module) -> float:
        """How far the outputs of `network` are from our cut model's, relative to the largest of these."""
        with torch.no_grad():
            found = network(self.inputs)
        return difference(found if isinstance(found, Tensor) else found.logits, self.logits)

    def dense(self) -> nn.Module:
        """The dense model in evaluation mode."""
        return built(self.folder / "network.py", self.state)


def built(path: Path, state: dict[str, Tensor]) -> nn.Module:
    """The model that `model()` of a file makes, with these weights."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    network: nn.Module = module.model()
    network.load_state_dict(state)
    return network.eval()


def graded(export: Path) -> dict[str, set[str]]:
    """By aspect of the policy, how the export's own report grades it: `{"width": {"exact"}}`."""
    found: dict[str, set[str]] = {}
    for remark in json.loads((export / "fidelity.json").read_text(encoding="utf-8"))["remarks"]:
        found.setdefault(remark["aspect"], set()).add(remark["level"])
    return found


def widths(found: nn.Module, case: Case) -> str:
    """How many tensors of `found` have the shapes of our cut model's: `74 of 74 tensors`. All must."""
    shapes = {name: tuple(tensor.shape) for name, tensor in found.state_dict().items()}
    wrong = {name: (shapes.get(name), shape) for name, shape in case.shapes.items() if shapes.get(name) != shape}
    assert not wrong, f"{case.name}: shapes differ (theirs, ours): {wrong}"
    return f"{len(case.shapes)} of {len(case.shapes)} tensors"


def difference(found: Tensor, wanted: Tensor) -> float:
    """The largest, relative to the largest number that is wanted."""
    return float((found - wanted).detach().abs().max() / wanted.abs().max())


def tell(packages: tuple[str, ...], **agreement: object) -> None:
    """The last line of a proof."""
    print(json.dumps({"versions": {name: version(name) for name in packages}, "agreement": agreement}))
