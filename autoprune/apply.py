"""A policy on a model: checked to belong to it, cut by the side file's exact indices, weights as they were verified."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from autoprune.core.policy import Policy, UnitDecision
from autoprune.core.unit import NARROWED, Unit
from autoprune.errors import PolicyError, listed, near_miss
from autoprune.files import read_policy
from autoprune.model.cut import CutPlan, cut
from autoprune.model.discover import Anatomy
from autoprune.model.factor import factor_layer
from autoprune.model.flow import norms_after
from autoprune.model.integers import Arithmetic, compute_in_integers
from autoprune.model.plain import Kinds
from autoprune.packing.coding import Codes
from autoprune.problems import MOST_TOLD
from autoprune.side_file import GRIDS, KEPT, SCALES, TENSOR, read_side_file
from autoprune.storage import Weights
from autoprune.subject import Subject


@dataclass(frozen=True, slots=True)
class Applied:
    """The cut model and what was done."""

    policy: Policy
    model: nn.Module
    plan: CutPlan
    weights: Weights
    """Those that are not stored as floats."""
    ranks: Mapping[str, int]
    """Layers that are two now, with the channels between them."""
    arithmetic: Mapping[str, Arithmetic]
    """Layers that compute in integers."""
    plain: Kinds
    """Modules in whose places plain ones stand."""

    @property
    def scales(self) -> dict[str, Tensor]:
        """By layer, the scales of its integer weights."""
        return {name.removesuffix(".weight"): codes.scales for name, codes in self.weights.quantised.items()}


def apply(path: Path, subject: Subject) -> Applied:
    """The policy at `path` on the subject's model. Raises PolicyError when it belongs to another one or is damaged."""
    policy = read_policy(path)
    anatomy = subject.anatomy
    _check_identity(path, policy, subject)
    check_units(path, policy, anatomy)
    tensors = read_side_file(path, policy)
    options = policy.options()
    kept = {
        name: kept_channels(path, name, option.keep, policy.units[name].of, tensors)
        for name, option in options.items()
        if policy.units[name].kind in NARROWED
    }
    plan = anatomy.plan(options, kept)
    model = cut(subject.model, plan)
    gone = {layer for block in plan.dropped for layer in block.layers}
    layers = {unit.name: unit.layers[0] for unit in anatomy.units if unit.kind == "weights"}
    ranks = {layers[name]: option.rank for name, option in options.items() if option.rank and layers[name] not in gone}
    for layer, rank in ranks.items():
        factor_layer(model, layer, rank)
    integer = [layers[name] for name, option in options.items() if option.form == "integer"]
    arithmetic = _arithmetic(path, subject, [layer for layer in integer if layer not in gone], tensors)
    for layer, each in arithmetic.items():
        compute_in_integers(model, layer, each)
    state = {name.removeprefix(TENSOR): tensor for name, tensor in tensors.items() if name.startswith(TENSOR)}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise PolicyError(f"{path}: its side file {policy.weights} does not fit the cut model: {error}") from None
    halves = tuple(name for name, decision in policy.units.items() if decision.bits == 16 and name in state)
    weights = Weights(_quantised(path, policy, state, tensors), halves)
    return Applied(policy, model, plan, weights, ranks, arithmetic, subject.plain)


def _arithmetic(
    path: Path, subject: Subject, layers: Sequence[str], tensors: Mapping[str, Tensor]
) -> dict[str, Arithmetic]:
    """How `layers` compute in integers. Raises PolicyError where the side file does not say it."""
    norms = norms_after(subject.model, subject.task.data.validation_inputs[:2]) if layers else {}
    found = {}
    for layer in layers:
        numbers = tensors.get(GRIDS + layer)
        try:
            found[layer] = Arithmetic.of(norms.get(layer, layer), [] if numbers is None else numbers.tolist())
        except (ValueError, TypeError) as error:
            raise PolicyError(f"{path}: units.{layer}.weight: its side file has no grids for it: {error}") from None
    return found


