"""From choices to layer widths: how wide each layer is, and whether it is there at all. No costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, final, get_args

import numpy as np
from numpy.typing import NDArray

from autoprune.core.architecture import Architecture, Width
from autoprune.core.space import Choice, Space
from autoprune.core.unit import Form

FORMS: tuple[Form, ...] = get_args(Form)

Choices = NDArray[np.int64]  # (P, U) option indices
Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Widths:
    """Widths of L layers for each of P choices, all of shape (P, L); `present` is 0 where dropped, else 1."""

    inputs: Array
    outputs: Array
    present: Array


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Conditions:
    """At most one condition of each of L layers."""

    unit: NDArray[np.intp]
    """(L,) the unit that decides; -1 where none does."""
    form: NDArray[np.intp]
    """(L,) the form that its option must give; -1 where it is what is kept that counts."""
    keep: Array
    """(L,) what its option must keep, where no form is asked for."""

    def hold(self, kept: Array, forms: NDArray[np.intp]) -> NDArray[np.bool_]:
        """(P, L) for what P choices keep of each unit and the forms they give, both (P, U)."""
        alike = np.where(self.form >= 0, forms[:, self.unit] == self.form, kept[:, self.unit] == self.keep)
        holding: NDArray[np.bool_] = (self.unit < 0) | alike
        return holding


@final
@dataclass(frozen=True, slots=True, eq=False)
class WidthMap:
    """How the options of U units set the widths of L layers."""

    keeps: Array
    """(U, O) channels kept by each option, the last repeated where a unit has fewer than O."""
    parents: tuple[tuple[int, int], ...]
    """(unit, innermost block unit around it) pairs, outer units first."""
    removes: Array
    """(U, L) 1 where a block unit's removal removes the layer, by itself or through a block within."""
    input_fixed: Array
    input_times: Array
    output_fixed: Array
    output_times: Array
    forms: NDArray[np.intp]
    """(U, O) which form each option gives its unit's layer, the last repeated as in `keeps`."""
    conditions: tuple[_Conditions, ...]
    """On what each layer's presence depends: the first condition of each, the second of each, ..."""

    @classmethod
    def of(cls, architecture: Architecture, space: Space) -> Self:
        """The map. Raises ValueError when a layer's width depends on a unit that the space does not have."""
        input_fixed, input_times = _sides(space, [layer.inputs for layer in architecture.layers])
        output_fixed, output_times = _sides(space, [layer.outputs for layer in architecture.layers])
        return cls(
            keeps=_keeps(space),
            parents=_parents(space),
            removes=_removes(architecture, space),
            input_fixed=input_fixed,
            input_times=input_times,
            output_fixed=output_fixed,
            output_times=output_times,
            forms=_forms(architecture, space),
            conditions=_conditions(architecture, space),
        )

    def moot(self, choices: Choices) -> NDArray[np.bool_]:
        """Which units' options do not matter because a block around them is dropped. Shape (P, U)."""
        moot = np.zeros(choices.shape, dtype=np.bool_)
        for unit, parent in self.parents:
            moot[:, unit] = moot[:, parent] | (self.keeps[parent, choices[:, parent]] == 0)
        return moot

    def normal(self, choices: Choices) -> Choices:
        """The same decisions with everything inside a dropped block kept, as `Space.normal`. Shape (P, U)."""
        return np.where(self.moot(choices), 0, choices)

    def at(self, choices: Choices) -> Widths:
        """Widths of all layers for `choices` of shape (P, U)."""
        normal, units = self.normal(choices), np.arange(len(self.keeps))
        return self.of_kept(self.keeps[units, normal], self.forms[units, normal])

    def of_kept(self, kept: Array, forms: NDArray[np.intp]) -> Widths:
        """The same for what each unit keeps, and the form it gives, both (P, U)."""
        removers = (kept == 0).astype(np.float64) @ self.removes  # (P, L) how many dropped blocks hold the layer
        return Widths(
            inputs=self.input_fixed + kept @ self.input_times,
            outputs=self.output_fixed + kept @ self.output_times,
            present=((removers == 0) & self._as_decided(kept, forms)).astype(np.float64),
        )

    def _as_decided(self, kept: Array, forms: NDArray[np.intp]) -> NDArray[np.bool_]:
        """(P, L) whether each layer is there in the state that its units' options give, `kept` and `forms` (P, U)."""
        there = np.ones((1, self.removes.shape[1]), dtype=np.bool_)
        for each in self.conditions:
            there = there & each.hold(kept, forms)
        return there

    def decided(self, unit: int) -> NDArray[np.bool_]:
        """(L,) the layers whose presence depends on the state that `unit` gives them."""
        found = np.zeros(self.removes.shape[1], dtype=np.bool_)
        for each in self.conditions:
            found |= each.unit == unit
        return found

    def touched(self, unit: int) -> NDArray[np.intp]:
        """Layers whose widths depend on `unit`."""
        return np.flatnonzero(self.input_times[unit] + self.output_times[unit])

    def shaped(self) -> tuple[int, ...]:
        """Units that decide in which form a layer is there."""
        return tuple(sorted({unit for each in self.conditions for unit in each.unit.tolist()} - {-1}))


