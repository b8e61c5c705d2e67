"""Prunes a model with NNI 2 as config_list.json and masks.pt say. Needs torch, nni and tensorboard, which nni imports.

from load import choose, cut, masked
"""

import json
from pathlib import Path

import torch
from nni.compression.pytorch.pruning import L1NormPruner, LevelPruner
from nni.compression.pytorch.speedup import ModelSpeedup

HERE = Path(__file__).resolve().parent
CONTENT = json.loads((HERE / "config_list.json").read_text(encoding="utf-8"))
NORMS = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d)
Masks = dict[str, dict[str, torch.Tensor]]


def choose(model: torch.nn.Module, example_inputs: torch.Tensor) -> tuple[torch.nn.Module, Masks]:
    """`model` with zeros as the config lists say; which channels and weights go, NNI decides by their size."""
    found: Masks = {}
    if CONTENT["l1_norm"]:
        pruner = L1NormPruner(model, CONTENT["l1_norm"], mode="dependency_aware", dummy_input=example_inputs)
        found |= pruner.compress()[1]
        pruner._unwrap_model()
    if CONTENT["level"]:
        level = LevelPruner(model, CONTENT["level"])
        found |= level.compress()[1]
        level._unwrap_model()
    return model, found


def masks() -> Masks:
    """Layer -> parameter -> the policy's own mask, as NNI has them."""
    found: Masks = {}
    for name, mask in torch.load(HERE / "masks.pt", weights_only=True).items():
        layer, _, parameter = name.rpartition(".")
        found.setdefault(layer, {})[parameter] = mask.float()
    return found


def masked(model: torch.nn.Module) -> LevelPruner:
    """A pruner around `model` that holds the policy's own masks, to train with; with the final weights if there are."""
    if (HERE / "state.pt").exists():
        model.load_state_dict(torch.load(HERE / "state.pt", weights_only=True))
    exact = masks()
    kinds = {type(model.get_submodule(layer)).__name__ for layer in exact}
    pruner = LevelPruner(model, [{"op_types": sorted(kinds), "op_names": list(exact), "sparsity_per_layer": 0.0}])
    pruner._wrap_model()
    pruner.load_masks(exact)
    return pruner


def _whole(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else torch.ones_like(bias)


def cut(model: torch.nn.Module, example_inputs: torch.Tensor) -> torch.nn.Module:
    """`model`, cut by the policy's own masks. Its norms' statistics and its mode stay; NNI's speedup changes both."""
    if not CONTENT["cut"]:
        raise ValueError("NNI's speedup would not make the policy's model here (heads, dropped blocks); use masked()")
    masked(model)._unwrap_model()
    exact = {layer: {"bias": _whole(model.get_submodule(layer).bias), **own} for layer, own in masks().items()}
    training = model.training
    norms = {name: module.momentum for name, module in model.named_modules() if isinstance(module, NORMS)}
    for name in norms:
        model.get_submodule(name).momentum = 0.0
    ModelSpeedup(model, example_inputs, exact).speedup_model()
    for name, momentum in norms.items():
        model.get_submodule(name).momentum = momentum
    return model.train(training)
