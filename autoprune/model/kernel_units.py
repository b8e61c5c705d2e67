"""Units for the kernels of convolutions: which may be cut to their middle, tested, and why others stay whole."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from autoprune.core.unit import Unit
from autoprune.model.blocks import Block
from autoprune.model.compare import same_outputs
from autoprune.model.coupling import CONVOLUTIONS, Refused
from autoprune.model.cut import cut, plan_cut
from autoprune.model.kernels import LEAST, cut_sizes
from autoprune.model.observe import calls
from autoprune.rebuilding import cropped


def kernel_units(
    model: nn.Module, example: Tensor, blocks: Sequence[Block]
) -> tuple[tuple[Unit, ...], tuple[Refused, ...]]:
    """One for each convolution whose kernel may be cut, in execution order; and those that look so and may not.

    Each is tested: cut to its smallest size, the model does what it does with the outer taps at zero.
    """
    modules = dict(model.named_modules())
    runs = Counter(call.name for call in calls(model, example))
    units, refused = [], []
    for name, times in runs.items():
        layer = modules[name]
        if not isinstance(layer, CONVOLUTIONS) or max(layer.kernel_size) < LEAST:
            continue
        sizes = cut_sizes(layer)
        if times > 1 or not sizes:
            reason = "it runs more than once" if times > 1 else _reason(layer)
            refused.append(Refused(f"{name}.kernel", reason))
            continue
        parent = next((block.name for block in blocks if name in block.layers), None)
        units.append(Unit(f"{name}.kernel", "kernel", layer.kernel_size[0], (name,), parent, sizes=sizes))
    if _is_sound(model, example, units):
        return tuple(units), tuple(refused)
    sound = [unit for unit in units if _is_sound(model, example, [unit])]
    reason = "cutting it changes more than zeros in its outer taps: its module does more than a convolution"
    return tuple(sound), (*refused, *(Refused(unit.name, reason) for unit in units if unit not in sound))


def _reason(layer: nn.Module) -> str:
    assert isinstance(layer, CONVOLUTIONS)
    sides = "x".join(str(side) for side in layer.kernel_size)
    if len(set(layer.kernel_size)) > 1 or layer.kernel_size[0] % 2 == 0:
        return f"its kernel of {sides} has no middle with one odd side"
    if set(layer.dilation) != {1}:
        return "its kernel is dilated"
    return f"its padding ({layer.padding}) is too little to shrink with its kernel of {sides}"


def _is_sound(model: nn.Module, example: Tensor, units: Sequence[Unit]) -> bool:
    """Whether all of `units` at their smallest do what zeros in their outer taps do."""
    sizes = {unit.layers[0]: unit.sizes[-1] for unit in units}
    smaller = cut(model, plan_cut({}, (), kept={}, dropped=(), kernels=sizes))
    zeroed = copy.deepcopy(model)
    for name, size in sizes.items():
        weight = zeroed.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        inner = torch.zeros_like(weight)
        cropped(inner, size).copy_(cropped(weight.detach(), size))
        weight.data = inner
    try:
        return same_outputs(model, example)(smaller, zeroed)
    except Exception:  # noqa: BLE001 (whatever a foreign forward raises once its kernel differs: it cannot be cut)
        return False
