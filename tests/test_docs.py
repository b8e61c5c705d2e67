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
from autoprune.files import read_yaml
from autoprune.testing import MethodContract

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
        (ROOT / "tests" / "golden" / "policy-1.yaml", "policy.schema.json"),
    ]
    for path, name in pairs:
        schema = json.loads((ROOT / "docs" / name).read_text(encoding="utf-8"))
        jsonschema.validate(read_yaml(path), schema)


def test_constraints_pin_every_direct_dependency() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    required = set(re.findall(r'"([A-Za-z][\w-]*)(?:\[[\w,]+\])?>=', project)) - {"hatchling", "optuna-dashboard"}
    pinned = set(re.findall(r"^([\w-]+)==[\w.]+$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))
    assert required == pinned
