"""PyTorch alone: loads a traced model from its file, in a process that shall hold nothing else.

Run by path: it imports none of this package.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

_jit: Any = torch.jit  # has no types


def load(model: str, example: str, threads: int) -> Callable[[], object]:
    """What runs the TorchScript file `model` once on the .npy file `example`, on the CPU."""
    torch.set_num_threads(threads)
    inputs = torch.from_numpy(np.load(example))
    program = _jit.load(model)

    def run() -> None:
        with torch.inference_mode():
            program(inputs)

    return run
