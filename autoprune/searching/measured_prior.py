"""The one-at-a-time prior: what each unit's change alone does to the outputs, really measured.

Each unit is measured at one option in the middle of its range (a block: dropped); its other options follow the shape of
the reconstruction prior. Far too kind to many changes at once, above all to depth, and still the best prior on some
models: one of a portfolio.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from autoprune.bank.stitch import Stitcher
from autoprune.core.space import Space
from autoprune.progress import Progress
from autoprune.searching.scorer import Selection


def one_at_a_time(
    space: Space, stitcher: Stitcher, selection: Selection, *, shape: Sequence[NDArray[np.float64]], progress: Progress
) -> list[NDArray[np.float64]]:
    """Divergence of every option alone, (options,) a unit: measured at one, scaled along `shape` for the others."""
    progress.phase("one at a time", len(space.entries))
    harms = []
    for unit, entry in enumerate(space.entries):
        harm = np.array(shape[unit], dtype=np.float64)
        if len(entry.options) > 1:
            probe = _middle(entry.unit.width, [option.keep for option in entry.options], harm)
            candidate = stitcher.build({entry.unit.name: entry.options[probe]})
            measured = float(selection.divergences(candidate.model).mean())
            harm = harm * (max(measured, 1e-9) / max(float(harm[probe]), 1e-12))
        harms.append(harm)
        progress.step()
    return harms


def _middle(width: int, keeps: Sequence[int], harm: NDArray[np.float64]) -> int:
    """The option that keeps about half, and of those with that width the least harmful one."""
    changed = range(1, len(keeps))
    return min(changed, key=lambda index: (abs(keeps[index] - width / 2), harm[index]))
