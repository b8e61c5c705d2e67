"""AIMET prunes in manual mode: our widths and channels where we say so, and all else as it was."""

import json
import sys
from pathlib import Path

import torch
from common import Case, difference, tell, widths

try:
    import torchvision  # noqa: F401 - AIMET imports it, and uses none of its operators here
except RuntimeError:  # built for another torch: its operators are not there to be described
    missing = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        missing.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

case, export = Case(sys.argv[1]), Path(sys.argv[2])
sys.path.insert(0, str(export))
loader = __import__("load")
content = json.loads((export / "aimet.json").read_text(encoding="utf-8"))
remarks = json.loads((export / "fidelity.json").read_text(encoding="utf-8"))["remarks"]

pruned = loader.prune(case.dense(), case.inputs).eval()
state = pruned.state_dict()
roots = [each["unit"] for each in remarks if (each["aspect"], each["level"]) == ("channels", "exact")]
assert len(roots) == len(content["pairs"])
masked, narrowed = case.dense(), set()
for root, pair in zip(roots, content["pairs"], strict=True):
    reader = masked.get_submodule(pair["module"])
    inputs = case.shapes.get(f"{pair['module']}.weight", (0, len(pair["kept"])))[1]  # a layer that is two: kept
    made = case.shapes[f"{root}.weight"][0]
    assert state[f"{pair['module']}.weight"].shape[1] == inputs == state[f"{root}.weight"].shape[0] == made, root
    reader.weight.data[:, [each for each in range(reader.in_channels) if each not in pair["kept"]]] = 0.0
    narrowed |= {pair["module"], root}
for name, module in masked.named_modules():
    if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)) and name not in narrowed and module.weight.shape[1] > 1:
        assert state[f"{name}.weight"].shape == module.weight.shape, f"{case.name}: {name} was to stay whole"
agreement: dict[str, object] = {"widths": f"{len(roots)} of {len(roots)} pairs"}
with torch.no_grad():
    out = pruned(case.inputs)
    if not (export / "state.pt").exists():  # the dense model without what the pairs take
        agreement["masked"] = difference(out, masked(case.inputs))
        assert agreement["masked"] < 1e-5, f"{case.name}: outputs differ by {agreement['masked']}"
if all(each["level"] == "exact" for each in remarks):
    agreement["widths"] = widths(pruned, case)
    agreement["logits"] = difference(out, case.logits)
    assert agreement["logits"] < 1e-5, f"{case.name}: outputs differ by {agreement['logits']}"
tell(("aimet-torch", "torch"), **agreement)
