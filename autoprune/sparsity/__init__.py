"""Zeros inside layers: which weights go by which criterion, what the rest becomes, and int8 storage."""

from __future__ import annotations

from collections.abc import Callable

from autoprune import plugins
from autoprune.sparsity.base import Sparsifier
from autoprune.sparsity.magnitude import Magnitude
from autoprune.sparsity.movement import Movement
from autoprune.sparsity.random import Random
from autoprune.sparsity.sparsegpt import SparseGPT
from autoprune.sparsity.wanda import Wanda

SPARSIFIERS: dict[str, Callable[[], Sparsifier]] = {
    "magnitude": Magnitude,
    "wanda": Wanda,
    "sparsegpt": SparseGPT,
    "movement": Movement,
    "random": Random,
}


def sparsifier(name: str) -> Sparsifier:
    """The sparsifier called `name`: built in, an entry point of `autoprune.sparsifiers`, or "module:Name".

    Raises ConfigError that lists what exists.
    """
    return plugins.resolve("sparsifier", name, SPARSIFIERS)
