"""Prunes a model with Torch-Pruning as pruning.json says. Needs torch and torch-pruning.

from load import prune
model = prune(model, example_inputs)
"""

import json
from pathlib import Path

import torch
import torch_pruning as tp

HERE = Path(__file__).resolve().parent


def prune(model: torch.nn.Module, example_inputs: torch.Tensor) -> torch.nn.Module:
    """`model`, pruned in place to the exact indices; with the final weights where there is a state.pt."""
    content = json.loads((HERE / "pruning.json").read_text(encoding="utf-8"))
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=example_inputs)
    graph.load_pruning_history([tuple(entry) for entry in content["pruning_history"]])
    for name, values in content["attributes"].items():
        for attribute, value in values.items():
            setattr(model.get_submodule(name), attribute, value)
    if (HERE / "state.pt").exists():
        model.load_state_dict(torch.load(HERE / "state.pt", weights_only=True))
    return model
