"""The run folder: everything durable of a search is in it."""

from __future__ import annotations

from pathlib import Path

from autoprune.errors import RunError
from autoprune.files import cause, write_text


def usable_folder(folder: Path) -> Path:
    """`folder`, made and writable. Raises RunError otherwise."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{folder}: the run folder cannot be made: {cause(error)}") from None
    write_text(folder / "README.txt", _README)
    return folder


_README = """An autoprune run.

bank/           what calibration saw; reused by every budget as long as weights, data and methods are the same
tables/         measured latencies, by target
study.journal   every trial (open with: optuna-dashboard study.journal)
BUDGET/         one folder a budget: policy.yaml, policy.safetensors, outcome.json, report.html
"""
