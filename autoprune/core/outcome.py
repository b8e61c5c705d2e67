"""What a search found, as written to `outcome.json` and drawn in the report. A value, without weights."""

from __future__ import annotations

from autoprune.core.policy import Measured, Policy
from autoprune.core.record import Record


class TrialRecord(Record):
    """One trial of the study: where it came from, what it was predicted to cost, how far it is from the dense model."""

    number: int
    origin: str
    state: str
    divergence: float | None
    costs: dict[str, float]
    """Predicted: latency in seconds, MACs, parameters, bytes."""


class UnitRecord(Record):
    """One unit of the model and what the policy does with it."""

    name: str
    kind: str
    width: int
    keep: int
    method: str
    macs_share: float
    latency_share: float | None
    """Share of the dense model's latency in the layers it touches, from the cost table."""


class KeptRecord(Record):
    """Channels that stay whole for one reason."""

    reason: str
    roots: tuple[str, ...]
    """The layers that the groups of channels are named by."""
    macs_share: float
    """Share of the MACs that nothing reaches because of it; a layer that two reasons hold counts half for each."""
    held_share: float
    """Share of the MACs in all layers that have these channels on a side, those that other units reach among them."""
    advice: str
    """What to do about it in a word; empty where it costs nothing."""


class CoverageRecord(Record):
    """How much of a model units reach: shares of the dense model, 0 to 1."""

    macs: float
    """In layers that some unit narrows on a side, or that lie in a block that may be dropped."""
    params: float
    """The same of the parameters."""
    weights: float
    """Of the parameters, in layers whose weights may change inside."""
    kept: tuple[KeptRecord, ...]
    """Why the rest stays whole, what costs most first."""


class UnitsRecord(Record):
    """What can be pruned in a model, and how much of it that is."""

    units: tuple[UnitRecord, ...]
    coverage: CoverageRecord
    notes: tuple[str, ...]


class PredictionCheck(Record):
    """Predicted against measured latency (shares of the dense) of whole models not used to build the table."""

    models: int
    median_error: float
    worst_error: float


class OutcomeRecord(Record):
    """Evidence for one budget: the policy, its baselines, every trial, and how the numbers were made."""

    title: str
    budget: str
    floor: str
    metric: str
    higher_is_better: bool
    met: bool
    verdict: str
    """One sentence: met with what margin, or missed by how much."""
    beats_baselines: bool
    policy: Policy
    dense: Measured
    chosen: Measured
    finalists: tuple[Measured, ...]
    """All verified candidates, the chosen one among them."""
    baselines: dict[str, Measured]
    units: tuple[UnitRecord, ...]
    coverage: CoverageRecord | None = None
    trials: tuple[TrialRecord, ...]
    check: PredictionCheck | None
    seconds: dict[str, float]
    """Wall seconds of each phase."""
    notes: tuple[str, ...] = ()


class VerifyRecord(Record):
    """What `verify` measured of a policy, and whether it still meets the budget and the floor it was made for."""

    met: bool
    verdict: str
    """One sentence: met with what margin, or missed by how much."""
    dense: Measured
    pruned: Measured
    budget: str
    floor: str


class PackedItem(Record):
    """What one tensor of a packed model takes."""

    name: str
    kind: str
    shape: tuple[int, ...]
    stored_bytes: int
    shannon_bytes: float
    """The least that a coder of independent symbols could reach."""


class PackedRecord(Record):
    """Where the bytes of a packed model go, and where it was unpacked to."""

    items: tuple[PackedItem, ...]
    overhead_bytes: int
    size_bytes: int
    plain_bytes: int
    written: str
