"""A strict reader of its own for each text format: what the file says is what our cut model is.

Where a tool cannot be installed, this stands in for it.
"""

import math
import sys
from pathlib import Path

import strict_texts
import torch
from common import Case, tell

case, export = Case(sys.argv[1]), Path(sys.argv[2])
layers = {name: mask for name, mask in case.masks.items() if mask.ndim > 1}
rows = {name: int((~mask.flatten(1).any(1)).sum()) for name, mask in layers.items()}
zeros = {name: int((~mask).sum()) for name, mask in layers.items()}


def read(name: str) -> str:
    return (export / name).read_text(encoding="utf-8")


def spdy() -> str:
    profile = strict_texts.spdy_profile(read("profile.txt"))
    assert all(abs(zeros[name] / layers[name].numel() - share) <= 1e-4 for name, share in profile.items())
    assert {name for name, gone in zeros.items() if gone} <= set(profile)
    return f"{len(profile)} of {len(layers)} layers, their sparsity to four digits"


def evopress() -> str:
    levels = strict_texts.evopress_levels(read("levels.txt"))
    loader = __import__("load")
    database = export / "database"
    loader.unpack(database)
    grid = torch.load(database / "metadata.pth", weights_only=True)
    for name, level in levels.items():
        weight = torch.load(database / name / f"{level}.pth", weights_only=True)
        share = grid["sparsity"] + level * grid["weights_diff"] / weight.numel()
        assert math.isclose(share, zeros[name] / weight.numel(), abs_tol=1e-9)
        assert not (weight != 0)[~layers[name]].any()
    return f"{len(levels)} of {len(levels)} layers, their levels and weights"


def mmrazor() -> str:
    units = strict_texts.mmrazor(read("fix_subnet.json"))
    assert all(case.state[f"{name}.weight"].shape[0] == of for name, (_, of) in units.items())
    assert all(case.shapes[f"{name}.weight"][0] == keep for name, (keep, _) in units.items() if name in rows)
    return f"{len(units)} of {len(units)} units, their widths"


def distiller() -> str:
    schedule = strict_texts.distiller(read("schedule.yaml"))
    for name, share in schedule.filters.items():
        assert name not in rows or math.floor(share * len(layers[name])) == rows[name], name
    for name, share in schedule.levels.items():
        assert int(share * layers[name].numel()) == zeros[name], name
    for name, (share, (height, width)) in schedule.blocks.items():
        assert int(share * layers[name].numel() / (height * width)) * height * width == zeros[name], name
    told = [schedule.filters, schedule.levels, schedule.blocks]
    return f"{sum(map(len, told))} weights, how many of their filters, weights and blocks go"


def amct() -> str:
    said = strict_texts.amct(read("prune.cfg"))
    for name, ratio in said.ratios.items():
        assert name not in rows or round(ratio * len(layers[name])) == rows[name], name
    for name in said.halved:
        mask = case.cut[f"{name}.weight"] != 0  # of the inputs that stay
        groups = mask.movedim(1, -1)[..., : mask.shape[1] // 4 * 4].reshape(-1, 4)
        assert int(groups.sum(1).max()) <= 2, name
    return f"{len(said.ratios)} layers, how many of their outputs go; {len(said.halved)} of 2:4"


FORMATS = {"profile.txt": spdy, "levels.txt": evopress, "fix_subnet.json": mmrazor, "schedule.yaml": distiller,
           "prune.cfg": amct}  # fmt: skip
sys.path.insert(0, str(export))
(check,) = [check for name, check in FORMATS.items() if (export / name).exists()]
tell(("torch",), strict_reader=check())
