"""A script that applies the policy to a model or a state dict: Python and torch, nothing else."""

from __future__ import annotations

from dataclasses import asdict
from typing import final

import torch

from autoprune.exporters.base import EXACT, Aspect, Exported, Grade, Resolved, approximated
from autoprune.exporters.script_text import FUTURE, script
from autoprune.exporters.texts import about, state_bytes
from autoprune.rebuilding import sliced

_HEAD = '''"""Prunes a model as {policy} says. Needs torch alone. {written_by}, tested with {tested_with}.

    from prune import prune
    network = prune(network)                 # the dense model, changed in place

    python prune.py dense.pt pruned.pt       # a state dict (torch.save) to a state dict
"""

{future}
import sys
from pathlib import Path

MENDED = Path(__file__).resolve().with_name("mended.pt")  # tensors that are not just cut; none where there is no file
'''
_BODY = '''
def prune_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The pruned model's state dict from the dense one's."""
    pruned = sliced(state, SURGERY)
    for name in SURGERY["split"]:
        pruned = {{key: tensor for key, tensor in pruned.items() if not key.startswith(f"{{name}}.")}}
    if MENDED.exists():
        pruned |= torch.load(MENDED, weights_only=True)
    return pruned


def prune(network: nn.Module) -> nn.Module:
    """`network`, the dense model, pruned in place and in evaluation mode."""
    {stand_in}return reshaped(network, SURGERY, prune_state(network.state_dict()))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("python prune.py DENSE.pt PRUNED.pt (state dicts, torch.save)")
    torch.save(prune_state(torch.load(sys.argv[1], weights_only=True)), sys.argv[2])
'''


@final
class Python:
    """`prune.py`, and `mended.pt` beside it where tensors are not just cut (least squares, recalibration, integers)."""

    __slots__ = ()

    name: str = "python"
    tested: tuple[str, ...] = ("torch 2.13.0",)

    def export(self, resolved: Resolved) -> Exported:
        """Everything, to the last bit."""
        surgery = resolved.surgery
        state, cut = resolved.model.state_dict(), sliced(dict(resolved.dense.state_dict()), asdict(surgery))
        mended = {
            name: tensor for name, tensor in state.items() if name not in cut or not torch.equal(tensor, cut[name])
        }
        head = _HEAD.format(future=FUTURE, **about(resolved, self.tested))
        stand_in = 'stand_in(network, SURGERY["plain"])\n    ' if surgery.plain else ""
        files = {"prune.py": script(head, surgery, _BODY.format(stand_in=stand_in)).encode()}
        if mended:
            files["mended.pt"] = state_bytes(mended)
        grades: dict[Aspect, Grade] = {aspect: EXACT for _, aspect in resolved.aspects}
        grades["bits"] = approximated("values are those of the integers, held as floats")
        grades["arithmetic"] = approximated("rounded as integers are, computed in floats")
        return Exported(files, resolved.graded(grades))
