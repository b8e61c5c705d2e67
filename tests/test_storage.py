"""Predicted bytes against the files that are really written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from networks import Residual, randomised
from test_weights import bench_of, logits

from autoprune.core.target import Target
from autoprune.storage import FLOATS, Weights, onnx_file
from autoprune.workbench import Workbench

torch.set_num_threads(1)

SPACE = """
methods:
  - {method: l2, compensate: least_squares}
weights:
  - {method: dense, bits: [16, 8, 4], inputs: [32, 8]}
  - {method: sparsegpt, patterns: [50%], bits: [32, 8]}
  - {method: low_rank, ranks: [25%]}
levels: 4
"""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    folder = tmp_path_factory.mktemp("bench")
    return bench_of(randomised(Residual(width=64)), folder, size="onnx", text=SPACE, target=Target(batch=4))


@pytest.mark.parametrize("seed", range(8))
def test_the_onnx_file_is_predicted(bench: Workbench, seed: int) -> None:
    rng = np.random.default_rng(seed)
    choice = bench.space.normal(tuple(int(rng.integers(size)) for size in bench.space.sizes))
    candidate = bench.stitcher.build(bench.space.options_of(choice))
    really = bench.files.size(candidate.model, Weights.of(candidate))
    assert bench.costs.cost("size", choice) == pytest.approx(really, rel=0.01, abs=300)  # nodes beside dropped blocks


def test_the_dense_file_is_exact(bench: Workbench) -> None:
    assert bench.costs.dense["size"] == bench.files.size(bench.subject.model, FLOATS)


def test_the_file_computes_what_was_scored_and_holds_what_was_decided(bench: Workbench) -> None:
    weights = [entry for entry in bench.space.entries if entry.unit.kind == "weights"]
    labels = ["dense half", "dense int8", "dense int4", "sparsegpt 50% int8"]
    chosen = {
        entry.unit.name: next(option for option in entry.options if option.label == label)
        for entry, label in zip(weights, labels, strict=False)
    }
    candidate = bench.stitcher.build(chosen)
    content = onnx_file(
        candidate.model, Weights.of(candidate), example=bench.subject.example, norms=bench.stitcher.norms
    )
    kinds = [tensor.data_type for tensor in onnx.load_from_string(content).graph.initializer]
    assert kinds.count(onnx.TensorProto.FLOAT16) == 1
    assert kinds.count(onnx.TensorProto.INT8) + kinds.count(onnx.TensorProto.INT4) == 3
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    inputs = bench.subject.task.data.validation_inputs[:9]  # any batch
    got = torch.from_numpy(session.run(None, {"input": inputs.numpy()})[0])
    torch.testing.assert_close(got, logits(candidate.model, inputs), rtol=0, atol=2e-2)  # halves of folded weights
    others = {name: option for name, option in chosen.items() if option.bits != 16}
    exact = bench.stitcher.build(others)
    content = onnx_file(exact.model, Weights.of(exact), example=bench.subject.example, norms=bench.stitcher.norms)
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    got = torch.from_numpy(session.run(None, {"input": inputs.numpy()})[0])
    torch.testing.assert_close(got, logits(exact.model, inputs), rtol=0, atol=1e-4)


def test_a_model_that_onnx_cannot_take_is_counted_in_tensors(tmp_path: Path) -> None:
    class Odd(Residual):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            # No operator of ONNX, and not traced either.
            return super().forward(x) + 0.0 * torch.special.bessel_j0(x).mean()

    odd = bench_of(randomised(Odd()), tmp_path, size="onnx", text=SPACE)
    assert odd.files.kind == "plain"
    candidate = odd.stitcher.build({})
    assert odd.costs.dense["size"] == odd.files.size(candidate.model, FLOATS)
