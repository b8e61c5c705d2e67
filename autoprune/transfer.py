"""A policy laid on weights that it was not made for: the same decision, what goes chosen anew by its methods.

Serves retrained models of the same architecture and policies that come without weights (imported ones). What it writes
is a complete policy of its own, whose evidence says that it is not verified.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from autoprune.apply import check_structure, check_units, kept_channels
from autoprune.bank.build import Bank
from autoprune.bank.stitch import Candidate, Stitcher
from autoprune.banking import bank_of, calibration_of, reference_of, selection_of, stitcher_of
from autoprune.core.policy import Policy
from autoprune.core.space import Space, UnitOptions
from autoprune.core.unit import NARROWED, Option, keep_all
from autoprune.engines.local import Local
from autoprune.errors import PolicyError, listed
from autoprune.evidence import model_identity
from autoprune.files import read_policy, write_bytes, write_policy
from autoprune.progress import Progress
from autoprune.recovery import refitted
from autoprune.run import Run
from autoprune.side_file import KEPT, TENSOR, WEIGHTS, digest, read_side_file, side_file
from autoprune.spaces import MethodChoice, WeightChoice
from autoprune.subject import Subject

POLICY = "policy.yaml"


def transfer(path: Path, subject: Subject, folder: Path, *, refit: bool, progress: Progress) -> Path:
    """Write the policy at `path` for the subject's weights into `folder`, and return where.

    Which channels and weights go is chosen by the policy's methods on the subject's calibration data; exact indices of
    an imported policy for these very weights stay. With `refit`, layers are solved again where that brings the model
    nearer to the dense one on selection data. Raises PolicyError where the policy is for another architecture.
    """
    policy = read_policy(path)
    check_structure(path, policy, subject)
    check_units(path, policy, subject.anatomy)
    space = _space(policy, subject)
    options = space.options_of(space.choice_of(policy.options()))
    subject = replace(subject, task=replace(subject.task, spec=subject.task.spec.model_copy(update=_methods(policy))))
    progress.note("what goes is chosen anew by the policy's methods; its numbers are not this model's until verified")
    with TemporaryDirectory(prefix="autoprune-") as scratch:
        batches = calibration_of(subject)
        bank, _ = bank_of(subject, batches, Run(Path(scratch), Local()), progress)
        bank = _with_orders(bank, _exact(path, policy, subject), policy)
        _check_ranked(path, policy, options, bank)
        stitcher = stitcher_of(subject, bank, space, Path(scratch), progress)
        progress.phase("build")
        candidate = _mended(stitcher, options, subject, batches) if refit else stitcher.build(options)
        side = side_file(candidate, stitcher, options)
    write_bytes(folder / WEIGHTS, side)
    write_policy(folder / POLICY, _of_this_model(policy, subject, side))
    return folder / POLICY


def _space(policy: Policy, subject: Subject) -> Space:
    """Every unit with its one option beside keeping it."""
    wanted = policy.options()
    entries = []
    for unit in subject.anatomy.units:
        own = [wanted[unit.name]] if unit.name in wanted and wanted[unit.name] != keep_all(unit) else []
        entries.append(UnitOptions(unit, (keep_all(unit), *own)))
    return Space(tuple(entries))


def _methods(policy: Policy) -> dict[str, object]:
    """The parts of a search space that say what calibration must collect."""
    units = policy.units.values()
    narrowed = {(unit.method, unit.compensate) for unit in units if unit.kind in NARROWED}
    inside = {(unit.method, unit.pattern) for unit in units if unit.kind == "weights" and unit.pattern}
    return {
        "methods": tuple(MethodChoice(method=name, compensate=how) for name, how in sorted(narrowed)),
        "weights": tuple(WeightChoice(method=name, patterns=(pattern,)) for name, pattern in sorted(inside)),
    }


def _exact(path: Path, policy: Policy, subject: Subject) -> dict[str, Tensor]:
    """Kept channels that are known: those of a policy that was imported with indices, for these very weights."""
    same = policy.model is not None and policy.model.fingerprint == subject.fingerprint
    if policy.weights is None or not same:
        return {}
    tensors = read_side_file(path, policy)
    if any(name.startswith(TENSOR) for name in tensors):
        return {}
    return {
        name: kept_channels(path, name, unit.keep, unit.of, tensors)
        for name, unit in policy.units.items()
        if unit.kind in NARROWED and KEPT + name in tensors
    }


def _with_orders(bank: Bank, exact: Mapping[str, Tensor], policy: Policy) -> Bank:
    """The bank, in which what `exact` names stays to the last."""
    orders = {unit: dict(known) for unit, known in bank.orders.items()}
    for unit, kept in exact.items():
        if unit in orders:
            decision, stays = policy.units[unit], set(kept.tolist())
            gone = [channel for channel in range(decision.of) if channel not in stays]
            orders[unit][decision.method] = torch.tensor([*gone, *kept.tolist()], dtype=torch.int64)
    return replace(bank, orders=orders)


def _check_ranked(path: Path, policy: Policy, options: Mapping[str, Option], bank: Bank) -> None:
    problems = [
        f"units.{name}: method {option.method!r} cannot rank it here (its layers are too wide for second moments)"
        for name, option in options.items()
        if policy.units[name].kind in NARROWED and option.method not in bank.orders.get(name, {})
    ]
    if problems:
        raise PolicyError(f"{path}: cannot be transferred:\n{listed(problems)}\nchoose l2 in their place")


def _mended(
    stitcher: Stitcher, options: Mapping[str, Option], subject: Subject, batches: tuple[Tensor, ...]
) -> Candidate:
    """The candidate refitted, or as it is where that is nearer to the dense model on selection data."""
    selection, reference = selection_of(subject), reference_of(subject, batches)
    plain, (solved, _) = stitcher.build(options), refitted(stitcher, options, reference)
    return min((plain, solved), key=lambda candidate: float(selection.divergences(candidate.model).mean()))


def _of_this_model(policy: Policy, subject: Subject, side: bytes) -> Policy:
    evidence = policy.evidence
    if evidence is not None:
        evidence = evidence.model_copy(update={"verified": False})
    return policy.model_copy(
        update={
            "model": model_identity(subject), "evidence": evidence, "weights": WEIGHTS,
            "weights_sha256": digest(side),
        }
    )  # fmt: skip
