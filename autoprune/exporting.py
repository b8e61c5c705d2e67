"""Writing a policy for another tool: refused where something would be lost that nobody agreed to.

Knows exporters by their protocol. Does not know how a policy is laid over its model.
"""

from __future__ import annotations

from pathlib import Path

from autoprune.core.exchange import ExportRecord, RemarkRecord
from autoprune.errors import LossyError, listed
from autoprune.exporters.base import Exported, Exporter, Resolved, lines_of
from autoprune.exporters.texts import about, json_bytes
from autoprune.files import write_bytes

FIDELITY = "fidelity.json"


def write_export(resolved: Resolved, exporter: Exporter, folder: Path, *, allow_lossy: bool) -> ExportRecord:
    """Write the files of `exporter` into `folder`, and `fidelity.json` last: where that is missing, so may others be.

    Raises LossyError with the list where something is approximated or dropped and `allow_lossy` is not set.
    """
    exported = exporter.export(resolved)
    lost = lines_of(exported.fidelity, levels=("approximated", "dropped"))
    if lost and not allow_lossy:
        raise LossyError(
            f"{resolved.title}: {exporter.name} cannot be told all of it:\n{listed(lost)}\n"
            "nothing was written; --allow-lossy writes what can be said"
        )
    record = _record(exporter, exported, folder)
    files = {**exported.files, FIDELITY: json_bytes(_fidelity(resolved, exporter, record))}
    for name, content in files.items():
        write_bytes(folder / name, content)
    return record


def _record(exporter: Exporter, exported: Exported, folder: Path) -> ExportRecord:
    remarks = tuple(
        RemarkRecord(unit=each.unit, aspect=each.aspect, level=each.grade.level, why=each.grade.why)
        for each in exported.fidelity.remarks
    )
    return ExportRecord(
        tool=exporter.name, tested=exporter.tested, remarks=remarks, lossy=exported.fidelity.lossy,
        lines=tuple(lines_of(exported.fidelity, levels=("exact", "approximated", "dropped"))),
        files={name: str(folder / name) for name in (*exported.files, FIDELITY)},
    )  # fmt: skip


def _fidelity(resolved: Resolved, exporter: Exporter, record: ExportRecord) -> dict[str, object]:
    remarks = [each.model_dump(exclude_defaults=True) for each in record.remarks]
    return {**about(resolved, exporter.tested), "tool": record.tool, "lossy": record.lossy, "remarks": remarks}
