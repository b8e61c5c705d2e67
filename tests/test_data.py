"""The user's data in its many shapes, and what is refused."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from autoprune.data import as_data, check_fits, from_factory, split
from autoprune.errors import DataError

X = torch.arange(60, dtype=torch.float32).reshape(20, 3)
Y = torch.arange(20) % 4


class Samples(Dataset[tuple[Tensor, int]]):
    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return X[index], int(Y[index])


class Stream(IterableDataset[tuple[Tensor, int]]):
    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return ((X[index], int(Y[index])) for index in range(20))


class Broken(Samples):
    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index == 3:
            raise KeyError("gone")
        return super().__getitem__(index)


SOURCES = {
    "tensors": (X, Y),
    "arrays": (X.numpy(), Y.numpy().astype(np.int32)),
    "float64": (X.double(), Y),
    "dataset": Samples(),
    "tensor dataset": TensorDataset(X, Y),
    "stream": Stream(),
    "loader": DataLoader(Samples(), batch_size=6),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_gives_the_same(kind: str) -> None:
    data = as_data(SOURCES[kind], SOURCES[kind], max_calibration=8)
    assert torch.equal(data.calibration_inputs, X[:8])
    assert data.calibration_targets is not None
    assert torch.equal(data.calibration_targets, Y[:8])
    assert torch.equal(data.validation_inputs, X)
    assert torch.equal(data.validation_targets, Y)
    assert (data.validation_inputs.dtype, data.validation_targets.dtype) == (torch.float32, torch.int64)


def test_calibration_needs_no_targets() -> None:
    assert as_data(X, (X, Y)).calibration_targets is None
    assert as_data((X, None), (X, Y)).calibration_targets is None


def test_what_a_factory_may_return() -> None:
    assert torch.equal(from_factory({"calibration": X, "validation": (X, Y)}).validation_targets, Y)
    assert torch.equal(from_factory((X, (X, Y))).calibration_inputs, X)
    with pytest.raises(DataError, match="keys: 'train'"):
        from_factory({"train": X})
    with pytest.raises(DataError, match=r"returned torch\.Tensor"):
        from_factory(X)


@pytest.mark.parametrize(
    ("validation", "reason"),
    [
        (X, "validation: targets are missing"),
        ((X[:0], Y[:0]), "validation: there are no samples"),
        (TensorDataset(X[:0], Y[:0]), "validation: there are no samples"),
        ((X, Y[:7]), "20 inputs but 7 targets"),
        ((X.to(torch.uint8), Y), "torch.uint8; give float32"),
        ((torch.where(X == 30, torch.nan, X), Y), r"NaN or infinity in 1 sample\(s\), first in number 10"),
        ((X, torch.full((20,), torch.inf)), "targets hold NaN"),
        ((X[:, 0], Y), r"must be \(samples, \.\.\.\)"),
        ((X[:, :2], Y), r"calibration samples have shape \(3,\), validation samples \(2,\)"),
        (([object()], Y), "numeric numpy array"),
        (5, "validation: given int, allowed: a tensor"),
        (Broken(), "reading item 3 failed: KeyError"),
    ],
)
def test_what_is_refused(validation: object, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        as_data(X, validation)


def test_samples_of_several_shapes_are_refused() -> None:
    class Ragged(Samples):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            return torch.zeros(index + 1), 0

    with pytest.raises(DataError, match="must all have one shape"):
        as_data(Ragged(), (X, Y))


def test_one_sample_is_run_through_the_model() -> None:
    data = as_data(X, (X, Y))
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    check_fits(model, data)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(DataError, match=r"inputs of shape \(1, 3\): RuntimeError: mat1 and mat2"):
        check_fits(nn.Linear(5, 4), data)
    with pytest.raises(DataError, match="labels go from 0 to 3, but the model has 2 outputs"):
        check_fits(nn.Linear(3, 2), data)
    with pytest.raises(DataError, match="must return a tensor"):
        check_fits(Text(), data)
    with pytest.raises(DataError, match="but the model has 3 outputs"):
        check_fits(Dictionary(), data)


class Text(nn.Module):
    def forward(self, x: Tensor) -> str:
        return "cat"


class Dictionary(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": x}


def test_split_takes_the_first_share() -> None:
    parts = split(as_data(X, (X, Y)))
    assert (len(parts.selection), len(parts.held_out), parts.note) == (8, 12, None)
    assert torch.equal(torch.cat([parts.selection.inputs, parts.held_out.inputs]), X)


def test_split_shuffles_what_is_sorted_by_class_and_says_so() -> None:
    ordered = Y.sort().values
    parts, again = (split(as_data(X, (X, ordered))) for _ in range(2))
    assert parts.note is not None
    assert "sorted by class" in parts.note
    assert set(parts.held_out.targets.tolist()) <= set(parts.selection.targets.tolist())
    assert torch.equal(parts.selection.inputs, again.selection.inputs)
    everything = torch.cat([parts.selection.inputs, parts.held_out.inputs])
    assert torch.equal(everything[:, 0].sort().values, X[:, 0])


def test_split_leaves_regression_alone_and_needs_two() -> None:
    assert split(as_data(X, (X, X[:, 0]))).note is None
    with pytest.raises(DataError, match="at least 2 are needed"):
        split(as_data(X, (X[:1], Y[:1])))
    small = split(as_data(X, (X[:2], torch.tensor([1, 1]))))
    assert (len(small.selection), len(small.held_out)) == (1, 1)


def test_tokens_stay_integers() -> None:
    tokens = torch.arange(12).reshape(4, 3)
    data = as_data(tokens, (tokens, tokens))
    assert (data.calibration_inputs.dtype, data.validation_inputs.dtype) == (torch.int64, torch.int64)
    with pytest.raises(DataError, match=r"torch\.int64; give float32.*or tokens \(samples, tokens\) int64"):
        as_data(torch.zeros(4, 3, 8, 8, dtype=torch.int64), (tokens, tokens))
