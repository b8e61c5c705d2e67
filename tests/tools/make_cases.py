"""Writes the cases that tools are tried with: a policy, its model, inputs, and what our own cut of it is and gives.

    python tests/tools/make_cases.py FOLDER [CASE ...]

Runs in autoprune's environment. Each case is a folder with `policy.yaml`, `autoprune.yaml`, `network.py` and `case.pt`.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from resolved_policies import CASES, NETWORKS, is_there, network_of, resolved_case, subject_for, written_case

from autoprune.nest import first_tensor

CONFIG = """model: network.py:model
data: network.py:data
weights: weights.safetensors
metric: {metric}
"""


def make(name: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    laid, task = resolved_case(name), subject_for(name).task
    written_case(name, folder)
    shutil.copy(NETWORKS / f"{CASES[name].network}.py", folder / "network.py")
    (folder / "autoprune.yaml").write_text(CONFIG.format(metric=CASES[name].metric), encoding="utf-8")
    state = {key: tensor.contiguous().clone() for key, tensor in network_of(name).model().state_dict().items()}
    save_file(state, folder / "weights.safetensors")
    inputs = task.data.validation_inputs[:16]
    with torch.no_grad():
        logits = first_tensor(laid.model(inputs))
    cut = {key: tensor.detach().clone() for key, tensor in laid.model.state_dict().items()}
    masks = {layer: laid.mask(layer) for layer, found in laid.layers.items() if not found.gone}
    content = {"inputs": inputs, "logits": logits, "state": state, "cut": cut, "masks": masks}
    torch.save(content, folder / "case.pt")


if __name__ == "__main__":
    for case in sys.argv[2:] or filter(is_there, CASES):
        make(case, Path(sys.argv[1]) / case)
        print(case)
