"""From a model and an example to its units: what can be pruned, what cannot and why, and what each layer costs.

Whatever the tracer says is tested: all groups are cut at once and compared with the same channels masked; where the
two differ, the group that is wrong is found and refused. A wrong cut never leaves this file.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoprune.core.architecture import Architecture
from autoprune.core.unit import Kind, Unit
from autoprune.errors import ConfigError, ModelError, near_miss
from autoprune.model.blocks import Block, droppable_blocks
from autoprune.model.coupling import NORMS, Candidate, Group, Refused, coupled_groups, is_matrix
from autoprune.model.cut import cut, plan_cut, replace_module, side_widths
from autoprune.model.describe import describe
from autoprune.model.observe import calls
from autoprune.model.written import with_numbers
from autoprune.nest import Nested, first_tensor, tensors_of


@dataclass(frozen=True, slots=True)
class Anatomy:
    """What discovery found. `units` follow the model's own order of modules; `refused` says what stays, and why."""

    units: tuple[Unit, ...]
    groups: tuple[Group, ...]
    blocks: tuple[Block, ...]
    refused: tuple[Refused, ...]
    architecture: Architecture
    widths: dict[str, int]

    def group(self, name: str) -> Group:
        """The group of a `channels` unit."""
        return next(group for group in self.groups if group.root == name)


def discover(
    model: nn.Module, example: Tensor, *, protect: Sequence[str] = (), channels: bool = True, blocks: bool = True,
    weights: bool = False, dense_layers: Sequence[str] = (), hidden: bool = False,
) -> Anatomy:  # fmt: skip
    """All units of `model` but those that `protect`'s globs name by any of their layers.

    With `weights`, also one for the weights inside each layer that is one matrix, but for `dense_layers` (globs).
    With
    `hidden`, also the width of a stream that layer norms or RMS norms scale (a transformer's hidden size): cut, it is
    the model whose norms look only at the channels that stay.
    `example` is a small batch of real data. Raises ConfigError for a glob that matches nothing, ModelError when the
    model cannot be traced or nothing in it can be pruned.
    """
    names = [name for name, _ in model.named_modules() if name]
    for key, glob in (*(("protect", glob) for glob in protect), *(("dense_layers", glob) for glob in dense_layers)):
        if not fnmatch.filter(names, glob):
            raise ConfigError(f"space.{key}: {glob!r} matches no module of the model; {near_miss(glob, names)}")
    found_groups, refused = coupled_groups(model, example, hidden=hidden) if channels else ((), ())
    is_free = {entry.group.root: not _is_protected(entry.group.layers, protect) for entry in found_groups}
    protected = [Refused(root, "protected") for root, free in is_free.items() if not free]
    groups, wrong = _tested(model, example, [entry for entry in found_groups if is_free[entry.group.root]])
    found = droppable_blocks(model, example) if blocks else ()
    found = tuple(block for block in found if not _is_protected((block.name, *block.layers), protect))
    order = {name: position for position, (name, _) in enumerate(model.named_modules())}
    units = sorted((*_channel_units(model, groups, found), *_block_units(found)), key=lambda unit: order[unit.name])
    if weights:
        within, shared = _weight_units(model, example, found, dense=(*protect, *dense_layers))
        units += within
        refused = (*refused, *shared)
    if not units:
        reasons = "; ".join(f"{entry.root}: {entry.reason}" for entry in (*refused, *protected, *wrong))
        raise ModelError(f"nothing in this model can be pruned ({reasons or 'no convolution or linear layer found'})")
    architecture = describe(model, example, groups=groups, blocks=found)
    return Anatomy(tuple(units), groups, found, (*refused, *protected, *wrong), architecture, side_widths(model))


def _is_protected(layers: Collection[str], globs: Sequence[str]) -> bool:
    inside = [ancestor for layer in layers for ancestor in _with_ancestors(layer)]
    return any(fnmatch.filter(inside, glob) for glob in globs)


def _with_ancestors(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: length + 1]) for length in range(len(parts))]


