"""A model as the ONNX file that a user ships: batch norms folded, integers and halves stored as such."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from autoprune.errors import TargetError, listed, near_miss
from autoprune.model.coupling import CONVOLUTIONS, NORMS
from autoprune.model.flow import norm_scale
from autoprune.model.fold import fold_norms
from autoprune.packing.coding import Codes
from autoprune.runtimes.onnx_weights import find_weights, with_stored_weights
from autoprune.runtimes.onnxruntime import export

LOST = "the exporter merged or dropped it: name the norm that follows it in `norms`, or leave it in 32 bits"


def export_stored(
    model: nn.Module, example: Tensor, *, norms: Mapping[str, str], quantised: Mapping[str, Codes],
    halves: Collection[str], fused: Collection[str] = (), dynamic_batch: bool = False,
) -> bytes:  # fmt: skip
    """`model` in evaluation as an ONNX graph whose weights are stored as asked; on a copy.

    `quantised` and `halves` name weights as the model's state does (`conv1.weight`); the codes are what the layer
    computes with, whatever its weight is; halves are rounded after folding. `norms` are layer -> the norm that reads
    it, and nothing else does. `fused` are those of `quantised` whose layers read and make integers, too.
    Raises TargetError for weights that the model or the graph does not have, and where the model cannot be exported.
    """
    weights = _checked(model, quantised, halves)
    own, factors = folded(model, norms)
    stored = {name: scaled(codes, factors.get(name.removesuffix(".weight"))) for name, codes in quantised.items()}
    for name in weights:
        layer = own.get_submodule(name.removesuffix(".weight"))
        value = stored[name].dequantised() if name in stored else _weight(layer).half().float()
        layer.weight.data = value  # in place: what shares it goes along
    graph = export(own, example, dynamic_batch=dynamic_batch)
    found = located(graph, {name: _weight(own.get_submodule(name.removesuffix(".weight"))) for name in weights})
    codes_at = {place: codes for name, codes in stored.items() for place in found[name]}
    halves_at = {place for name in halves for place in found[name]} - codes_at.keys()
    fused_at = {place for name in fused for place in found.get(name, ())}
    return with_stored_weights(graph, codes_at, halves_at, fused=fused_at)


def folded(model: nn.Module, norms: Mapping[str, str]) -> tuple[nn.Module, dict[str, Tensor]]:
    """A copy with `norms` folded, and what each folded layer's outputs are multiplied by, (outputs,) float64."""
    own = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    modules = dict(own.named_modules())
    pairs: dict[str, str] = {}
    for layer, norm in norms.items():
        foldable, reader = isinstance(modules.get(layer), (*CONVOLUTIONS, nn.Linear)), modules.get(norm)
        if foldable and isinstance(reader, NORMS) and reader.running_mean is not None:
            pairs[layer] = norm
    factors = {layer: norm_scale(modules[norm]) for layer, norm in pairs.items()}
    fold_norms(own, pairs)
    return own, factors


def scaled(codes: Codes, factor: Tensor | None) -> Codes:
    """Codes of the weight times `factor` (outputs,); scales stay positive, so a negative factor turns codes round.

    Raises ValueError for a code of -128, which has no opposite.
    """
    if factor is None:
        return codes
    if int(codes.codes.min()) < -127:
        raise ValueError("codes of -128 cannot change sign; symmetric ones are needed")
    turned = codes.codes * factor.sign().to(torch.int8)[:, None]
    scales = (codes.scales.double() * factor.abs()).float().clamp_min(torch.finfo(torch.float32).tiny)
    return Codes(turned, scales, codes.shape)


def located(graph: bytes, weights: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
    """The initialisers that hold each of `weights`. Raises TargetError where there is none."""
    arrays: dict[str, NDArray[Any]] = {name: weight.numpy() for name, weight in weights.items()}
    found = find_weights(graph, arrays)
    lost = [f"{name!r}: {LOST}" for name, places in found.items() if not places]
    if lost:
        raise TargetError(f"onnx: weights that are not in the exported graph:\n{listed(lost)}")
    return found


def _checked(model: nn.Module, quantised: Mapping[str, Codes], halves: Collection[str]) -> list[str]:
    """All names, each once. Raises TargetError for those that are no layer's weight, and for codes that do not fit."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, (*CONVOLUTIONS, nn.Linear))}
    shapes = {f"{name}.weight": tuple(_weight(layer).shape) for name, layer in layers.items()}
    names = list(dict.fromkeys([*quantised, *halves]))
    problems = [f"{name!r} is no layer's weight; {near_miss(name, shapes)}" for name in names if name not in shapes]
    problems += [
        f"{name!r} is {shapes[name]}, but its codes are {codes.shape}"
        for name, codes in quantised.items()
        if name in shapes and codes.shape != shapes[name]
    ]
    problems += [f"{name!r} is to be integers and halves; choose one" for name in halves if name in quantised]
    if problems:
        raise TargetError(f"onnx: weights cannot be stored as asked:\n{listed(problems)}")
    return names


def _weight(layer: nn.Module) -> Tensor:
    assert isinstance(layer.weight, Tensor)
    return layer.weight.detach()
