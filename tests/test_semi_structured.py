"""2 of 4: what counts as such, what the cost table makes of it, and on a GPU that the kernels run and compute it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from networks import CASES
from torch import nn

from autoprune.bank.stitch import shape_only
from autoprune.core.target import Target
from autoprune.core.unit import Option
from autoprune.errors import TargetError
from autoprune.model.discover import discover
from autoprune.profile.forms import with_forms
from autoprune.profile.widths import WidthMap, as_array
from autoprune.runtimes.onnxruntime import OnnxRuntime
from autoprune.runtimes.semi_structured import fits_kernels, is_two_of_four
from autoprune.runtimes.torch import TorchRuntime
from autoprune.spaces import load_space, resolve

SPACE = """
channels: false
blocks: false
weights:
  - {method: magnitude, patterns: ["2:4", 50%]}
"""
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, and torch built for it")


def two_of_four(outputs: int = 128, inputs: int = 256) -> torch.Tensor:
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0))
    weight.view(outputs, -1, 4)[:, :, ::2] = 0
    return weight


def test_two_of_four_is_told_from_anything_else() -> None:
    weight = two_of_four()
    assert is_two_of_four(weight)
    assert is_two_of_four(torch.zeros(4, 8))
    weight[3, 4:8] = 1.0
    assert not is_two_of_four(weight)
    assert not is_two_of_four(two_of_four()[:, :255])
    assert not is_two_of_four(torch.zeros(4, 4, 3, 3))


@pytest.mark.parametrize(
    ("shape", "dtype", "fits"),
    [((32, 64), torch.float16, True), ((32, 64), torch.bfloat16, True), ((32, 64), torch.float32, False),
     ((31, 64), torch.float16, False), ((32, 48), torch.float16, False), ((32, 64, 1, 1), torch.float16, False)],
)  # fmt: skip
def test_kernels_take_some_shapes_and_types(shape: tuple[int, ...], dtype: torch.dtype, fits: bool) -> None:
    assert fits_kernels(torch.zeros(shape, dtype=dtype)) is fits


def test_zeros_have_a_price_of_their_own_only_where_kernels_use_them(tmp_path: Path) -> None:
    case = CASES["vgg"]
    model, example = case.model(), case.example()
    (tmp_path / "space.yaml").write_text(SPACE)
    anatomy = discover(model, example, narrow=(), blocks=False, weights=True)
    space = resolve(anatomy.units, load_space("space.yaml", tmp_path))
    gpu = TorchRuntime().forms(Target("torch", "cuda", precision="float16"))
    told = with_forms(anatomy.architecture, space, gpu).layers
    linear = [layer.name for layer in anatomy.architecture.layers if layer.kind == "linear"]
    assert [layer.name for layer in told if layer.form == "2:4"] == linear
    for target in (Target("torch"), Target("torch", "cuda")):
        assert with_forms(anatomy.architecture, space, TorchRuntime().forms(target)) == anatomy.architecture
    assert with_forms(anatomy.architecture, space, OnnxRuntime().forms(Target())) == anatomy.architecture
    sparse = space.choice_of({
        entry.unit.name: next(o for o in entry.options if o.pattern == "2:4") for entry in space.entries
    })  # fmt: skip
    for architecture in (anatomy.architecture, with_forms(anatomy.architecture, space, gpu)):
        present = WidthMap.of(architecture, space).at(as_array(sparse)).present
        assert int(present.sum()) == len(anatomy.architecture.layers)
    shaped = shape_only(model, anatomy, space.options_of(sparse))
    assert all(is_two_of_four(shaped.get_submodule(name).weight) for name in linear)


def test_precision_is_offered_where_it_is_built() -> None:
    model, x = nn.Sequential(nn.Linear(8, 4)), torch.randn(2, 8)
    with pytest.raises(TargetError, match="runtime 'torch'"):
        OnnxRuntime().load(model, x, Target(batch=2, precision="float16"))
    found = TorchRuntime().load(model, x, Target("torch", batch=2, precision="bfloat16")).run(x.numpy())
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), model(x), rtol=2e-2, atol=2e-2)


@GPU
def test_sparse_kernels_compute_what_dense_ones_do() -> None:
    model = nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 64)).eval()
    model[0].weight.data = two_of_four()
    x = torch.randn(64, 256)
    session = TorchRuntime().load(model, x, Target("torch", "cuda", batch=64, precision="float16"))
    kinds = [type(layer.weight).__name__ for layer in session._model if isinstance(layer, nn.Linear)]
    assert "SparseSemiStructured" in kinds[0]
    assert kinds[1] == "Parameter"
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(session.run(x.numpy())), model(x), rtol=2e-2, atol=2e-2)


def test_an_option_of_two_of_four_stored_as_integers_is_no_such_form() -> None:
    assert Option("wanda", 2, pattern="2:4").form == "2:4"
    assert Option("wanda", 2, pattern="2:4", bits=8).form == "float"
    assert Option("wanda", 2, pattern="4:8").form == "float"
