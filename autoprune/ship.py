"""Writing a cut model down for use without autoprune: ONNX, state dict with a script that rebuilds it, torch.export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from autoprune.apply import Applied
from autoprune.errors import TargetError
from autoprune.exporters.script_text import FUTURE, script
from autoprune.files import write_bytes, write_text
from autoprune.origin import copy_origin
from autoprune.progress import Progress
from autoprune.resolved import onnx_of, surgery_of
from autoprune.runtimes.torch import TorchRuntime
from autoprune.storage import packed_model

_HEAD = '''"""Rebuilds the pruned model from {factory!r} and {weights!r}. Needs torch and safetensors,
and the libraries that the unpruned model comes from; not autoprune.

    from rebuild import model
    network = model()
"""

{future}
import importlib.util
import sys
from pathlib import Path

from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent
FACTORY = {factory!r}
'''
_BODY = '''
def dense_model() -> nn.Module:
    """The unpruned model."""
    source, _, name = FACTORY.partition(":")
    if not source.endswith(".py"):
        return getattr(importlib.import_module(source), name)()
    path = next((p for p in (HERE / Path(source).name, Path(source)) if p.exists()), None)
    if path is None:
        raise SystemExit(f"{{source}} was not found beside this file; put your model's file there")
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return getattr(module, name)()


def model() -> nn.Module:
    """The pruned model in evaluation mode."""
    network = dense_model()
    {stand_in}return reshaped(network, SURGERY, load_file(HERE / {weights!r}))


if __name__ == "__main__":
    print(model())
'''


def write_model(
    applied: Applied, *, example: Tensor, factory: str, source: Path, folder: Path, progress: Progress
) -> dict[str, Path]:
    """Write every form of the cut model into `folder`; kind -> path. A form that cannot be written is noted.

    `factory` is where the dense model comes from, relative to `source`; what that needs is copied beside the script.
    """
    model = applied.model
    written: dict[str, Path] = {}
    weights = folder / "model.safetensors"
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    write_bytes(weights, save(state))
    written["state dict"] = weights
    packed = folder / "model.packed"
    write_bytes(packed, packed_model(state, applied.weights.quantised).content)
    written["packed"] = packed
    factory = copy_origin(factory, source, folder)
    surgery = surgery_of(applied)
    stand_in = 'stand_in(network, SURGERY["plain"])\n    ' if surgery.plain else ""
    head = _HEAD.format(factory=factory, weights=weights.name, future=FUTURE)
    written["rebuild script"] = folder / "rebuild.py"
    write_text(folder / "rebuild.py", script(head, surgery, _BODY.format(weights=weights.name, stand_in=stand_in)))
    onnx, exported = folder / "model.onnx", folder / "model.pt2"
    forms: dict[str, tuple[Path, Callable[[], None]]] = {
        "onnx": (onnx, lambda: write_bytes(onnx, onnx_of(applied, example))),
        "torch.export": (exported, lambda: TorchRuntime().save(model, example, exported)),
    }
    for kind, (path, write) in forms.items():
        try:
            write()
        except TargetError as error:
            progress.note(f"{kind} was not written: {error}")
        else:
            written[kind] = path
    return written