def _channel_units(model: nn.Module, groups: Sequence[Group], blocks: Sequence[Block]) -> list[Unit]:
    units = []
    for group in groups:
        parent = next((block.name for block in blocks if set(group.layers) <= {block.name, *block.layers}), None)
        units.append(Unit(group.root, _kind(model, group), group.width, group.layers, parent))
    return units


def _kind(model: nn.Module, group: Group) -> Kind:
    """Heads are known by what is done with them; features by lying between linear layers and nothing else."""
    if group.heads:
        return "heads"
    linear = all(isinstance(model.get_submodule(member.layer), (nn.Linear, *NORMS)) for member in group.members)
    return "ffn" if linear and not group.slabs else "channels"


def _block_units(blocks: Sequence[Block]) -> list[Unit]:
    return [Unit(block.name, "block", 1, block.layers) for block in blocks]


def _weight_units(
    model: nn.Module, example: Tensor, blocks: Sequence[Block], *, dense: Sequence[str]
) -> tuple[list[Unit], list[Refused]]:
    """One for each layer that runs once and is one matrix, in execution order; and those that share their weights."""
    modules = dict(model.named_modules())
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    refused = []
    runs = Counter(call.name for call in calls(model, example))
    units = []
    for name, times in runs.items():
        layer = modules[name]
        if times > 1 or not is_matrix(layer) or _is_protected((name,), dense):
            continue
        others = [other for other in names.get(id(layer.weight), ()) if other != f"{name}.weight"]
        if others:
            refused.append(Refused(f"{name}.weight", f"{others[0]} is the same tensor, and would change with it"))
            continue
        parent = next((block.name for block in blocks if name in block.layers), None)
        units.append(Unit(f"{name}.weight", "weights", layer.weight.numel(), (name,), parent, len(layer.weight)))
    return units, refused


def _tested(
    model: nn.Module, example: Tensor, candidates: Sequence[Candidate]
) -> tuple[tuple[Group, ...], tuple[Refused, ...]]:
    """The groups whose cut equals their mask, and the others. All at once first: one forward pair when all is well."""
    check = _cut_check(model, example)
    groups = tuple(candidate.group for candidate in candidates)
    if check(groups):
        return groups, ()
    tried = [with_numbers(model, candidate, lambda group: check((group,))) for candidate in candidates]
    sound = tuple(group for group in tried if group is not None)
    wrong = [Refused(group.root, "cutting it changes more than masking it: an operation on channels is not understood")
             for group, found in zip(groups, tried, strict=True) if found is None]  # fmt: skip
    while sound and not check(sound):  # each alone is fine, together they are not: give up the last ones
        wrong.append(Refused(sound[-1].root, "cutting it beside others changes more than masking them"))
        sound = sound[:-1]
    return sound, tuple(wrong)


def _cut_check(model: nn.Module, example: Tensor) -> Callable[[Sequence[Group]], bool]:
    """A test of groups: every third channel is cut, and the same channels masked where they are read."""
    widths = side_widths(model)
    with torch.no_grad():
        whole = _compared(model(example))
    tolerances = [1e-4 * float(tensor.abs().max().clamp_min(1e-3)) for tensor in whole]

    def same(groups: Sequence[Group]) -> bool:
        kept = {g.root: torch.tensor([c for c in range(g.width) if c % 3 != 1]) for g in groups}
        try:
            with torch.no_grad():
                smaller = cut(model, plan_cut(widths, groups, kept=kept, dropped=()))
                large = _masked(model, groups, kept, smaller)
                pairs = zip(_compared(smaller(example)), _compared(large(example)), strict=True)
                return all(
                    torch.allclose(one, other, rtol=1e-3, atol=tolerance, equal_nan=True)
                    for (one, other), tolerance in zip(pairs, tolerances, strict=True)
                )
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


def _compared(output: Nested) -> list[Tensor]:
    """The tensors of a model's output that a cut must leave alone. Raises ModelError where there is none."""
    first_tensor(output)
    return [tensor for tensor in tensors_of(output) if tensor.is_floating_point() and tensor.numel()]
