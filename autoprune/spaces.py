"""Search space files: which methods and widths, what is protected. Read, checked, and laid over a model's units."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Final, Self, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from autoprune.core.budget import parse_fraction
from autoprune.core.pattern import parse_pattern
from autoprune.core.space import Space, UnitOptions
from autoprune.core.unit import (
    CENTER,
    DROP,
    LOW_RANK,
    NARROWED,
    RESIZE,
    Bits,
    Compensate,
    Form,
    InputBits,
    Kind,
    Option,
    Unit,
    keep_all,
)
from autoprune.errors import ConfigError, listed, near_miss
from autoprune.files import read_yaml
from autoprune.problems import given, problems_of

LEVELS: Final = 16
MIN_KEEP: Final = 0.0625


def _share_of(what: str) -> BeforeValidator:
    def share(value: object) -> object:
        try:
            if isinstance(value, str | int | float) and not isinstance(value, bool):
                found = parse_fraction(value, key=what)
                if found > 0:
                    return found
        except ConfigError:
            pass
        raise ValueError(f"{value!r} is no share of the {what}; write e.g. 25% or 0.25")

    return BeforeValidator(share)


def _width(value: object) -> object:
    """A whole number as it is, a share as a fraction of one."""
    if type(value) is int and value > 0:
        return value
    if isinstance(value, str | float):
        try:
            found = parse_fraction(value, key="widths")
        except ConfigError:
            found = 0.0
        if 0 < found < 1:
            return found
    raise ValueError(f"{given(value)} is no width; write a number of channels such as 24, or a share such as 75%")


def _switch(value: object) -> object:
    """`true` is a mapping without keys, `false` is none."""
    if isinstance(value, bool):
        return {} if value else None
    if isinstance(value, dict | Narrowing):
        return value
    raise ValueError(f"given {given(value)}, allowed: true, false, or a mapping such as {{levels: 8, min_keep: 25%}}")


def _check_widths(widths: Sequence[object], *, levels: bool, min_keep: bool) -> None:
    if widths and (levels or min_keep):
        raise ValueError("widths: they are tried in place of even levels; give either widths, or levels and min_keep")


Rank = Annotated[float, _share_of("full rank")]
Share = Annotated[float, _share_of("width")]
Resolution = Annotated[float, _share_of("input's side"), Field(lt=1)]
Levels = Annotated[int, Field(ge=2, le=256)]
Align = Annotated[int, Field(ge=1, le=1024, strict=True)]
Width = Annotated[int | float, BeforeValidator(_width)]
"""A number of channels, or (a fraction) a share of a unit's."""


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


class Narrowing(BaseModel):
    """Which widths units of one kind may take; what is not said is as for all kinds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    levels: Levels | None = None
    min_keep: Share | None = None
    widths: tuple[Width, ...] = ()
    align: Align | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        _check_widths(self.widths, levels=self.levels is not None, min_keep=self.min_keep is not None)
        return self


Narrowed = Annotated[Narrowing | None, BeforeValidator(_switch)]


class SpaceSpec(BaseModel):
    """The content of a search space file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    about: str = ""
    methods: tuple[MethodChoice, ...] = ()
    levels: Levels = LEVELS
    """Widths tried for each unit: `levels` even steps of its width, and the edges of the runtime's blocks."""
    min_keep: Share = MIN_KEEP
    """Smallest share of a unit's channels that may stay."""
    widths: tuple[Width, ...] = ()
    """The widths tried in place of even steps and edges: numbers of channels, or shares."""
    align: Align = 1
    """Only multiples of this and the full width; not for heads."""
    channels: Narrowed = Narrowing()
    """Whether units of channels are narrowed, and how where that differs from the above; heads and ffn follow it."""
    heads: Narrowed = None
    ffn: Narrowed = None
    blocks: bool = True
    hidden: bool = False
    """Whether the width of a stream that norms scale (a transformer's hidden size) may be cut, too."""
    weights: tuple[WeightChoice, ...] = ()
    """What may be done to the weights inside layers."""
    kernels: tuple[Annotated[int, Field(ge=3)], ...] = ()
    """Sides that kernels of 5 and more may be cut to, about their middle: [3], [5, 3]. Empty: they stay."""
    resolutions: tuple[Resolution, ...] = ()
    """Shares of the side that input images may be resized to by the model itself: [87.5%, 75%]; the nearest size that
    the model's strides divide is taken. Empty: they stay.
    """
    dense_layers: tuple[str, ...] = ()
    """Globs of layers whose weights stay dense floats."""
    only: tuple[str, ...] = ()
    """Globs of module names beside which all others stay as they are; empty: any may change."""
    protect: tuple[str, ...] = ()
    """Globs of module names that stay as they are."""

    @field_validator("methods")
    @classmethod
    def _distinct(cls, methods: tuple[MethodChoice, ...]) -> tuple[MethodChoice, ...]:
        if len(set(methods)) < len(methods):
            raise ValueError("each method with each compensation may stand here once")
        return methods

    @field_validator("kernels")
    @classmethod
    def _odd(cls, kernels: tuple[int, ...]) -> tuple[int, ...]:
        if any(size % 2 == 0 for size in kernels):
            raise ValueError("a kernel is cut to its middle, of an odd side: [3], [5, 3]")
        return kernels

    @model_validator(mode="after")
    def _something(self) -> SpaceSpec:
        if self.narrowed and not self.methods:
            raise ValueError(f"methods: {self.narrowed[0]} need at least one method (or set {self.narrowed[0]}: false)")
        if not (self.narrowed or self.blocks or self.weights or self.kernels or self.resolutions):
            raise ValueError(
                "nothing may be pruned: channels, heads, ffn and blocks are off, weights, kernels and resolutions empty"
            )
        heads = self.narrowing("heads")
        if heads is not None and heads.align is not None and "heads" in self.model_fields_set:
            raise ValueError("heads.align: heads have no alignment; leave it out")
        _check_widths(
            self.widths, levels="levels" in self.model_fields_set, min_keep="min_keep" in self.model_fields_set
        )
        return self

    def narrowing(self, kind: Kind) -> Narrowing | None:
        """How units of a kind are narrowed, None where they are not; heads and ffn like channels unless named."""
        own = {"channels": self.channels, "heads": self.heads, "ffn": self.ffn}
        if kind not in own:
            return None
        return own[kind] if kind in self.model_fields_set else self.channels

    @property
    def narrowed(self) -> tuple[Kind, ...]:
        """The kinds of units that may be narrowed."""
        return tuple(kind for kind in NARROWED if self.narrowing(kind) is not None)


