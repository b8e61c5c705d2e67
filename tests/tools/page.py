"""The page of tools: versions, what exports keep, approximate and drop, and what each tool's own run said.

    python tests/tools/page.py --rows rows.json [TOOL ...]      # runs proofs, in autoprune's environment
    python tests/tools/page.py --write docs/exports.md rows.json ...

Without files, `--write` runs all proofs first. A tool whose environment is missing has no row, and the page says so.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from make_cases import make
from proofs import PROOFS, Proof, prove
from resolved_policies import is_there, resolved_case

from autoprune.exporters import exporter
from autoprune.exporters.base import MEANING
from autoprune.exporting import write_export

CASES = {
    "plain": "convolutions without norms, one depthwise, and linear layers; channels and features",
    "channels": "a residual network; channels and features, norms recalibrated",
    "resnet20": "a trained ResNet-20 for CIFAR-10; half of all channels by OBS with least squares and a refit",
    "mended": "the residual network; channels by OBS with least squares and a refit, a dropped block",
    "zeros": "the same; 50 %, 70 %, 2:4 and 4x1 50 % zeros in its layers",
    "mixed": "the same; channels, a dropped block, a kernel cut from 5 to 3, zeros, 8 and 4 bits, rank 4",
    "vit": "a vision transformer; heads and features",
    "llm": "a Llama; 50 %, 70 % and 2:4 zeros",
    "llm-bits": "a Llama; integers of 8 to 3 bits, some beside zeros",
    "llm-even": "a Llama; the same features in every layer",
    "llm-channels": "a Llama; grouped heads and features",
}

_HEAD = """# Tools that a policy can be exported to

Written by `python tests/tools/page.py --write docs/exports.md` on {where}: every row was run.
`tests/tool_environments.sh` makes an environment for each tool; there a script (`tests/tools/prove_*.py`) reads the
export with the tool itself and compares what it makes with our own cut of the same model. An export's own
`fidelity.json` says the same of any policy.

**exact**: the tool does what the policy says. **approximated**: something near, the reason beside it. **dropped**: the
format has no place for it. `autoprune export` refuses a lossy export unless `--allow-lossy` is given.

Differences of logits are the largest over 16 samples, relative to our cut's largest logit; of sparsities and shares,
the largest over layers. Where a part of a policy is dropped (a block that cannot be said), logits differ, and the row
shows it.

The policies:

{cases}

| tool | tested with | exact | approximated | dropped |
|---|---|---|---|---|
"""


def rows_of(names: Sequence[str]) -> list[dict[str, Any]]:
    """One row for each proof and case that can be run here."""
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for proof in PROOFS:
            if names and proof.exporter not in names:
                continue
            if not proof.python.exists():
                print(f"{proof.exporter}: {proof.python} is not there", file=sys.stderr)
                continue
            found += [_row(proof, case, Path(scratch)) for case in proof.cases if is_there(case)]
    return found


def _row(proof: Proof, case: str, scratch: Path) -> dict[str, Any]:
    if not (scratch / case).exists():
        make(case, scratch / case)
    export = scratch / case / "exports" / f"{proof.exporter}-{proof.script}"
    write_export(resolved_case(case), exporter(proof.exporter), export, allow_lossy=True)
    proven = prove(proof, scratch / case, export)
    print(f"{proof.exporter} {case}: {dict(proven.agreement)}", file=sys.stderr)
    return {**asdict(proven), "exporter": proof.exporter, "tested": list(exporter(proof.exporter).tested)}


def page(rows: Iterable[Mapping[str, Any]]) -> str:
    """The page in Markdown."""
    by_tool: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        by_tool[row["exporter"]].append(row)
    tools = [proof.exporter for proof in PROOFS if proof.exporter in by_tool]
    cases = "\n".join(f"* `{name}`: {text}" for name, text in CASES.items())
    lines = [_HEAD.format(where=f"{platform.system()} {platform.machine()}, Python 3.11", cases=cases).rstrip()]
    lines += [_summary(name, by_tool[name]) for name in dict.fromkeys(tools)]
    for name in dict.fromkeys(tools):
        lines += ["", f"## {name}", "", *_details(by_tool[name])]
    missing = sorted({proof.exporter for proof in PROOFS} - set(by_tool))
    if missing:
        lines += ["", f"Not run for this page: {', '.join(missing)}."]
    return "\n".join(lines) + "\n"


def _summary(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    found: dict[str, dict[str, None]] = {level: {} for level in ("exact", "approximated", "dropped")}
    for remark in (remark for row in rows for remark in row["remarks"]):
        found[remark["level"]][remark["aspect"]] = None
    cells = [", ".join(found[level]) or "–" for level in found]
    return f"| [{name}](#{name.replace('.', '')}) | {', '.join(_versions(rows))} | {' | '.join(cells)} |"


def _versions(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What ran; where only our own strict reader did, what it was written after."""
    ran = {
        f"{package} {version}": None
        for row in rows
        for package, version in row["versions"].items()
        if row["proof"]["script"] != "prove_texts"
    }
    return list(ran) or [f"a strict reader of ours, after {' and '.join(rows[0]['tested'])}"]


def _details(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["| policy | what the tool's own run said |", "|---|---|"]
    lines += [f"| {row['case']} | {_said(row['agreement'])} |" for row in rows]
    reasons: dict[tuple[str, str, str], dict[str, None]] = defaultdict(dict)
    for row in rows:
        for remark in row["remarks"]:
            if remark["level"] != "exact":
                reasons[remark["level"], remark["aspect"], remark["why"]][row["case"]] = None
    told = [
        f"* {level}: {MEANING[aspect]} ({', '.join(cases)}): {why}"  # type: ignore[index]
        for (level, aspect, why), cases in sorted(reasons.items())
    ]
    return [*lines, *(["", *told] if told else [])]


def _said(agreement: Mapping[str, Any]) -> str:
    return "; ".join(f"{key.replace('_', ' ')}: {_number(value)}" for key, value in agreement.items())


def _number(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_number(each)}" for key, each in value.items())
    if isinstance(value, list):
        return " ".join(map(_number, value)) or "none"
    return f"{value:.2g}" if isinstance(value, float) else str(value).replace("|", "\\|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, help="write what was run to this file, as JSON")
    parser.add_argument("--write", type=Path, help="write the page to this file")
    parser.add_argument("names", nargs="*", help="tools to run; with --write, files of rows")
    given = parser.parse_args()
    if given.rows:
        given.rows.write_text(json.dumps(rows_of(given.names), indent=1), encoding="utf-8")
        return
    rows = [row for name in given.names for row in json.loads(Path(name).read_text(encoding="utf-8"))] or rows_of([])
    text = page(rows)
    if given.write:
        given.write.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
