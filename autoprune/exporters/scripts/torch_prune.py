"""Masks a model with torch.nn.utils.prune as masks.pt says. Needs torch alone.

from load import prune_model
model = prune_model(model)   # the model that was pruned, with its weights
"""

from pathlib import Path

import torch
from torch.nn.utils import prune

HERE = Path(__file__).resolve().parent


def prune_model(model: torch.nn.Module, *, permanent: bool = False) -> torch.nn.Module:
    """`model`, masked in place: each pruned parameter NAME becomes NAME_orig and NAME_mask, or its zeros `permanent`.
    With the mended values where there is a state.pt.
    """
    if (HERE / "state.pt").exists():
        model.load_state_dict(torch.load(HERE / "state.pt", weights_only=True), strict=False)
    for parameter, mask in torch.load(HERE / "masks.pt", weights_only=True).items():
        module, _, name = parameter.rpartition(".")
        prune.custom_from_mask(model.get_submodule(module), name, mask)
        if permanent:
            prune.remove(model.get_submodule(module), name)
    return model