def _quantised(
    path: Path, policy: Policy, state: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> dict[str, Codes]:
    """The integers of every int8 weight. Raises PolicyError where weights are no multiples of their scales."""
    found: dict[str, Codes] = {}
    for name, decision in policy.units.items():
        if decision.bits > 8 or name not in state:  # the layer went with its block
            continue
        scales = tensors.get(SCALES + name)
        if scales is None or scales.shape != state[name].shape[:1]:
            raise PolicyError(f"{path}: units.{name}: its side file has no scale for each output; search anew")
        matrix = state[name].flatten(1)
        codes = Codes(torch.round(matrix / scales[:, None]).to(torch.int8), scales, tuple(state[name].shape))
        if not torch.equal(codes.dequantised(), state[name]):
            raise PolicyError(
                f"{path}: units.{name}: its weights are not the integers times scales that they should be"
            )
        found[name] = codes
    return found


def _check_identity(path: Path, policy: Policy, subject: Subject) -> None:
    check_structure(path, policy, subject)
    identity = policy.model
    if identity is None:
        raise PolicyError(
            f"{path}: it does not say which model it is for (`model:`); "
            "--transfer lays it on this one by the policy's methods"
        )
    if identity.fingerprint != subject.fingerprint:
        raise PolicyError(
            f"{path}: same architecture as {identity.name!r}, other weights "
            f"(policy {identity.fingerprint[:19]}..., model {subject.fingerprint[:19]}...); "
            "give the weights it was made for (--weights), or --transfer, which chooses anew what goes"
        )


def check_structure(path: Path, policy: Policy, subject: Subject) -> None:
    """Raises PolicyError where the policy is for a model of other layers."""
    identity = policy.model
    if identity is not None and identity.structure != subject.structure:
        found = sum(parameter.numel() for parameter in subject.task.model.parameters())
        raise PolicyError(
            f"{path}: it was made for {identity.name!r} ({identity.params:,} parameters); this model is "
            f"{subject.task.name!r} ({found:,} parameters) and its layers have other names or shapes; "
            "give the model it was made for (--model), or search anew"
        )


def check_units(path: Path, policy: Policy, anatomy: Anatomy) -> None:
    """Raises PolicyError with all units that the model does not have so."""
    units = {unit.name: unit for unit in anatomy.units}
    problems: list[str] = []
    for name, decision in policy.units.items():
        if len(problems) >= MOST_TOLD:
            problems.append("and perhaps more")
            break
        if name not in units:
            problems.append(f"units.{name}: the model has no such unit; {near_miss(name, units)}")
        elif units[name].width != decision.of or not _alike(units[name], decision):
            have = f"{units[name].kind} of {units[name].width}"
            problems.append(f"units.{name}: the policy says {decision.kind} of {decision.of}, the model has {have}")
        elif decision.kind in ("kernel", "resolution") and decision.keep not in units[name].sizes:
            able = " or ".join(str(size) for size in units[name].sizes)
            problems.append(f"units.{name}: a {decision.kind} of {decision.keep} is not possible here; keep {able}")
    if problems:
        raise PolicyError(f"{path}: does not fit the model:\n{listed(problems)}")


def _alike(unit: Unit, decision: UnitDecision) -> bool:
    """Whether both mean the same kind; `channels` is also how heads and features were called first."""
    return unit.kind == decision.kind or (unit.narrows and decision.kind == "channels")


def kept_channels(path: Path, unit: str, keep: int, of: int, tensors: Mapping[str, Tensor]) -> Tensor:
    """The channels of a unit that stay, as a side file names them, ascending. Raises PolicyError for damaged ones."""
    indices = tensors.get(KEPT + unit)
    if indices is None or indices.numel() != keep:
        given = "none" if indices is None else str(indices.numel())
        raise PolicyError(f"{path}: units.{unit}: keep is {keep}, its side file has {given} indices")
    whole = indices.ndim == 1 and indices.dtype == torch.int64
    if not whole or len(set(indices.tolist())) != keep or not 0 <= int(indices.min()) <= int(indices.max()) < of:
        raise PolicyError(f"{path}: units.{unit}: its side file's indices must be {keep} different ones below {of}")
    return indices.sort().values
