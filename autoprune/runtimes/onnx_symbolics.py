"""Operations that torch's TorchScript exporter does not know, as ONNX operations of opset 18.

Without them a model falls to the newer exporter, which takes ten times as long. Known to it once
`register` was called.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import onnx
from torch.onnx import symbolic_helper

OPSET = 18


@symbolic_helper.parse_args("v", "is", "v", "f")
def _rms_norm(graph: Any, x: Any, shape: Sequence[int], weight: Any, eps: float | None) -> Any:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimensions (arXiv 1910.07467, equation 4)."""
    axes = graph.op("Constant", value_t=torch.arange(-len(shape), 0))
    least = graph.op("Constant", value_t=torch.tensor(torch.finfo(torch.float32).eps if eps is None else eps))
    mean = graph.op("ReduceMean", graph.op("Mul", x, x), axes, keepdims_i=1)
    normal = graph.op("Div", x, graph.op("Sqrt", graph.op("Add", mean, least)))
    return normal if symbolic_helper._is_none(weight) else graph.op("Mul", normal, weight)


def register() -> None:
    """Make them known to the exporter."""
    onnx.register_custom_op_symbolic("aten::rms_norm", _rms_norm, OPSET)  # type: ignore[attr-defined]
