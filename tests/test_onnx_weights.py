"""ONNX files with stored integers and halves: they compute what the float model does, and their size is foretold."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from networks import CASES, Vgg, assert_untouched, randomised, snapshot
from onnx import TensorProto
from torch import Tensor, nn

from autoprune.bank.stitch import shape_only
from autoprune.core.unit import DROP, Option
from autoprune.demo.network import DemoNet
from autoprune.errors import TargetError
from autoprune.model.coupling import CONVOLUTIONS, NORMS, is_matrix
from autoprune.model.cut import side_widths
from autoprune.model.discover import Anatomy, discover
from autoprune.model.flow import norms_after
from autoprune.packing.coding import Codes
from autoprune.profile.onnx_export import export_stored, folded, scaled
from autoprune.profile.onnx_size import onnx_bytes
from autoprune.runtimes import onnx_weights
from autoprune.runtimes import onnxruntime as exporting
from autoprune.runtimes.onnx_weights import with_stored_weights
from autoprune.runtimes.onnxruntime import export
from autoprune.sparsity.quantise import most

torch.set_num_threads(1)


class Tokens(nn.Module):
    """Linear layers on three dimensions: (N, tokens, 8) -> (N, 5). One is square, so that its axes look alike."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(8, 12)
        self.square = nn.Linear(12, 12, bias=False)
        self.leave = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(torch.relu(self.square(torch.relu(self.enter(x))))).mean(1)


