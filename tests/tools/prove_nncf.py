"""NNCF makes our masks, layer by layer; and calls one after another, each with its own ratio, do not."""

import json
import sys
from pathlib import Path

import nncf
import torch
from common import Case, difference, tell

case, export = Case(sys.argv[1]), Path(sys.argv[2])
sys.path.insert(0, str(export))
loader = __import__("load")
content = json.loads((export / "nncf.json").read_text(encoding="utf-8"))
remarks = json.loads((export / "fidelity.json").read_text(encoding="utf-8"))["remarks"]


def reached(model: torch.nn.Module) -> dict[str, float]:
    """By tensor, the share that NNCF's masks take."""
    return {each.tensor_name: each.pruned_ratio for each in nncf.pruning_statistic(model).pruned_tensors}


def one_after_another() -> str:
    """What is reached by a call for every layer, with its own ratio, that ignores all others, on the dense weights."""
    model, wanted = case.dense(), content["sparsity"]
    for layer, share in wanted.items():
        scope = nncf.IgnoredScope(patterns=[rf"(?!{layer}\.weight$)[^/]+$"])
        mode = nncf.PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL
        model = nncf.prune(model, mode, ratio=share, ignored_scope=scope, examples_inputs=case.inputs[:1])
    found = reached(model)
    right = sum(abs(found[f"{layer}.weight"] - share) < 0.01 for layer, share in wanted.items())
    return f"{right} of {len(wanted)} layers"


def masks_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """By layer; NNCF's hooks are called after tensors, with colons."""
    ours, start, end = {}, "__nncf_hooks.post_hooks.", ":weight__0.0.binary_mask"
    for name, tensor in model.state_dict().items():
        if name.startswith(start) and name.endswith(end):
            ours[name.removeprefix(start).removesuffix(end).replace(":", ".")] = tensor
    return ours


pruned = loader.prune(case.dense(), case.inputs[:1]).eval()
shares, masks = reached(pruned), masks_of(pruned)
assert set(content["sparsity"]) == set(masks), f"{case.name}: other layers than ours"
for layer, share in content["sparsity"].items():
    assert shares[f"{layer}.weight"] == share, f"{case.name}: {layer} has {shares[f'{layer}.weight']}"
aspects = {remark["aspect"] for remark in remarks}
known = [layer for layer in masks if layer in case.masks]  # not those of dropped blocks
for layer in known:
    off = masks[layer] != case.masks[layer]
    # a value that was rounded to zero is masked as well
    assert not (off & ~case.masks[layer]).any(), f"{case.name}: {layer} keeps what we do not"
    assert "bits" in aspects or not off.any(), f"{case.name}: {layer} loses what we keep"
agreement: dict[str, object] = {
    "sparsity": f"{len(shares)} of {len(shares)} layers",
    "masks": f"{len(known)} of {len(known)} layers",
    "calls": one_after_another(),
}
if aspects.isdisjoint(("rank", "resolution", "arithmetic")):
    with torch.no_grad():
        out = pruned(case.inputs)
    agreement["logits"] = difference(out if isinstance(out, torch.Tensor) else out.logits, case.logits)
    assert agreement["logits"] < 1e-5, f"{case.name}: outputs differ by {agreement['logits']}"
tell(("nncf", "torch"), **agreement)
