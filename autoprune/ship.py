"""Writing a cut model down for use without autoprune: ONNX, state dict with a script that rebuilds it, torch.export."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from safetensors.torch import save
from torch import Tensor

from autoprune.apply import Applied
from autoprune.errors import TargetError
from autoprune.files import write_bytes, write_text
from autoprune.model import plain_modules
from autoprune.model.cut import set_number
from autoprune.model.flow import norms_after
from autoprune.origin import copy_origin
from autoprune.progress import Progress
from autoprune.runtimes.onnxruntime import checked
from autoprune.runtimes.torch import TorchRuntime
from autoprune.storage import onnx_file, packed_model

_SCRIPT = '''"""Rebuilds the pruned model from {factory!r} and {weights!r}. Needs torch and safetensors,
and the libraries that the unpruned model comes from; not autoprune.

    from rebuild import model
    network = model()
"""

import copy
import importlib.util
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

HERE = Path(__file__).resolve().parent
FACTORY = {factory!r}
DROPPED = {dropped!r}  # module -> what stays of it, and what it returns besides
SPLIT = {split!r}  # layer that is two now -> channels between them
NUMBERS = {numbers!r}  # module -> integers that its forward reads, such as how many heads it has
WIDTHS = ("num_features", "num_channels", "num_parameters")  # of norms and slopes
PLAIN = {plain!r}  # module -> the kind of plain module that stands in for it, and how it is used
RESIZED = {resized!r}  # height and width that the model resizes its input to, where it does
ROUNDED = {rounded!r}  # layer that computes in 8-bit integers -> what hands its output on, scale and zero of both


class Dropped(nn.Module):
    """Hands the first tensor it is given on, after the activation that stayed; or a zero."""

    def __init__(self, rest, further):
        super().__init__()
        self.rest = rest
        self.further = further

    def forward(self, *args, **kwargs):
        x = next(given for given in (*args, *kwargs.values()) if isinstance(given, torch.Tensor))
        if self.rest == "zero":
            x = x.new_zeros(())
        elif self.rest == "relu":
            x = torch.relu(x)
        return x if self.further is None else (x, *self.further)


{plain_source}
def dense_model():
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


def halves(layer, rank):
    """A layer as two, the first to `rank` channels."""
    biased = layer.bias is not None
    if isinstance(layer, nn.Linear):
        first = nn.Linear(layer.in_features, rank, bias=False)
        return nn.Sequential(first, nn.Linear(rank, layer.out_features, bias=biased))
    window = {{key: getattr(layer, key) for key in ("stride", "padding", "dilation", "padding_mode")}}
    first = type(layer)(layer.in_channels, rank, layer.kernel_size, bias=False, **window)
    return nn.Sequential(first, type(layer)(rank, layer.out_channels, 1, bias=biased))


def shrink(layer, window):
    """Give a convolution a smaller kernel about the middle of its own."""
    lost = (layer.kernel_size[0] - window[0]) // 2
    if lost:
        if not isinstance(layer.padding, str):
            layer.padding = tuple(each - lost for each in layer.padding)
        layer._reversed_padding_repeated_twice = [each - lost for each in layer._reversed_padding_repeated_twice]
        layer.kernel_size = window


def fit(layer, name, state, made):
    """Give one layer the shapes of the stored tensors. `made`: new parameters by old; shared ones stay so."""
    before = f"{{name}}." if name else ""
    weight = state.get(f"{{before}}weight", state.get(f"{{before}}running_mean"))
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and weight is not None:
        shrink(layer, tuple(weight.shape[2:]))
        if layer.groups == layer.in_channels == layer.out_channels > 1:
            layer.groups = layer.in_channels = weight.shape[0]
        else:
            layer.in_channels = weight.shape[1] * layer.groups
        layer.out_channels = weight.shape[0]
    elif isinstance(layer, nn.Linear) and weight is not None:
        layer.out_features, layer.in_features = weight.shape
    elif isinstance(layer, (nn.LayerNorm, nn.RMSNorm)) and weight is not None:
        layer.normalized_shape = tuple(weight.shape)
    elif isinstance(layer, nn.Embedding):
        layer.embedding_dim = weight.shape[1]
    for attribute in WIDTHS:
        if weight is not None and isinstance(getattr(layer, attribute, None), int):
            setattr(layer, attribute, weight.shape[0])
    for key, tensor in list(layer.named_parameters(recurse=False)):
        stored = state[before + key]
        if tensor.shape != stored.shape:
            new, same = made.setdefault(tensor, (nn.Parameter(torch.empty_like(stored)), stored))
            setattr(layer, key, new if torch.equal(same, stored) else nn.Parameter(torch.empty_like(stored)))
    for key, tensor in list(layer.named_buffers(recurse=False)):
        stored = state.get(before + key)  # none where a module makes it itself
        if stored is not None and tensor.shape != stored.shape:
            setattr(layer, key, torch.empty_like(stored))
    if isinstance(layer, nn.RNNBase):
        layer.input_size, layer.hidden_size = layer.weight_ih_l0.shape[1], layer.weight_hh_l0.shape[1]


{set_number}

def nearest(values, scale, zero):
    """The values of an 8-bit grid."""
    return torch.fake_quantize_per_tensor_affine(values, scale, int(zero), 0, 255)


def model():
    """The pruned model in evaluation mode."""
    state = load_file(HERE / {weights!r})
    network = dense_model()
    if PLAIN:
        stand_in(network, PLAIN)
    for name, (rest, further) in DROPPED.items():
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, Dropped(rest, further))
    for name, rank in SPLIT.items():
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, halves(network.get_submodule(name), rank))
    for name, values in NUMBERS.items():
        for attribute, value in values.items():
            set_number(network.get_submodule(name), attribute, value)
    made = {{}}
    for name, layer in network.named_modules():
        fit(layer, name, state, made)
    network.load_state_dict(state)
    if RESIZED:
        network.register_forward_pre_hook(
            lambda _network, inputs: (
                nn.functional.interpolate(inputs[0], size=RESIZED, mode="bilinear", antialias=True), *inputs[1:]
            )
        )
    for name, (tail, *grids) in ROUNDED.items():
        reads, makes = grids[:2], grids[2:]
        network.get_submodule(name).register_forward_pre_hook(
            lambda _layer, inputs, reads=reads: (nearest(inputs[0], *reads), *inputs[1:])
        )
        network.get_submodule(tail).register_forward_hook(
            lambda _layer, _inputs, output, makes=makes: nearest(output, *makes)
        )
    return network.eval()


if __name__ == "__main__":
    print(model())
'''


def write_model(
    applied: Applied, *, example: Tensor, factory: str, source: Path, folder: Path, progress: Progress
) -> dict[str, Path]:
    """Write every form of the cut model into `folder`; kind -> path. A form that cannot be written is noted.

    `factory` is where the dense model comes from, relative to `source`; what that needs is copied beside the script.
    """
    model, plan = applied.model, applied.plan
    written: dict[str, Path] = {}
    weights = folder / "model.safetensors"
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    write_bytes(weights, save(state))
    written["state dict"] = weights
    packed = folder / "model.packed"
    write_bytes(packed, packed_model(state, applied.weights.quantised).content)
    written["packed"] = packed
    script = folder / "rebuild.py"
    factory = copy_origin(factory, source, folder)
    dropped = {each.name: (each.rest, each.further) for block in plan.dropped for each in block.stand_ins}
    numbers: dict[str, dict[str, int]] = {}
    for (module, attribute), value in plan.numbers.items():
        numbers.setdefault(module, {})[attribute] = value
    rounded = {layer: (each.tail, *each.numbers) for layer, each in applied.arithmetic.items()}
    write_text(script, _SCRIPT.format(
        factory=factory, weights=weights.name, dropped=dropped, split=dict(applied.ranks), rounded=rounded,
        numbers=numbers, plain=dict(applied.plain), plain_source=_source_of(plain_modules) if applied.plain else "",
        resized=plan.size, set_number=inspect.getsource(set_number),
    ))  # fmt: skip
    written["rebuild script"] = script
    onnx, exported = folder / "model.onnx", folder / "model.pt2"
    forms: dict[str, tuple[Path, Callable[[], None]]] = {
        "onnx": (onnx, lambda: write_bytes(onnx, _onnx(applied, example))),
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


def _source_of(module: ModuleType) -> str:
    """The code of a module of ours that needs torch alone, without its docstring."""
    return "\n" + inspect.getsource(module).split('"""\n\n', maxsplit=1)[1] + "\n"


def _onnx(applied: Applied, example: Tensor) -> bytes:
    norms = norms_after(applied.model, example)
    return checked(onnx_file(applied.model, applied.weights, example=example, norms=norms))
