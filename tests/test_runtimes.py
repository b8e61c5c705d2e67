"""Runtimes: one contract for all that are built in, and what is told when a name or a model is wrong."""

import copy
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from autoprune.core.target import Target
from autoprune.errors import ConfigError, TargetError
from autoprune.plugins import resolve
from autoprune.runtimes import RUNTIMES, runtime
from autoprune.runtimes.base import Runtime
from autoprune.runtimes.onnxruntime import OnnxRuntime, _export_traced
from autoprune.runtimes.torch import TorchRuntime


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images).mean(dim=(2, 3)))


class Broken(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        raise RuntimeError("the flux capacitor is missing")


class TwoOutputs(Small):
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        scores = super().forward(images)
        return scores, scores.argmax(dim=1)


def network() -> nn.Module:
    torch.manual_seed(0)
    model = Small()
    model(torch.randn(16, 3, 8, 8))  # running statistics that are not the initial ones
    return model


def outputs(model: nn.Module, inputs: Tensor) -> np.ndarray:
    with torch.inference_mode():
        return copy.deepcopy(model).eval()(inputs).numpy()


class RuntimeContract:
    """What every runtime keeps to."""

    runtime: Runtime
    target: Target

    def test_outputs_equal_torch(self) -> None:
        model, inputs = network(), torch.randn(2, 3, 8, 8)
        session = self.runtime.load(model, torch.zeros(2, 3, 8, 8), self.target)
        found = session.run(inputs.numpy())
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, outputs(model, inputs), atol=1e-4)

    def test_the_model_is_unchanged_bit_for_bit(self, tmp_path: Path) -> None:
        model, example = network().train(), torch.randn(1, 3, 8, 8)
        before = copy.deepcopy(model.state_dict())
        session = self.runtime.load(model, example, self.target)
        session.invoke()
        self.runtime.save(model, example, tmp_path / "model.bin")
        assert all(module.training for module in model.modules())
        assert all(parameter.requires_grad for parameter in model.parameters())
        after = model.state_dict()
        assert list(before) == list(after)
        assert all(torch.equal(before[name], after[name]) for name in before)

    def test_invoking_keeps_threads_as_they_were(self) -> None:
        before = torch.get_num_threads()
        self.runtime.load(network(), torch.randn(1, 3, 8, 8), Target(self.runtime.name, threads=2)).invoke()
        assert torch.get_num_threads() == before

    def test_the_first_of_several_outputs_counts(self) -> None:
        model, inputs = TwoOutputs(), torch.randn(1, 3, 8, 8)
        with torch.inference_mode():
            scores = copy.deepcopy(model).eval()(inputs)[0].numpy()
        found = self.runtime.load(model, inputs, self.target).run(inputs.numpy())
        np.testing.assert_allclose(found, scores, atol=1e-4)

    def test_a_model_that_cannot_run_is_a_target_error_with_its_cause(self) -> None:
        with pytest.raises(TargetError, match="flux capacitor"):
            self.runtime.load(Broken(), torch.randn(1, 3, 8, 8), self.target)

    def test_nothing_is_left_of_a_failed_save(self, tmp_path: Path) -> None:
        with pytest.raises(TargetError, match="flux capacitor"):
            self.runtime.save(Broken(), torch.randn(1, 3, 8, 8), tmp_path / "model.bin")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
    def test_a_missing_device_is_a_target_error(self) -> None:
        with pytest.raises(TargetError, match="device: cpu"):
            self.runtime.load(network(), torch.randn(1, 3, 8, 8), Target(self.runtime.name, device="cuda"))

    def test_it_has_a_version(self) -> None:
        assert self.runtime.version()[0].isdigit()


