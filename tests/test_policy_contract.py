"""The policy as a contract: golden files by every reader, schema and documents that say the same, diff and merge."""

import hashlib
import json
import re
import runpy
from pathlib import Path

import jsonschema
import pytest
import yaml
from records import policy
from resolved_policies import resolved_case, subject_for, written_case
from safetensors.torch import load_file
from typer.testing import CliRunner

from autoprune import cli, policies
from autoprune.core.comparison import difference, merged
from autoprune.core.policy import Policy, UnitDecision
from autoprune.errors import PolicyError
from autoprune.files import policy_text, read_policy, write_policy

ROOT = Path(__file__).parents[1]
GOLDEN = sorted((ROOT / "tests" / "golden").glob("policy-1*.yaml"))
READER = runpy.run_path(str(ROOT / "examples" / "read_policy.py"))
runner = CliRunner()


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_the_small_reader_reads_what_we_read(path: Path) -> None:
    small, whole = READER["read_policy"](path), read_policy(path)
    assert small["units"] == {name: unit.model_dump() for name, unit in whole.units.items()}
    assert whole.units


def test_the_small_reader_is_small_and_needs_pyyaml_alone() -> None:
    text = (ROOT / "examples" / "read_policy.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    assert re.findall(r"^(?:import|from) (\w+)", text, flags=re.MULTILINE) == ["re", "sys", "yaml"]


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_the_schema_takes_what_we_read(path: Path) -> None:
    jsonschema.validate(yaml.safe_load(path.read_text(encoding="utf-8")), Policy.model_json_schema())


@pytest.mark.parametrize(
    "damage",
    [
        "units: {a: {kind: channels, method: l2, keep: 0, of: 4}}",
        "units: {a: {kind: channels, method: l2, keep: 5, of: 4}}",
        "units: {a: {kind: channels, method: l2, keep: 2, of: 4, later: 1}}",
        "units: {a: {kind: spirits, method: l2, keep: 2, of: 4}}",
        "units: {a: {kind: weights, method: l2, keep: 2, of: 4, pattern: often}}",
        "units: {a: {kind: channels, method: l2, keep: true, of: 4}}",
        "units: []",
        "units: {}\nlater: 1",
    ],
)
def test_both_readers_refuse_what_may_mean_something_else(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(f"autoprune: 1\n{damage}\n", encoding="utf-8")
    with pytest.raises(PolicyError):
        read_policy(path)
    with pytest.raises(ValueError, match=r"\w"):
        READER["read_policy"](path)


def test_what_informs_may_grow_and_what_is_others_own_is_kept(tmp_path: Path) -> None:
    later = read_policy(ROOT / "tests" / "golden" / "policy-1-later.yaml")
    assert later.evidence is not None
    assert later.evidence.pruned.macs == 5
    write_policy(tmp_path / "again.yaml", later)
    assert (tmp_path / "again.yaml").read_text(encoding="utf-8").endswith("x-note: kept\n")
    assert read_policy(tmp_path / "again.yaml") == later


def test_every_kind_is_written_as_it_was_read() -> None:
    path = ROOT / "tests" / "golden" / "policy-1-kinds.yaml"
    assert policy_text(read_policy(path)) == path.read_text(encoding="utf-8")


def test_the_documents_example_is_a_policy(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "policy-format.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    decision = block[: block.index("model:")]
    (tmp_path / "example.yaml").write_text(decision, encoding="utf-8")
    assert len(read_policy(tmp_path / "example.yaml").units) == 3
    kinds = re.findall(r"^\| `(\w+)` \|", text[text.index("| kind |") :], flags=re.MULTILINE)
    schema = Policy.model_json_schema()["$defs"]["UnitDecision"]["properties"]
    assert set(schema["kind"]["enum"]) <= set(kinds)
    told = {
        key for cell in re.findall(r"^\| (`.*?) \| ", text, flags=re.MULTILINE) for key in re.findall(r"`(\w+)`", cell)
    }
    assert set(schema) | set(Policy.model_fields) - {"autoprune", "units"} <= told


# ---- diff ----------------------------------------------------------------------------------------------------------


def test_diff_tells_units_and_costs() -> None:
    one = policy()
    units = {**one.units, "layer1.0.conv1": one.units["layer1.0.conv1"].model_copy(update={"keep": 8})}
    del units["layer2.3"]
    units["fc"] = UnitDecision(kind="channels", method="l2", keep=3, of=9)
    found = difference(one, one.model_copy(update={"units": units}))
    assert [(each.unit, each.before and each.before.keep, each.after and each.after.keep) for each in found.units] == [
        ("layer1.0.conv1", 10, 8), ("layer2.3", 0, None), ("fc", None, 3),
    ]  # fmt: skip
    assert found.same == 0
    assert found.before == found.after
    assert found.notes == ()
    assert difference(one, one).units == ()


def test_diff_on_the_command_line(tmp_path: Path) -> None:
    first, second = ROOT / "tests" / "golden" / "policy-1.yaml", tmp_path / "other.yaml"
    other = policy()
    assert other.evidence is not None
    assert other.model is not None
    write_policy(second, other.model_copy(update={
        "units": {}, "model": other.model.model_copy(update={"fingerprint": "sha256:00"}),
        "evidence": other.evidence.model_copy(update={"verified": False}),
    }))  # fmt: skip
    shown = runner.invoke(cli.app, ["diff", str(first), str(second)])
    assert shown.exit_code == 0, shown.output
    assert "2 units differ, 0 are the same" in shown.output
    assert "same architecture with other weights" in shown.output
    assert "numbers of the second are not verified" in shown.output
    told = runner.invoke(cli.app, ["diff", str(first), str(second), "--json"])
    content = json.loads(told.output.splitlines()[-1])["diff"]
    assert [each["unit"] for each in content["units"]] == ["layer1.0.conv1", "layer2.3"]
    assert content["before"]["macs"] == 31350000


# ---- merge ---------------------------------------------------------------------------------------------------------


def narrowed(keep: int) -> UnitDecision:
    return UnitDecision(kind="channels", method="l2", keep=keep, of=16)


DROPPED = UnitDecision(kind="block", method="drop", keep=0, of=1)


def test_merge_joins_what_does_not_conflict() -> None:
    joined = merged({"a": Policy(units={"x": narrowed(3), "y": narrowed(4)}), "b": Policy(units={"x": narrowed(3)})})
    assert joined.units == {"x": narrowed(3), "y": narrowed(4)}


def test_merge_refuses_conflicts_and_tells_all() -> None:
    one = Policy(units={"x": narrowed(3), "b.1": DROPPED}, model=policy().model)
    assert one.model is not None
    other = Policy(
        units={"x": narrowed(4), "b.1.conv": narrowed(2)},
        model=one.model.model_copy(update={"structure": "sha256:ee"}),
    )
    with pytest.raises(PolicyError) as error:
        merged({"one.yaml": one, "other.yaml": other})
    told = str(error.value)
    assert "units.x: one.yaml says l2:3 of 16, other.yaml says l2:4 of 16" in told
    assert "units.b.1.conv: one.yaml drops b.1, other.yaml changes it inside" in told
    assert "model of other layers" in told


def test_merged_policies_keep_their_channels_through_a_transfer(tmp_path: Path) -> None:
    one, other = written_case("plain", tmp_path / "one"), tmp_path / "other.yaml"
    whole = read_policy(one)
    halves = dict(list(whole.units.items())[:2]), dict(list(whole.units.items())[2:])
    side = one.parent / "policy.safetensors"
    (tmp_path / "policy.safetensors").write_bytes(side.read_bytes())
    for path, units in zip((tmp_path / "first.yaml", other), halves, strict=True):
        write_policy(path, whole.model_copy(update={"units": units}))
    policies.merge_policies([tmp_path / "first.yaml", other], tmp_path / "merged.yaml")
    joined = read_policy(tmp_path / "merged.yaml")
    assert joined.units == whole.units
    assert joined.weights == "merged.kept.safetensors"
    kept = load_file(tmp_path / "merged.kept.safetensors")
    assert hashlib.sha256((tmp_path / "merged.kept.safetensors").read_bytes()).hexdigest() == joined.weights_sha256
    for unit in resolved_case("plain").units:
        assert tuple(kept[f"kept/{unit.name}"].tolist()) == unit.kept
    assert subject_for("plain").fingerprint == (joined.model.fingerprint if joined.model else "")
