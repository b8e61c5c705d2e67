"""The one-at-a-time prior: what each unit's change alone does to the outputs, really measured.

Each unit is measured at one option in the middle of its range (a block: dropped); its other options follow the shape of
the reconstruction prior. Far too kind to many changes at once, above all to depth, and still the best prior on some
models: one of a portfolio.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from autoprune.bank.stitch import Stitcher
from autoprune.core.space import Space
from autoprune.engines.base import EachTensor, one_by_one
from autoprune.progress import Progress
from autoprune.searching.scorer import Selection


def one_at_a_time(
    space: Space, stitcher: Stitcher, selection: Selection, *, shape: Sequence[NDArray[np.float64]],
    progress: Progress, each: EachTensor = one_by_one,
) -> list[NDArray[np.float64]]:  # fmt: skip
    """Divergence of every option alone, (options,) a unit: measured at one, scaled along `shape` for the others. Every
    unit is a piece of work of its own.
    """
    progress.phase("one at a time", len(space.entries))
    changed = [unit for unit, entry in enumerate(space.entries) if len(entry.options) > 1]
    probe = Probe(space, stitcher, selection, shape)
    harms = [np.array(row, dtype=np.float64) for row in shape]
    progress.step(len(space.entries) - len(changed))
    for unit, measured in zip(changed, each(Probe.divergence, probe, changed), strict=True):
        at = max(float(harms[unit][probe.option(unit)]), 1e-12)
        harms[unit] = harms[unit] * (max(float(measured), 1e-9) / at)
        progress.step()
    return harms


@dataclass(frozen=True, slots=True)
class Probe:
    """Changes one unit alone."""

    space: Space
    stitcher: Stitcher
    selection: Selection
    shape: Sequence[NDArray[np.float64]]

    def option(self, unit: int) -> int:
        """The option that a unit is measured at."""
        entry = self.space.entries[unit]
        return _middle(entry.unit.width, [option.keep for option in entry.options], self.shape[unit])

    def divergence(self, unit: int) -> Tensor:
        """What that does to the outputs, on average: (), float64."""
        entry = self.space.entries[unit]
        candidate = self.stitcher.build({entry.unit.name: entry.options[self.option(unit)]})
        return self.selection.divergences(candidate.model).mean()


def _middle(width: int, keeps: Sequence[int], harm: NDArray[np.float64]) -> int:
    """The option that keeps about half, and of those with that width the least harmful one."""
    changed = range(1, len(keeps))
    return min(changed, key=lambda index: (abs(keeps[index] - width / 2), harm[index]))
