"""Exporters: a policy as files that another tool reads. The table below is all there is built in."""

from __future__ import annotations

from collections.abc import Callable

from autoprune import plugins
from autoprune.exporters.base import Exporter
from autoprune.exporters.onnx_model import OnnxModel
from autoprune.exporters.python import Python
from autoprune.exporters.torch_pruning import TorchPruning

EXPORTERS: dict[str, Callable[[], Exporter]] = {
    "onnx": OnnxModel,
    "python": Python,
    "torch-pruning": TorchPruning,
}


def exporter(name: str) -> Exporter:
    """The exporter called `name`: built in, an entry point of `autoprune.exporters`, or "module:Name".

    Raises ConfigError that lists what exists.
    """
    return plugins.resolve("exporter", name, EXPORTERS)
