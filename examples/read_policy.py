"""Reads an autoprune policy without autoprune: PyYAML alone. docs/policy-format.md says what the parts mean.

python read_policy.py policy.yaml
"""

import re
import sys

import yaml

NARROWED = ("channels", "heads", "ffn")
KINDS = (*NARROWED, "block", "weights", "kernel", "resolution")
TOP = ("autoprune", "units", "model", "target", "budget", "size", "floor", "evidence", "weights", "weights_sha256")
USUAL = {"compensate": "none", "pattern": "", "bits": 32, "rank": 0, "inputs": 32}  # where a key is left out
PATTERN = re.compile(r"(\s*(\d+\s*x\s*\d+\s+)?\d*\.?\d+\s*%\s*|\s*\d+\s*:\s*\d+\s*)?")


def read_policy(path):
    """The policy as a dict; `units` has every key of every unit. Raises ValueError with what is wrong."""
    with open(path, encoding="utf-8") as file:
        policy = yaml.safe_load(file)
    if not isinstance(policy, dict) or policy.get("autoprune") != 1 or not isinstance(policy.get("units"), dict):
        raise ValueError("not a policy of format 1: it begins with `autoprune: 1` and has `units`")
    unknown = [key for key in policy if key not in TOP and not str(key).startswith("x-")]
    if unknown:
        raise ValueError(f"keys of a later version or misspelt: {unknown}")
    policy["units"] = {name: read_unit(name, unit) for name, unit in policy["units"].items()}
    return policy


def read_unit(name, unit):
    """One decision, checked: {kind, method, keep, of, compensate, pattern, bits, rank, inputs}."""
    if not isinstance(unit, dict) or {"kind", "method", "keep", "of"} - set(unit):
        raise ValueError(f"{name}: a unit has kind, method, keep and of")
    unit = USUAL | unit
    if set(unit) - {"kind", "method", "keep", "of", *USUAL}:
        raise ValueError(f"{name}: it says more than format 1 knows, and that may change what it means: {unit}")
    least = 0 if unit["kind"] in ("block", "weights") else 1
    numbers = [unit[key] for key in ("keep", "of", "bits", "rank", "inputs")]
    if not all(type(number) is int for number in numbers) or not least <= unit["keep"] <= unit["of"]:
        raise ValueError(f"{name}: keep and of are whole numbers, {least} <= keep <= of")
    if unit["kind"] not in KINDS or not PATTERN.fullmatch(str(unit["pattern"])):
        raise ValueError(f"{name}: unknown kind or pattern: {unit['kind']}, {unit['pattern']!r}")
    return unit


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("python read_policy.py policy.yaml")
    for unit_name, decision in read_policy(sys.argv[1])["units"].items():
        print(f"{unit_name}: {decision['method']} keeps {decision['keep']} of {decision['of']} ({decision['kind']})")
