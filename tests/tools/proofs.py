"""Which tool is tried with which policies: an export, then a script that the tool's own Python runs on it.

Knows environments, scripts and cases. `test_tools.py` runs them as tests, `page.py` writes what they say as a page.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ENVIRONMENTS = Path(os.environ.get("AUTOPRUNE_TOOLS", ROOT / ".ci" / "tools"))
"""Where `tool_environments.sh` puts one virtual environment for each file in `requirements/`."""


@dataclass(frozen=True, slots=True)
class Proof:
    """An exporter, what checks its files, and the cases that it is checked on."""

    exporter: str
    script: str
    environment: str | None
    """None: what autoprune itself is tested in has the tool."""
    cases: tuple[str, ...]

    @property
    def python(self) -> Path:
        """The interpreter that runs the script."""
        return Path(sys.executable) if self.environment is None else ENVIRONMENTS / self.environment / "bin" / "python"


VISION = ("plain", "channels", "mended", "zeros", "mixed", "vit")
DECODERS = ("llm", "llm-bits", "llm-even", "llm-channels")
PROOFS = (
    Proof("torch-pruning", "prove_torch_pruning", "torch-pruning", (*VISION, "resnet20")),
    Proof("python", "prove_python", None, (*VISION, "resnet20", *DECODERS)),
    Proof("onnx", "prove_onnx", None, (*VISION, "resnet20", *DECODERS)),
    Proof("llm-compressor", "prove_llm_compressor", "llm-compressor", ("llm", "llm-bits")),
    Proof("neural-compressor", "prove_neural_compressor", "neural-compressor", (*VISION, "llm")),
    Proof("nni", "prove_nni3", "nni3", (*VISION, "llm", "llm-channels")),
    Proof("nni2", "prove_nni2", "nni2", (*VISION, "llm", "llm-channels")),
    Proof("torch.nn.utils.prune", "prove_torch_prune", "torch-pruning", (*VISION, "llm", "llm-channels")),
    Proof("torch.ao.pruning", "prove_torch_ao", "torch-pruning", (*VISION, "llm", "llm-channels")),
    Proof(
        "modelopt",
        "prove_modelopt",
        "modelopt",
        ("plain", "channels", "mended", "mixed", "vit", "resnet20", "llm-even", "llm-channels"),
    ),
    Proof("nncf", "prove_nncf", "nncf", (*VISION, "llm", "llm-channels")),
    Proof("aimet", "prove_aimet", "aimet", ("plain", "channels", "mended", "mixed")),
    Proof("tfmot", "prove_tfmot", "tfmot", ("zeros", "mixed", "llm")),
    Proof("mmrazor", "prove_mmrazor", "mmrazor", ("plain", "channels", "mended", "mixed", "vit")),
    Proof("mmrazor", "prove_texts", None, ("plain", "channels", "mended", "mixed", "vit")),
    Proof("spdy", "prove_texts", None, VISION),
    Proof("evopress", "prove_texts", None, ("zeros", "vit", "llm", "llm-channels")),
    Proof("distiller", "prove_texts", None, ("plain", "channels", "mended", "zeros", "mixed")),
    Proof("amct", "prove_texts", None, VISION),
)


@dataclass(frozen=True, slots=True)
class Proven:
    """What a tool's own run said."""

    proof: Proof
    case: str
    versions: Mapping[str, str]
    agreement: Mapping[str, object]
    remarks: tuple[Mapping[str, str], ...] = field(default_factory=tuple)
    """The export's fidelity report."""


def prove(proof: Proof, case: Path, export: Path) -> Proven:
    """Run the script of `proof` on an export of the policy in `case`. Raises AssertionError with what it printed."""
    command = [str(proof.python), str(HERE / f"{proof.script}.py"), str(case), str(export)]
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=1800, env={**os.environ, **quiet}
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    said = json.loads(done.stdout.strip().splitlines()[-1])
    report = json.loads((export / "fidelity.json").read_text(encoding="utf-8"))
    return Proven(proof, case.name, said["versions"], said["agreement"], tuple(report["remarks"]))
