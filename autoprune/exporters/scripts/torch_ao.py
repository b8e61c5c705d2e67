"""Prepares a model for torch.ao.pruning as sparsity.json and masks.pt say. Needs torch alone.

from load import prepare
sparsifier = prepare(model)   # masked; train it on, then sparsifier.squash_mask() makes the zeros permanent
"""

import json
from pathlib import Path

import torch
from torch.ao.pruning import WeightNormSparsifier

HERE = Path(__file__).resolve().parent


def prepare(model: torch.nn.Module) -> WeightNormSparsifier:
    """The sparsifier of `model`, which is masked in place with the exact masks; with the mended values where there is a
    state.pt. `sparsifier.step()` would choose zeros anew, and works where all weights have two dimensions.
    """
    if (HERE / "state.pt").exists():
        model.load_state_dict(torch.load(HERE / "state.pt", weights_only=True), strict=False)
    content = json.loads((HERE / "sparsity.json").read_text(encoding="utf-8"))
    masks = torch.load(HERE / "masks.pt", weights_only=True)
    sparsifier = WeightNormSparsifier()
    config = [{**entry, "mask": masks[entry["tensor_fqn"]]} for entry in content["config"]]
    sparsifier.prepare(model, config)
    return sparsifier
