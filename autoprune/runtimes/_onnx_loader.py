"""ONNX Runtime without PyTorch: how a session is set up, and a model loaded from its file.

Imported by the runtime, and run by path in a process that shall hold nothing else: it imports none of this package.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime as _onnxruntime

onnxruntime: Any = _onnxruntime  # it declares none of its names as exported


def session_options(threads: int) -> Any:
    """What every session of ours runs with: all graph optimisations, `threads` threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    # Sessions are timed in turns: the threads of one must not spin into the time of the next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def load(model: str, example: str, threads: int) -> Callable[[], object]:
    """What runs the .onnx file `model` once on the .npy file `example`, on the CPU."""
    feed = np.load(example)
    session = onnxruntime.InferenceSession(model, session_options(threads), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda: session.run(None, {name: feed})
