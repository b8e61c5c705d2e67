"""What an exporter is: it writes a policy, laid over its model, as another tool reads it, and says what was lost.

Knows the policy, every layer as the policy leaves it, and how well each part of a decision can be kept. Does not know
any tool; nor how units are found and models are cut, which is done before.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from autoprune.core.policy import Policy, UnitDecision
from autoprune.core.surgery import Surgery
from autoprune.core.unit import NARROWED

Aspect = Literal[
    "width", "channels", "depth", "sparsity", "mask", "bits", "arithmetic", "rank", "kernel", "resolution", "weights"
]
"""A part of a decision that a format may or may not be able to say."""

MEANING: Final[Mapping[Aspect, str]] = {
    "width": "how many channels, heads or features stay",
    "channels": "which of them stay",
    "depth": "that a block is dropped",
    "sparsity": "how many weights of a layer are zero, and in which pattern",
    "mask": "which of them are zero",
    "bits": "in how many bits weights are stored",
    "arithmetic": "that a layer computes in 8-bit integers",
    "rank": "that a layer is two, and how many channels lie between them",
    "kernel": "that a kernel is cut to its middle",
    "resolution": "that the model resizes its input",
    "weights": "the values of the weights that stay, where they were mended",
}
MODEL: Final = "model"
"""In place of a unit's name: the model as a whole."""

Level = Literal["exact", "approximated", "dropped"]


@dataclass(frozen=True, slots=True)
class Grade:
    """How well one aspect is kept, and why no better."""

    level: Level
    why: str = ""

    def __post_init__(self) -> None:
        if (self.level == "exact") == bool(self.why):
            raise ValueError("what is approximated or dropped needs a reason, and what is exact has none")


EXACT: Final = Grade("exact")


def approximated(why: str) -> Grade:
    """Something near is written; `why` says what."""
    return Grade("approximated", why)


def dropped(why: str) -> Grade:
    """Nothing of it is written; `why` says for want of what."""
    return Grade("dropped", why)


def final_weights(*, whole: bool) -> Grade:
    """Mended values that are written down if, and only if, the `whole` policy is: they fit no other model."""
    return EXACT if whole else dropped("they fit only the model that the whole policy makes")


@dataclass(frozen=True, slots=True)
class Remark:
    """What became of one aspect of one unit's decision (or of the model's, `MODEL`)."""

    unit: str
    aspect: Aspect
    grade: Grade


@dataclass(frozen=True, slots=True)
class Fidelity:
    """What an export kept, approximated and dropped: one remark for every aspect of every unit."""

    remarks: tuple[Remark, ...]

    @property
    def lossy(self) -> bool:
        """Whether anything is not exactly what the policy says."""
        return any(remark.grade.level != "exact" for remark in self.remarks)

    def units(self, level: Level) -> dict[tuple[Aspect, str], tuple[str, ...]]:
        """The units of which an aspect was graded so, by aspect and reason, in the order of the policy."""
        found: dict[tuple[Aspect, str], list[str]] = {}
        for remark in self.remarks:
            if remark.grade.level == level:
                found.setdefault((remark.aspect, remark.grade.why), []).append(remark.unit)
        return {key: tuple(names) for key, names in found.items()}


@dataclass(frozen=True, slots=True)
class Kept:
    """Which of the `of` positions along one side of a layer stay, ascending."""

    of: int
    positions: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LayerCut:
    """One convolution, linear layer or norm, and what the policy leaves of it. Sides that stay whole are None."""

    name: str
    kind: str
    """The class's name in torch: `Conv2d`, `Linear`, `BatchNorm2d`."""
    shape: tuple[int, ...]
    """Of the dense weight: (outputs, inputs / groups, ...); of a norm (channels,)."""
    groups: int
    inputs: Kept | None
    outputs: Kept | None
    gone: bool
    """Whether it goes with a dropped block."""
    kernel: int | None = None
    """The side of the middle of its kernel that stays, where that is cut."""
    decision: UnitDecision | None = None
    """What is done to the weights inside it."""

    @property
    def weight(self) -> str:
        """Its weight's name in the state dict."""
        return f"{self.name}.weight"

    @property
    def pattern(self) -> str:
        """Of the zeros in its weight; empty where there are none."""
        return self.decision.pattern if self.decision is not None else ""

    @property
    def is_cut(self) -> bool:
        """Whether rows, columns or taps of its weight go."""
        return self.inputs is not None or self.outputs is not None or self.kernel is not None

    @property
    def is_depthwise(self) -> bool:
        """Whether every output reads one input of its own."""
        return self.groups > 1 and self.groups == self.shape[0] and self.shape[1] == 1


@dataclass(frozen=True, slots=True)
class UnitCut:
    """One unit that the policy changes, as layers see it."""

    name: str
    decision: UnitDecision
    layers: tuple[str, ...]
    """All layers that it touches; the first one of a `weights` or `kernel` unit is the layer itself."""
    kept: tuple[int, ...] = ()
    """Of a narrowed unit: its channels (heads, features) that stay, ascending."""
    producers: Mapping[str, tuple[int, ...]] | None = None
    """Of a narrowed unit: the layers whose outputs go with it (root first), and which of them go, in the order of the
    unit's channels. Depthwise convolutions are among them, norms are not."""

    modules: tuple[str, ...] = ()
    """Of a narrowed unit: the modules whose forward pass reads its width as an integer (`Surgery.numbers`)."""

    @property
    def narrows(self) -> bool:
        """Whether channels of it go."""
        return self.decision.kind in NARROWED

    @property
    def aspects(self) -> tuple[Aspect, ...]:
        """What there is to say about it."""
        decision = self.decision
        if self.narrows:
            return ("width", "channels")
        fixed: dict[str, tuple[Aspect, ...]] = {
            "block": ("depth",), "kernel": ("kernel",), "resolution": ("resolution",),
        }  # fmt: skip
        if decision.kind in fixed:
            return fixed[decision.kind]
        if decision.rank:
            return ("rank",)
        has: dict[Aspect, bool] = {
            "sparsity": bool(decision.pattern),
            "mask": bool(decision.pattern),
            "bits": decision.bits < 32,
            "arithmetic": decision.inputs == 8,
        }
        return tuple(aspect for aspect, there in has.items() if there)


