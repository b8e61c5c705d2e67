"""torch.ao.pruning takes our masks; its own steps, on linear layers, zero as many weights in the same pattern."""

import json
import sys
from pathlib import Path

import torch
from common import Case, graded, tell
from torch.ao.pruning import WeightNormSparsifier

case, export = Case(sys.argv[1]), Path(sys.argv[2])
sys.path.insert(0, str(export))
loader = __import__("load")
config = json.loads((export / "sparsity.json").read_text(encoding="utf-8"))["config"]

model = case.dense()
sparsifier = loader.prepare(model)
sparsifier.squash_mask()
ours = {f"{layer}.weight": mask for layer, mask in case.masks.items() if mask.ndim > 1 and not mask.all()}
assert {entry["tensor_fqn"] for entry in config} == set(ours)
weights = dict(model.named_parameters())
for name, mask in ours.items():
    assert not (weights[name] != 0)[~mask].any(), f"{name}: a weight is left"
    assert float((weights[name] != 0).float().mean()) == float(mask.float().mean()), f"{name}: another sparsity"
error = case.error(model)
complete = all("dropped" not in levels for levels in graded(export).values())
if complete:
    assert error < 1e-5, f"{case.name}: outputs differ by {error}"

flat = [entry for entry in config if ours[entry["tensor_fqn"]].ndim == 2]
again = case.dense()
own = WeightNormSparsifier()
own.prepare(again, [dict(entry) for entry in flat])
own.step()
zeros = same = 0
for entry in flat:
    mask = again.get_submodule(entry["tensor_fqn"].rpartition(".")[0]).parametrizations.weight[0].mask.bool()
    zeros += int((~mask).sum()) == int((~ours[entry["tensor_fqn"]]).sum())
    same += torch.equal(mask, ours[entry["tensor_fqn"]])
assert zeros == len(flat), f"a step makes as many zeros in {zeros} of {len(flat)} weights alone"
tell(
    ("torch",), masks=f"{len(ours)} of {len(ours)} weights",
    logits=error if complete else "not all can be said",
    own_step=f"{zeros} of {len(flat)} weights with as many zeros, {same} with the same",
)  # fmt: skip
