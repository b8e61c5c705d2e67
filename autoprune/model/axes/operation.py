"""One aten operation as it ran, and what every rule about dimensions needs of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from autoprune.model.axes.expressions import ONE, Axes, Expr

Dims = list[Expr]
Rule = Callable[["Op"], "Dims | list[Dims]"]

HEADS = "heads"
HEAD_WIDTH = "the width of a head"
NORMALISED = "normalised by "
PARTS = "splits it in a fixed number of parts"
SPACE = "it is a position in space or time, not a channel"


@dataclass(frozen=True, slots=True)
class Op:
    """One operation as it ran: its arguments by the names of its schema, and the dimensions of every tensor."""

    name: str
    axes: Axes
    args: Mapping[str, Any]
    tensors: Sequence[Tensor]
    outputs: Sequence[Tensor]
    dims_of: Callable[[Tensor], Dims]
    is_static: Callable[[Tensor], bool]
    module: str
    in_norm: bool
    note_read: Callable[[Tensor, Expr], None]

    def dims(self, argument: str) -> Dims:
        """The dimensions of a tensor argument."""
        return list(self.dims_of(self.args[argument]))

    def place(self, dims: Dims, argument: str = "dim") -> int:
        """A dimension given as an argument, counted from the front."""
        return int(self.args[argument]) % max(len(dims), 1)

    def same(self, *exprs: Expr) -> Expr:
        """Unify dimensions; those of one position aside."""
        wide = [expr for expr in exprs if self.axes.size(expr) > 1]
        for other in wide[1:]:
            self.axes.unify(wide[0], other, reason=self.why("sees it in parts that do not fit together"))
        return wide[0] if wide else ONE

    def read(self, tensor: Tensor, expr: Expr) -> None:
        """Say that a dimension of a tensor is multiplied and summed over: weights there read what it stands for."""
        if self.is_static(tensor):
            self.note_read(tensor, expr)

    def why(self, text: str) -> str:
        """A reason that names the operation and the module that ran it."""
        return f"{self.name} in {self.module or 'the model itself'} {text}"

    def fixed(self, size: int, reason: str = SPACE) -> Expr:
        """A new dimension that stays as it is."""
        return self.axes.fresh(size, pin=reason)
