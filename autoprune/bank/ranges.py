"""On what grids layers can compute in integers: what each reads and makes on calibration data."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from autoprune.model.coupling import is_matrix
from autoprune.model.integers import Arithmetic, Grid
from autoprune.model.observe import watching
from autoprune.nest import first_tensor
from autoprune.progress import Progress

_VALUES = 2**15
"""Values of each tensor and batch that a grid is fitted to."""
_SHRINKS = 20
_PROBE = 4
"""Samples on which it is tried whether negative outputs matter."""


def observe_arithmetic(
    model: nn.Module, layers: Collection[str], *, norms: Mapping[str, str], batches: Sequence[Tensor],
    progress: Progress,
) -> dict[str, Arithmetic]:  # fmt: skip
    """How each of `layers` that is one matrix computes in integers. `norms` maps a layer to the norm that follows it.

    A grid is the one of least squared rounding error. Outputs of which only the positive part is read (a rectifier
    follows) have a grid without negative values, so that the runtime can fuse the rectifier.
    """
    chosen = [name for name in layers if is_matrix(model.get_submodule(name))]
    tails = {name: norms.get(name, name) for name in chosen}
    reads: dict[str, list[Tensor]] = {name: [] for name in chosen}
    makes: dict[str, list[Tensor]] = {tail: [] for tail in tails.values()}
    progress.phase("ranges", len(batches))
    with torch.no_grad():
        for batch in batches:
            read = {name: (lambda x, _y, name=name: reads[name].append(_some(x))) for name in chosen}
            made = {tail: (lambda _x, y, tail=tail: makes[tail].append(_some(y))) for tail in makes}
            with watching(model, read), watching(model, made):
                model(batch)
            progress.step()
        rectified = set(_rectified(model, tuple(makes), batches[0][:_PROBE]))
    return {
        name: Arithmetic(
            tail,
            _grid(torch.cat(reads[name])),
            _grid(torch.cat(makes[tail]).clamp_min(0.0) if tail in rectified else torch.cat(makes[tail])),
        )
        for name, tail in tails.items()
    }


def _some(values: Tensor) -> Tensor:
    """At most so many of the values, evenly picked, and the extremes."""
    flat = values.flatten()
    step = max(1, len(flat) // _VALUES)
    return torch.cat((flat[::step], flat.min()[None], flat.max()[None])).float()


def _grid(values: Tensor) -> Grid:
    """The grid of least squared rounding error: all the way to the extremes, or clipping some."""
    low, high = float(values.min()), float(values.max())
    grids = [Grid.over(low * share, high * share) for share in (1 - 0.5 * step / _SHRINKS for step in range(_SHRINKS))]
    return min(grids, key=lambda grid: float((grid.rounded(values) - values).square().sum()))


def _rectified(model: nn.Module, tails: Sequence[str], example: Tensor) -> Iterator[str]:
    """Those of `tails` whose negative outputs change nothing."""
    wanted = first_tensor(model(example))
    for tail in tails:
        with watching(model, {tail: lambda _x, y: y.clamp_min(0.0)}):
            if torch.equal(first_tensor(model(example)), wanted):
                yield tail
