"""SPDY's profiles: one line a layer, the share of zeros among its weights and its name (arXiv:2201.13096)."""

from __future__ import annotations

from typing import final

from autoprune.importers.base import Found
from autoprune.importers.reading import Reading
from autoprune.importers.texts import lines_of

LINE = "a share of zeros and a layer's name, such as `0.6016 layer1.0.conv1`"


@final
class SPDY:
    """`0.6016 layer1.0.conv1`: what `spdy.py` writes and `adaprune.py load --profile` reads.

    A profile does not say whether its database held single zeros or blocks of four; single ones are what is read.
    """

    __slots__ = ()

    name: str = "spdy"
    about: str = "profiles: one line a layer, `0.6016 layer1.0.conv1`"

    def read(self, content: bytes, *, name: str) -> Found:
        """The zeros of every line. Raises PolicyError."""
        reading = Reading(name)
        for number, words in lines_of(content, name=name):
            where = f"line {number}"
            if len(words) != 2:
                reading.wrong(where, " ".join(words), LINE)
                continue
            layer, share = reading.layer(words[1], where), reading.share(words[0], where)
            if layer is not None and share is not None:
                zeros = reading.zeros(share, where)
                if zeros is not None:
                    reading.want(layer, zeros, where)
        return reading.found()
