"""Batch norm statistics of a candidate, anchored: only the change against the equally treated dense model is applied.

Stored statistics come from training with augmentation and momentum; recomputing them costs the *dense* model accuracy.
So dense and candidate are recalibrated alike and the candidate gets `mean + (mean_cand - mean_dense)` and
`var * var_cand / var_dense`. A candidate that keeps everything is the dense model exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoprune.model.coupling import NORMS
from autoprune.model.cut import Kept

Statistics = Mapping[str, tuple[Tensor, Tensor]]
"""Norm layer name -> mean and variance of its inputs, each (channels,)."""


@contextmanager
def _collecting(norms: Mapping[str, nn.Module]) -> Iterator[None]:
    """Norms count plain averages over batches for the time of the block; afterwards they are as they were."""
    saved: list[tuple[nn.Module, Tensor, Tensor, Tensor | None, float | None, bool]] = []
    for norm in norms.values():
        assert isinstance(norm, NORMS)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        saved.append(
            (norm, norm.running_mean, norm.running_var, norm.num_batches_tracked, norm.momentum, norm.training)
        )
        norm.running_mean, norm.running_var = norm.running_mean.clone(), norm.running_var.clone()
        norm.num_batches_tracked = None if norm.num_batches_tracked is None else norm.num_batches_tracked.clone()
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    try:
        yield
    finally:
        for norm, mean, variance, batches, momentum, training in saved:
            assert isinstance(norm, NORMS)
            norm.running_mean, norm.running_var, norm.num_batches_tracked = mean, variance, batches
            norm.momentum = momentum
            norm.train(training)


def norm_statistics(model: nn.Module, batches: Sequence[Tensor]) -> Statistics:
    """Mean and variance at the input of every batch norm, averaged over `batches`. The model stays as it was."""
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, NORMS) and module.running_mean is not None
    }
    if not norms:
        return {}
    with torch.no_grad(), _collecting(norms):
        for batch in batches:
            model(batch)
        return {name: _taken(norm) for name, norm in norms.items()}


def _taken(norm: nn.Module) -> tuple[Tensor, Tensor]:
    assert isinstance(norm, NORMS)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean.clone(), norm.running_var.clone()


@dataclass(frozen=True, slots=True)
class Anchor:
    """The dense model's statistics on the calibration batches that every candidate is compared with."""

    batches: tuple[Tensor, ...]
    dense: Statistics

    @classmethod
    def of(cls, model: nn.Module, batches: Sequence[Tensor]) -> Anchor:
        """Measure the dense model."""
        return cls(tuple(batches), norm_statistics(model, batches))

    def mend(self, candidate: nn.Module, kept: Mapping[str, Kept]) -> None:
        """Give `candidate` (our own cut copy) statistics that fit its smaller inputs. `kept` is its cut plan's."""
        if not self.dense:
            return
        measured = norm_statistics(candidate, self.batches)
        for name, norm in candidate.named_modules():
            if name not in measured or not isinstance(norm, NORMS):
                continue
            dense_mean, dense_variance = self.dense[name]
            outputs = kept[name].outputs if name in kept else None
            if outputs is not None:
                dense_mean, dense_variance = dense_mean[outputs], dense_variance[outputs]
            mean, variance = measured[name]
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.running_mean = norm.running_mean + (mean - dense_mean)
            norm.running_var = norm.running_var * (variance / dense_variance.clamp_min(1e-12)).clamp(0, 1e6)
