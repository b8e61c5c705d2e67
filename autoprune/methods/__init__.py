"""Methods: how to choose which channels of a unit go. The table below is all there is built in."""

from __future__ import annotations

from collections.abc import Callable

from autoprune import plugins
from autoprune.methods.activation import Activation
from autoprune.methods.base import Method
from autoprune.methods.bn_scale import BNScale
from autoprune.methods.fpgm import FPGM
from autoprune.methods.l1 import L1
from autoprune.methods.l2 import L2
from autoprune.methods.mrmr import MRMR
from autoprune.methods.neuron import Neuron
from autoprune.methods.obs import OBS
from autoprune.methods.random import Random
from autoprune.methods.taylor import Taylor

METHODS: dict[str, Callable[[], Method]] = {
    "l1": L1,
    "l2": L2,
    "bn_scale": BNScale,
    "fpgm": FPGM,
    "taylor": Taylor,
    "activation": Activation,
    "neuron": Neuron,
    "mrmr": MRMR,
    "obs": OBS,
    "random": Random,
}


def method(name: str) -> Method:
    """The method called `name`: built in, an entry point of `autoprune.methods`, or "module:Name".

    Raises ConfigError that lists what exists.
    """
    return plugins.resolve("method", name, METHODS)
