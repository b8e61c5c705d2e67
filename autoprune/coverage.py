"""How much of a model a space reaches, and what stays whole for which reason. Counts; measures nothing."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

from autoprune.core.architecture import Layer
from autoprune.core.outcome import CoverageRecord, KeptRecord
from autoprune.core.space import Space
from autoprune.model.coupling import Refused, Spared
from autoprune.profile.cost_model import CostModel

_NOT_FOUND = "no unit of this space has a choice there"
_NOT_LOOKED = "the space leaves channels, heads and ffn as they are"
_ADVICE: Mapping[Spared, str] = {
    "model": "weights: --space compress, int8 or weights-nm",
    "protect": "take it out of protect",
    "only": "name it in only",
    "hidden": "hidden: true in a space file",
    "space": "another --space: everything has all kinds",
}
_INSIDE = "its weights change inside"
_WORTH_A_WORD = 0.0005
_NAMED = re.compile(r"\w+(?:\.\w+)+|\d+")
"""What tells two reasons of one kind apart: dotted names of modules, and numbers."""


def coverage(costs: CostModel, refused: Sequence[Refused], *, narrowed: bool) -> CoverageRecord:
    """What the units of `costs.space` reach of the dense model's MACs and parameters, and why the rest stays whole.

    A layer is reached where a unit with a choice sets one of its widths, or is a block around it. A layer that is not
    counts for every reason that holds it, in equal parts; one that no reason holds is told, too. `narrowed` says
    whether units that narrow were looked for.
    """
    layers = costs.architecture.layers
    macs = _by_name(layers, costs.by_layer("macs") / costs.dense["macs"])
    params = _by_name(layers, costs.by_layer("params") / costs.dense["params"])
    reached = _reached(layers, costs.space)
    inside = {u.unit.layers[0] for u in costs.space.entries if u.unit.kind == "weights" and len(u.options) > 1}
    kept = _kept(refused, macs, reached, inside)
    explained = {name for entry in refused for name in entry.layers} | reached
    rest = {name: share for name, share in macs.items() if share and name not in explained}
    if rest:
        kept.append(_unexplained(rest, inside, narrowed=narrowed))
    return CoverageRecord(
        macs=_sum(macs, reached), params=_sum(params, reached), weights=_sum(params, inside),
        kept=tuple(sorted(kept, key=lambda record: (-record.macs_share, -record.held_share, record.reason))),
    )  # fmt: skip


def _reached(layers: Sequence[Layer], space: Space) -> set[str]:
    live = {entry.unit.name for entry in space.entries if len(entry.options) > 1 and entry.unit.kind != "weights"}
    return {layer.name for layer in layers if live & {layer.block, *_units_of(layer)}}


def _units_of(layer: Layer) -> set[str]:
    """The units that set its widths."""
    return {unit for unit, _ in (*layer.inputs.terms, *layer.outputs.terms)}


def _kept(
    refused: Sequence[Refused], macs: Mapping[str, float], reached: Collection[str], inside: Collection[str]
) -> list[KeptRecord]:
    """One record for each kind of reason."""
    holders: dict[str, int] = defaultdict(int)
    for entry in refused:
        for name in entry.layers:
            holders[name] += 1
    alike: dict[str, list[Refused]] = defaultdict(list)
    for entry in refused:
        alike[_NAMED.sub("...", entry.reason)].append(entry)
    records = []
    for entries in alike.values():
        whole = {name for entry in entries for name in entry.layers if name not in reached}
        lost = sum(macs.get(name, 0.0) / holders[name] for e in entries for name in e.layers if name in whole)
        told = _INSIDE if whole & macs.keys() <= set(inside) else _ADVICE[entries[0].by]
        more = f" (and {len(entries) - 1} more like it)" if len(entries) > 1 else ""
        records.append(KeptRecord(
            reason=entries[0].reason + more, roots=tuple(entry.root for entry in entries), macs_share=lost,
            held_share=_sum(macs, {name for entry in entries for name in entry.layers}),
            advice=told if lost >= _WORTH_A_WORD else "",
        ))  # fmt: skip
    return records


def _unexplained(macs: Mapping[str, float], inside: Collection[str], *, narrowed: bool) -> KeptRecord:
    """Layers that are neither reached nor held by a reason."""
    reason, advice = (_NOT_FOUND, _ADVICE["model"]) if narrowed else (_NOT_LOOKED, _ADVICE["space"])
    if macs.keys() <= set(inside):
        advice = _INSIDE
    share = sum(macs.values())
    return KeptRecord(reason=reason, roots=tuple(macs), macs_share=share, held_share=share, advice=advice)


def _by_name(layers: Sequence[Layer], shares: Collection[float]) -> dict[str, float]:
    """Shares of the dense model by layer; forms of one layer that the dense model has not are zero."""
    found: dict[str, float] = defaultdict(float)
    for layer, share in zip(layers, shares, strict=True):
        found[layer.name] += float(share)
    return dict(found)


def _sum(shares: Mapping[str, float], names: Collection[str]) -> float:
    return sum(share for name, share in shares.items() if name in names)