@dataclass(frozen=True, slots=True)
class Resolved:
    """A policy laid over its model: what an exporter is given. Nothing in it is written to."""

    policy: Policy
    title: str
    """The policy file's name."""
    units: tuple[UnitCut, ...]
    """Those that the policy changes, without what lies in dropped blocks, in its order."""
    layers: Mapping[str, LayerCut]
    """Every convolution, linear layer and batch norm of the dense model, changed or not, in its order."""
    dense: nn.Module
    model: nn.Module
    """The cut one, with its final weights."""
    example: Tensor
    """One batch as the target runs it."""
    surgery: Surgery
    """How the model is cut, as plain values."""
    mended: tuple[str, ...]
    """Tensors of the cut model's state that are not the dense ones' kept positions (and zeros)."""
    onnx: Callable[[], bytes]
    """Makes the cut model's ONNX file, integers stored as such; raises TargetError where it cannot be."""

    def mask(self, layer: str) -> Tensor:
        """Which weights of a layer count, in its dense shape, bool: of its kept rows, columns and taps those that are
        not pruned.
        """
        cut = self.layers[layer]
        mask = torch.zeros(cut.shape, dtype=torch.bool)
        if cut.gone:
            return mask
        rows = _places(cut.outputs, cut.shape[0])
        if len(cut.shape) == 1:
            mask[rows] = True
            return mask
        columns = torch.arange(cut.shape[1])
        if cut.inputs is not None and cut.shape[1] > 1:  # each group of a convolution keeps the same of its inputs
            columns = _places(cut.inputs, 0)[: len(cut.inputs.positions) // cut.groups]
        sides = [cut.kernel or side for side in cut.shape[2:]]
        stays = torch.ones(len(rows), len(columns), *sides, dtype=torch.bool)
        if cut.pattern:
            stays = self.model.get_parameter(cut.weight).detach() != 0
        around = [(whole - side) // 2 for whole, side in zip(cut.shape[2:], sides, strict=True)]
        stays = functional.pad(stays, [each for side in reversed(around) for each in (side, side)])
        mask[rows[:, None], columns] = stays
        return mask

    @property
    def aspects(self) -> tuple[tuple[str, Aspect], ...]:
        """Every part of the policy: what a fidelity report speaks of."""
        found: list[tuple[str, Aspect]] = [(unit.name, aspect) for unit in self.units for aspect in unit.aspects]
        return (*found, (MODEL, "weights")) if self.mended else tuple(found)

    def says_only(self, *aspects: Aspect) -> bool:
        """Whether the policy has no parts but these."""
        return {aspect for _, aspect in self.aspects} <= set(aspects)

    def graded(
        self, grades: Mapping[Aspect, Grade], *, units: Mapping[str, Mapping[Aspect, Grade]] | None = None
    ) -> Fidelity:
        """The report of an exporter that treats all units alike, but for `units`. An aspect without a grade is dropped:
        the format has nothing for it.
        """
        own = units or {}
        nothing = dropped("the format has nothing for it")
        return Fidelity(
            tuple(
                Remark(unit, aspect, own.get(unit, {}).get(aspect) or grades.get(aspect, nothing))
                for unit, aspect in self.aspects
            )
        )


def _places(kept: Kept | None, size: int) -> Tensor:
    return torch.arange(size) if kept is None else torch.tensor(kept.positions, dtype=torch.int64)


@dataclass(frozen=True, slots=True)
class Exported:
    """Files by name, and what they keep of the policy."""

    files: Mapping[str, bytes]
    fidelity: Fidelity


class Exporter(Protocol):
    """Writes policies for one tool. Stateless."""

    name: str
    """What follows `--to`."""
    tested: tuple[str, ...]
    """The tool's packages and versions that read such files in a test: `torch-pruning 1.6.1`; or what stood in."""

    def export(self, resolved: Resolved) -> Exported:
        """The files for the tool. Raises PolicyError where nothing of the policy can be said in its format."""
        ...


def lines_of(fidelity: Fidelity, *, levels: Collection[Level], most: int = 3) -> list[str]:
    """One line for each aspect and reason: `dropped: which channels stay, of 12 units (a, b, c, ...): why`."""
    return [
        f"{level}: {MEANING[aspect]}{_named(names, most)}{f': {why}' if why else ''}"
        for level in levels
        for (aspect, why), names in fidelity.units(level).items()
    ]


def _named(names: Iterable[str], most: int) -> str:
    known = [name for name in names if name != MODEL]
    if not known:
        return ""
    shown = ", ".join(known[:most]) + (", ..." if len(known) > most else "")
    return f" ({len(known)} unit{'s' if len(known) > 1 else ''}: {shown})"
