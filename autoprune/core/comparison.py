"""Two policies beside each other: what differs by unit and in cost; and several joined into one, where they may be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

from autoprune.core.policy import Measured, Policy, UnitDecision
from autoprune.core.record import Record
from autoprune.errors import PolicyError, listed


class UnitDifference(Record):
    """One unit that two policies decide differently; None where one of them keeps it."""

    unit: str
    before: UnitDecision | None
    after: UnitDecision | None


class PolicyDifference(Record):
    """What differs. `notes` say why numbers may not be comparable."""

    units: tuple[UnitDifference, ...]
    same: int
    """Units that both decide alike."""
    before: Measured | None
    after: Measured | None
    metric: str
    notes: tuple[str, ...]


def difference(before: Policy, after: Policy) -> PolicyDifference:
    """Unit by unit in the order of `before`, then what only `after` changes; and the evidence of both."""
    names = dict.fromkeys((*before.units, *after.units))
    pairs = [(name, before.units.get(name), after.units.get(name)) for name in names]
    differing = tuple(UnitDifference(unit=n, before=b, after=a) for n, b, a in pairs if b != a)
    measured = [policy.evidence.pruned if policy.evidence is not None else None for policy in (before, after)]
    metrics = [policy.evidence.metric for policy in (before, after) if policy.evidence is not None]
    return PolicyDifference(
        units=differing, same=len(pairs) - len(differing), before=measured[0], after=measured[1],
        metric=next(iter(metrics), ""), notes=tuple(_notes(before, after)),
    )  # fmt: skip


def _notes(before: Policy, after: Policy) -> list[str]:
    """Why the two are not of one model, target or metric."""
    found = []
    one, other = before.model, after.model
    if one is not None and other is not None:
        if one.structure != other.structure:
            found.append(f"they are for models of other layers: {one.name} and {other.name}")
        elif one.fingerprint != other.fingerprint:
            found.append("they are for the same architecture with other weights")
    if before.target is not None and after.target is not None and before.target != after.target:
        found.append("their latencies were measured on other targets")
    if before.evidence is not None and after.evidence is not None:
        if before.evidence.metric != after.evidence.metric:
            found.append(f"their scores are other metrics: {before.evidence.metric} and {after.evidence.metric}")
        unverified = [name for name, policy in (("first", before), ("second", after))
                      if policy.evidence is not None and not policy.evidence.verified]  # fmt: skip
        found += [f"the numbers of the {name} are not verified" for name in unverified]
    return found


def merged(policies: Mapping[str, Policy]) -> Policy:
    """One policy that does what each of `policies` (by the name it is told by) does; without evidence.

    Raises PolicyError with all conflicts: units that two of them decide differently, units inside a block that another
    one drops, models of other layers.
    """
    problems = [
        problem
        for (one, first), (other, second) in combinations(policies.items(), 2)
        for problem in _conflicts(one, first, other, second)
    ]
    if problems:
        raise PolicyError(f"these policies cannot be merged:\n{listed(problems)}\ntake the unit out of one of them")
    units = {name: decision for policy in policies.values() for name, decision in policy.units.items()}
    identities = [policy.model for policy in policies.values() if policy.model is not None]
    return Policy(units=units, model=identities[0] if identities else None)


def _conflicts(one: str, first: Policy, other: str, second: Policy) -> list[str]:
    found = []
    if first.model is not None and second.model is not None and first.model.structure != second.model.structure:
        found.append(f"{one} is for {first.model.name!r}, {other} for a model of other layers ({second.model.name!r})")
    for name, decision in first.units.items():
        theirs = second.units.get(name)
        if theirs is not None and theirs != decision:
            found.append(f"units.{name}: {one} says {_told(decision)}, {other} says {_told(theirs)}")
    for dropper, drops, inner, units in ((one, first, other, second.units), (other, second, one, first.units)):
        blocks = [name for name, decision in drops.units.items() if decision.kind == "block"]
        found += [
            f"units.{name}: {dropper} drops {block}, {inner} changes it inside"
            for block in blocks
            for name in units
            if name.startswith(f"{block}.") and name not in drops.units
        ]
    return found


def _told(decision: UnitDecision) -> str:
    return f"{decision.option.label} of {decision.of}"


def names_of(paths: Sequence[object]) -> list[str]:
    """What files are told by; numbered where one is given twice."""
    texts = [str(path) for path in paths]
    return [text if texts.count(text) == 1 else f"{text} ({place})" for place, text in enumerate(texts, 1)]
