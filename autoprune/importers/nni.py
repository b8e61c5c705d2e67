"""NNI's config lists, of versions 3 and 2: which layers, what share of them, in which pieces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, final

from autoprune.importers.base import Amount, Found, Share, Side
from autoprune.importers.reading import Reading
from autoprune.importers.texts import data_of
from autoprune.problems import given, shown

FILE = "a config list: `[{op_names: [layer1.0.conv1], sparse_ratio: 0.42, granularity: out_channel}]`"
LEGACY: Final = ("sparsity", "sparsity_per_layer", "total_sparsity")
OURS: Final = ("l1_norm", "level")
"""Keys of our own export for version 2: a list for each of two pruners, the second one of single weights."""
NEED_THE_MODEL: Final = ("op_names_re", "op_partial_names", "exclude_op_types", "exclude_op_names_re")
PIECES = "default, out_channel, in_channel, or a block such as [4, 1]"
TAKEN = (
    "an entry without granularity is taken as out_channel, as all pruners of NNI do but LevelPruner (single weights) "
    "and MovementPruner of version 2"
)


@dataclass(frozen=True, slots=True)
class _Wish:
    """What an entry asks of each of its layers."""

    amount: Amount
    side: Side
    where: str
    types: tuple[str, ...]
    dims: int | None = None


@final
class NNI:
    """A `config_list` as JSON or YAML. Layers must be named (`op_names`): what else chooses them needs the model.

    Of version 2 the last entry that names a layer counts, and `exclude` takes it out again.
    """

    __slots__ = ()

    name: str = "nni"
    about: str = "config lists (JSON or YAML) of versions 3 and 2, layers by `op_names`"

    def read(self, content: bytes, *, name: str) -> Found:
        """The ratio of every named layer. Raises PolicyError."""
        reading = Reading(name)
        data = data_of(content, name=name)
        inside = data if isinstance(data, dict) else {}
        if any(key in inside for key in OURS):
            lists = {key: inside[key] for key in OURS if key in inside}
        else:
            lists = {"": inside.get("config_list", data)}
        for key, entries in lists.items():
            if isinstance(entries, list):
                _list(entries, key, reading)
            else:
                reading.wrong(key or "the file", entries, FILE)
        return reading.found()


def _list(entries: Sequence[object], key: str, reading: Reading) -> None:
    """One config list, for one pruner."""
    wishes: dict[str, list[_Wish]] = {}
    for place, entry in enumerate(entries):
        where = f"{key}[{place}]"
        asked = reading.mapping(entry, where, "a mapping with op_names and a ratio")
        _entry(asked, where, reading, wishes, single=key == "level")
    for layer, each in wishes.items():
        for wish in each:
            reading.want(layer, wish.amount, wish.where, side=wish.side, types=wish.types, dims=wish.dims)


def _entry(
    entry: Mapping[str, object], where: str, reading: Reading, wishes: dict[str, list[_Wish]], *, single: bool
) -> None:
    """Add what one entry asks to `wishes`, by layer; with `single` weights where it does not say in which pieces."""
    names = reading.layers(entry.get("op_names", []), f"{where}.op_names")
    if "exclude" in entry:
        for layer in names:
            wishes.pop(layer, None)
        if not names or entry.get("op_types"):
            reading.leave(where, f"excludes {_chosen(entry)}: which layers those are, only the model says")
        return
    unclear = [key for key in NEED_THE_MODEL if entry.get(key)]
    if unclear or (entry and not names):
        reading.leave(where, f"chooses layers by {_chosen(entry)}: name them (op_names)")
        return
    spared = {*reading.layers(entry.get("exclude_op_names", []), f"{where}.exclude_op_names")}
    legacy = any(key in entry for key in LEGACY)
    wish = _legacy(entry, names, where, reading, single=single) if legacy else _new(entry, where, reading)
    if wish is None:
        return
    for layer in names:
        if layer in spared:
            continue
        if legacy:
            wishes[layer] = []
        wishes.setdefault(layer, []).append(wish)


def _chosen(entry: Mapping[str, object]) -> str:
    keys = [key for key in ("op_types", *NEED_THE_MODEL) if entry.get(key)]
    return " and ".join(f"{key} {given(entry[key])}" for key in keys) or "nothing"


def _types(entry: Mapping[str, object], where: str, reading: Reading) -> tuple[str, ...]:
    """The classes that are meant; `default` are all with weights."""
    types = reading.layers(entry.get("op_types", []), f"{where}.op_types")
    return () if "default" in types else types


def _legacy(
    entry: Mapping[str, object], names: Sequence[str], where: str, reading: Reading, *, single: bool
) -> _Wish | None:
    """Version 2: sparsity, sparsity_per_layer, or total_sparsity, which means the same for one layer alone."""
    keys = [key for key in LEGACY if key in entry]
    share = reading.share(entry[keys[0]], f"{where}.{keys[0]}")
    if len(keys) > 1:
        reading.wrong(where, " and ".join(keys), "one of them")
        return None
    if keys == ["total_sparsity"] and len(names) > 1:
        reading.leave(where, "total_sparsity is of all its layers together, and leaves each one's to the tool")
        return None
    if share is None:
        return None
    types = _types(entry, where, reading)
    if single:
        zeros = reading.zeros(share, where)
        return None if zeros is None else _Wish(zeros, "outputs", where, types)
    reading.note(TAKEN)
    return _Wish(Share(share, down=True), "outputs", where, types)


def _new(entry: Mapping[str, object], where: str, reading: Reading) -> _Wish | None:
    """Version 3: of the weight's own settings, or of the entry where they say nothing."""
    settings = reading.mapping(entry.get("target_settings", {}), f"{where}.target_settings", "a mapping by target")
    own = reading.mapping(settings.get("weight", {}), f"{where}.target_settings.weight", "a mapping of settings")
    targets = reading.layers(entry.get("target_names", ["weight"]), f"{where}.target_names")
    others = [key for key in (*targets, *settings) if key not in ("weight", "bias")]
    asked = {**entry, **own}
    if others or "weight" not in targets:
        reading.leave(where, f"is about {', '.join(map(shown, others[:3])) or 'a bias'}, not about weights alone")
    elif asked.get("global_group_id") is not None:
        reading.leave(where, "its ratio is of a global group together, and leaves each layer's to the tool")
    elif asked.get("sparse_ratio") is None:
        asks = next((key for key in ("sparse_threshold", "quant_types", "quant_dtype") if key in asked), "no ratio")
        reading.leave(where, f"gives {asks}, where a sparse_ratio can be read alone")
    else:
        return _ratio(asked, where, reading, _types(entry, where, reading))
    return None


