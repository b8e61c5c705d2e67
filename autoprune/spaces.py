"""Search space files: which methods and widths, what is protected. Read, checked, and laid over a model's units."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from autoprune.core.budget import parse_fraction
from autoprune.core.pattern import parse_pattern
from autoprune.core.space import Space, UnitOptions
from autoprune.core.unit import DROP, LOW_RANK, Bits, Compensate, Form, InputBits, Option, Unit, keep_all
from autoprune.errors import ConfigError, listed, near_miss
from autoprune.files import read_yaml
from autoprune.problems import problems_of


def _share(value: object) -> object:
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        share = parse_fraction(value, key="ranks")
        if share > 0:
            return share
    raise ValueError(f"{value!r} is no share of the full rank; write e.g. 25% or 0.25")


Rank = Annotated[float, BeforeValidator(_share)]


class MethodChoice(BaseModel):
    """A method and what happens to the rest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str
    compensate: Compensate = "none"


class WeightChoice(BaseModel):
    """What may be done to a layer's weights: zeros by a sparsifier in each of `patterns`, stored in each of `bits`; or,
    with the method `low_rank`, two layers with each of `ranks` between them, shares of the full rank. With `inputs` of
    8 the layer computes in integers, where the runtime does.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str = "dense"
    patterns: tuple[str, ...] = ("",)
    bits: tuple[Bits, ...] = (32,)
    ranks: tuple[Rank, ...] = ()
    inputs: tuple[InputBits, ...] = (32,)

    @field_validator("patterns")
    @classmethod
    def _readable(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            if pattern:
                parse_pattern(pattern)
        return patterns

    @model_validator(mode="after")
    def _does_something(self) -> WeightChoice:
        if (self.method == LOW_RANK) != bool(self.ranks):
            raise ValueError("low_rank needs ranks (e.g. [25%, 50%]), and nothing else has them")
        if self.method == LOW_RANK:
            if self.patterns != ("",) or self.bits != (32,) or self.inputs != (32,):
                raise ValueError("low_rank has neither patterns nor bits nor inputs")
            return self
        if (self.method == "dense") != (self.patterns == ("",)):
            raise ValueError("a sparsifier needs patterns, and `dense` has none")
        if 8 in self.inputs and 8 not in self.bits:
            raise ValueError("a layer computes in integers when its weights are some: inputs: [8] needs bits: [8]")
        if self.method == "dense" and 32 in self.bits:
            raise ValueError("dense weights of 32 bits are what is there already; give bits: [8]")
        return self


class SpaceSpec(BaseModel):
    """The content of a search space file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    about: str = ""
    methods: tuple[MethodChoice, ...] = ()
    levels: Annotated[int, Field(ge=2, le=256)] = 16
    """Widths tried for each unit: `levels` even steps of its width, and the edges of the runtime's blocks."""
    min_keep: Annotated[float, Field(gt=0, le=1)] = 0.0625
    """Smallest share of a unit's channels that may stay."""
    channels: bool = True
    blocks: bool = True
    hidden: bool = False
    """Whether the width of a stream that norms scale (a transformer's hidden size) may be cut, too."""
    weights: tuple[WeightChoice, ...] = ()
    """What may be done to the weights inside layers."""
    dense_layers: tuple[str, ...] = ()
    """Globs of layers whose weights stay dense floats."""
    protect: tuple[str, ...] = ()
    """Globs of module names that stay as they are."""

    @field_validator("methods")
    @classmethod
    def _distinct(cls, methods: tuple[MethodChoice, ...]) -> tuple[MethodChoice, ...]:
        if len(set(methods)) < len(methods):
            raise ValueError("each method with each compensation may stand here once")
        return methods

    @model_validator(mode="after")
    def _something(self) -> SpaceSpec:
        if self.channels and not self.methods:
            raise ValueError("methods: channels need at least one method (or set channels: false)")
        if not (self.channels or self.blocks or self.weights):
            raise ValueError("nothing may be pruned: channels and blocks are off and weights is empty")
        return self


