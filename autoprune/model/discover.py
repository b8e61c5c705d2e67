"""From a model and an example to its units: what can be pruned, what cannot and why, and what each layer costs.

Knows what may be asked for, and in which order things are found; the test of every cut is in `masked`.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from autoprune.core.architecture import Architecture, Layer, Width
from autoprune.core.unit import DROP, NARROWED, Kind, Option, Unit
from autoprune.errors import ConfigError, ModelError, near_miss
from autoprune.model.blocks import Block, droppable_blocks, home_of, parent_of
from autoprune.model.coupling import NORMS, Group, Refused, coupled_groups, is_matrix
from autoprune.model.cut import CutPlan, plan_cut, side_widths
from autoprune.model.describe import describe
from autoprune.model.kernel_units import kernel_units
from autoprune.model.masked import sound_groups
from autoprune.model.observe import calls
from autoprune.model.resolution import Size, resized, smaller_inputs


@dataclass(frozen=True, slots=True)
class Anatomy:
    """What discovery found. `units` follow the model's own order of modules; `refused` says what stays, and why."""

    units: tuple[Unit, ...]
    groups: tuple[Group, ...]
    blocks: tuple[Block, ...]
    refused: tuple[Refused, ...]
    architecture: Architecture
    widths: dict[str, int]
    inputs: dict[int, Size] = field(default_factory=dict)
    """Heights of smaller inputs that the model runs on, each with the whole size."""

    def group(self, name: str) -> Group:
        """The group of a `channels` unit."""
        return next(group for group in self.groups if group.root == name)

    def plan(self, options: Mapping[str, Option], kept: Mapping[str, Tensor]) -> CutPlan:
        """What `options` (by unit) mean for each layer, `kept` being the channels that stay of narrowed units."""
        dropped = [block for block in self.blocks if options.get(block.name) == DROP]
        kernels = {layer: option.keep for layer, option in self.kernels(options).items()}
        sides = [options[unit.name].keep for unit in self.units if unit.kind == "resolution" and unit.name in options]
        size = self.inputs[sides[0]] if sides else None
        return plan_cut(self.widths, self.groups, kept=kept, dropped=dropped, kernels=kernels, size=size)

    def kernels(self, options: Mapping[str, Option]) -> dict[str, Option]:
        """Layer to what `options` (by unit) do to its kernel."""
        layers = {unit.name: unit.layers[0] for unit in self.units if unit.kind == "kernel"}
        return {layers[name]: option for name, option in options.items() if name in layers}


def discover(  # noqa: PLR0913 (what may change, one flat list of switches)
    model: nn.Module, example: Tensor, *, only: Sequence[str] = (), protect: Sequence[str] = (),
    narrow: Collection[str] = NARROWED, blocks: bool = True, weights: bool = False, dense_layers: Sequence[str] = (),
    hidden: bool = False, kernels: bool = False, resolutions: bool = False,
) -> Anatomy:  # fmt: skip
    """All units of `model` but those that `protect`'s globs name by any of their layers.

    With `only`, those alone whose channels are made in modules that its globs name (or that are or lie in such blocks).
    `narrow` names the kinds of units with channels; the others stay whole.

    With `weights`, also one for the weights inside each layer that is one matrix, but for `dense_layers` (globs).
    With `hidden`, also the width of a stream that layer norms or RMS norms scale (a transformer's hidden size): cut, it
    is the model whose norms look only at the channels that stay. With `kernels`, also the kernels of convolutions that
    have a smaller middle; with `resolutions`, also the size of the input, where that is images and the model runs on
    smaller ones with outputs of the same shapes.
    `example` is a small batch of real data. Raises ConfigError for a glob that matches nothing, ModelError when the
    model cannot be traced or nothing in it can be pruned.
    """
    names = [name for name, _ in model.named_modules() if name]
    asked = {"only": only, "protect": protect, "dense_layers": dense_layers}
    for key, glob in ((key, glob) for key, globs in asked.items() for glob in globs):
        if not fnmatch.filter(names, glob):
            raise ConfigError(f"space.{key}: {glob!r} matches no module of the model; {near_miss(glob, names)}")
    found_groups, refused = coupled_groups(model, example, hidden=hidden) if narrow else ((), ())
    chosen = _Chosen(model, only, protect, narrow)
    protected = [entry for found in found_groups if (entry := chosen.spares(found.group)) is not None]
    spared = {entry.root for entry in protected}
    groups, wrong = sound_groups(model, example, [entry for entry in found_groups if entry.group.root not in spared])
    found = droppable_blocks(model, example) if blocks else ()
    roots = {group.root for group in groups}  # a layer that ends a branch may name a group of channels, too
    found = tuple(b for b in found if b.name not in roots and not _is_named((b.name, *b.layers), protect))
    found = tuple(block for block in found if not only or _is_named((block.name,), only))
    order = {name: position for position, (name, _) in enumerate(model.named_modules())}
    units = sorted((*_channel_units(model, groups, found), *_block_units(found)), key=lambda unit: order[unit.name])
    if weights:
        within, shared = _weight_units(model, example, found, only=only, dense=(*protect, *dense_layers))
        units += within
        refused = (*refused, *shared)
    if kernels:
        sized, whole = kernel_units(model, example, found)
        free = [unit for unit in sized if not _is_named(unit.layers, protect)]
        units += [unit for unit in free if not only or _is_named(unit.layers, only)]
        refused = (*refused, *whole)
    inputs = smaller_inputs(model, example) if resolutions else {}
    if inputs:
        units.append(_resolution_unit(units, example, inputs))
    elif resolutions:
        reason = "no images, or the model does not give outputs of the same shapes for smaller ones"
        refused = (*refused, Refused("input", reason))
    if not units:
        reasons = "; ".join(f"{entry.root}: {entry.reason}" for entry in (*refused, *protected, *wrong))
        raise ModelError(f"nothing in this model can be pruned ({reasons or 'no convolution or linear layer found'})")
    architecture = describe(model, example, groups=groups, blocks=found)
    smaller = tuple(
        (side, (_resizing(example, size), *describe(model, resized(example, size), groups=groups, blocks=found).layers))
        for side, size in inputs.items()
    )
    return Anatomy(
        tuple(units), groups, found, (*refused, *protected, *wrong), replace(architecture, smaller=smaller),
        side_widths(model), inputs,
    )  # fmt: skip


