"""The script cuts a model and a state dict as ours is, with torch alone."""

import sys
from pathlib import Path

import torch
from common import Case, tell, widths

case, export = Case(sys.argv[1]), Path(sys.argv[2])
sys.path.insert(0, str(export))
script = __import__("prune")

network = script.prune(case.dense())
state = script.prune_state(case.state)
error = case.error(network)
same = [name for name, tensor in case.cut.items() if torch.equal(state[name], tensor)]
assert set(state) == set(case.cut), set(state) ^ set(case.cut)
assert len(same) == len(case.cut), sorted(set(case.cut) - set(same))
assert error < 1e-6, f"{case.name}: outputs differ by {error}"
tell(("torch",), widths=widths(network, case), state=f"{len(same)} of {len(case.cut)} tensors equal", logits=error)
