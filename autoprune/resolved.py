"""A policy laid over its model, as exporters get it: every layer with what stays of it, and how the model is cut.

Knows what was applied. Does not know any tool.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace

import torch
from torch import Tensor, nn

from autoprune.apply import Applied
from autoprune.core.policy import UnitDecision
from autoprune.core.surgery import Slice, Surgery
from autoprune.core.unit import NARROWED, Unit
from autoprune.exporters.base import Kept, LayerCut, Resolved, UnitCut
from autoprune.model.blocks import is_within
from autoprune.model.coupling import CUTTABLE, NORMS, is_depthwise
from autoprune.model.cut import Kept as KeptSides
from autoprune.model.flow import norms_after
from autoprune.rebuilding import kept_of
from autoprune.runtimes.onnxruntime import checked
from autoprune.storage import onnx_file
from autoprune.subject import Subject


def resolved(applied: Applied, subject: Subject, *, title: str) -> Resolved:
    """What exporters get of an applied policy. `title` is the policy file's name."""
    surgery = _with_slices(surgery_of(applied), applied, subject.model)
    return Resolved(
        applied.policy, title, _units(applied, subject), _layers(applied, subject), subject.model,
        applied.model, subject.example, surgery, _mended(applied, subject.model, surgery),
        lambda: onnx_of(applied, subject.example),
    )  # fmt: skip


def onnx_of(applied: Applied, example: Tensor) -> bytes:
    """The cut model's ONNX file. Raises TargetError where ONNX cannot take it."""
    norms = norms_after(applied.model, example)
    return checked(onnx_file(applied.model, applied.weights, example=example, norms=norms))


def surgery_of(applied: Applied) -> Surgery:
    """What is done to modules, as plain values; the shapes of tensors follow from the cut model's state."""
    plan = applied.plan
    numbers: dict[str, dict[str, int]] = {}
    for (module, attribute), value in plan.numbers.items():
        numbers.setdefault(module, {})[attribute] = value
    return Surgery(
        dropped={each.name: (each.rest, each.further) for block in plan.dropped for each in block.stand_ins},
        split=dict(applied.ranks), numbers=numbers, plain=dict(applied.plain), resized=plan.size,
        rounded={layer: (each.tail, *each.numbers) for layer, each in applied.arithmetic.items()},
    )  # fmt: skip


def _with_slices(surgery: Surgery, applied: Applied, dense: nn.Module) -> Surgery:
    """The same, and what of each tensor of `dense` stays."""
    slices: dict[str, list[Slice]] = {}
    modules, left = dict(dense.named_modules()), applied.model.state_dict()
    for name, kept in applied.plan.layers.items():
        for tensor, dim, indices in _cut_tensors(name, modules[name], kept):
            slices.setdefault(tensor, []).append((dim, tuple(indices.tolist())))
    for (parameter, dim), indices in applied.plan.slabs.items():
        slices.setdefault(parameter, []).append((dim, tuple(indices.tolist())))
    halves = [name for name in dense.state_dict() if any(is_within(name, layer) for layer in applied.ranks)]
    return replace(
        surgery, slices={name: tuple(cuts) for name, cuts in slices.items() if name in left or name in halves},
        gone=tuple(name for name in dense.state_dict() if name not in left and name not in halves),
        kernels={name: kept.kernel for name, kept in applied.plan.layers.items() if kept.kernel is not None},
    )  # fmt: skip


def _cut_tensors(name: str, layer: nn.Module, kept: KeptSides) -> list[tuple[str, int, Tensor]]:
    """Tensor, dimension, positions that stay, for all tensors of one layer; kernels are told elsewhere."""
    found: list[tuple[str, int, Tensor]] = []
    if kept.outputs is not None:
        own = [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]
        found += [(f"{name}.{key}", 0, kept.outputs) for key, tensor in own if tensor.ndim]
    if kept.inputs is not None and not isinstance(layer, NORMS) and not is_depthwise(layer):
        groups = getattr(layer, "groups", 1)
        found.append((f"{name}.weight", 1, kept.inputs[: len(kept.inputs) // groups]))
    return found


def _mended(applied: Applied, dense: nn.Module, surgery: Surgery) -> tuple[str, ...]:
    """Tensors that hold other values than the dense model's at the same places; zeros of a pattern do not count, nor do
    values that are rounded, or of a layer that is two.
    """
    before, cuts, found = dense.state_dict(), asdict(surgery), []
    rounded = {name for name, decision in applied.policy.units.items() if decision.bits < 32}
    sparse = {name for name, decision in applied.policy.units.items() if decision.pattern}
    for name, tensor in applied.model.state_dict().items():
        if name not in before or name in rounded:
            continue
        same = kept_of(before[name], name, cuts)
        if name in sparse:
            same = same * (tensor != 0)
        if not torch.equal(same, tensor):
            found.append(name)
    return tuple(found)


def _units(applied: Applied, subject: Subject) -> tuple[UnitCut, ...]:
    """What the policy changes, in its order, without what lies in dropped blocks."""
    known = {unit.name: unit for unit in subject.anatomy.units}
    drops = {name for name, decision in applied.policy.units.items() if decision.kind == "block"}
    found = []
    for name, decision in applied.policy.units.items():
        unit = known[name]
        if _around(unit, known, drops) is None:
            found.append(_narrowed(unit, decision, applied, subject) if decision.kind in NARROWED
                         else UnitCut(name, decision, unit.layers))  # fmt: skip
    return tuple(found)


def _around(unit: Unit, known: Mapping[str, Unit], drops: set[str]) -> str | None:
    """The dropped block that a unit lies in, if there is one."""
    around = unit.parent
    while around is not None and around not in drops:
        around = known[around].parent
    return around


def _narrowed(unit: Unit, decision: UnitDecision, applied: Applied, subject: Subject) -> UnitCut:
    kept = applied.plan.units[unit.name]
    gone = torch.ones(unit.width, dtype=torch.bool)
    gone[kept] = False
    group = subject.anatomy.group(unit.name)
    producers: dict[str, tuple[int, ...]] = {}
    for member in sorted(group.on("out", "both"), key=lambda member: member.layer != unit.name):
        places = producers.get(member.layer, ())
        producers[member.layer] = (*places, *member.positions[gone].flatten().tolist())
    modules = tuple(dict.fromkeys(number.module for number in group.numbers))
    return UnitCut(unit.name, decision, unit.layers, tuple(kept.tolist()), producers, modules)


def _layers(applied: Applied, subject: Subject) -> dict[str, LayerCut]:
    plan, found = applied.plan, {}
    gone = {layer for block in plan.dropped for layer in block.layers}
    inside = {
        unit.layers[0]: applied.policy.units[unit.name]
        for unit in subject.anatomy.units
        if unit.kind == "weights" and unit.name in applied.policy.units
    }
    for name, layer in subject.model.named_modules():
        if not isinstance(layer, CUTTABLE):
            continue
        sides, weight = plan.layers.get(name, KeptSides()), layer.weight
        shape = (layer.num_features,) if isinstance(layer, NORMS) else tuple(weight.shape)
        groups = getattr(layer, "groups", 1)
        found[name] = LayerCut(
            name, type(layer).__name__, shape, groups, _side(sides.inputs, shape[-1 if len(shape) < 2 else 1] * groups),
            _side(sides.outputs, shape[0]), name in gone, sides.kernel, inside.get(name),
        )  # fmt: skip
    return found


def _side(kept: Tensor | None, of: int) -> Kept | None:
    return None if kept is None or len(kept) == of else Kept(of, tuple(kept.tolist()))
