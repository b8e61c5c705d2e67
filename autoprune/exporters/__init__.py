"""Exporters: a policy as files that another tool reads. The table below is all there is built in."""

from __future__ import annotations

from collections.abc import Callable

from autoprune import plugins
from autoprune.exporters.aimet import Aimet
from autoprune.exporters.amct import AMCT
from autoprune.exporters.base import Exporter
from autoprune.exporters.distiller import Distiller
from autoprune.exporters.evopress import EvoPress
from autoprune.exporters.llm_compressor import LLMCompressor
from autoprune.exporters.mmrazor import MMRazor
from autoprune.exporters.modelopt import ModelOpt
from autoprune.exporters.neural_compressor import NeuralCompressor
from autoprune.exporters.nncf import Nncf
from autoprune.exporters.nni import NNI, NNI2
from autoprune.exporters.onnx_model import OnnxModel
from autoprune.exporters.python import Python
from autoprune.exporters.spdy import SPDY
from autoprune.exporters.tfmot import TFMOT
from autoprune.exporters.torch_ao import TorchAO
from autoprune.exporters.torch_prune import TorchPrune
from autoprune.exporters.torch_pruning import TorchPruning

EXPORTERS: dict[str, Callable[[], Exporter]] = {
    "torch-pruning": TorchPruning,
    "python": Python,
    "onnx": OnnxModel,
    "torch.nn.utils.prune": TorchPrune,
    "torch.ao.pruning": TorchAO,
    "modelopt": ModelOpt,
    "llm-compressor": LLMCompressor,
    "neural-compressor": NeuralCompressor,
    "nni": NNI,
    "nni2": NNI2,
    "nncf": Nncf,
    "aimet": Aimet,
    "tfmot": TFMOT,
    "spdy": SPDY,
    "evopress": EvoPress,
    "distiller": Distiller,
    "mmrazor": MMRazor,
    "amct": AMCT,
}


def exporter(name: str) -> Exporter:
    """The exporter called `name`: built in, an entry point of `autoprune.exporters`, or "module:Name".

    Raises ConfigError that lists what exists.
    """
    return plugins.resolve("exporter", name, EXPORTERS)
