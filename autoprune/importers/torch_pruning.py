"""Torch-Pruning's histories: which channels went, in the order in which they did; and its ratios by layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

from autoprune.importers.base import Exactly, Found, Share
from autoprune.importers.reading import Reading
from autoprune.importers.texts import data_of
from autoprune.problems import shown

HISTORY, RATIOS = "pruning_history", "pruning_ratio_dict"
ENTRY = "[module name, whether outputs go, [indices]]"
FILE = (
    f"a list of {ENTRY} as pruner.pruning_history() returns it, or a mapping with `{HISTORY}` or `{RATIOS}` of layers"
)
MOST_INDEX = 10_000_000


@final
class TorchPruning:
    """`pruner.pruning_history()` as JSON: indices are those that the layer had left at that time, replayed in order.

    Or the file `pruning.json` of our own exporter, whose `pruning_ratio_dict` speaks for layers without a history.
    """

    __slots__ = ()

    name: str = "torch-pruning"
    about: str = "pruning_history() as JSON, exact channels; or `pruning_ratio_dict` by module name"

    def read(self, content: bytes, *, name: str) -> Found:
        """What every entry removes. Raises PolicyError."""
        reading = Reading(name)
        data = data_of(content, name=name)
        inside = data if isinstance(data, dict) else {}
        history, ratios = data if isinstance(data, list) else inside.get(HISTORY), inside.get(RATIOS)
        if history is None and ratios is None:
            reading.wrong("the file", data, FILE)
        exact: set[str] = set()
        if isinstance(history, list):
            for place, entry in enumerate(history):
                _entry(entry, f"{HISTORY}[{place}]", reading, exact)
        elif history is not None:
            reading.wrong(HISTORY, history, f"a list of {ENTRY}")
        if ratios is not None:
            _ratios(reading.mapping(ratios, RATIOS, "a mapping of layers to shares removed"), reading, exact)
        return reading.found()


def _entry(entry: object, where: str, reading: Reading, exact: set[str]) -> None:
    """One step of a history; the layer is added to `exact`."""
    if not isinstance(entry, list) or len(entry) != 3 or not isinstance(entry[1], bool):
        reading.wrong(where, entry, ENTRY)
        return
    layer, indices = reading.layer(entry[0], f"{where}[0]"), entry[2]
    whole = isinstance(indices, list) and all(type(each) is int and 0 <= each < MOST_INDEX for each in indices)
    if not whole or len(set(indices)) < len(indices):
        reading.wrong(f"{where}[2]", indices, "a list of different indices, 0 or more")
    elif layer is not None and indices:
        exact.add(layer)
        reading.want(layer, Exactly(tuple(indices)), where, side="outputs" if entry[1] else "inputs")


def _ratios(ratios: Mapping[str, object], reading: Reading, exact: set[str]) -> None:
    """Shares of layers that the history does not name."""
    for key, value in ratios.items():
        where = f"{RATIOS}.{shown(key)}"
        layer, share = reading.layer(key, where), reading.share(value, where)
        if layer is not None and share is not None and layer not in exact:
            reading.want(layer, Share(share), where)
