"""Bytes of foreign files as plain values: JSON, YAML, CSV and lines, all bounded. Nothing here runs what a file says.

Knows texts alone. Pickles are refused: reading one would run it.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator
from typing import Final, NoReturn

from autoprune import yamls
from autoprune.errors import PolicyError
from autoprune.files import SIZE_LIMIT
from autoprune.problems import given

DIGITS: Final = 4000
"""Of a whole number in JSON; Python itself refuses somewhat longer ones."""
CELL: Final = 1000
"""Characters in a cell of a table."""

_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def text_of(content: bytes, *, name: str) -> str:
    """`content` as text. Raises PolicyError for pickles, for what is no UTF-8, and for more than 10 MB."""
    if len(content) > SIZE_LIMIT:
        raise PolicyError(f"{name}: is larger than {SIZE_LIMIT // 1_000_000} MB; allowed: a list of layers")
    if content.startswith(_PICKLES):
        raise PolicyError(
            f"{name}: is no text but, it seems, what torch.save or pickle wrote, and reading that would run code; load "
            "it with the tool that wrote it and write what it holds as JSON: "
            "json.dump(pruner.pruning_history(), open('history.json', 'w'))"
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as bad:
        raise PolicyError(f"{name}: is not UTF-8 text (byte {bad.start}); allowed: a text file") from bad


def data_of(content: bytes, *, name: str) -> object:
    """What a JSON or YAML file holds: dict, list, str, int, float, bool or None, of bounded depth.

    JSON where the name says so, or where it begins like it and the name does not say YAML. Raises PolicyError.
    """
    text = text_of(content, name=name)
    says_yaml = name.lower().endswith((".yaml", ".yml"))
    if name.lower().endswith(".json") or (text.lstrip()[:1] in ("{", "[") and not says_yaml):
        return _json(text, name=name)
    return yamls.parse(text, name=name, error=PolicyError)


def rows_of(content: bytes, *, name: str) -> Iterator[tuple[int, list[str]]]:
    """The rows of a CSV file that are not empty, with their lines. Raises PolicyError for damaged ones."""
    reader = csv.reader(io.StringIO(text_of(content, name=name), newline=""), strict=True)
    try:
        for row in reader:
            cells = [cell.strip() for cell in row]
            if any(len(cell) > CELL for cell in cells):
                raise PolicyError(f"{name}, line {reader.line_num}: a cell is longer than {CELL} characters")
            if any(cells):
                yield reader.line_num, cells
    except csv.Error as bad:
        raise PolicyError(f"{name}, line {reader.line_num}: is not CSV: {bad}") from bad


def lines_of(content: bytes, *, name: str) -> Iterator[tuple[int, list[str]]]:
    """The words of every line that has some and is no comment (`# ...`), with its number. Raises PolicyError."""
    for number, line in enumerate(text_of(content, name=name).split("\n"), 1):
        words = line.split()
        if words and not words[0].startswith("#"):
            yield number, words


def _json(text: str, *, name: str) -> object:
    def pairs(items: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(items)
        if len(found) < len(items):
            (twice, _), *_ = Counter(key for key, _ in items).most_common(1)
            raise PolicyError(f"{name}: the key {twice!r:.80} is given twice; keep one")
        return found

    def whole(digits: str) -> int:
        if len(digits) > DIGITS:
            raise PolicyError(f"{name}: a number of {len(digits)} digits is given; allowed: up to {DIGITS}")
        return int(digits)

    def constant(word: str) -> NoReturn:
        raise PolicyError(f"{name}: {word} is given where a finite number is needed")

    try:
        value: object = json.loads(text, object_pairs_hook=pairs, parse_int=whole, parse_constant=constant)
    except json.JSONDecodeError as bad:
        raise PolicyError(f"{name}, line {bad.lineno}, column {bad.colno}: is not JSON: {bad.msg}") from bad
    except RecursionError:
        raise PolicyError(f"{name}: is nested deeper than {yamls.DEPTH_LIMIT} levels") from None
    _check(value, name=name)
    return value


def _check(value: object, *, name: str) -> None:
    """Raises PolicyError where values are nested too deep, or a text cannot be written down again."""
    level: list[object] = [value]
    for _ in range(yamls.DEPTH_LIMIT + 1):
        for each in level:
            texts = list(each) if isinstance(each, dict) else [each]
            broken = next((text for text in texts if isinstance(text, str) and not yamls.is_unicode(text)), None)
            if broken is not None:
                raise PolicyError(f"{name}: {given(broken)} holds half a character (a lone surrogate)")
        level = [
            inner
            for each in level
            if isinstance(each, dict | list)
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            return
    raise PolicyError(f"{name}: is nested deeper than {yamls.DEPTH_LIMIT} levels")