class TestOnnxRuntime(RuntimeContract):
    runtime = OnnxRuntime()
    target = Target("onnxruntime")

    def test_a_saved_file_is_valid_onnx_with_a_free_batch(self, tmp_path: Path) -> None:
        model, path = network(), tmp_path / "model.onnx"
        self.runtime.save(model, torch.randn(1, 3, 8, 8), path)
        onnx.checker.check_model(str(path))
        assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
        images = torch.randn(7, 3, 8, 8)
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        found = session.run(None, {"input": images.numpy()})[0]
        np.testing.assert_allclose(found, outputs(model, images), atol=1e-4)

    def test_export_is_quiet(self, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder) -> None:
        self.runtime.load(network(), torch.randn(1, 3, 8, 8), self.target)
        assert capfd.readouterr() == ("", "")
        assert not list(recwarn)

    def test_a_failing_export_is_quiet_too(self, capfd: pytest.CaptureFixture[str]) -> None:
        class Unknown(nn.Module):
            def forward(self, images: Tensor) -> Tensor:
                return torch.igamma(images.abs() + 1, images.abs())  # ONNX has nothing like it

        with pytest.raises(TargetError, match="cannot be exported"):
            self.runtime.load(Unknown(), torch.rand(2, 3), self.target)
        assert capfd.readouterr() == ("", "")

    @pytest.mark.parametrize("norm", [
        nn.RMSNorm(6), nn.RMSNorm(6, eps=0.1), nn.RMSNorm((5, 6)), nn.RMSNorm(6, elementwise_affine=False),
    ])  # fmt: skip
    def test_rms_norms_take_the_fast_exporter(self, norm: nn.RMSNorm) -> None:
        for parameter in norm.parameters():
            nn.init.uniform_(parameter)
        inputs = torch.randn(2, 5, 6) * 1e-3
        graph = _export_traced(norm.eval(), inputs, dynamic_batch=False)
        found = onnxruntime.InferenceSession(graph).run(None, {"input": inputs.numpy()})[0]
        np.testing.assert_allclose(found, outputs(norm, inputs), atol=1e-6)


class TestTorchRuntime(RuntimeContract):
    runtime = TorchRuntime()
    target = Target("torch")

    def test_a_saved_archive_loads_with_any_batch(self, tmp_path: Path) -> None:
        model, path = network(), tmp_path / "model.pt2"
        self.runtime.save(model, torch.randn(1, 3, 8, 8), path)
        images = torch.randn(7, 3, 8, 8)
        found = torch.export.load(path).module()(images)
        np.testing.assert_allclose(found.detach().numpy(), outputs(model, images), atol=1e-4)

    def test_outputs_that_are_no_tensors_are_refused(self) -> None:
        class Text(nn.Module):
            def forward(self, images: Tensor) -> str:
                return "cat"

        session = self.runtime.load(Text(), torch.zeros(1, 3, 8, 8), self.target)
        with pytest.raises(TargetError, match="must return a tensor"):
            session.run(np.zeros((1, 3, 8, 8), dtype=np.float32))


def test_every_built_in_is_found_by_its_name() -> None:
    for name in RUNTIMES:
        assert runtime(name).name == name


def test_an_unknown_runtime_lists_what_exists_and_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown runtime 'onxruntime'; did you mean 'onnxruntime'\?.*torch"):
        runtime("onxruntime")


def test_a_runtime_of_ones_own_is_named_by_module_and_name() -> None:
    assert isinstance(runtime("autoprune.runtimes.torch:TorchRuntime"), TorchRuntime)


def test_a_module_or_name_that_is_not_there_is_told() -> None:
    with pytest.raises(ConfigError, match="cannot import 'no_such_module'"):
        runtime("no_such_module:Thing")
    with pytest.raises(ConfigError, match=r"has no 'TorchRuntim'; did you mean 'TorchRuntime'"):
        runtime("autoprune.runtimes.torch:TorchRuntim")


def test_entry_points_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def points(*, group: str) -> list[EntryPoint]:
        assert group == "autoprune.runtimes"
        return [
            EntryPoint("mine", "autoprune.runtimes.torch:TorchRuntime", group),
            EntryPoint("gone", "no_such_module:Thing", group),
        ]

    monkeypatch.setattr("autoprune.plugins.entry_points", points)
    assert isinstance(runtime("mine"), TorchRuntime)
    with pytest.raises(ConfigError, match="'gone' is installed as"):
        runtime("gone")
    with pytest.raises(ConfigError, match="mine"):
        resolve("runtime", "min", RUNTIMES)
