"""Exports read by the tools they are for, each in an environment of its own (`tests/tool_environments.sh`)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from resolved_policies import CASES, is_there, resolved_case
from typer.testing import CliRunner

from autoprune.exporters import EXPORTERS, exporter
from autoprune.exporting import write_export

sys.path.insert(0, str(Path(__file__).parent / "tools"))

from make_cases import make
from proofs import PROOFS, Proof, prove

runner = CliRunner()


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cases")


def test_every_exporter_is_proven() -> None:
    assert {proof.exporter for proof in PROOFS} == set(EXPORTERS)
    assert {case for proof in PROOFS for case in proof.cases} == set(CASES)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("proof", "case"),
    [(proof, case) for proof in PROOFS for case in proof.cases],
    ids=lambda value: f"{value.exporter}-{value.script}" if isinstance(value, Proof) else value,
)
def test_the_tool_does_what_the_export_says(proof: Proof, case: str, cases: Path) -> None:
    if not proof.python.exists():
        pytest.skip(f"{proof.python} is not there: tests/tool_environments.sh {proof.environment}")
    if not is_there(case):
        pytest.skip("the folder of real models is not there (AUTOPRUNE_DATA)")
    if not (cases / case).exists():
        make(case, cases / case)
    export = cases / case / "exports" / f"{proof.exporter}-{proof.script}"
    write_export(resolved_case(case), exporter(proof.exporter), export, allow_lossy=True)
    proven = prove(proof, cases / case, export)
    assert proven.versions
    assert proven.agreement
