"""The policy file: what is written is read back, format 1 is read for ever, damage is told as PolicyError."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from records import policy

from autoprune.core.policy import Evidence, LatencyRecord, Measured, ModelIdentity, Policy, UnitDecision
from autoprune.errors import PolicyError
from autoprune.files import policy_text, read_policy, write_policy

GOLDEN = Path(__file__).parent / "golden" / "policy-1.yaml"

texts = st.text(max_size=20)
counts = st.integers(0, 10**15)
numbers = st.floats(allow_nan=False, allow_infinity=False)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
latencies = st.builds(LatencyRecord, median=numbers, p10=numbers, p90=numbers, runs=counts)
models = st.builds(
    Measured, latency_ms=st.none() | latencies, ratio=st.none() | numbers, macs=counts, params=counts, size_bytes=counts
)
channels = st.integers(1, 4096).flatmap(
    lambda of: st.builds(
        UnitDecision,
        kind=st.just("channels"),
        method=texts,
        keep=st.integers(1, of),
        of=st.just(of),
        compensate=st.sampled_from(["none", "least_squares"]),
    )
)
evidences = st.builds(
    Evidence,
    metric=texts,
    dense=models,
    pruned=models,
    baselines=st.dictionaries(texts, models, max_size=2),
    search=st.dictionaries(texts, plain, max_size=3),
)
identities = st.builds(
    ModelIdentity,
    name=texts,
    fingerprint=texts,
    structure=texts,
    params=counts,
    example=st.lists(st.lists(counts, max_size=4), max_size=2),
)
policies = st.builds(
    Policy,
    units=st.dictionaries(texts, channels, max_size=4),
    model=st.none() | identities,
    budget=st.dictionaries(texts, texts, max_size=2),
    floor=st.dictionaries(texts, numbers, max_size=2),
    evidence=st.none() | evidences,
    weights=st.none() | texts,
)


@given(content=policies)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, content: Policy) -> None:
    path = tmp_path_factory.getbasetemp() / "round.yaml"
    write_policy(path, content)
    assert read_policy(path) == content


def test_golden_file_is_read_and_written_the_same() -> None:
    assert read_policy(GOLDEN) == policy()
    assert policy_text(policy()) == GOLDEN.read_text(encoding="utf-8")


def test_other_yaml_readers_read_the_same() -> None:
    assert Policy.model_validate(yaml.safe_load(GOLDEN.read_text(encoding="utf-8"))) == policy()


def test_one_unit_a_line() -> None:
    lines = policy_text(policy()).splitlines()
    assert lines[:2] == ["autoprune: 1", "units:"]
    assert "  layer2.3: {kind: block, method: drop, keep: 0, of: 1}" in lines
    assert "null" not in policy_text(policy())


DAMAGED = {
    "empty": "",
    "not a mapping": "- a\n- b\n",
    "no version": "units: {}\n",
    "a newer version": "autoprune: 2\nunits: {}\n",
    "a version that is true": "autoprune: true\nunits: {}\n",
    "no units": "autoprune: 1\n",
    "keep above of": "autoprune: 1\nunits:\n  a: {kind: channels, method: l2, keep: 20, of: 16}\n",
    "keep as text": "autoprune: 1\nunits:\n  a: {kind: channels, method: l2, keep: '2', of: 16}\n",
    "no channel left": "autoprune: 1\nunits:\n  a: {kind: channels, method: l2, keep: 0, of: 16}\n",
    "a block of two": "autoprune: 1\nunits:\n  a: {kind: block, method: drop, keep: 0, of: 2}\n",
    "unknown kind": "autoprune: 1\nunits:\n  a: {kind: spirits, method: l2, keep: 1, of: 16}\n",
    "unknown key": "autoprune: 1\nunits: {}\nbuget: {latency: 5ms}\n",
    "not a number": "autoprune: 1\nunits: {}\nfloor: {max_drop: .nan}\nevidence: {dense: {macs: .inf}}\n",
    "a key given twice": "autoprune: 1\nunits: {}\nunits: {}\n",
    "an alias": "autoprune: 1\nunits: &u {}\nbudget: *u\n",
    "a tag": "autoprune: 1\nunits: !!python/object/apply:os.system ['true']\n",
    "a set": "autoprune: 1\nunits: !!set {a, b}\n",
    "a bad integer": "autoprune: !!int x\nunits: {}\n",
    "a huge integer": f"autoprune: {'9' * 5000}\nunits: {{}}\n",
    "a bad timestamp": "autoprune: 2024-99-99\nunits: {}\n",
    "a number as key": "autoprune: 1\nunits: {1: {}}\n",
    "a list as key": "autoprune: 1\nunits: {[1]: {}}\n",
    "two documents": "autoprune: 1\nunits: {}\n---\nautoprune: 1\n",
    "broken brackets": "autoprune: 1\nunits: {a: {kind\n",
    "a bad escape": 'autoprune: 1\nunits: {"\\UFFFFFFFF": {}}\n',
    "a tab": "autoprune: 1\nunits:\n\ta: 1\n",
    "deep nesting": "autoprune: 1\nunits: " + "[" * 3000,
    "a null character": "autoprune: 1\nunits: {a: \0}\n",
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damage_is_a_policy_error_with_the_file(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(DAMAGED[damage], encoding="utf-8")
    with pytest.raises(PolicyError, match=r"policy\.yaml"):
        read_policy(path)


@given(cut=st.integers(0, 3000), noise=st.binary(max_size=6))
def test_any_damage_is_a_policy_error_or_still_a_policy(
    tmp_path_factory: pytest.TempPathFactory, cut: int, noise: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.yaml"
    whole = GOLDEN.read_bytes()
    path.write_bytes(whole[:cut] + noise + whole[cut + len(noise) :])
    try:
        content = read_policy(path)
    except PolicyError:
        return
    assert isinstance(content, Policy)


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(
        "autoprune: 1\nbuget: {}\nunits:\n  conv.1: {kind: channels, method: l2, keep: 20, of: 16, kep: 1}\n"
    )
    with pytest.raises(PolicyError) as error:
        read_policy(path)
    text = str(error.value)
    assert "did you mean 'budget'" in text
    assert "'conv.1'.kep: unknown key; did you mean 'keep'" in text


def test_the_version_error_says_which_are_read(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text("autoprune: 7\nunits: {}\n")
    with pytest.raises(PolicyError, match=r"version 7 is unknown; this version of autoprune reads 1"):
        read_policy(path)


def test_files_that_are_none(tmp_path: Path) -> None:
    big = tmp_path / "big.yaml"
    big.write_bytes(b"#" * 10_000_001)
    for path, text in ((tmp_path / "absent.yaml", "no such file"), (tmp_path, "folder"), (big, "larger than 10 MB")):
        with pytest.raises(PolicyError, match=text):
            read_policy(path)
