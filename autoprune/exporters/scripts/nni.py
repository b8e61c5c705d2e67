"""Prunes a model with NNI 3 as config_list.json and masks.pt say. Needs torch and nni.

from load import choose, cut, masked
"""

import json
from pathlib import Path

import torch
from nni.compression.pruning import L1NormPruner
from nni.compression.speedup import ModelSpeedup

HERE = Path(__file__).resolve().parent
CONTENT = json.loads((HERE / "config_list.json").read_text(encoding="utf-8"))
NORMS = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d)
Masks = dict[str, dict[str, torch.Tensor]]


def choose(model: torch.nn.Module) -> tuple[torch.nn.Module, Masks]:
    """`model`, pruned as the config list says; which channels and weights go, NNI decides by their size."""
    return L1NormPruner(model, CONTENT["config_list"]).compress()


def masks() -> Masks:
    """Layer -> parameter -> the policy's own mask, as NNI has them."""
    found: Masks = {}
    for name, mask in torch.load(HERE / "masks.pt", weights_only=True).items():
        layer, _, parameter = name.rpartition(".")
        found.setdefault(layer, {})[parameter] = mask.float()
    return found


def masked(model: torch.nn.Module) -> L1NormPruner:
    """A pruner around `model` that holds the policy's own masks, to train with; with the final weights if there are."""
    if (HERE / "state.pt").exists():
        model.load_state_dict(torch.load(HERE / "state.pt", weights_only=True))
    exact = masks()
    pruner = L1NormPruner(model, [{"op_names": list(exact), "sparse_ratio": 0.0}])
    pruner.update_masks(exact)
    return pruner


def cut(model: torch.nn.Module, example_inputs: torch.Tensor) -> torch.nn.Module:
    """`model`, cut by the policy's own masks. Its norms' statistics and its mode stay; NNI's speedup changes both."""
    if not CONTENT["cut"]:
        raise ValueError("NNI's speedup would not make the policy's model here (heads, dropped blocks); use masked()")
    masked(model).unwrap_model()
    exact, own = masks(), dict(model.named_parameters())
    with torch.no_grad():
        for layer, parameters in exact.items():
            for parameter, mask in parameters.items():
                own[f"{layer}.{parameter}"].mul_(mask)
    training = model.training
    norms = {name: module.momentum for name, module in model.named_modules() if isinstance(module, NORMS)}
    for name in norms:
        model.get_submodule(name).momentum = 0.0
    ModelSpeedup(model, example_inputs, exact, graph_module=torch.fx.symbolic_trace(model)).speedup_model()
    for name, momentum in norms.items():
        model.get_submodule(name).momentum = momentum
    return model.train(training)
