"""A model's numbers as a row, and rows as a page of Markdown."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

SHARE = 0.5
"""Of the dense model's MACs: what the cut models are to have left."""
MOST_ERROR = 1e-4
"""Of the output's largest value: what ONNX Runtime and torch may differ by."""
FOUND = ("model", "from", "family", "parameters", "MACs", "channels", "heads", "ffn", "blocks", "prunable",
         "what stays, and why")  # fmt: skip
CUT = ("model", "from", "kept", "MACs left", "ONNX Runtime", "masked", "stitched", "latency left", "seconds")


@dataclass
class Row:
    """One model's numbers; `failed` says what is missing and why."""

    name: str
    source: str
    family: str
    trained: bool
    failed: str = ""
    environment: str = ""
    params: int = 0
    macs: int = 0
    units: dict[str, int] = field(default_factory=dict)
    prunable: float = 0.0
    """Share of the MACs that go when every unit keeps its least."""
    refused: list[str] = field(default_factory=list)
    kept: float = 0.0
    """Mean share that units keep in the cut."""
    reached: float = 0.0
    """MACs counted on the cut model over the dense model's."""
    onnx_error: float | None = None
    onnx_failed: str = ""
    mask_error: float | None = None
    stitch_error: float | None = None
    latency: float | None = None
    seconds: float = 0.0


def short(text: str, most: int = 160) -> str:
    line = " ".join(text.split()).replace("|", "/")
    return line if len(line) <= most else f"{line[: most - 3]}..."


# ---- the page ------------------------------------------------------------------------------------------------------


def _merged(rows: Sequence[Row]) -> list[Row]:
    """One row a model: the first of an environment that has what it needs."""
    known: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = row.source, row.name
        if key not in known or known[key].failed.startswith("not here"):
            known[key] = row
    return list(known.values())


def page(given: Sequence[Row]) -> str:
    """The page as Markdown. Where several rows are of one model, the first that ran counts."""
    rows = _merged(given)
    ran = [row for row in rows if not row.failed]
    exact = [row for row in ran if row.onnx_error is not None and row.onnx_error <= MOST_ERROR]
    made_with = "\n".join(sorted({f"* {row.environment}" for row in rows if not row.failed.startswith("not here")}))
    reached = sum(row.reached <= SHARE for row in ran)
    return f"""# Models

Which models are pruned, what of them, and whether the cut is right. Written by `benchmarks/models_page.py`, which says
how; nothing on this page is typed in.

{len(rows)} models: {len(ran)} cut, {reached} of them to half of their MACs or less; {len(exact)} of the cut models do
the same in ONNX Runtime to {MOST_ERROR:.0e} of the largest output. Small configurations and images; random weights and
batch norm statistics, unless marked `trained`. Hugging Face models are asked for their first output alone.

## What is found

Opaque modules (torch's attention, stacked recurrent layers and the like) become plain ones first, as in every search.
Units by kind; the share of the MACs that goes when every unit keeps its least and all blocks stay; what stays, and why,
with how many groups. Inputs and outputs stay in every model and are not listed.

{_table(FOUND, [_found(row) for row in rows], left={0, 1, 2, 10})}

## What is cut

Every unit narrowed alike to {SHARE:.0%} of the MACs by the cost model, or to the least where that is not enough; by l2.
Kept: mean share of a unit. Differences are the largest of any output over the largest output: ONNX Runtime from torch,
the cut model from the dense one whose layers read zeros, and the search's candidate from the cut model. Latency: of the
dense model's on ONNX Runtime, where it was asked for. Seconds: the whole row, on one thread of a shared machine.

{_table(CUT, [_cut(row) for row in rows], left={0, 1})}

## Made with

{made_with}
"""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: Collection[int]) -> str:
    """Columns without any text are left out."""
    used = [index for index in range(len(head)) if any(row[index] for row in rows)]
    line = "|".join("---" if index in left else "---:" for index in used)
    lines = ["| " + " | ".join(row[index] for index in used) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], f"|{line}|", *lines[1:]])


def _found(row: Row) -> list[str]:
    name = f"{row.name} (trained)" if row.trained else row.name
    if row.failed and not row.units:
        return [name, row.source, row.family, _count(row.params), _count(row.macs), *[""] * 5, row.failed]
    kinds = [str(row.units.get(kind, "")) for kind in ("channels", "heads", "ffn", "block")]
    return [name, row.source, row.family, _count(row.params), _count(row.macs), *kinds, f"{row.prunable:.0%}",
            "; ".join(row.refused)]  # fmt: skip


def _cut(row: Row) -> list[str]:
    if row.failed:
        told = f"**{row.failed}**" if row.failed.startswith("wrong") else row.failed.partition(":")[0]
        return [row.name, row.source, told, *[""] * 6]
    onnx = row.onnx_failed or _error(row.onnx_error, MOST_ERROR)
    return [row.name, row.source, f"{row.kept:.0%}", f"{row.reached:.1%}", onnx, _error(row.mask_error, MOST_ERROR),
            _error(row.stitch_error, 1e-6), "" if row.latency is None else f"{row.latency:.0%}",
            f"{row.seconds:.1f}"]  # fmt: skip


def _error(value: float | None, most: float) -> str:
    if value is None:
        return ""
    text = "0" if value == 0 else f"{value:.0e}"
    return text if value <= most else f"**{text}**"


def _count(number: int) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return str(number) if number else ""
