"""Batch norm statistics of a candidate, anchored: only the change against the equally treated dense model is applied.

Stored statistics come from training with augmentation and momentum; recomputing them costs the *dense* model accuracy.
So both models run over the same batches, and the candidate gets `mean + (mean_cand - mean_dense)` and
`var * var_cand / var_dense`, batch by batch while it runs, so that every layer sees what earlier ones will give it
afterwards. A candidate that keeps everything is the dense model exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoprune.model.coupling import NORMS
from autoprune.model.cut import Kept

Statistics = Mapping[str, tuple[Tensor, Tensor]]
"""Norm layer name -> mean and variance of its inputs in one batch, each (channels,)."""
_TINY = 1e-12
_DEAD = 1e-10
"""A channel of less variance says nothing about the change of its variance."""
_FACTORS = (1e-2, 1e2)


@dataclass(frozen=True, slots=True)
class Expected:
    """How the inputs of a norm should differ from the dense: by a mean shift and a variance factor, (channels,).

    A layer that stands in for dropped blocks adds more than it did; the norm after it must not take that for an error.
    """

    mean_shift: Tensor
    variance_factor: Tensor


@dataclass(frozen=True, slots=True)
class Anchor:
    """The dense model's statistics on each of the calibration batches that every candidate is compared with."""

    batches: tuple[Tensor, ...]
    dense: tuple[Statistics, ...]

    @classmethod
    def of(cls, model: nn.Module, batches: Sequence[Tensor]) -> Anchor:
        """Measure the dense model."""
        seen: list[Statistics] = []
        for batch in batches:
            current: dict[str, tuple[Tensor, Tensor]] = {}
            with _before_norms(model, current.__setitem__):
                model(batch)
            seen.append(current)
        return cls(tuple(batches), tuple(seen))

    def mend(
        self, candidate: nn.Module, kept: Mapping[str, Kept], expected: Mapping[str, Expected] | None = None
    ) -> None:
        """Give `candidate` (our own cut copy) statistics that fit its smaller inputs. `kept` is its cut plan's;
        `expected` says by norm layer, before any cut of its outputs, what is meant to differ.
        """
        if not self.dense or not self.dense[0]:
            return
        norms = {name: norm for name, norm in candidate.named_modules() if isinstance(norm, NORMS)}
        stored = {name: (norm.running_mean, norm.running_var) for name, norm in norms.items()}
        anchored: dict[str, list[tuple[Tensor, Tensor]]] = {}
        meant = expected or {}
        for batch, dense in zip(self.batches, self.dense, strict=True):

            def adapt(name: str, seen: tuple[Tensor, Tensor], dense: Statistics = dense) -> None:
                mean, variance = stored[name]
                if name not in dense or mean is None or variance is None:
                    return
                wanted_mean, wanted_variance = _wanted(dense[name], kept.get(name), meant.get(name))
                alive = wanted_variance > _DEAD
                factor = torch.where(alive, seen[1] / wanted_variance.clamp_min(_DEAD), 1.0).clamp(*_FACTORS)
                new = (mean + (seen[0] - wanted_mean), variance * factor)
                anchored.setdefault(name, []).append(new)
                norms[name].running_mean, norms[name].running_var = new

            with _before_norms(candidate, adapt):
                candidate(batch)
        for name, values in anchored.items():
            means, variances = zip(*values, strict=True)
            norms[name].running_mean = torch.stack(means).mean(0)
            norms[name].running_var = torch.stack(variances).mean(0)


def _wanted(dense: tuple[Tensor, Tensor], kept: Kept | None, meant: Expected | None) -> tuple[Tensor, Tensor]:
    """What the candidate's norm should see if nothing were wrong."""
    mean, variance = dense
    if meant is not None:
        mean, variance = mean + meant.mean_shift, variance * meant.variance_factor
    if kept is not None and kept.outputs is not None:
        mean, variance = mean[kept.outputs], variance[kept.outputs]
    return mean, variance


def _thinned(inputs: Tensor) -> Tensor:
    """Every second row and column of large maps: neighbours say the same, and this costs as much as convolutions do."""
    return inputs[:, :, ::2, ::2] if inputs.ndim == 4 and min(inputs.shape[2:]) >= 16 else inputs


@contextmanager
def _before_norms(model: nn.Module, seen: Callable[[str, tuple[Tensor, Tensor]], None]) -> Iterator[None]:
    """Call `seen` with the mean and variance of every norm's inputs just before it runs, without gradients."""
    handles = []

    def attach(name: str, norm: nn.Module) -> None:
        def before(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            # The kernel's own statistics: several times faster here than torch.var_mean.
            seen_at = _thinned(inputs[0])
            _, mean, inverse = torch.native_batch_norm(seen_at, None, None, None, None, True, 0.0, _TINY)
            seen(name, (mean, inverse.square().reciprocal() - _TINY))

        handles.append(norm.register_forward_pre_hook(before))

    for name, norm in model.named_modules():
        if isinstance(norm, NORMS) and norm.running_mean is not None:
            attach(name, norm)
    try:
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
