"""Torch-Pruning replays the history: the same shapes, and the same outputs as our own cut."""

import sys
from pathlib import Path

from common import Case, graded, tell, widths

case, export = Case(sys.argv[1]), Path(sys.argv[2])
sys.path.insert(0, str(export))
loader = __import__("load")

pruned = loader.prune(case.dense(), case.inputs[:1])
agreement: dict[str, object] = {}
if all(levels == {"exact"} for levels in graded(export).values()):
    agreement["widths"] = widths(pruned, case)
    agreement["logits"] = error = case.error(pruned)
    assert error < 1e-5, f"{case.name}: outputs differ by {error}"
else:  # a dropped block is still there, and whole
    shapes = {name: tuple(tensor.shape) for name, tensor in pruned.state_dict().items()}
    alike = [name for name, shape in case.shapes.items() if shapes.get(name) == shape]
    agreement["widths"] = f"{len(alike)} of {len(case.shapes)} tensors"
tell(("torch-pruning", "torch"), **agreement)