def as_array(choice: Choice) -> Choices:
    """One choice as an array of shape (1, U)."""
    return np.asarray(choice, dtype=np.int64).reshape(1, -1)


def _parents(space: Space) -> tuple[tuple[int, int], ...]:
    parents = space.parents()

    def depth(unit: int) -> int:
        parent = parents[unit]
        return 0 if parent is None else 1 + depth(parent)

    pairs = [(unit, parent) for unit, parent in enumerate(parents) if parent is not None]
    return tuple(sorted(pairs, key=lambda pair: depth(pair[0])))


def _conditions(architecture: Architecture, space: Space) -> tuple[_Conditions, ...]:
    index = {name: position for position, name in enumerate(space.names)}
    layers = architecture.layers
    most = max((len(layer.when) for layer in layers), default=0)
    found = []
    for place in range(most):
        here = [layer.when[place] if place < len(layer.when) else None for layer in layers]
        states = [None if each is None else each.state for each in here]
        found.append(_Conditions(
            unit=np.asarray([-1 if each is None else index[each.unit] for each in here], dtype=np.intp),
            form=np.asarray([FORMS.index(state) if isinstance(state, str) else -1 for state in states], dtype=np.intp),
            keep=np.asarray([state if isinstance(state, int) else 0 for state in states], dtype=np.float64),
        ))  # fmt: skip
    return tuple(found)


def _forms(architecture: Architecture, space: Space) -> NDArray[np.intp]:
    """(U, O) the form that each option gives its unit's layer; `float` where the architecture does not know it."""
    known = {(condition.unit, condition.state) for layer in architecture.layers for condition in layer.when}
    rows = [
        [FORMS.index(option.form if (entry.unit.name, option.form) in known else "float") for option in entry.options]
        for entry in space.entries
    ]
    return _padded(rows).astype(np.intp)


def _keeps(space: Space) -> Array:
    return _padded([[option.keep for option in entry.options] for entry in space.entries])


def _padded(rows: Sequence[Sequence[float]]) -> Array:
    """(rows, longest), the last of each row repeated."""
    longest = max((len(row) for row in rows), default=0)
    padded = [[*row, *[row[-1]] * (longest - len(row))] for row in rows]
    return np.asarray(padded, dtype=np.float64).reshape(len(rows), longest)


def _sides(space: Space, widths: list[Width]) -> tuple[Array, Array]:
    """Fixed parts (L,) and, for each unit, how many channels one kept channel stands for (U, L)."""
    index = {name: position for position, name in enumerate(space.names)}
    times = np.zeros((len(index), len(widths)))
    for layer, width in enumerate(widths):
        for name, count in width.terms:
            if name not in index:
                raise ValueError(f"unit {name!r} sets a layer's width but is not in the space")
            times[index[name], layer] += count
    return np.asarray([width.fixed for width in widths], dtype=np.float64), times


def _removes(architecture: Architecture, space: Space) -> Array:
    index = {name: position for position, name in enumerate(space.names)}
    parents = space.parents()
    removes = np.zeros((len(index), len(architecture.layers)))
    for position, layer in enumerate(architecture.layers):
        unit = index.get(layer.block) if layer.block is not None else None
        while unit is not None:
            removes[unit, position] = 1
            unit = parents[unit]
    return removes