def _resolution_unit(units: Sequence[Unit], example: Tensor, inputs: Mapping[int, Size]) -> Unit:
    """The unit for the size of the input; named otherwise where a layer has that name."""
    taken = any(unit.name == "input" for unit in units)
    return Unit("input.resolution" if taken else "input", "resolution", example.shape[2], (), sizes=tuple(inputs))


def _resizing(example: Tensor, size: Size) -> Layer:
    """The step that resizes images like those of `example`, as the cost table sees it: without MACs or parameters."""
    before, after = ("x".join(str(side) for side in sides) for sides in (example.shape[2:], size))
    channels = Width(example.shape[1])
    return Layer(
        name="", kind="resize", signature=f"resize {before}->{after}", inputs=channels, outputs=channels, kernel=1,
        groups=1, positions=size[0] * size[1], bias_like=0, buffer_bytes_each=0, buffer_bytes_fixed=0,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Chosen:
    """What may be narrowed, as far as the user says."""

    model: nn.Module
    only: Sequence[str]
    protect: Sequence[str]
    narrow: Collection[str]

    def spares(self, group: Group) -> Refused | None:
        """Why a group stays whole, if it does."""
        layers = group.layers
        if _is_named(layers, self.protect):
            return Refused(group.root, "protected", layers, "protect")
        made = {group.root, *(member.layer for member in group.on("out", "both"))}
        if self.only and not all(_is_named((layer,), self.only) for layer in made):
            return Refused(group.root, "not among those that `only` names", layers, "only")
        kind = _kind(self.model, group)
        return None if kind in self.narrow else Refused(group.root, _left(kind), layers, "space")


def _left(kind: Kind) -> str:
    return f"the space leaves {kind} as they are"


def _is_named(layers: Collection[str], globs: Sequence[str]) -> bool:
    inside = [ancestor for layer in layers for ancestor in _with_ancestors(layer)]
    return any(fnmatch.filter(inside, glob) for glob in globs)


def _with_ancestors(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: length + 1]) for length in range(len(parts))]


def _channel_units(model: nn.Module, groups: Sequence[Group], blocks: Sequence[Block]) -> list[Unit]:
    units = []
    for group in groups:
        units.append(Unit(group.root, _kind(model, group), group.width, group.layers, home_of(blocks, group.layers)))
    return units


def _kind(model: nn.Module, group: Group) -> Kind:
    """Heads are known by what is done with them; features by lying between linear layers and nothing else."""
    if group.heads:
        return "heads"
    linear = all(isinstance(model.get_submodule(member.layer), (nn.Linear, *NORMS)) for member in group.members)
    return "ffn" if linear and not group.slabs else "channels"


def _block_units(blocks: Sequence[Block]) -> list[Unit]:
    return [Unit(block.name, "block", 1, block.layers, parent_of(blocks, block)) for block in blocks]


def _weight_units(
    model: nn.Module, example: Tensor, blocks: Sequence[Block], *, only: Sequence[str], dense: Sequence[str]
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
        if times > 1 or not is_matrix(layer) or _is_named((name,), dense):
            continue
        if only and not _is_named((name,), only):
            continue
        others = [other for other in names.get(id(layer.weight), ()) if other != f"{name}.weight"]
        if others:
            refused.append(Refused(f"{name}.weight", f"{others[0]} is the same tensor, and would change with it"))
            continue
        parent = home_of(blocks, (name,))
        units.append(Unit(f"{name}.weight", "weights", layer.weight.numel(), (name,), parent, len(layer.weight)))
    return units, refused
