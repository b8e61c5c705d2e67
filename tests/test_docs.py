"""What the documents say is true: CONTRIBUTING's method keeps the contract, the published schemas are the real ones."""

import json
import re
import sys
from pathlib import Path
from types import ModuleType

import jsonschema
import pytest

from autoprune.config import json_schema
from autoprune.core.policy import Policy
from autoprune.exporters import exporter
from autoprune.files import read_yaml
from autoprune.testing import ExporterContract, MethodContract, example_resolved

ROOT = Path(__file__).parents[1]
METHOD = "autoprune.methods.outgoing"


def python_blocks(path: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def executed(name: str, source: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`source` as module `name`, importable until the test ends."""
    module = ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(source, name, "exec"), vars(module))
    return module


def test_contributings_method_keeps_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    method, contract = python_blocks(ROOT / "CONTRIBUTING.md")
    executed(METHOD, method, monkeypatch)
    tested = vars(executed("test_outgoing", contract, monkeypatch))["TestOutgoing"]
    assert issubclass(tested, MethodContract)
    checks = [name for name in dir(tested) if name.startswith("test_")]
    assert len(checks) >= 7
    for name in checks:
        getattr(tested(), name)()


def test_the_documents_exporter_keeps_the_contract_and_is_found_by_its_entry_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Installed as a package of one file is: the module, and what its installer says of it."""
    page = ROOT / "docs" / "write-an-exporter.md"
    source, contract = python_blocks(page)
    (entry_points,) = re.findall(r"^```toml\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    installed = tmp_path / "keep_list-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: keep-list\nVersion: 1.0\n")
    table, line = entry_points.strip().splitlines()
    group = table.split('"')[1]
    name, _, value = line.replace('"', "").partition(" = ")
    (installed / "entry_points.txt").write_text(f"[{group}]\n{name} = {value}\n")
    (tmp_path / "keep_list.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    tested = vars(executed("test_keep_list", contract, monkeypatch))["TestKeepList"]
    assert issubclass(tested, ExporterContract)
    checks = [check for check in dir(tested) if check.startswith("test_")]
    assert len(checks) == 5
    for check in checks:
        getattr(tested(), check)()
    found = exporter("keep-list")
    assert type(found).__name__ == "KeepList"
    files = found.export(example_resolved()).files
    assert files == {"keep.csv": b"layer,kept\nfirst,0 2 3 5 7\n"}
    monkeypatch.delitem(sys.modules, "keep_list")


def test_contributing_is_under_a_page() -> None:
    assert len((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()) <= 80


@pytest.mark.parametrize(
    ("name", "schema"),
    [("autoprune.schema.json", json_schema()), ("policy.schema.json", Policy.model_json_schema())],
)
def test_published_schemas_are_the_real_ones(name: str, schema: dict[str, object]) -> None:
    published = json.loads((ROOT / "docs" / name).read_text(encoding="utf-8"))
    assert published == schema, f"docs/{name} is stale; write it anew with `autoprune schema`"
    jsonschema.Draft202012Validator.check_schema(published)


def test_files_in_the_repository_fit_the_published_schemas() -> None:
    pairs = [
        (ROOT / "examples" / "own_model" / "autoprune.yaml", "autoprune.schema.json"),
        (ROOT / "examples" / "ray_cluster" / "autoprune.yaml", "autoprune.schema.json"),
        *((path, "policy.schema.json") for path in (ROOT / "tests" / "golden").glob("policy-1*.yaml")),
    ]
    for path, name in pairs:
        schema = json.loads((ROOT / "docs" / name).read_text(encoding="utf-8"))
        jsonschema.validate(read_yaml(path), schema)


def test_constraints_pin_every_direct_dependency() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    required = set(re.findall(r'"([A-Za-z][\w-]*)(?:\[[\w,]+\])?>=', project)) - {"hatchling", "optuna-dashboard"}
    pinned = set(re.findall(r"^([\w-]+)==[\w.]+$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))
    assert required == pinned
