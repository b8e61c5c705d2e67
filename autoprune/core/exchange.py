"""What was handed to another tool or taken from one, as it is told. A value."""

from __future__ import annotations

from autoprune.core.record import Record


class RemarkRecord(Record):
    """What became of one aspect of one unit's decision: `exact`, `approximated` or `dropped`, and why."""

    unit: str
    aspect: str
    level: str
    why: str = ""


class ExportRecord(Record):
    """An export: the files it wrote by name, what it kept and what not."""

    tool: str
    tested: tuple[str, ...]
    lossy: bool
    remarks: tuple[RemarkRecord, ...]
    lines: tuple[str, ...]
    """The remarks as a person reads them, one for each aspect and reason."""
    files: dict[str, str]


class ImportRecord(Record):
    """An import: the policy (or table) it wrote, how much of the file is in it, and what could not be mapped."""

    tool: str
    written: str
    units: int
    unmapped: tuple[str, ...]
    notes: tuple[str, ...] = ()
