"""Prunes a model with NVIDIA ModelOpt as modelopt.json says. Needs torch and nvidia-modelopt.

from load import prune
model = prune(model)

FastNAS selects what its trace follows. What the trace holds fixed (before a `flatten`, inside attention) is set on
ModelOpt's dynamic layers one by one. Which channels stay is set as the order of each hyperparameter.
"""

import json
from pathlib import Path

import modelopt.torch.nas as mtn
import torch
from modelopt.torch.nas.registry import DMRegistry
from modelopt.torch.nas.search_space import SearchSpace
from modelopt.torch.nas.traced_hp import TracedHp
from modelopt.torch.opt.conversion import ApplyModeError
from modelopt.torch.opt.dynamic import DynamicModule
from modelopt.torch.opt.utils import named_hparams
from modelopt.torch.prune.pruning import PruneModeRegistry

HERE = Path(__file__).resolve().parent


def prune(model: torch.nn.Module) -> torch.nn.Module:
    """`model`, pruned in place to the exact channels; with the final weights where there is a state.pt."""
    content = json.loads((HERE / "modelopt.json").read_text(encoding="utf-8"))
    subnet = {name: tuple(size) if isinstance(size, list) else size for name, size in content["subnet"].items()}
    try:
        model = mtn.convert(model, mode=[("fastnas", content["fastnas"])], registry=PruneModeRegistry)
    except ApplyModeError:  # its trace follows nothing
        searched = False
    else:
        searched = True
        select(model, subnet, content["kept"])
    for name, size in subnet.items():
        fix(model, name, size, content["kept"].get(name))
    model = mtn.export(model) if searched else SearchSpace(model).export()
    for module, numbers in content["numbers"].items():
        for attribute, number in numbers.items():
            setattr(model.get_submodule(module), attribute, number)
    if (HERE / "state.pt").exists():
        model.load_state_dict(torch.load(HERE / "state.pt", weights_only=True))
    return model


def select(model: torch.nn.Module, subnet: dict, kept: dict) -> list[str]:
    """Select of `subnet` what FastNAS may choose, with the order that keeps `kept`; the names of that."""
    free = {name: hparam for name, hparam in named_hparams(model, configurable=True) if name in subnet}
    for name, hparam in free.items():
        if name in kept and hparam.is_sortable:
            hparam.enforce_order(in_order(kept[name], hparam.max))
    mtn.utils.select(model, {name: subnet[name] for name in free}, strict=False)
    return list(free)


def fix(model: torch.nn.Module, name: str, size: object, kept: list[int] | None) -> None:
    """Set one hyperparameter of one layer, unless it is set already."""
    owner, _, side = name.rpartition(".")
    layer = model.get_submodule(owner)
    if not isinstance(layer, DynamicModule):
        layer = DMRegistry.convert(layer)
    known = layer.get_hparam(side)
    if known.active == size and (kept is None or torch.arange(known.max)[known.active_slice].tolist() == kept):
        return
    own = TracedHp([size, known.original], original=known.original)
    own.active = size
    if kept is not None:
        own.enforce_order(in_order(kept, known.original))
    setattr(layer, side, own)


def in_order(kept: list[int], of: int) -> torch.Tensor:
    """All positions, those that stay first."""
    return torch.tensor([*kept, *(each for each in range(of) if each not in set(kept))])
