"""The text of scripts that cut a model without autoprune: what is done, as data, and the code that does it."""

from __future__ import annotations

from dataclasses import asdict
from importlib.resources import files

from autoprune.core.surgery import Surgery

FUTURE = "from __future__ import annotations\n"


def script(head: str, surgery: Surgery, body: str) -> str:
    """`head` (docstring and imports), the data, the code of `rebuilding.py`, and `body`, which calls it."""
    parts = [head, _data(surgery), _code("rebuilding.py")]
    if surgery.plain:
        parts.append(_code("model/plain_modules.py"))
    return "\n\n".join(part.strip("\n") for part in (*parts, body)) + "\n"


def _data(surgery: Surgery) -> str:
    """`SURGERY = {...}`, one line an entry."""
    lines = ["SURGERY = {"]
    for key, value in asdict(surgery).items():
        if isinstance(value, dict) and value:
            lines += [f"    {key!r}: {{", *(f"        {name!r}: {item!r}," for name, item in value.items()), "    },"]
        else:
            lines.append(f"    {key!r}: {value!r},")
    return "\n".join((*lines, "}"))


def _code(file: str) -> str:
    """A file of ours that needs torch alone, without its docstring and what a script can have but once, at its top."""
    text = (files("autoprune") / file).read_text(encoding="utf-8")
    return text.split('"""\n\n', maxsplit=1)[1].replace(FUTURE, "")
