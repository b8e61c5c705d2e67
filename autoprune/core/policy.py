"""The policy file's content (format 1): decision first, evidence after. A value; reading YAML is done elsewhere.

What decides (`units`, and every key at the top) is read strictly: a key that is not known here could change what the
policy means. What only informs (model, target, evidence) may have keys of later versions, which are passed over. Keys
at the top that begin with `x-` are other tools' own and are kept as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from autoprune.core.budget import Metric
from autoprune.core.pattern import parse_pattern
from autoprune.core.target import Precision
from autoprune.core.unit import LOW_RANK, NARROWED, Bits, Compensate, InputBits, Kind, Option, SizeOf

FORMAT: Final = 1
EXTENSION: Final = "x-"
"""What keys at the top begin with that other tools add for themselves."""


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("must be a finite number")
    return value


Finite = Annotated[float, AfterValidator(_finite)]


class _Informs(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class UnitDecision(BaseModel):
    """What happens to one unit: `keep` of its `of` channels or weights by `method`, or the block dropped (keep 0 of 1),
    or a kernel of side `of` cut to its middle (method `center`), or input images of height `of` resized.

    Zeros in a layer's weights follow `pattern` (`2:4`, `70%`, `4x1 50%`); `bits` says how they are stored. With a
    `rank` the layer is two, that many channels between them; with `inputs: 8` it computes in integers.
    """

    kind: Kind
    method: str
    keep: int = Field(ge=0)
    of: int = Field(ge=1)
    compensate: Compensate = "none"
    pattern: str = ""
    bits: Bits = 32
    rank: int = Field(default=0, ge=0)
    inputs: InputBits = 32

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="after")
    def _consistent(self) -> UnitDecision:
        if self.keep > self.of:
            raise ValueError(f"keep ({self.keep}) is more than there is (of: {self.of})")
        if self.kind in NARROWED and self.keep < 1:
            raise ValueError("at least one channel must stay (keep: 1)")
        if self.kind in ("kernel", "resolution") and self.keep < 1:
            raise ValueError("a side of at least one must stay (keep: 1)")
        if self.kind == "block" and self.of != 1:
            raise ValueError("a block is one thing (of: 1)")
        if self.kind == "kernel" and not (self.keep % 2 and self.of % 2):
            raise ValueError("a kernel has a middle: keep and of are odd (kind: kernel)")
        if self.kind != "weights" and (self.pattern or self.bits != 32 or self.rank or self.inputs != 32):
            raise ValueError("a pattern, bits, a rank and inputs belong to weights (kind: weights)")
        if self.inputs == 8 and self.bits != 8:
            raise ValueError("a layer computes in integers when its weights are some (inputs: 8 needs bits: 8)")
        if (self.method == LOW_RANK) != bool(self.rank) or (self.rank and (self.pattern or self.bits != 32)):
            raise ValueError("method low_rank has a rank, and neither pattern nor bits")
        if self.pattern:
            parse_pattern(self.pattern)
        return self

    @property
    def option(self) -> Option:
        """The same as an option of a space."""
        return Option(self.method, self.keep, self.compensate, self.pattern, self.bits, self.rank, self.inputs)


class ModelIdentity(_Informs):
    """Which model a policy belongs to. `fingerprint` covers weights, `structure` names and shapes alone."""

    name: str
    fingerprint: str
    structure: str
    params: int
    example: list[list[int]]


class TargetRecord(_Informs):
    """Where latencies were measured."""

    runtime: str
    device: str
    threads: int
    batch: int
    precision: Precision = "float32"
    where: str = ""


class LatencyRecord(_Informs):
    """Measured milliseconds over `runs` timed runs, interleaved with the dense model."""

    median: Finite
    p10: Finite
    p90: Finite
    runs: int


class ScoreRecord(_Informs):
    """A metric on `n` held-out samples, with its standard error."""

    value: Finite
    n: int
    stderr: Finite


class Measured(_Informs):
    """Everything measured or counted of one model."""

    latency_ms: LatencyRecord | None = None
    ratio: Finite | None = None
    """Latency over the dense model's, median of paired rounds."""
    predicted_ms: Finite | None = None
    score: ScoreRecord | None = None
    divergence: Finite | None = None
    macs: int
    params: int
    size_bytes: int
    memory_bytes: int | None = None
    """Peak resident memory above that of a process without the model."""
    recovery: str | None = None

    @property
    def costs(self) -> dict[Metric, float]:
        """What was measured or counted, in each budgeted metric's own unit: latency in seconds."""
        found: dict[Metric, float] = {"macs": self.macs, "params": self.params, "size": self.size_bytes}
        if self.latency_ms is not None:
            found["latency"] = self.latency_ms.median / 1e3
        if self.memory_bytes is not None:
            found["memory"] = self.memory_bytes
        return found


class Evidence(_Informs):
    """What was measured when the policy was made."""

    metric: str = "top1"
    dense: Measured
    pruned: Measured
    baselines: dict[str, Measured] = Field(default_factory=dict)
    verified: bool = True
    search: dict[str, Any] = Field(default_factory=dict)


class Policy(BaseModel):
    """A pruning policy. `units` alone is enough to apply it; units not named are kept."""

    autoprune: Literal[1] = FORMAT
    units: dict[str, UnitDecision]
    model: ModelIdentity | None = None
    target: TargetRecord | None = None
    budget: dict[str, str] = Field(default_factory=dict)
    size: SizeOf = "onnx"
    """What a budget on size counts: the state as it is, or the packed file."""
    floor: dict[str, float] = Field(default_factory=dict)
    evidence: Evidence | None = None
    weights: str | None = None
    """Side file (safetensors, beside the YAML) with exact kept indices and mended tensors, and its SHA-256."""
    weights_sha256: str | None = None

    model_config = ConfigDict(
        frozen=True, extra="allow", json_schema_extra={"additionalProperties": False, "patternProperties": {"^x-": {}}}
    )

    @model_validator(mode="after")
    def _known_keys(self) -> Policy:
        for key in unknown_keys(self.model_extra or {}):
            raise ValueError(f"{key}: unknown key")
        return self

    def options(self) -> dict[str, Option]:
        """Unit name to option."""
        return {name: decision.option for name, decision in self.units.items()}


def unknown_keys(keys: Iterable[str]) -> list[str]:
    """Those of `keys` that a policy of this format does not have at its top."""
    return [key for key in keys if key not in Policy.model_fields and not key.startswith(EXTENSION)]
