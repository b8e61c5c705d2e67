"""Peak resident memory of inference, measured where nothing else is: in a fresh process that knows one runtime.

What a machine must really have: the peak while a model is loaded counts as much as that while it runs.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.core.target import Target
from autoprune.errors import TargetError
from autoprune.runtimes.base import Runtime
from autoprune.runtimes.onnxruntime import export
from autoprune.runtimes.shared import cause

REPEATS = 3
_TIMEOUT_S = 600.0
_HERE = Path(__file__).parent
_jit: Any = torch.jit  # has no types


@dataclass(frozen=True, slots=True)
class Resident:
    """Peaks of resident memory: `loading_bytes` and `running_bytes` are above the `runtime_bytes` without a model."""

    runtime_bytes: int
    """Once the runtime is imported, before the model is read: Python and the runtime's own code."""
    loading_bytes: int
    """Until the model is loaded."""
    running_bytes: int
    """After that, during a few inferences."""

    def __post_init__(self) -> None:
        if min(self.runtime_bytes, self.loading_bytes, self.running_bytes) < 0:
            raise ValueError("resident memory is not negative")

    @property
    def model_bytes(self) -> int:
        """The peak above the runtime's own memory."""
        return max(self.loading_bytes, self.running_bytes)

    @property
    def process_bytes(self) -> int:
        """The whole peak."""
        return self.runtime_bytes + self.model_bytes


@dataclass(frozen=True, slots=True)
class _Way:
    """How a runtime's model gets into another process."""

    loader: str
    write: Callable[[nn.Module, Tensor, Path], None]


def resident(
    model: nn.Module, example: Tensor, *, runtime: Runtime, target: Target, repeats: int = REPEATS
) -> Resident:
    """Peak memory of `model` on inputs of `example`'s shape: each number the median of `repeats` fresh processes.

    On Linux. Elsewhere the system tells only the peak of a whole process so far: running cannot be told from loading,
    and what the runtime's import needed for a moment hides as much of the model. Raises TargetError for runtimes and
    devices that are not measured, and with the last line of a process that fails.
    """
    way = _WAYS.get(runtime.name)
    if way is None:
        raise TargetError(f"memory: cannot be measured with runtime {runtime.name!r}, only with {', '.join(_WAYS)}")
    if target.device != "cpu":
        raise TargetError(f"memory: is measured on the CPU only, not on device {target.device!r}; set device: cpu")
    with tempfile.TemporaryDirectory() as name:
        file, inputs = Path(name, "model"), Path(name, "example.npy")
        way.write(model, example, file)
        np.save(inputs, example.detach().cpu().numpy())
        arguments = [str(_HERE / way.loader), str(file), str(inputs), str(target.threads)]
        found = [_in_fresh_process(arguments, runtime.name) for _ in range(repeats)]
    before, loading, running = (
        round(median(peaks[key] for peaks in found)) for key in ("runtime", "loading", "running")
    )
    return Resident(before, max(loading - before, 0), max(running - before, 0))


def _in_fresh_process(arguments: list[str], runtime: str) -> Mapping[str, int]:
    # -P: the folder of the script has files named like the runtimes
    command = [sys.executable, "-P", str(_HERE / "_resident_child.py"), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (subprocess.TimeoutExpired, OSError) as error:
        raise TargetError(
            f"{runtime}: memory could not be measured in a process of its own ({cause(error)})"
        ) from error
    if done.returncode:
        last = next(reversed(done.stderr.split("\n")[:-1]), "") or f"exit status {done.returncode}"
        raise TargetError(f"{runtime}: the model does not run in a process of its own ({last.strip()})")
    return {key: int(value) for key, value in json.loads(done.stdout.splitlines()[-1]).items()}


def _write_onnx(model: nn.Module, example: Tensor, path: Path) -> None:
    path.write_bytes(export(model, example))


def _write_torch(model: nn.Module, example: Tensor, path: Path) -> None:
    """As TorchScript: an archive of `torch.export` imports 80 MB of Python with itself."""
    frozen = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            _jit.trace(frozen, example.detach().cpu(), check_trace=False, strict=False).save(path)
    except Exception as error:
        raise TargetError(f"torch: the model cannot be traced for another process ({cause(error)})") from error


_WAYS: Mapping[str, _Way] = MappingProxyType(
    {"onnxruntime": _Way("_onnx_loader.py", _write_onnx), "torch": _Way("_torch_loader.py", _write_torch)}
)