def load_space(name: str, folder: Path) -> SpaceSpec:
    """A space by preset name (`cnn-channels`) or path of a YAML file relative to `folder`."""
    path = _preset(name) if not name.endswith((".yaml", ".yml")) else folder / name
    if not path.exists():
        raise ConfigError(f"space: {name!r} does not exist at {path}; presets: {', '.join(presets())}")
    content = read_yaml(path)
    try:
        return SpaceSpec.model_validate(content)
    except ValidationError as error:
        raise ConfigError(
            f"{path}:\n{listed([f'{key}: {text}' for key, text in problems_of(error, SpaceSpec)])}"
        ) from None


def _folder() -> Path:
    packaged = Path(str(files("autoprune"))) / "search_spaces"
    return packaged if packaged.is_dir() else Path(str(files("autoprune"))).parent / "search_spaces"


def presets() -> tuple[str, ...]:
    """Names of the spaces that come with autoprune."""
    return tuple(sorted(path.stem for path in _folder().glob("*.yaml")))


def _preset(name: str) -> Path:
    if name not in presets():
        raise ConfigError(
            f"space: unknown preset {name!r}; {near_miss(name, presets())} (or a path that ends in .yaml)"
        )
    return _folder() / f"{name}.yaml"


def resolve(
    units: Sequence[Unit], spec: SpaceSpec, *, aligned: Callable[[Unit], Sequence[int]] | None = None,
    forms: Collection[Form] = get_args(Form),
) -> Space:  # fmt: skip
    """The options of every unit. `aligned` gives a unit's widths at the runtime's steps, once they are measured;
    `forms` are those in which the runtime has kernels of its own for a layer.
    """
    entries = []
    for unit in units:
        if unit.kind == "block":
            options: tuple[Option, ...] = (DROP,) if spec.blocks else ()
        elif unit.kind == "weights":
            options = _weight_options(unit, spec, forms)
        else:
            widths = _widths(unit, spec, aligned(unit) if aligned else ()) if spec.channels else []
            options = tuple(
                Option(choice.method, width, choice.compensate) for width in widths for choice in spec.methods
            )
        entries.append(UnitOptions(unit, (keep_all(unit), *options)))
    return Space(tuple(entries))


def _weight_options(unit: Unit, spec: SpaceSpec, forms: Collection[Form]) -> tuple[Option, ...]:
    """Most weights first; of equally many, most bits first."""
    found = {
        Option(choice.method, _kept(unit.width, pattern), pattern=pattern, bits=bits, inputs=inputs)
        for choice in spec.weights
        for pattern in choice.patterns
        for bits in choice.bits
        for inputs in choice.inputs
        if choice.method != LOW_RANK and (inputs == 32 or bits == 8)
    }
    found |= {option for choice in spec.weights for option in _low_ranks(unit, choice.ranks)}
    order = sorted(found, key=lambda o: (-o.keep, -o.bits, -o.inputs, o.method, o.pattern))
    return tuple(option for option in order if option.form != "integer" or "integer" in forms)


def _low_ranks(unit: Unit, shares: Sequence[float]) -> set[Option]:
    """Those that leave fewer weights than there were."""
    inputs = unit.width // unit.outputs
    ranks = {max(1, round(share * min(unit.outputs, inputs))) for share in shares}
    kept = {rank: rank * (unit.outputs + inputs) for rank in ranks}
    return {Option(LOW_RANK, keep, rank=rank) for rank, keep in kept.items() if keep < unit.width}


def _kept(width: int, pattern: str) -> int:
    return width - round(parse_pattern(pattern).sparsity * width) if pattern else width


def _widths(unit: Unit, spec: SpaceSpec, aligned: Sequence[int]) -> list[int]:
    """Widths below the full one, widest first: even steps and the runtime's edges, never below one."""
    least = max(1, math.ceil(unit.width * spec.min_keep - 1e-9))
    even = {round(unit.width * step / spec.levels) for step in range(1, spec.levels)}
    return sorted({width for width in even | set(aligned) if least <= width < unit.width}, reverse=True)
