"""What executes and times a model: one file a runtime, and the table of those that are built in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from autoprune.plugins import resolve
from autoprune.runtimes.base import Runtime
from autoprune.runtimes.onnxruntime import OnnxRuntime
from autoprune.runtimes.torch import TorchRuntime

RUNTIMES: Mapping[str, Callable[[], Runtime]] = MappingProxyType(
    {
        "onnxruntime": OnnxRuntime,
        "torch": TorchRuntime,
    }
)


def runtime(name: str) -> Runtime:
    """The runtime called `name`: built in, of an entry point in group `autoprune.runtimes`, or `module:Name`.

    Raises ConfigError that lists what exists and the nearest match.
    """
    return resolve("runtime", name, RUNTIMES)
