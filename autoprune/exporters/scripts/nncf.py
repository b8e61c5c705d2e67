"""Puts NNCF's pruning masks on a model as nncf.json says. Needs torch and nncf.

from load import prune
model = prune(model, example_inputs)

The pruned weights are loaded first. The ratio is no layer's own: it is one that none of them falls short of, so that
the threshold is zero in all of them, and the masks are their zeros. Another call of `nncf.prune`, or a scheduler, sets
its ratio for all masks, these too.
"""

import json
from pathlib import Path

import nncf
import torch

HERE = Path(__file__).resolve().parent


def prune(model: torch.nn.Module, example_inputs: torch.Tensor) -> torch.nn.Module:
    """`model`, with the final weights, wrapped by NNCF, with a mask for every layer of nncf.json."""
    content = json.loads((HERE / "nncf.json").read_text(encoding="utf-8"))
    model.load_state_dict(torch.load(HERE / "state.pt", weights_only=True))
    # a layer's weight is in NNCF's graph by its name in the state dict; names of what is computed have a slash
    names = "|".join(rf"{layer.replace('.', chr(92) + '.')}\.weight" for layer in content["sparsity"])
    scope = nncf.IgnoredScope(patterns=[rf"(?!(?:{names})$)[^/]+$"])
    mode = nncf.PruneMode[content["mode"]]
    return nncf.prune(model, mode, ratio=content["ratio"], ignored_scope=scope, examples_inputs=example_inputs)
