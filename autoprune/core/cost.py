"""The measured part of the cost table: how long each shape of layer takes on the target. A value, read from JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from autoprune.core.unit import Form

Block = Annotated[int, Field(ge=1, le=1 << 20)]
Count = Annotated[int, Field(ge=0, le=1 << 48)]
"""A damaged file may hold integers of thousands of digits, which arithmetic would stumble over."""


@dataclass(frozen=True, slots=True)
class LayerBytes:
    """What a layer takes in a file besides its weights: while it is there, and for each output."""

    present: float
    per_output: float
    copies: float = 1.0
    """How often its weights are in the file; less than 1 where they are compressed."""


@dataclass(frozen=True, slots=True)
class Rate:
    """What an option makes of that: bytes a weight (of those there are in its form), and what else comes with it."""

    per_weight: float
    per_output: float = 0.0
    present: float = 0.0


@dataclass(frozen=True, slots=True)
class Storage:
    """How many bytes things take in the file that a model is shipped as."""

    dense_bytes: float
    """The dense model's file; what is not of its layers is there whatever is chosen."""
    layers: Sequence[LayerBytes]
    """For each layer of the architecture."""
    rates: Mapping[str, Sequence[Rate]]
    """For each `weights` unit, one for each of its options. Other layers take 4 bytes a weight."""


class SignatureCost(BaseModel):
    """One shape of layer: seconds (as a share of the dense model's latency) for each feature of its two widths."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    signature: str
    coefficients: dict[str, float]


class TableCheck(BaseModel):
    """How well the table predicts whole models that were not used to build it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    models: Count
    median_error: float
    worst_error: float


class TimedModel(BaseModel):
    """A whole model that was timed: for each unit of the space what it keeps and in which form, and the latency."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    keeps: tuple[Count, ...]
    forms: tuple[Form, ...]
    share: float
    """Of the dense model's."""
    near: bool = False
    """Whether it was near a budget, where a search goes, and not drawn at random."""


class LatencyTable(BaseModel):
    """Latency of any choice on one target, as a share of the dense model's: `base + sum over layers`.

    Shares, because absolute times on a shared machine drift and ratios to a dense model timed in the same loop do not.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Count = 1
    key: str
    """Fingerprint of architecture, target, runtime version and machine: a table of another key is measured anew."""
    dense_s: float
    base: float
    channel_block: Block
    """Widths cost what the next multiple of this costs: the step of the runtime's blocked kernels, found by fit."""
    signatures: tuple[SignatureCost, ...]
    fitted_models: Count
    check: TableCheck
    integer_block: Block = 1
    """The same step of layers that compute in integers."""
    seam: float = 0.0
    """What each place costs where layers in integers meet layers in floats."""
    timed: tuple[TimedModel, ...] = ()
    """What it was fitted to."""
    correction: float = 1.0
    """Factor learnt by verification: measured over predicted near the chosen policy."""
    where: str = ""
    """The machine that it was measured on."""


class SharesTable(BaseModel):
    """What shares of the dense model's latency some choices take, in an order that whoever asked for them knows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    shares: tuple[float, ...]
