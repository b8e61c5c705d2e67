"""Small scripts that are written beside an export: they read it with the tool it is for, and need nothing of ours.

Knows how such a script is kept here (`exporters/scripts/NAME.py`, real Python that is linted). Does not know any tool.
"""

from __future__ import annotations

from importlib.resources import files


def loader(name: str) -> bytes:
    """The script `exporters/scripts/NAME.py`, as it is."""
    return (files("autoprune") / "exporters" / "scripts" / f"{name}.py").read_bytes()
