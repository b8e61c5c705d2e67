"""Importers: what other tools wrote, read as wishes about layers. The table below is all there is built in."""

from __future__ import annotations

from collections.abc import Callable

from autoprune import plugins
from autoprune.importers.base import Importer
from autoprune.importers.distiller import Distiller
from autoprune.importers.mmrazor import MMRazor
from autoprune.importers.nni import NNI
from autoprune.importers.plain import Plain
from autoprune.importers.spdy import SPDY
from autoprune.importers.torch_pruning import TorchPruning

IMPORTERS: dict[str, Callable[[], Importer]] = {
    "torch-pruning": TorchPruning,
    "nni": NNI,
    "distiller": Distiller,
    "mmrazor": MMRazor,
    "spdy": SPDY,
    "plain": Plain,
}


def importer(name: str) -> Importer:
    """The importer called `name`: built in, an entry point of `autoprune.importers`, or "module:Name".

    Raises ConfigError that lists what exists.
    """
    return plugins.resolve("importer", name, IMPORTERS)
