"""The products that one operation computes, by the dimensions they go over. Knows aten operations, and no modules.

A product of n rows, k summed positions and m columns takes n k m multiply-adds. Everything that multiplies many by
many is one: matrix products, convolutions, and the two inside fused attention (einsum and matmul come apart before).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from autoprune.model.axes.expressions import Expr
from autoprune.model.axes.operation import Op

_OPERANDS = {
    "mm": ("self", "mat2"), "bmm": ("self", "mat2"), "mv": ("self", "vec"), "addmm": ("mat1", "mat2"),
    "baddbmm": ("batch1", "batch2"), "addmv": ("mat", "vec"), "addbmm": ("batch1", "batch2"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Product:
    """One product as it ran: MACs are the sizes of `over`, `made` and all of `rest`, times `times` and `kernel`."""

    module: str
    """The innermost module that ran it; empty for the model itself."""
    name: str
    over: Expr
    """The dimension that is summed over; of a convolution, its inputs in one group."""
    made: Expr
    """The columns; of a convolution, its outputs (transposed, in one group)."""
    rest: tuple[Expr, ...] = ()
    """Rows, and batches of matrices."""
    times: int = 1
    """Positions that a convolution is computed at, over all samples."""
    kernel: int = 1
    """Area of a convolution's window."""


def products_of(op: Op) -> Iterator[Product]:
    """The products of one operation, if it has any."""
    if op.name in _OPERANDS:
        left, right = (op.dims(name) for name in _OPERANDS[op.name])
        made = right[-1] if len(right) > 1 else ((),)
        yield Product(op.module, op.name, left[-1], made, tuple(left[:-1]))
    elif op.name == "convolution":
        inputs, weight, output = op.args["input"], op.dims("weight"), op.outputs[0]
        is_transposed = bool(op.args["transposed"])
        over, made = (weight[0], weight[1]) if is_transposed else (weight[1], weight[0])
        at = inputs if is_transposed else output
        area = math.prod(op.args["weight"].shape[2:])
        yield Product(op.module, op.name, over, made, (), at.shape[0] * math.prod(at.shape[2:]), area)
    elif op.name.startswith("_scaled_dot_product"):
        query, key, value = op.dims("query"), op.dims("key"), op.dims("value")
        yield Product(op.module, "scores", query[-1], key[-2], tuple(query[:-1]))
        yield Product(op.module, "mixed", value[-2], value[-1], tuple(query[:-1]))
