"""NNI 2: its pruners reach the shares of the config lists, and with our masks the model does what our own cut does."""

import sys
from pathlib import Path

import torch
from common import Case, difference, tell, widths

case, export = Case(sys.argv[1]), Path(sys.argv[2])
sys.path.insert(0, str(export))
loader = __import__("load")


def first(outputs: object) -> torch.Tensor:
    return outputs if isinstance(outputs, torch.Tensor) else outputs[0]


off, kept, chosen = 0.0, 0, {}
if case.inputs.is_floating_point():  # NNI 2 traces the model to see which layers depend on each other
    chosen = loader.choose(case.dense(), case.inputs[:2])[1]
for entry in (*loader.CONTENT["l1_norm"], *loader.CONTENT["level"]):
    for name in entry["op_names"] if chosen else ():
        share = 1 - chosen[name]["weight"].mean().item()
        off = max(off, abs(share - entry["sparsity_per_layer"]))
for entry in loader.CONTENT["l1_norm"]:
    for name in entry["op_names"] if chosen else ():
        rows = chosen[name]["weight"].flatten(1).amax(1)
        assert int(rows.sum()) == int(case.masks[name].flatten(1).any(1).sum()), f"{name}: another number of channels"
        same = chosen[entry["op_names"][0]]["weight"].flatten(1).amax(1)
        assert torch.equal(rows, same), f"{name}: not its group's channels"
        kept += 1
assert off < 2e-3, f"{case.name}: NNI reaches another share, by {off}"

agreement: dict[str, object] = {"shares": off, "widths chosen": f"{kept} layers"}
whole = case.name not in ("mended", "mixed")  # they drop a block, which NNI 2 cannot
with torch.no_grad():
    model = case.dense()
    pruner = loader.masked(model)
    wrappers = pruner.get_modules_wrapper()
    for name, wanted in case.masks.items():
        if wanted.ndim > 1 and not wanted.all():
            assert torch.equal(wrappers[name].weight_mask.bool(), wanted), f"{name}: another mask"
    error = difference(first(model(case.inputs)), case.logits)
agreement["masked logits"] = error
assert not whole or error < 1e-5, f"{case.name}: masked, the outputs differ by {error}"
if loader.CONTENT["cut"]:
    pruned = loader.cut(case.dense(), case.inputs[:2])
    agreement["cut widths"] = widths(pruned, case)
    with torch.no_grad():
        error = difference(first(pruned(case.inputs)), case.logits)
    assert error < 1e-5, f"{case.name}: cut, the outputs differ by {error}"
    agreement["cut logits"] = error
tell(("nni", "torch"), **agreement)