def load_space(name: str, folder: Path) -> SpaceSpec:
    """A space by preset name (`cnn-channels`) or path of a YAML file relative to `folder`."""
    path = _preset(name) if not name.endswith((".yaml", ".yml")) else folder / name
    if not os.path.exists(path):  # unlike Path's, False for a text that can be no path
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
        elif unit.kind == "kernel":
            options = _kernel_options(unit, spec)
        elif unit.kind == "resolution":
            options = _resolution_options(unit, spec)
        else:
            widths = _widths(unit, spec, aligned(unit) if aligned else ())
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


def _kernel_options(unit: Unit, spec: SpaceSpec) -> tuple[Option, ...]:
    """Largest first: what is left solved again for what went, and as it is."""
    sizes = [size for size in unit.sizes if size in spec.kernels]
    return tuple(Option(CENTER, size, how) for size in sizes for how in get_args(Compensate)[::-1])


def _resolution_options(unit: Unit, spec: SpaceSpec) -> tuple[Option, ...]:
    """The sizes nearest to the wanted shares, largest first."""
    sides = {min(unit.sizes, key=lambda side: abs(side - share * unit.width)) for share in spec.resolutions}
    return tuple(Option(RESIZE, side) for side in sorted(sides, reverse=True))


def _low_ranks(unit: Unit, shares: Sequence[float]) -> set[Option]:
    """Those that leave fewer weights than there were."""
    inputs = unit.width // unit.outputs
    ranks = {max(1, round(share * min(unit.outputs, inputs))) for share in shares}
    kept = {rank: rank * (unit.outputs + inputs) for rank in ranks}
    return {Option(LOW_RANK, keep, rank=rank) for rank, keep in kept.items() if keep < unit.width}


def _kept(width: int, pattern: str) -> int:
    return width - round(parse_pattern(pattern).sparsity * width) if pattern else width


def _widths(unit: Unit, spec: SpaceSpec, aligned: Sequence[int]) -> list[int]:
    """Widths below the full one and never below one, widest first: those asked for, or even steps and edges."""
    own = spec.narrowing(unit.kind)
    if own is None:
        return []
    align = 1 if unit.kind == "heads" else own.align or spec.align
    stepped = own.levels is not None or own.min_keep is not None
    asked = own.widths or (() if stepped else spec.widths)
    if asked:
        wanted = {round(unit.width * width) if isinstance(width, float) else width for width in asked}
        least = 1
    else:
        levels = own.levels or spec.levels
        wanted = {round(unit.width * step / levels) for step in range(1, levels)} | set(aligned)
        least = max(1, math.ceil(unit.width * (own.min_keep or spec.min_keep) - 1e-9))
    rounded = {round(width / align) * align for width in wanted}
    return sorted({width for width in rounded if least <= width < unit.width}, reverse=True)
