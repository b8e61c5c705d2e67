"""What a runtime is: it turns a torch model into something that runs, and can be timed, on a target."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from autoprune.core.target import Target
from autoprune.core.unit import Form

Array = NDArray[np.float32]


class Session(Protocol):
    """A loaded model on its runtime, ready to run one fixed input shape."""

    def run(self, inputs: Array) -> Array:
        """Outputs for `inputs`, the first output where there are several. Shape: that of the model's output."""
        ...

    def invoke(self) -> None:
        """Run once on the example input, results thrown away: the thing the clock times."""
        ...


class Runtime(Protocol):
    """Loads models. Stateless: everything about the target comes in."""

    name: str

    def version(self) -> str:
        """The runtime's own version, for the policy's evidence."""
        ...

    def forms(self, target: Target) -> frozenset[Form]:
        """In which forms it runs a layer on `target` otherwise than as floats, or can be given one."""
        ...

    def load(self, model: nn.Module, example: Tensor, target: Target) -> Session:
        """`model` on `target`, for inputs of `example`'s shape. Raises TargetError when it cannot be run there."""
        ...

    def save(self, model: nn.Module, example: Tensor, path: Path) -> None:
        """Write what a user of this runtime would ship."""
        ...
