"""Prunes a model with Intel Neural Compressor as pruning.json and masks.pt say.

Needs torch, neural-compressor 3.7 or older (3.8 has no pruning), and six and setuptools<81, which that imports. After a
call below, each forward pass with an optimizer.step() is one step.

from load import lock, prune
"""

import json
from pathlib import Path

import torch
from neural_compressor.compression.pruner import prepare_pruning
from neural_compressor.config import WeightPruningConfig

HERE = Path(__file__).resolve().parent
CONTENT = json.loads((HERE / "pruning.json").read_text(encoding="utf-8"))
SAVE = torch.save


def prune(model: torch.nn.Module, optimizer: torch.optim.Optimizer, *, end_step: int = 1000) -> object:
    """Has `model` lose its weights up to that step; which of them go, the tool decides."""
    return _prepared(model, optimizer, [{**entry, "end_step": end_step} for entry in CONTENT["pruning_configs"]])


def lock(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> object:
    """Sets the policy's own zeros and keeps them while `model` trains; with the final weights where there are some."""
    if (HERE / "state.pt").exists():
        model.load_state_dict(torch.load(HERE / "state.pt", weights_only=True))
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, mask in torch.load(HERE / "masks.pt", weights_only=True).items():
            own[name].mul_(mask.to(own[name].device))
    return _prepared(model, optimizer, CONTENT["lock_configs"])


def _prepared(model: torch.nn.Module, optimizer: torch.optim.Optimizer, configs: list[dict]) -> object:
    """The tool's handle. It never prunes a model's last layer, so another stands last meanwhile; and it wraps
    torch.save, which a second time would call itself for ever.
    """
    torch.save = SAVE
    model.add_module("stands_last", torch.nn.Identity())
    handle = prepare_pruning(model, WeightPruningConfig(configs), optimizer=optimizer)
    del model.stands_last
    return handle
