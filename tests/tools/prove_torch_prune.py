"""torch.nn.utils.prune takes the masks: they are ours, the outputs are our cut model's, and the calls make the same."""

import sys
from pathlib import Path

import torch
import yaml
from common import Case, graded, tell
from torch.nn.utils import prune

case, export = Case(sys.argv[1]), Path(sys.argv[2])
sys.path.insert(0, str(export))
loader = __import__("load")
masks = torch.load(export / "masks.pt", weights_only=True)

model = loader.prune_model(case.dense())
found = {name: buffer.bool() for name, buffer in model.named_buffers() if name.endswith("_mask")}
assert set(found) == {f"{name}_mask" for name in masks}
assert all(torch.equal(found[f"{name}_mask"], mask) for name, mask in masks.items())
ours = {f"{layer}.weight": mask for layer, mask in case.masks.items() if not mask.all()}
assert all(torch.equal(masks[name], mask) for name, mask in ours.items()), "masks differ"

error = case.error(model)
complete = all("dropped" not in levels for levels in graded(export).values())
if complete:
    assert error < 1e-5, f"{case.name}: outputs differ by {error}"

made: dict[str, int] = {}
dense = case.dense()
for call in yaml.safe_load((export / "prune.yaml").read_text(encoding="utf-8")):
    module, name, method = dense.get_submodule(call["module"]), call["name"], call["method"]
    wanted = masks[f"{call['module']}.{name}"]
    if method == "custom":
        prune.custom_from_mask(module, name, wanted)
    elif method == "l1_unstructured":
        prune.l1_unstructured(module, name, amount=call["amount"])
    else:
        prune.ln_structured(module, name, amount=call["amount"], n=call["n"], dim=call["dim"])
    assert torch.equal(module.get_buffer(f"{name}_mask").bool(), wanted), f"{call}: another mask"
    made[method] = made.get(method, 0) + 1
assert sum(made.values()) == len(masks)
tell(
    ("torch",), masks=f"{len(ours)} of {len(ours)} layers", logits=error if complete else "not all can be said",
    calls=made,
)  # fmt: skip
