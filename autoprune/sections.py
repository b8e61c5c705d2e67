"""The sections of `autoprune.yaml`: what each key may hold, and what is said where it holds something else.

Knows keys, types and defaults. Does not read files.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, ValidationInfo

from autoprune.core.budget import parse_budgets, parse_limit
from autoprune.core.floor import SHARES, parse_drop, parse_worst
from autoprune.core.target import Device, Precision, Target
from autoprune.errors import ConfigError, near_miss
from autoprune.problems import given
from autoprune.source import ALLOWED, FUNCTION, parse_source

LOWER_IS_BETTER = ("mse", "mae", "perplexity")
METRICS = ("top1", "top5", "miou", "miou_image", "map", "psnr", *LOWER_IS_BETTER)


def _factory(value: object) -> object:
    if not isinstance(value, str) or not FUNCTION.fullmatch(value):
        raise ValueError(f"given {given(value)}, allowed: 'file.py:function' or 'package.module:function'")
    return value


def model_source(value: object) -> object:
    """A text that says where a model comes from. Raises ValueError with what is allowed."""
    if not isinstance(value, str):
        raise ValueError(f"given {given(value)}, allowed: {ALLOWED}")
    parse_source(value)
    return value


def known_metric(value: object) -> object:
    """A metric's name or function. Raises ValueError with the nearest."""
    if isinstance(value, str) and (value in METRICS or FUNCTION.fullmatch(value)):
        return value
    raise ValueError(f"given {given(value)}, allowed: 'file.py:function' or a name; {near_miss(str(value), METRICS)}")


def budget_texts(value: object) -> object:
    """One or several budgets as a tuple of texts. Raises ValueError with what is wrong."""
    texts = (value,) if isinstance(value, str) else value
    if isinstance(texts, list):
        texts = tuple(texts)
    if not isinstance(texts, tuple) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"given {given(value)}, allowed: a text with a unit, e.g. 5ms, 50%, 2MB, or a list of them")
    try:
        parse_budgets(texts)
    except ConfigError as error:
        raise ValueError(str(error).removeprefix("budget: ")) from error
    return texts


def _bytes(value: object) -> object:
    try:
        limit = parse_limit(value) if isinstance(value, str) else None
    except ConfigError:
        limit = None
    if limit is not None and limit.metric == "size" and not limit.relative:
        return int(limit.value)
    if type(value) is int and value > 0:
        return value
    raise ValueError(f"given {given(value)}, allowed: bytes with a unit, e.g. 4GB or 500MB")


def _drop(value: object, info: ValidationInfo) -> object:
    """A number in the metric's own unit, or `5%` of the dense model's value as it was written."""
    metric = str(info.data.get("metric", SHARES[0]))
    try:
        drop = parse_drop(_number(value), metric)
    except ConfigError as error:
        raise ValueError(str(error).removeprefix("max_drop: ")) from error
    return value if drop.relative else drop.amount


def _worst(value: object, info: ValidationInfo) -> object:
    metric = str(info.data.get("metric", SHARES[0]))
    try:
        return parse_worst(_number(value), metric, key=str(info.field_name))
    except ConfigError as error:
        raise ValueError(str(error).removeprefix(f"{info.field_name}: ")) from error


def _number(value: object) -> str | float:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(
            f"given {given(value)}, allowed: a share such as 1% or 0.01, or a number in the metric's own unit"
        )
    return value


def _shape(value: object) -> object:
    if isinstance(value, str) and len(value) <= 1000:  # the expression takes the square of a long row of spaces
        parts = re.split(r"\s*[,x]\s*", value.strip(" []"))
        value = [int(part) if re.fullmatch(r"[0-9]{1,9}", part) else part for part in parts]
    if not isinstance(value, list | tuple) or not all(type(size) is int and size > 0 for size in value):
        raise ValueError(f"given {given(value)}, allowed: a shape with its batch, e.g. [1, 3, 32, 32]")
    if len(value) < 2:
        raise ValueError(f"given {given(value)}, allowed: a batch and at least one more size, e.g. [1, 3, 32, 32]")
    return tuple(value)


def _names(value: object) -> object:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"given {given(value)}, allowed: a list of unit names or patterns, e.g. ['head*']")
    return tuple(names)


def _storage(value: object) -> object:
    if isinstance(value, str) and re.match(r"[a-z][a-z0-9+]*://", value):
        return value
    raise ValueError(
        f"given {given(value)}, allowed: the URL of a database, e.g. postgresql://user@host/name or sqlite:///study.db"
    )


Factory = Annotated[str, BeforeValidator(_factory)]
Drop = Annotated[float | str, BeforeValidator(_drop)]
Worst = Annotated[float, BeforeValidator(_worst)]
Count = Annotated[int, Field(ge=1, strict=True)]


