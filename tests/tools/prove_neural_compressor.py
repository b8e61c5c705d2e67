"""Neural Compressor: reaches the configured sparsities in the same patterns; and locks our zeros while it trains."""

import sys
from pathlib import Path

import torch
from common import Case, difference, tell

sys.path.remove(str(Path(__file__).parent))  # this file has the tool's name
case, export = Case(sys.argv[1]), Path(sys.argv[2])
sys.path.insert(0, str(export))
loader = __import__("load")
STEPS = 5


def outputs(model: torch.nn.Module) -> torch.Tensor:
    found = model(case.inputs)
    return found if isinstance(found, torch.Tensor) else found[0]


def trained(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(STEPS + 2):
        optimizer.zero_grad()
        outputs(model).square().mean().backward()
        optimizer.step()


def in_blocks(weight: torch.Tensor, pattern: str) -> bool:
    """Whether zeros lie as `pattern` says, rows of outputs by inputs, position by position."""
    flat = (weight != 0).permute(0, *range(2, weight.ndim), 1).flatten(1)
    if ":" in pattern:
        gone, of = map(int, pattern.split(":"))
        return bool((flat.reshape(len(flat), -1, of).sum(-1) == of - gone).all())
    rows, columns = map(int, pattern.split("x"))
    blocks = flat.reshape(len(flat) // rows, rows, -1, columns).sum((1, 3))
    return bool(((blocks == 0) | (blocks == rows * columns)).all())


model = case.dense()
optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
handle = loader.prune(model, optimizer, end_step=STEPS)
trained(model, optimizer)
off, count, ours = 0.0, 0, 0.0
for pruner in handle.pruners:
    pattern, target = pruner.config["pattern"], pruner.config["target_sparsity"]
    assert pruner.masks, f"no layer for {pruner.config['op_names']}"
    for name in pruner.masks:
        weight = model.get_submodule(name).weight.detach()
        zero = float((weight == 0).float().mean())
        off, count = max(off, abs(zero - target)), count + 1
        assert in_blocks(weight, pattern), f"{name}: not {pattern}"
        mask = case.masks[name]
        if "x" in pattern and pattern != "1x1" and mask.flatten(1).shape[1] in map(int, pattern.split("x")):
            mask = mask.flatten(1).any(1)  # whole outputs
        ours = max(ours, abs(zero - (1 - float(mask.float().mean()))))
assert max(off, ours) < 5e-3, f"{case.name}: reaches another sparsity, by {off} of its target, {ours} of ours"

model = case.dense()
loader.lock(model, torch.optim.SGD(model.parameters(), lr=0.0))
with torch.no_grad():
    error = difference(outputs(model), case.logits)
whole = case.name not in ("mended", "mixed")  # they drop blocks, or split and round layers
assert not whole or error < 1e-5, f"{case.name}: locked, the outputs differ by {error}"
optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
loader.lock(model, optimizer)
trained(model, optimizer)
kept = 0
for name, mask in case.masks.items():
    if mask.ndim > 1 and not mask.all():
        assert torch.equal(model.get_submodule(name).weight != 0, mask), f"{name}: other zeros after training"
        kept += 1
tell(
    ("neural_compressor", "torch"),
    sparsity={"layers": count, "off its target": off, "off ours": ours},
    locked=f"{kept} layers",
    logits=error,
)
