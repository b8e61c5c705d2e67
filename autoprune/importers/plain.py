"""Ratios by layer, as papers and scripts hand them round: YAML, JSON or CSV."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal, final

from autoprune.errors import PolicyError
from autoprune.importers.base import Dropped, Found, Share
from autoprune.importers.reading import Reading
from autoprune.importers.texts import data_of, rows_of
from autoprune.problems import shown

RatioIs = Literal["removed", "kept"]
HEADER = "a first row `layer,ratio`"
MAPPING = "a mapping of layers to ratios, such as `layer1.0.conv1: 0.42` or `layer1.0.conv1: 42%`"


@final
class Plain:
    """`layer1.0.conv1: 0.42` (or `42%`): channels of its outputs; of a name that ends in `.weight`, weights inside.

    A ratio is what goes, as with all tools, or what stays. All of something (1.0) is a dropped block.
    """

    __slots__ = ("_kept",)

    name: str = "plain"
    about: str = "ratios by layer: YAML or JSON `layer: ratio`, or CSV with the header `layer,ratio`"

    def __init__(self, ratio_is: RatioIs = "removed") -> None:
        self._kept = ratio_is == "kept"

    def read(self, content: bytes, *, name: str) -> Found:
        """The ratio of every layer. Raises PolicyError."""
        reading = Reading(name)
        for layer, ratio, where in _pairs(content, reading, name=name):
            share = reading.share(ratio, where, whole=True)
            known = reading.layer(layer, where)
            if share is None or known is None:
                continue
            removed = 1 - share if self._kept else share
            if removed >= 1:
                reading.want(known, Dropped(), where)
            elif known.endswith(".weight"):
                zeros = reading.zeros(removed, where)
                if zeros is not None:
                    reading.want(known, zeros, where)
            else:
                reading.want(known, Share(removed), where)
        return reading.found()


def _pairs(content: bytes, reading: Reading, *, name: str) -> Iterable[tuple[object, object, str]]:
    """Layer, ratio and place."""
    if name.lower().endswith(".csv"):
        return _rows(content, reading, name=name)
    data = reading.mapping(data_of(content, name=name), "the file", MAPPING)
    return [(layer, ratio, shown(layer)) for layer, ratio in data.items()]


def _rows(content: bytes, reading: Reading, *, name: str) -> Iterator[tuple[object, object, str]]:
    rows = rows_of(content, name=name)
    line, header = next(rows, (1, []))
    if [cell.lower() for cell in header] != ["layer", "ratio"]:
        raise PolicyError(f"{name}, line {line}: given {','.join(header)[:80]!r}, allowed: {HEADER}")
    for number, cells in rows:
        if len(cells) == 2:
            yield cells[0], cells[1], f"line {number}"
        else:
            reading.wrong(f"line {number}", ",".join(cells), "a layer and a ratio, such as `layer1.0.conv1,0.42`")
