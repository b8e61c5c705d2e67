"""What a cut is tested against: the same channels masked where they are read, in a whole model.

Whatever the tracer says is tested: all groups are cut at once and compared with the same channels masked; where the
two differ, the group that is wrong is found and refused. A wrong cut never leaves this file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from autoprune.model.compare import same_outputs
from autoprune.model.coupling import Candidate, Group, Refused
from autoprune.model.cut import cut, plan_cut, side_widths
from autoprune.model.written import with_numbers
from autoprune.rebuilding import replace_module


def sound_groups(
    model: nn.Module, example: Tensor, candidates: Sequence[Candidate]
) -> tuple[tuple[Group, ...], tuple[Refused, ...]]:
    """The groups whose cut equals their mask, and the others. All at once first: one forward pair when all is well."""
    check = _cut_check(model, example)
    groups = tuple(candidate.group for candidate in candidates)
    if check(groups):
        return groups, ()
    tried = [with_numbers(model, candidate, lambda group: check((group,))) for candidate in candidates]
    sound = tuple(group for group in tried if group is not None)
    unlike = "cutting it changes more than masking it: an operation on channels is not understood"
    wrong = [Refused(group.root, unlike, group.layers)
             for group, found in zip(groups, tried, strict=True) if found is None]  # fmt: skip
    while sound and not check(sound):  # each alone is fine, together they are not: give up the last ones
        wrong.append(
            Refused(sound[-1].root, "cutting it beside others changes more than masking them", sound[-1].layers)
        )
        sound = sound[:-1]
    return sound, tuple(wrong)


def _cut_check(model: nn.Module, example: Tensor) -> Callable[[Sequence[Group]], bool]:
    """A test of groups: every third channel is cut, and the same channels masked where they are read."""
    widths, alike = side_widths(model), same_outputs(model, example)

    def same(groups: Sequence[Group]) -> bool:
        kept = {g.root: torch.tensor([c for c in range(g.width) if c % 3 != 1]) for g in groups}
        try:
            smaller = cut(model, plan_cut(widths, groups, kept=kept, dropped=()))
            return alike(smaller, _masked(model, groups, kept, smaller))
        except Exception:  # noqa: BLE001 (whatever a foreign forward raises once widths differ: it cannot be cut)
            return False

    return same


def _masked(model: nn.Module, groups: Sequence[Group], kept: dict[str, Tensor], smaller: nn.Module) -> nn.Module:
    """A copy of `model` in which no layer reads the channels that are not kept, and no norm looks at them.

    `smaller` is the cut model, whose norms are used.
    """
    copied = cut(model, plan_cut({}, (), kept={}, dropped=()))
    modules = dict(copied.named_modules())
    with torch.no_grad():
        for group in groups:
            removed = torch.ones(group.width, dtype=torch.bool)
            removed[kept[group.root]] = False
            for member in group.on("in"):
                layer = modules[member.layer]
                weight = layer.weight
                assert isinstance(weight, Tensor)
                _mask_inputs(weight, member.positions[removed].flatten(), getattr(layer, "groups", 1))
            for slab in group.slabs:
                if slab.reads:
                    parameter = copied.get_parameter(slab.parameter)
                    parameter.index_fill_(slab.dim, slab.positions[removed].flatten(), 0)
    for name in {norm for group in groups for norm in group.norms}:
        replace_module(copied, name, _OverKept(smaller.get_submodule(name), _kept_by(f"{name}.weight", groups, kept)))
    return copied


def _kept_by(parameter: str, groups: Sequence[Group], kept: dict[str, Tensor]) -> Tensor:
    """Which positions of a vector stay, (size,), bool."""
    slabs = [(group, slab) for group in groups for slab in group.slabs if slab.parameter == parameter]
    mask = torch.ones(slabs[0][1].size, dtype=torch.bool)
    for group, slab in slabs:
        removed = torch.ones(group.width, dtype=torch.bool)
        removed[kept[group.root]] = False
        mask[slab.positions[removed].flatten()] = False
    return mask


class _OverKept(nn.Module):
    """A narrow norm in the place of a wide one: over the channels that stay, with zeros for the others."""

    def __init__(self, norm: nn.Module, mask: Tensor) -> None:
        super().__init__()
        self.norm, self.mask = norm, mask

    def forward(self, x: Tensor) -> Tensor:
        """Norm over the last dimension, or over dimension 1 where the channels of images are there."""
        dim = -1 if x.shape[-1] == len(self.mask) else 1
        places = self.mask.nonzero().flatten()
        return torch.zeros_like(x).index_copy(dim, places, self.norm(x.index_select(dim, places)))


def _mask_inputs(weight: Tensor, positions: Tensor, groups: int) -> None:
    """Zero the columns of `weight` (outputs, inputs / groups, ...) that read input `positions`."""
    outputs, inputs = weight.shape[0] // groups, weight.shape[1]
    for position in positions.tolist():
        group, column = divmod(position, inputs)
        weight[group * outputs : (group + 1) * outputs, column] = 0
