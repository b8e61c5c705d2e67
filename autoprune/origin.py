"""What a rebuild script needs to make the unpruned model again, copied beside it: it runs without autoprune.

A user's own file is copied as it is. For other sources the readers of `autoprune.sources`, which need nothing else of
autoprune, are copied with what they read, and a small file calls them.
"""

from __future__ import annotations

from pathlib import Path

import onnx

import autoprune.sources
from autoprune.files import write_bytes, write_text
from autoprune.source import Source, parse_source

READERS = "dense_sources"
PLACES = {"hf": "dense_hf", "onnx": "dense.onnx", "export": "dense.pt2"}
_ENTRY = '''"""The unpruned model, whose weights do not matter: from {text!r}."""

from pathlib import Path

from {readers}.opened import opened

HERE = Path(__file__).resolve().parent


def model():
    """The model in evaluation mode."""
    return opened({kind!r}, {place}, {keywords!r}, pretrained=False)
'''


def copy_origin(text: str, source: Path, folder: Path) -> str:
    """Copy what `text`, a model's source relative to `source`, needs into `folder`. The factory is returned."""
    known = parse_source(text)
    if known.kind == "function":
        own = source / text.partition(":")[0]
        if own.suffix == ".py" and own.is_file():
            write_bytes(folder / own.name, own.read_bytes())
        return text
    for file in sorted(Path(autoprune.sources.__file__).parent.glob("*.py")):
        code = file.read_text(encoding="utf-8").replace("autoprune.sources", READERS)
        write_text(folder / READERS / file.name, code)
    place = _copied(known, source, folder)
    entry = _ENTRY.format(
        text=text, readers=READERS, kind=known.kind, keywords=dict(known.keywords),
        place=repr(known.place) if place is None else f"HERE / {place!r}",
    )  # fmt: skip
    write_text(folder / "dense.py", entry)
    return "dense.py:model"


def _copied(known: Source, source: Path, folder: Path) -> str | None:
    """The folder or file that a source reads, by its name in `folder`; None where it reads none."""
    name = PLACES.get(known.kind)
    if name is not None:
        here = source / known.place
        pairs = ((here / "config.json", folder / name / "config.json"),) if here.is_dir() else ((here, folder / name),)
        for old, new in pairs:  # an ONNX file's weights may be in another file: one holds all here
            write_bytes(new, onnx.load(old).SerializeToString() if known.kind == "onnx" else old.read_bytes())
    return name