class Section(BaseModel):
    """What all sections share: no unknown keys, and nothing changes once it is read."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TargetConfig(Section):
    """What latency is measured on."""

    runtime: str = Field(default="onnxruntime", min_length=1, description="What executes and times the model.")
    device: Device = Field(default="cpu", description="The device it runs on.")
    threads: Count = Field(default=1, description="Threads of the runtime.")
    batch: Count = Field(default=1, description="Samples a run.")
    precision: Precision = Field(default="float32", description="What the runtime computes with where it has a choice.")
    example: Annotated[tuple[int, ...], BeforeValidator(_shape)] | None = Field(
        default=None, description="Shape of one input with its batch, e.g. [1, 3, 32, 32]. Default: the data's shape."
    )
    table: str | None = Field(
        default=None, min_length=1,
        description="Times of a device that cannot be reached: CSV rows `unit,keep,ms`, or SPDY's timings. Latency is "
        "then by this table, and is not measured.",
    )  # fmt: skip

    @property
    def target(self) -> Target:
        """The same as a value of the core."""
        return Target(self.runtime, self.device, self.threads, self.batch, self.precision)


class SpaceConfig(Section):
    """What may be done to which unit."""

    preset: str = Field(
        default="cnn-channels", min_length=1, description="A shipped search space's name, or a YAML file."
    )
    protect: Annotated[tuple[str, ...], BeforeValidator(_names)] = Field(
        default=(), description="Names or patterns of units that must stay as they are."
    )


class SearchConfig(Section):
    """How long and how to search."""

    trials: Count = Field(default=200, description="Candidates to evaluate at most.")
    seconds: float | None = Field(
        default=None, gt=0, strict=True, allow_inf_nan=False, description="Time limit of the search."
    )
    seed: int = Field(default=0, ge=0, strict=True, description="Seed of everything random.")
    sampler: str = Field(default="budget", min_length=1, description="Who proposes candidates.")
    finalists: Count = Field(default=6, description="Candidates that are really cut, exported, timed and scored.")
    refit: StrictBool = Field(default=True, description="Refit the chosen candidate's weights by least squares.")
    bank_memory: Annotated[int, BeforeValidator(_bytes)] = Field(
        default=4_000_000_000, description="What the bank may hold in memory (`4GB`); the rest is kept on disk."
    )

    engine: Literal["optuna", "ray"] = Field(
        default="optuna", description="Where work runs: on this machine, or on a Ray cluster."
    )
    workers: Count | None = Field(
        default=None,
        description="Candidates evaluated at the same time. Default: 1; with ray as many as the cluster has room for.",
    )
    retries: int = Field(
        default=3, ge=0, strict=True, description="How often an evaluation is begun again whose worker died."
    )
    storage: Annotated[str, BeforeValidator(_storage)] | None = Field(
        default=None,
        description="URL of a database for the trials (`postgresql://user@host/name`), which any number of machines "
        "may share. Default: a file in the run folder.",
    )


class RecoverConfig(Section):
    """Fine-tuning of what was found, by distillation from the dense model on the calibration inputs."""

    steps: int = Field(
        default=0, ge=0, strict=True, description="Steps of the optimizer; 0: candidates are refitted only."
    )
    learning_rate: float = Field(default=3e-4, gt=0, allow_inf_nan=False, description="The largest learning rate.")
    batch: Count = Field(default=64, description="Samples of a step.")
    trials: StrictBool = Field(
        default=False, description="Score every trial after a recovery of its own: long trials, nearer to the truth."
    )


class RayConfig(Section):
    """What a search with `engine: ray` asks of Ray."""

    address: str | None = Field(
        default=None,
        min_length=1,
        description="Of the cluster, or `auto`. Default: a job's own cluster, or a new one here.",
    )
    cpus: float = Field(default=1, ge=0, allow_inf_nan=False, description="CPUs of each evaluation.")
    gpus: float = Field(default=0, ge=0, allow_inf_nan=False, description="GPUs of each evaluation; 0.25 shares one.")
    target_wait: float = Field(
        default=600.0, ge=0, allow_inf_nan=False,
        description="Seconds to wait for a node with the resource autoprune_target, which alone measures.",
    )  # fmt: skip
    asha: StrictBool = Field(default=False, description="Run recovered trials under Ray Tune and ASHA.")
    population: int = Field(
        default=0,
        ge=0,
        strict=True,
        description="Copies of the chosen candidate that population-based training recovers.",
    )
    callbacks: Annotated[tuple[str, ...], BeforeValidator(_names)] = Field(
        default=(), description="Callbacks of Ray Tune that hear of every trial: 'module:Name' or 'file.py:function'."
    )
