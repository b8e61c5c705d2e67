"""ModelOpt builds the subnet: our shapes and outputs; and Minitron, as far as its source tells, takes the sizes."""

import ast
import json
import sys
from importlib.util import find_spec
from pathlib import Path

import modelopt.torch.nas as mtn
import torch
import yaml
from common import Case, difference, tell, widths
from modelopt.torch.opt.conversion import ApplyModeError
from modelopt.torch.prune.pruning import PruneModeRegistry

case, export = Case(sys.argv[1]), Path(sys.argv[2])
sys.path.insert(0, str(export))
loader = __import__("load")
content = json.loads((export / "modelopt.json").read_text(encoding="utf-8"))
remarks = json.loads((export / "fidelity.json").read_text(encoding="utf-8"))["remarks"]


def followed() -> str:
    """How many of the widths FastNAS itself selects; the others are set layer by layer."""
    wanted = {name: size for name, size in content["subnet"].items() if name in content["kept"]}
    try:
        model = mtn.convert(case.dense(), mode=[("fastnas", content["fastnas"])], registry=PruneModeRegistry)
    except ApplyModeError:
        return f"0 of {len(wanted)} sides"
    loader.select(model, wanted, content["kept"])
    sizes = mtn.get_subnet_config(model)
    return f"{sum(sizes.get(name) == size for name, size in wanted.items())} of {len(wanted)} sides"


def kept_values(model: torch.nn.Module) -> str:
    """All narrowed weights are the dense ones at the kept positions, in order."""
    dense, names = case.dense(), {name.rpartition(".")[0] for name in content["kept"]}
    for name in names:
        wanted = dense.get_parameter(f"{name}.weight")
        for dim, side in ((0, "out"), (1, "in")):
            for key in (f"{name}.{side}_channels", f"{name}.{side}_features", f"{name}.num_features"):
                if key in content["kept"] and dim < wanted.ndim and wanted.shape[dim] > 1:
                    wanted = wanted.index_select(dim, torch.tensor(content["kept"][key]))
        if kernel := content["subnet"].get(f"{name}.kernel_size"):
            edge = (wanted.shape[-1] - kernel[0]) // 2
            wanted = wanted[..., edge : edge + kernel[0], edge : edge + kernel[0]]
        assert torch.equal(model.get_parameter(f"{name}.weight"), wanted), f"{case.name}: {name} keeps others"
    return f"{len(names)} of {len(names)} layers"


def minitron() -> str:
    """The keys of export_config that the installed Minitron's source names."""
    spec = find_spec("modelopt")
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).parent / "torch/prune/plugins/mcore_minitron.py"
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SUPPORTED_HPARAMS":
            keys = yaml.safe_load((export / "minitron.yaml").read_text(encoding="utf-8"))["export_config"].keys()
            assert keys <= ast.literal_eval(node.value), keys
            return f"{len(keys)} of {len(keys)} keys"
    raise AssertionError("SUPPORTED_HPARAMS is gone from Minitron")


pruned = loader.prune(case.dense()).eval()
agreement: dict[str, object] = {"fastnas": followed()}
lost = {
    (remark["aspect"], remark["unit"].removesuffix(".weight")) for remark in remarks if remark["level"] == "dropped"
}
if lost:
    shapes = {name: tuple(tensor.shape) for name, tensor in pruned.state_dict().items()}
    split = [unit for aspect, unit in lost if aspect == "rank"]
    ours = [name for name in case.shapes if not any(name.startswith(f"{each}.") for each in split)]
    if not any(aspect == "width" for aspect, _ in lost):
        assert all(shapes[name] == case.shapes[name] for name in ours), f"{case.name}: shapes differ"
        agreement["widths"] = f"{len(ours)} of {len(ours)} tensors"
    agreement["channels"] = kept_values(pruned)
    pruned(case.inputs)
else:
    agreement["widths"] = widths(pruned, case)
    with torch.no_grad():
        out = pruned(case.inputs)
    agreement["logits"] = difference(out if isinstance(out, torch.Tensor) else out.logits, case.logits)
    assert agreement["logits"] < 1e-5, f"{case.name}: outputs differ by {agreement['logits']}"
if (export / "minitron.yaml").exists():
    agreement["minitron"] = minitron()
tell(("nvidia-modelopt", "torch"), **agreement)
