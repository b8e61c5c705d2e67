"""Where a model comes from, as one text: a function of the user's, a library's model by name, a folder or a file.

Knows the forms of the text. Opens nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["function", "timm", "torchvision", "hf", "onnx", "export"]
Keyword = int | float | bool | str

ALLOWED = (
    "'file.py:function', 'package.module:function', 'timm:NAME', 'torchvision:NAME', 'hf:FOLDER', 'FILE.onnx' or "
    "'FILE.pt2'"
)
FUNCTION = re.compile(r"(?P<place>.*\.py|[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):(?P<name>[A-Za-z_]\w*)", re.DOTALL)
_ZOO = re.compile(r"(?P<kind>timm|torchvision):(?P<name>[\w.\-/]+)(?:\?(?P<query>.*))?", re.DOTALL)
_PAIR = re.compile(r"(?P<key>[A-Za-z_]\w*)=(?P<value>[^=]+)")
_FILES: dict[str, Kind] = {".onnx": "onnx", ".pt2": "export"}


@dataclass(frozen=True, slots=True)
class Source:
    """`place` is the function, the model's name in its library, or a path; `keywords` are for a library's model."""

    kind: Kind
    place: str
    keywords: tuple[tuple[str, Keyword], ...] = ()

    @property
    def is_path(self) -> bool:
        """Whether `place` is a folder or file of its own."""
        return self.kind in ("hf", "onnx", "export")


def parse_source(text: str) -> Source:
    """The source that `text` names. Raises ValueError that says what is allowed."""
    if named := _ZOO.fullmatch(text):
        kind: Kind = "timm" if named["kind"] == "timm" else "torchvision"
        return Source(kind, named["name"], _keywords(named["query"]))
    if text.startswith("hf:") and len(text) > 3:
        return Source("hf", text.removeprefix("hf:"))
    if FUNCTION.fullmatch(text):
        return Source("function", text)
    kind_of_file = next((kind for ending, kind in _FILES.items() if text.endswith(ending)), None)
    if kind_of_file is None:
        raise ValueError(f"given {text!r}, allowed: {ALLOWED}")
    return Source(kind_of_file, text)


def anchored(text: str, folder: Path) -> str:
    """`text` with its path, if it has one, made relative to `folder`."""
    if text.startswith("hf:"):
        return f"hf:{folder / text.removeprefix('hf:')}"
    is_file = text.endswith(tuple(_FILES)) or ".py:" in text
    return str(folder / text) if is_file else text


def _keywords(query: str | None) -> tuple[tuple[str, Keyword], ...]:
    """`num_classes=10&img_size=64`. Raises ValueError."""
    found: dict[str, Keyword] = {}
    for pair in (query or "").split("&") if query is not None else ():
        match = _PAIR.fullmatch(pair)
        if match is None or match["key"] in found:
            raise ValueError(f"given {pair!r} after '?', allowed: key=value, each key once, joined by '&'")
        found[match["key"]] = _value(match["value"])
    return tuple(found.items())


def _value(text: str) -> Keyword:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
