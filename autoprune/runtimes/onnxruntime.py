"""ONNX Runtime: exports a copy of the model to ONNX in memory and runs it. Never writes to the user's model."""

from __future__ import annotations

import copy
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, cast, final

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.onnx import symbolic_helper
from torch.onnx.utils import register_custom_op_symbolic

from autoprune.core.target import Target
from autoprune.core.unit import Form
from autoprune.errors import TargetError
from autoprune.runtimes._onnx_loader import onnxruntime, session_options
from autoprune.runtimes.base import Array
from autoprune.runtimes.onnx_symbolics import OPSET, register
from autoprune.runtimes.shared import cause, whole

_INPUT, _OUTPUT = "input", "output"


@final
class OnnxSession:
    """A loaded ONNX graph with its example input."""

    def __init__(self, session: Any, example: Array) -> None:
        self._session = session
        self._input = session.get_inputs()[0].name
        self._outputs = [session.get_outputs()[0].name]
        self._feed = {self._input: example}

    def run(self, inputs: Array) -> Array:
        """First output for `inputs`."""
        return np.asarray(self._session.run(self._outputs, {self._input: inputs})[0], dtype=np.float32)

    def invoke(self) -> None:
        """Run on the example, result thrown away."""
        self._session.run(self._outputs, self._feed)


@final
class OnnxRuntime:
    """Times and ships models with ONNX Runtime, all graph optimisations on."""

    name: str = "onnxruntime"

    def version(self) -> str:
        """ONNX Runtime's version."""
        return str(onnxruntime.__version__)

    def forms(self, target: Target) -> frozenset[Form]:
        """Integers on CPUs, where convolutions between QuantizeLinear and DequantizeLinear are fused."""
        everywhere: frozenset[Form] = frozenset({"float", "low_rank"})
        return everywhere | {"integer"} if target.device == "cpu" else everywhere

    def load(self, model: nn.Module, example: Tensor, target: Target) -> OnnxSession:
        """A session for inputs of exactly `example`'s shape. Raises TargetError when export or loading fails."""
        providers = _providers(target)
        if target.precision != "float32":
            raise TargetError(
                f"onnxruntime: precision {target.precision!r} is not offered; use float32, or the runtime 'torch'"
            )
        graph = export(model, example)
        try:
            session = onnxruntime.InferenceSession(graph, session_options(target.threads), providers=providers)
        except Exception as error:
            raise TargetError(f"onnxruntime: cannot load the exported model ({cause(error)})") from error
        return OnnxSession(session, example.detach().cpu().numpy())

    def save(self, model: nn.Module, example: Tensor, path: Path) -> None:
        """Write a checked .onnx file whose batch is free. The file is there whole or not at all."""
        graph = checked(export(model, example, dynamic_batch=True))
        with whole(path) as temporary:
            temporary.write_bytes(graph)


def checked(graph: bytes) -> bytes:
    """`graph`, which is valid ONNX. Raises TargetError where it is not."""
    try:
        onnx.checker.check_model(graph, full_check=True)
    except Exception as error:
        raise TargetError(f"onnxruntime: the exported model is not valid ONNX ({cause(error)})") from error
    return graph


def export(model: nn.Module, example: Tensor, *, dynamic_batch: bool = False) -> bytes:
    """`model` in eval mode as a serialised ONNX graph. Works on a copy. Raises TargetError that names the cause.

    The TorchScript exporter goes first because it is 30 times faster than the newer one, which is asked when it fails.
    """
    register()
    frozen = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    inputs = example.detach().cpu()
    with _quiet():
        try:
            return _export_traced(frozen, inputs, dynamic_batch)
        except Exception as first:  # noqa: BLE001 - exporters raise anything; the other one may still do it
            try:
                return _export_dynamo(frozen, inputs, dynamic_batch)
            except Exception as second:
                raise TargetError(
                    f"onnxruntime: the model cannot be exported to ONNX: {cause(first)} (torch.export: "
                    f"{cause(second)}). Replace what ONNX does not know, or use the runtime 'torch'"
                ) from second


def _antialiased(graph: Any, images: Any, size: Any, *_corners_and_scales: Any) -> Any:
    """Bilinear resizing with antialiasing, which the TorchScript exporter does not know and ONNX does.

    Weights that fall outside the image are left out and the others scaled up, as in torch.
    """

    def constant(values: Any, dtype: torch.dtype) -> Any:
        return graph.op("Constant", value_t=torch.tensor(values, dtype=dtype))

    shape, zero, two = graph.op("Shape", images), constant([0], torch.int64), constant([2], torch.int64)
    leading = graph.op("Slice", shape, zero, two)
    wanted = constant(symbolic_helper._maybe_get_const(size, "is"), torch.int64)
    nothing = constant([], torch.float32)
    return graph.op(
        "Resize", images, nothing, nothing, graph.op("Concat", leading, wanted, axis_i=0), mode_s="linear",
        coordinate_transformation_mode_s="half_pixel", antialias_i=1, exclude_outside_i=1,
    )  # fmt: skip


register_custom_op_symbolic("aten::_upsample_bilinear2d_aa", _antialiased, OPSET)


def _export_traced(model: nn.Module, example: Tensor, dynamic_batch: bool) -> bytes:
    buffer = io.BytesIO()
    torch.onnx.export(
        model,
        (example,),
        cast(Any, buffer),  # takes a buffer, though it declares only paths
        dynamo=False,
        opset_version=OPSET,
        input_names=[_INPUT],
        output_names=[_OUTPUT],
        dynamic_axes={_INPUT: {0: "batch"}, _OUTPUT: {0: "batch"}} if dynamic_batch else None,
    )
    return buffer.getvalue()


def _export_dynamo(model: nn.Module, example: Tensor, dynamic_batch: bool) -> bytes:
    # torch.export takes a batch of one for a constant, so a free batch is traced with two.
    inputs = torch.cat([example, example]) if dynamic_batch else example
    program = torch.onnx.export(
        model,
        (inputs,),
        dynamo=True,
        external_data=False,
        opset_version=OPSET,
        dynamic_shapes=({0: torch.export.Dim.DYNAMIC},) if dynamic_batch else None,
        verbose=False,
    )
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    return bytes(program.model_proto.SerializeToString())


def _providers(target: Target) -> list[str]:
    if target.device == "cpu":
        return ["CPUExecutionProvider"]
    available = onnxruntime.get_available_providers()
    if "CUDAExecutionProvider" not in available:
        raise TargetError(
            f"target: device 'cuda' asked for, but this onnxruntime offers only {', '.join(available)}; install "
            f"onnxruntime-gpu, or set device: cpu"
        )
    return ["CUDAExecutionProvider", "CPUExecutionProvider"]


def _no_log(*_: object) -> None:
    """Print nothing."""


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing of what exporters print: a model that cannot be exported is told once, and by us."""
    sink, level, log = io.StringIO(), logging.root.manager.disable, torch._C._jit_onnx_log
    with warnings.catch_warnings(), redirect_stdout(sink), redirect_stderr(sink):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        torch._C._jit_onnx_log = _no_log  # the exporter turns this log on by a slip, and it goes past sys.stdout
        try:
            yield
        finally:
            logging.disable(level)
            torch._C._jit_onnx_log = log
