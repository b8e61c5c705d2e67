"""The ONNX file passes ONNX's checker, holds the policy, and gives in ONNX Runtime what our own cut gives."""

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
import yaml
from common import Case, difference, tell

case, export = Case(sys.argv[1]), Path(sys.argv[2])
model = onnx.load(export / "model.onnx")
onnx.checker.check_model(model, full_check=True)
metadata = {entry.key: entry.value for entry in model.metadata_props}
assert yaml.safe_load(metadata["autoprune.policy"]) == yaml.safe_load((case.folder / "policy.yaml").read_text())
kept = json.loads(metadata["autoprune.kept"])

session = onnxruntime.InferenceSession(export / "model.onnx", providers=["CPUExecutionProvider"])
(given,) = session.get_inputs()
found = session.run(None, {given.name: np.asarray(case.inputs)})[0]
error = difference(torch.from_numpy(found), case.logits)
assert error < 1e-4, f"{case.name}: outputs differ by {error}"
tell(("onnx", "onnxruntime"), logits=error, kept=f"{len(kept)} units in the metadata")
