"""Models of timm and torchvision, and ONNX files: where those libraries can be imported.

`tests/vision_environment.sh` makes an environment in which they can, and runs this file there.
"""

import importlib
from pathlib import Path

import onnx
import pytest
import torch
from networks import Residual, Vgg, randomised
from onnx import TensorProto, helper
from test_sources import Attention, halved, images, rebuilt
from torch import nn

from autoprune.config import Config
from autoprune.errors import ModelError
from autoprune.loading import load_model
from autoprune.model.discover import discover
from autoprune.origin import copy_origin

pytestmark = pytest.mark.slow


def needs(name: str) -> None:
    try:
        importlib.import_module(name)
    except (ImportError, RuntimeError, OSError) as error:  # operators of another torch are no ImportError
        pytest.skip(f"{name} cannot be imported here ({error}); tests/vision_environment.sh")


def loaded(text: str, folder: Path, **more: str) -> nn.Module:
    return load_model(Config.model_validate({"model": text, "data": "net.py:data", **more}), folder=folder)


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_models_by_name(tmp_path: Path, library: str) -> None:
    needs(library)
    text = f"{library}:resnet18?pretrained=false&num_classes=7"
    model = loaded(text, tmp_path)
    example = images(2, 64)
    assert model(example).shape == (2, 7)
    assert torch.equal(loaded(text, tmp_path)(example), model(example))
    assert "layer1.0.conv1" in {unit.name for unit in discover(model, example).units}
    torch.save({name: tensor + 1 for name, tensor in model.state_dict().items()}, tmp_path / "w.pt")
    given = loaded(f"{library}:resnet18?num_classes=7", tmp_path, weights="w.pt")
    assert torch.equal(given.state_dict()["conv1.weight"], model.state_dict()["conv1.weight"] + 1)
    factory = copy_origin(text, tmp_path, tmp_path / "out")
    assert torch.allclose(rebuilt(tmp_path / "out", factory, model, example), model(example), atol=1e-5)


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_unknown_names_and_keywords(tmp_path: Path, library: str) -> None:
    needs(library)
    with pytest.raises(ModelError, match=f"{library} has no model 'resnet19'; did you mean .*'resnet18'"):
        loaded(f"{library}:resnet19", tmp_path)
    with pytest.raises(ModelError, match=r"TypeError.*no_such_keyword"):
        loaded(f"{library}:resnet18?pretrained=false&no_such_keyword=1", tmp_path)


@pytest.mark.parametrize("dynamo", [False, True], ids=["traced", "dynamo"])
@pytest.mark.parametrize(("make", "widths"), [(Residual, 6), (Vgg, 4), (Attention, 2)])
def test_an_onnx_file_is_the_model_that_was_exported(
    tmp_path: Path, make: type[nn.Module], widths: int, dynamo: bool
) -> None:
    needs("onnx2pytorch")
    if dynamo:
        needs("onnxscript")
    torch.manual_seed(0)
    model = randomised(make())
    shapes = {"dynamic_shapes": ({0: torch.export.Dim("batch")},)} if dynamo else {"dynamic_axes": {"x": {0: "batch"}}}
    names = {} if dynamo else {"input_names": ["x"]}
    torch.onnx.export(model, (images(),), tmp_path / "net.onnx", dynamo=dynamo, **shapes, **names)
    read = loaded("net.onnx", tmp_path)
    more = images(5)
    assert torch.allclose(read(more), model(more), atol=1e-4)
    assert sum(each.numel() for each in read.parameters()) <= sum(each.numel() for each in model.parameters())
    before, after = discover(model, images()), discover(read, images())
    channels = [[g.width for g in anatomy.groups] for anatomy in (before, after)]
    assert len(channels[1]) == widths
    if len(channels[0]) == widths:  # the same groups in the same order, by other names
        assert channels[0] == channels[1]
        assert torch.allclose(halved(read, after)(more), halved(model, before)(more), atol=1e-4)
    factory = copy_origin("net.onnx", tmp_path, tmp_path / "out")
    assert torch.allclose(rebuilt(tmp_path / "out", factory, read, more), read(more), atol=1e-5)


def written(path: Path, *nodes: onnx.NodeProto, weights: dict[str, list[int]]) -> None:
    """A graph from `x` (batch, 3, 8, 8) to `y`, as other frameworks write it."""
    stored = [
        helper.make_tensor(name, TensorProto.FLOAT, sizes, torch.randn(sizes).abs().flatten().tolist())
        for name, sizes in weights.items()
    ]
    reads = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8])
    makes = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(list(nodes), "written", [reads], [makes], stored)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


def test_a_graph_that_torch_did_not_write(tmp_path: Path) -> None:
    needs("onnx2pytorch")
    written(
        tmp_path / "net.onnx",
        helper.make_node("BatchNormalization", ["x", "s", "b", "m", "v"], ["n"], "norm"),
        helper.make_node("Conv", ["n", "w"], ["c"], "conv", auto_pad="SAME_UPPER"),
        helper.make_node("Relu", ["c"], ["r"], "relu"),
        helper.make_node("MaxPool", ["r"], ["p"], "pool", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Flatten", ["p"], ["f"], "flat"),
        helper.make_node("MatMul", ["f", "k"], ["y"], "head"),
        weights={"s": [3], "b": [3], "m": [3], "v": [3], "w": [6, 3, 3, 3], "k": [96, 4]},
    )
    read = loaded("net.onnx", tmp_path)
    assert read(images(3)).shape == (3, 4)
    assert [(unit.kind, unit.width) for unit in discover(read, images()).units] == [("channels", 6)]


def test_onnx_files_that_are_refused(tmp_path: Path) -> None:
    needs("onnx2pytorch")
    (tmp_path / "net.onnx").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="ONNX Runtime cannot read it"):
        loaded("net.onnx", tmp_path)
    written(
        tmp_path / "net.onnx",
        helper.make_node("Conv", ["x", "w"], ["c"], "conv"),
        helper.make_node("RandomNormalLike", ["c"], ["e"], "noise"),
        helper.make_node("Add", ["c", "e"], ["y"], "sum"),
        weights={"w": [6, 3, 3, 3]},
    )
    with pytest.raises(ModelError, match="RandomNormalLike node 'noise' computes something else"):
        loaded("net.onnx", tmp_path)
