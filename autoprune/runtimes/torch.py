"""Eager PyTorch as a runtime: for models that nothing else takes, and for targets that run torch itself."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import final

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.core.target import Target
from autoprune.core.unit import Form
from autoprune.errors import TargetError
from autoprune.nest import tensors_of
from autoprune.runtimes.base import Array
from autoprune.runtimes.semi_structured import PRECISIONS, use_sparse_kernels
from autoprune.runtimes.shared import cause, whole


@final
class TorchSession:
    """A copy of a model in eval mode, on its device, with its example input."""

    def __init__(self, model: nn.Module, example: Tensor, target: Target) -> None:
        self._device = torch.device(target.device)
        self._precision: torch.dtype = getattr(torch, target.precision)
        self._model = copy.deepcopy(model).to(self._device, self._precision).eval().requires_grad_(False)
        self._example = self._as_asked(example.detach())
        if self._device.type == "cuda" and self._precision in PRECISIONS:
            use_sparse_kernels(self._model)
        self._threads = target.threads

    def run(self, inputs: Array) -> Array:
        """First output for `inputs`."""
        with torch.inference_mode(), _threads(self._threads):
            output = self._model(self._as_asked(torch.from_numpy(inputs)))
        found = tensors_of(output)
        if not found:
            raise TargetError(f"torch: the model returns {type(output).__name__}; it must return a tensor, or some")
        return np.asarray(found[0].float().cpu().numpy(), dtype=np.float32)

    def _as_asked(self, inputs: Tensor) -> Tensor:
        """On the device; floats in the precision asked for."""
        return inputs.to(self._device, self._precision if inputs.is_floating_point() else inputs.dtype)

    def invoke(self) -> None:
        """Run on the example and wait until it is done, result thrown away."""
        with torch.inference_mode(), _threads(self._threads):
            self._model(self._example)
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)


@final
class TorchRuntime:
    """Times and ships models with PyTorch itself."""

    name: str = "torch"

    def version(self) -> str:
        """PyTorch's version."""
        return str(torch.__version__)

    def forms(self, target: Target) -> frozenset[Form]:
        """Eager torch gains nothing from rounded values, and from zeros on a GPU alone: 2 of 4, in 16 bits."""
        everywhere: frozenset[Form] = frozenset({"float", "low_rank"})
        sparse = target.device == "cuda" and getattr(torch, target.precision) in PRECISIONS
        return everywhere | {"2:4"} if sparse else everywhere

    def load(self, model: nn.Module, example: Tensor, target: Target) -> TorchSession:
        """A session for inputs of `example`'s shape, run once. Raises TargetError when the model does not run."""
        if target.device == "cuda" and not torch.cuda.is_available():
            raise TargetError("target: device 'cuda' asked for, but torch sees none; set device: cpu")
        try:
            session = TorchSession(model, example, target)
            session.invoke()
        except Exception as error:
            raise TargetError(
                f"torch: the model does not run on inputs of shape {tuple(example.shape)} ({cause(error)}); check the "
                f"example input"
            ) from error
        return session

    def save(self, model: nn.Module, example: Tensor, path: Path) -> None:
        """Write a `torch.export` archive (.pt2), its batch free where the model allows. Whole or not at all."""
        frozen = copy.deepcopy(model).cpu().eval().requires_grad_(False)
        # torch.export takes a batch of one for a constant, so a free batch is traced with two.
        inputs = torch.cat([example, example]).detach().cpu()
        try:
            with torch.no_grad():
                program = torch.export.export(frozen, (inputs,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
        except Exception as error:
            raise TargetError(f"torch: torch.export cannot take the model ({cause(error)})") from error
        with whole(path) as temporary:
            torch.export.save(program, temporary)


@contextmanager
def _threads(wanted: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if before == wanted:
        yield
        return
    torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(before)
