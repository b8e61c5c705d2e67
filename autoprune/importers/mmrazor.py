"""MMRazor's fixed subnets: how many channels of a unit stay, by a name that holds its first layer and its width."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import final

from autoprune.importers.base import Count, Found
from autoprune.importers.reading import Reading
from autoprune.importers.texts import data_of
from autoprune.problems import shown

NAME = "LAYER_(START, END)_WIDTH, such as `backbone.layer1.0.conv1_(0, 64)_64`"
CHOICE = "a number of channels such as 28, or a share kept such as 0.4375"

_UNIT = re.compile(r"(.+)_\((\d{1,7}), ?(\d{1,7})\)_(\d{1,7})", re.ASCII)


@final
class MMRazor:
    """`{"backbone.layer1.0.conv1_(0, 64)_64": 28}`, as pruning algorithms print it; a `fix_subnet` of a channel mutator
    (`channel_unit_cfg.units`, each with a `choice`); or one of mutables, each with what was `chosen`.

    A whole number is how many channels stay, any other the share that does, rounded down.
    """

    __slots__ = ()

    name: str = "mmrazor"
    about: str = "fix_subnet (JSON or YAML): channels kept by unit, `backbone.layer1.0.conv1_(0, 64)_64: 28`"

    def read(self, content: bytes, *, name: str) -> Found:
        """How many channels of every unit stay. Raises PolicyError."""
        reading = Reading(name)
        data = reading.mapping(data_of(content, name=name), "the file", f"a mapping of {NAME} to {CHOICE}")
        prefix = ""
        for key in ("channel_unit_cfg", "units"):
            if key in data:
                prefix = f"{prefix}{key}."
                data = reading.mapping(data[key], prefix[:-1], f"a mapping of {NAME} to choices")
        for key, value in data.items():
            _unit(key, value, f"{prefix}{shown(key)}", reading)
        return reading.found()


def _unit(key: str, value: object, where: str, reading: Reading) -> None:
    choice, ratios = value, False
    if isinstance(value, dict):
        found = [value[each] for each in ("choice", "chosen") if each in value]
        if len(found) != 1:
            reading.wrong(where, value, f"one `choice` or `chosen`: {CHOICE}")
            return
        choice, ratios = found[0], _by_share(value)
    named = _UNIT.fullmatch(key)
    if named is None or reading.layer(named[1], where) is None:
        reading.leave(where, f"is not {NAME}: a choice between operations, or a unit that the tool named otherwise")
        return
    start, end, width = (int(digits) for digits in named.groups()[1:])
    if (start, end) != (0, width):
        reading.leave(where, f"is about the channels {start} to {end} of a layer alone")
        return
    keep = _kept(choice, width)
    if keep is None:
        reading.wrong(where, choice, f"{CHOICE}, of {width}")
    elif ratios and choice == 1 and isinstance(choice, int):
        reading.leave(where, "1 where shares are given (choice_mode: ratio): one channel, or all of them")
    else:
        reading.want(named[1], Count(keep, width), where)


def _by_share(value: Mapping[str, object]) -> bool:
    """Whether a unit says that its choices are shares."""
    arguments = value.get("init_args")
    return isinstance(arguments, dict) and arguments.get("choice_mode") == "ratio"


def _kept(choice: object, width: int) -> int | None:
    """As `SequentialMutableChannelUnit` reads a choice; None where it is none."""
    if isinstance(choice, bool) or not isinstance(choice, int | float):
        return None
    if isinstance(choice, int):
        return choice if 1 <= choice <= width else None
    return max(1, int(width * choice)) if 0 < choice <= 1 else None