def _ratio(asked: Mapping[str, object], where: str, reading: Reading, types: tuple[str, ...]) -> _Wish | None:
    """A ratio, held between its bounds as NNI does, in its pieces."""
    share = reading.share(asked["sparse_ratio"], f"{where}.sparse_ratio")
    least = reading.share(asked.get("min_sparse_ratio") or 0, f"{where}.min_sparse_ratio")
    most = reading.share(asked.get("max_sparse_ratio") or 1, f"{where}.max_sparse_ratio", whole=True)
    if share is None or least is None or most is None:
        return None
    share = min(most, max(least, share))
    pieces = asked.get("granularity", "default")
    if pieces in ("default", "out_channel", None):
        if pieces != "out_channel":
            reading.note(TAKEN)
        return _Wish(Share(share, down=True), "outputs", where, types)
    if pieces == "in_channel":
        return _Wish(Share(share, down=True), "inputs", where, types)
    if not isinstance(pieces, list) or not all(type(side) is int for side in pieces):
        reading.leave(where, f"its granularity is {given(pieces)}; what can be read: {PIECES}")
        return None
    plain = _Wish(Share(share, down=True), "outputs", where, types)
    wish = _blocks(pieces, share, asked.get("internal_metric_block"), plain, reading)
    if wish is None:
        reading.leave(where, f"its granularity is {given(pieces)}; what can be read: {PIECES}")
    return wish


def _blocks(sides: list[int], share: float, parts: object, plain: _Wish, reading: Reading) -> _Wish | None:
    """Single weights (in parts), blocks of outputs by inputs, or runs of outputs; None where it is neither. NNI lays a
    list along a weight's last dimensions, and -1 is all of one.
    """
    where, zeros = plain.where, None
    if not sides or max(sides) > 4096:
        return None
    if all(side == 1 for side in sides):
        if parts is not None and (type(parts) is not int or parts < 1):
            reading.wrong(f"{where}.internal_metric_block", parts, "a whole number, 1 or more")
            return plain
        zeros = reading.zeros(share, where, parts=parts if isinstance(parts, int) and parts > 1 else None)
        return plain if zeros is None else replace(plain, amount=zeros)
    if len(sides) > 1 and sides[0] > 0 and all(side == -1 for side in sides[1:]):
        return replace(plain, amount=Share(share, down=True, run=sides[0]), dims=len(sides))
    if len(sides) > 1 and min(sides) > 0 and all(side == 1 for side in sides[2:]):
        zeros = reading.zeros(share, where, block=(sides[0], sides[1]))
        return plain if zeros is None else replace(plain, amount=zeros, dims=len(sides))
    return None
