"""NNI 3: its pruners reach the shares of the config list, and with our masks the model does what our own cut does."""

import sys
from pathlib import Path

import torch
from common import Case, difference, tell, widths

case, export = Case(sys.argv[1]), Path(sys.argv[2])
sys.path.insert(0, str(export))
loader = __import__("load")


def shares(entry: dict, found: dict) -> float:
    """How far the masks that NNI chose are from the share that one entry asks for, at most."""
    asked = [1 - found[name]["weight"].float().mean().item() for name in entry["op_names"]]
    return max(abs(share - entry["sparse_ratio"]) for share in asked)


def rows(mask: torch.Tensor) -> torch.Tensor:
    return mask.flatten(1).amax(1)


entries = loader.CONTENT["config_list"]
chosen = loader.choose(case.dense())[1]
off = max(shares(entry, chosen) for entry in entries)
assert off < 2e-3, f"{case.name}: NNI reaches another share, by {off}"
kept = 0
for entry in entries:
    first = chosen[entry["op_names"][0]]["weight"]
    for name in entry["op_names"]:
        if entry["granularity"] == "out_channel":
            ours = int(case.masks[name].flatten(1).any(1).sum())
            assert int(rows(chosen[name]["weight"]).sum()) == ours, f"{name}: another number of channels"
            assert torch.equal(rows(chosen[name]["weight"]), rows(first)), f"{name}: not its group's channels"
            kept += 1

agreement: dict[str, object] = {"shares": off, "widths chosen": f"{kept} layers", "groups": f"{len(entries)} entries"}
with torch.no_grad():
    model = case.dense()
    pruner = loader.masked(model)
    for name, wanted in case.masks.items():
        if wanted.ndim > 1 and not wanted.all():
            mask = pruner.get_masks()[name]["weight"].bool()
            assert torch.equal(mask.expand_as(wanted), wanted), f"{name}: another mask"
    outputs = model(case.inputs)
    error = difference(outputs if isinstance(outputs, torch.Tensor) else outputs[0], case.logits)
agreement["masked logits"] = error
whole = case.name != "mixed"  # bits and two-layer forms are not masks
assert not whole or error < 1e-5, f"{case.name}: masked, the outputs differ by {error}"
if loader.CONTENT["cut"]:
    pruned = loader.cut(case.dense(), case.inputs[:2])
    agreement["cut widths"] = widths(pruned, case)
    with torch.no_grad():
        error = difference(pruned(case.inputs), case.logits)
    assert error < 1e-5, f"{case.name}: cut, the outputs differ by {error}"
    agreement["cut logits"] = error
tell(("nni", "torch"), **agreement)