class Branch(nn.Module):
    """A block with parameters that no choice cuts: they go with it."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(12)
        self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 12)
        generator = torch.Generator().manual_seed(seed)
        for part in self.norm.parameters():  # equal ones are merged by the exporter
            nn.init.uniform_(part, 0.5, 1.5, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


def branches() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 12), *map(Branch, range(3)), nn.Linear(12, 5))


def plain_convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3, bias=False), nn.Flatten())


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolutions": (plain_convolutions, (3, 8, 8)),
    "tokens": (Tokens, (4, 8)),
    "branches": (branches, (4, 8)),
    **{name: (CASES[name].make, CASES[name].shape) for name in ("waves", "mlp", "residual functional", "mobile")},
    "norm beside a join": (CASES["dense"].make, CASES["dense"].shape),
}


def rounded(weight: Tensor, bits: int) -> Codes:
    rows = weight.detach().flatten(1)
    scales = (rows.abs().amax(1) / most(bits)).clamp_min(1e-9)
    codes = torch.round(rows / scales[:, None]).clamp(-most(bits), most(bits)).to(torch.int8)
    return Codes(codes, scales, tuple(weight.shape))


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {f"{name}.weight": layer.weight for name, layer in model.named_modules() if is_matrix(layer)}


def stored_as(weights: Mapping[str, Tensor], bits: Mapping[str, int]) -> tuple[dict[str, Codes], list[str]]:
    integers = {name: rounded(weight, bits[name]) for name, weight in weights.items() if bits[name] <= 8}
    return integers, [name for name in weights if bits[name] == 16]


def with_these(model: nn.Module, quantised: Mapping[str, Codes], halves: Iterable[str]) -> nn.Module:
    """A copy of `model` with the weights that are stored, as floats."""
    model = copy.deepcopy(model)
    state = model.state_dict()
    state |= {name: codes.dequantised() for name, codes in quantised.items()}
    model.load_state_dict(state | {name: state[name].half().float() for name in halves})
    return model


def answers(graph: bytes, inputs: Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: inputs.numpy()})[0]


def assert_same_answers(graph: bytes, model: nn.Module, example: Tensor) -> None:
    """The file against the plain export of `model`, which folds no norm of ours."""
    onnx.checker.check_model(graph, full_check=True)
    wanted = answers(export(model, example), example)
    assert float(np.abs(answers(graph, example) - wanted).max()) <= 1e-5 * float(np.abs(wanted).max())


def kinds(graph: bytes) -> dict[str, int]:
    return {tensor.name: tensor.data_type for tensor in onnx.load_from_string(graph).graph.initializer}


@pytest.mark.parametrize("bits", [8, 4, 3, 16])
@pytest.mark.parametrize("name", list(MODELS))
def test_the_file_computes_what_the_float_model_computes(name: str, bits: int) -> None:
    make, shape = MODELS[name]
    model, example = randomised(make()), torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    weights = weights_of(model)
    quantised, halves = stored_as(weights, dict.fromkeys(weights, bits))
    before = snapshot(model)
    norms = norms_after(model, example)
    graph = export_stored(model, example, norms=norms, quantised=quantised, halves=halves)
    assert_untouched(model, before)
    rounded_last = folded(model, norms)[0] if halves else model  # halves are of what is left to store
    assert_same_answers(graph, with_these(rounded_last, quantised, halves), example)
    kind = {8: TensorProto.INT8, 16: TensorProto.FLOAT16}.get(bits, TensorProto.INT4)
    assert [held for held in kinds(graph).values() if held != TensorProto.FLOAT] == [kind] * len(weights)


@pytest.mark.parametrize("name", ["residual functional", "mlp", "waves"])
def test_norms_that_turn_or_silence_channels_keep_scales_positive(name: str) -> None:
    model, example = CASES[name].model(), CASES[name].example()
    for norm in model.modules():
        if isinstance(norm, NORMS):
            norm.weight.data[::2] *= -1
            norm.weight.data[1] = 0
    norms = norms_after(model, example)
    quantised, _ = stored_as(weights_of(model), dict.fromkeys(weights_of(model), 4))
    graph = export_stored(model, example, norms=norms, quantised=quantised, halves=())
    assert_same_answers(graph, with_these(model, quantised, ()), example)
    held = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load_from_string(graph).graph.initializer}
    assert norms
    assert all((scales > 0).all() for name, scales in held.items() if name.startswith("scales"))


def test_what_shares_a_weight_goes_along() -> None:
    model, example = randomised(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))), torch.randn(3, 4, 8)
    model[2].weight = model[0].weight
    codes = rounded(model[0].weight, 8)
    graph = export_stored(model, example, norms={}, quantised={"0.weight": codes}, halves=())
    model[0].weight.data = codes.dequantised()
    assert_same_answers(graph, model, example)


def test_a_code_without_an_opposite_cannot_be_turned() -> None:
    codes = Codes(torch.tensor([[-128, 1]], dtype=torch.int8), torch.ones(1), (1, 2))
    with pytest.raises(ValueError, match="symmetric"):
        scaled(codes, -torch.ones(1, dtype=torch.float64))


@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_to_be_fused_is_decoded_by_one_node_from_a_byte(bits: int) -> None:
    model, example = CASES["residual functional"].model(), CASES["residual functional"].example()
    quantised, _ = stored_as(weights_of(model), dict.fromkeys(weights_of(model), bits))
    norms, fused = norms_after(model, example), ["layer1.0.conv1.weight", "head.weight"]
    graph = export_stored(
        model, example[:1], norms=norms, quantised=quantised, halves=(), fused=fused, dynamic_batch=True
    )
    nodes = [node.op_type for node in onnx.load_from_string(graph).graph.node]
    assert nodes.count("DequantizeLinear") == 2
    others = TensorProto.INT4 if bits == 4 else TensorProto.INT8
    held = [kind for kind in kinds(graph).values() if kind != TensorProto.FLOAT]
    assert sorted(held) == sorted([TensorProto.INT8] * 2 + [others] * (len(quantised) - 2))
    assert_same_answers(graph, with_these(model, quantised, ()), example)


def test_a_file_repeats_to_the_byte_in_whatever_order_it_is_asked_for() -> None:
    model, example = CASES["bottleneck"].model(), CASES["bottleneck"].example()
    weights, norms = weights_of(model), norms_after(model, example)
    quantised, halves = stored_as(weights, {name: (8, 4, 16)[place % 3] for place, name in enumerate(weights)})
    first = export_stored(model, example, norms=norms, quantised=quantised, halves=halves)
    backwards = dict(reversed(quantised.items()))
    assert first == export_stored(model, example, norms=norms, quantised=backwards, halves=halves[::-1])


def test_where_four_bits_do_not_run_a_code_takes_a_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    model, example = randomised(Vgg(norm=False)), CASES["vgg"].example()
    quantised, _ = stored_as(weights_of(model), dict.fromkeys(weights_of(model), 4))
    monkeypatch.setattr(onnx_weights, "runs_int4", lambda: False)
    graph = with_stored_weights(export(model, example), quantised, ())
    assert TensorProto.INT4 not in kinds(graph).values()
    assert_same_answers(graph, with_these(model, quantised, ()), example)


def test_the_other_exporter_does_as_well_and_leaves_no_paths(monkeypatch: pytest.MonkeyPatch) -> None:

    def fails(*_: object) -> bytes:
        raise RuntimeError("no symbolic")

    monkeypatch.setattr(exporting, "_export_traced", fails)
    model, example = randomised(Tokens()), torch.randn(2, 4, 8)
    architecture = discover(model, example).architecture
    weights = weights_of(model)
    quantised, halves = stored_as(weights, dict(zip(weights, (8, 4, 16), strict=True)))
    graph = export_stored(model, example, norms={}, quantised=quantised, halves=halves)
    assert b".py" not in graph
    assert_same_answers(graph, with_these(model, quantised, halves), example)
    foretold = onnx_bytes(model, example, norms={}, layers=architecture.layers)
    widths = {"enter": (8, 12), "square": (12, 12), "leave": (12, 5)}
    size = foretold.predict(widths, {"enter": 8, "square": 4, "leave": 16})
    assert abs(size - len(graph)) <= 0.01 * len(graph)


def test_names_and_shapes_that_do_not_fit_are_told() -> None:
    model, example = CASES["residual functional"].model(), CASES["residual functional"].example()
    norms, codes = norms_after(model, example), rounded(model.head.weight, 8)
    with pytest.raises(TargetError, match=r"'haed.weight' is no layer's weight; did you mean 'head.weight'"):
        export_stored(model, example, norms=norms, quantised={"haed.weight": codes}, halves=())
    with pytest.raises(TargetError, match=r"'stem.0.weight' is \(8, 3, 3, 3\), but its codes are \(5, 12\)"):
        export_stored(model, example, norms=norms, quantised={"stem.0.weight": codes}, halves=())
    with pytest.raises(TargetError, match=r"'head.weight' is to be integers and halves; choose one"):
        export_stored(model, example, norms=norms, quantised={"head.weight": codes}, halves=["head.weight"])
    with pytest.raises(TargetError, match=r"'stem.0.weight': .* name the norm that follows it in `norms`"):
        export_stored(model, example, norms={}, quantised={}, halves=["stem.0.weight"])
    with pytest.raises(TargetError, match=r"'stem.0.weight' .* float32 weight of the graph"):
        with_stored_weights(export(model, example), {}, ["stem.0.weight"])
    model.head.weight.data[0, 0] = 1e6
    with pytest.raises(TargetError, match="float16 cannot hold"):
        export_stored(model, example, norms=norms, quantised={}, halves=["head.weight"])


def choice(anatomy: Anatomy, draw: random.Random) -> dict[str, Option]:
    options = {}
    for unit in anatomy.units:
        if unit.kind == "block" and draw.random() < 0.4:
            options[unit.name] = DROP
        if unit.narrows:
            options[unit.name] = Option("l2", draw.randint(1, unit.width))
    return options


def widths_of(model: nn.Module, anatomy: Anatomy) -> dict[str, tuple[int, int]]:
    """The layers and parameters that are left, with their inputs and outputs."""
    sides = side_widths(model)
    named = [layer.name for layer in anatomy.architecture.layers if f"{layer.name}/out" in sides]
    widths = {name: (sides.get(f"{name}/in", sides[f"{name}/out"]), sides[f"{name}/out"]) for name in named}
    left = {name: parameter.numel() for name, parameter in model.named_parameters()}
    outside = {each.name: each.kernel for each in anatomy.architecture.layers if each.kind == "other"}
    return widths | {name: (left[name] // area, 1) for name, area in outside.items() if name in left}


@pytest.mark.parametrize("name", [*CASES, "tokens", "branches", "demo"])
def test_the_size_of_any_choice_is_foretold(name: str) -> None:
    cases = {key: (case.make, case.shape) for key, case in CASES.items()}
    make, shape = {**cases, **MODELS, "demo": (DemoNet, (1, 8, 8))}[name]
    model, example = randomised(make()), torch.randn(2, *shape)
    anatomy, norms = discover(model, example), norms_after(model, example)
    foretold = onnx_bytes(model, example[:1], norms=norms, layers=anatomy.architecture.layers)
    for seed in range(4):
        draw = random.Random(seed)
        smaller = shape_only(model, anatomy, choice(anatomy, draw) if seed else {})
        weights = weights_of(smaller)
        bits = {name: draw.choice((3, 4, 5, 6, 8, 16, 32)) for name in weights}
        bits |= {
            f"{name}.weight": draw.choice((16, 32))
            for name, layer in smaller.named_modules()
            if isinstance(layer, CONVOLUTIONS) and not is_matrix(layer)
        }
        quantised, _ = stored_as(weights, bits)
        halves = [name for name, each in bits.items() if each == 16]
        fused = [name for name in quantised if draw.random() < 0.3]
        graph = export_stored(smaller, example[:1], norms=norms, quantised=quantised, halves=halves, fused=fused)
        onnx.checker.check_model(graph, full_check=True)
        by_layer = {name.removesuffix(".weight"): each for name, each in bits.items()}
        whole = [name.removesuffix(".weight") for name in fused]
        size = foretold.predict(widths_of(smaller, anatomy), by_layer, fused=whole)
        assert abs(size - len(graph)) <= 0.01 * len(graph)
