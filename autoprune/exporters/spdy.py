"""SPDY: a profile, one line a layer, `0.6016 layer1.0.conv1`: its share of zeros, then its name."""

from __future__ import annotations

import math
from typing import Final, final

from autoprune.core.pattern import parse_pattern
from autoprune.errors import PolicyError
from autoprune.exporters.base import EXACT, Aspect, Exported, Grade, LayerCut, Resolved, UnitCut, approximated, dropped
from autoprune.exporters.dense_shape import sparsity_of, zeros_of

LAYERS: Final = ("Conv2d", "Linear")
"""Classes of layers that SPDY finds."""
OWN_ZEROS: Final = dropped("the zeros are those of SPDY's own database")
AS_SHARE: Final = approximated("as a share of zeros")


@final
class SPDY:
    """`profile.txt`, as `adaprune.py load --profile` reads it: an entry of its database for each layer, which is named
    by its sparsity with four digits (`0.6016` is the file `6016.pth`). Takes no comments.

    The format of https://github.com/IST-DASLab/spdy (commit 0702e4b), arXiv:2201.13096.
    """

    __slots__ = ()

    name: str = "spdy"
    tested: tuple[str, ...] = ("spdy 0702e4b, its UnstrDatabase.load_file",)

    def export(self, resolved: Resolved) -> Exported:
        """How many weights of each layer are zero. Raises PolicyError where none are."""
        lines = [f"{_sparsity(resolved, cut)} {cut.name}\n" for cut in resolved.layers.values() if _said(cut)]
        if not any(float(line.split()[0]) for line in lines):
            raise PolicyError(f"{resolved.title}: no weight of it is zero, and an SPDY profile says nothing else")
        units = {unit.name: _sparse(resolved, unit) for unit in resolved.units if unit.decision.pattern}
        grades: dict[Aspect, Grade] = {
            "width": AS_SHARE, "kernel": AS_SHARE, "mask": OWN_ZEROS, "weights": OWN_ZEROS,
            "channels": dropped("a profile names no channels"),
            "depth": dropped("a profile cannot say that a whole layer goes"),
        }  # fmt: skip
        return Exported({"profile.txt": "".join(lines).encode()}, resolved.graded(grades, units=units))


def _said(cut: LayerCut) -> bool:
    return cut.kind in LAYERS and not cut.gone


def _sparsity(resolved: Resolved, cut: LayerCut) -> str:
    """Four digits, and never all of a layer: SPDY puts `0.` before a file's name."""
    return f"{min(sparsity_of(resolved, cut), 0.9999):.4f}"


def _sparse(resolved: Resolved, unit: UnitCut) -> dict[Aspect, Grade]:
    cut = resolved.layers[unit.layers[0]]
    if not _said(cut):
        return {"sparsity": dropped("SPDY prunes Conv2d and Linear layers")}
    if cut.is_cut:
        return {"sparsity": approximated("one share, with what is cut off the layer")}
    if parse_pattern(unit.decision.pattern).kind != "unstructured":
        return {"sparsity": approximated("the share alone: a database has one pattern")}
    same = round(float(_sparsity(resolved, cut)) * math.prod(cut.shape)) == zeros_of(resolved, cut.name)
    return {"sparsity": EXACT if same else approximated("rounded to four digits")}
