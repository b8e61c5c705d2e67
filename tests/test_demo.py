"""The embedded demo: what is shipped is small, is scikit-learn's data, reads it well, and exports to ONNX."""

from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from autoprune.demo.data import DIGITS_PATH, data, digits, normalise, upsample
from autoprune.demo.network import WEIGHTS_PATH, model

DIGIT_COUNT = 1797


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return model()


def test_files_are_small() -> None:
    assert WEIGHTS_PATH.stat().st_size < 3_000_000
    assert DIGITS_PATH.stat().st_size < 130_000


def test_model_is_float32_and_in_evaluation_mode(network: nn.Module) -> None:
    assert not any(layer.training for layer in network.modules())
    assert {value.dtype for value in network.parameters()} == {torch.float32}


def test_parts_share_no_index_and_cover_all_digits() -> None:
    stored = load_file(DIGITS_PATH)
    calibration = set(stored["calibration_indices"].tolist())
    validation = set(stored["validation_indices"].tolist())
    assert not calibration & validation
    assert calibration | validation == set(range(DIGIT_COUNT))


def test_data_has_the_promised_shapes_and_mixed_classes() -> None:
    parts = data()
    assert {part: len(labels) for part, (_, labels) in parts.items()} == {"calibration": 1078, "validation": 719}
    for inputs, labels in parts.values():
        assert inputs.shape == (len(labels), 1, 60, 60)
        assert (inputs.dtype, labels.dtype) == (torch.float32, torch.int64)
        assert set(labels[:64].tolist()) == set(range(10))
    inputs, _ = parts["calibration"]
    assert inputs.mean().item() == pytest.approx(0, abs=0.01)
    assert inputs.std().item() == pytest.approx(1, abs=0.01)


def test_digits_are_those_of_scikit_learn() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    stored = load_file(DIGITS_PATH)
    images, labels = datasets.load_digits(return_X_y=True)
    numpy.testing.assert_array_equal(stored["images"].reshape(-1, 64).numpy(), images)
    numpy.testing.assert_array_equal(stored["labels"].numpy(), labels)


def test_validation_accuracy_is_the_shipped_one(network: nn.Module) -> None:
    inputs, labels = data()["validation"]
    with torch.inference_mode():
        predicted = torch.cat([network(batch).argmax(dim=1) for batch in torch.split(inputs, 16)])
    assert (predicted == labels).double().mean().item() > 0.985


def test_onnx_export_agrees_with_torch(network: nn.Module, tmp_path: Path) -> None:
    images, _ = digits("validation")
    inputs = normalise(upsample(images[:1]))
    onnxruntime = pytest.importorskip("onnxruntime")
    path = tmp_path / "demo.onnx"
    torch.onnx.export(network, (inputs,), path, dynamo=False, opset_version=18)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    with torch.inference_mode():
        numpy.testing.assert_allclose(logits, network(inputs).numpy(), atol=1e-4)
