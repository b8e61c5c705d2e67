"""Compensation against numpy's least squares on explicit data."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import reconstruction_error
from torch import Tensor

from autoprune.errors import DataError
from autoprune.methods.compensate import gone_alone, least_squares, nested_errors

torch.set_num_threads(1)


def layer(outputs: int = 4, inputs: int = 9, *, samples: int = 200, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, correlated samples (samples, inputs), and their second moments."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    data = torch.randn(samples, inputs, generator=generator, dtype=torch.float64) @ mixing + 0.5
    weight = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
    return weight, data, data.T @ data / samples


KEPT = torch.tensor([7, 0, 2, 3])  # not sorted: the caller's order is kept


def test_against_numpy_on_the_data_itself() -> None:
    weight, data, moments = layer()
    expected = np.linalg.lstsq(data[:, KEPT].numpy(), (data @ weight.T).numpy(), rcond=None)[0].T
    found = least_squares(weight, moments, KEPT, damping=1e-13)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-8, atol=1e-9)


def test_damped_against_numpy_with_the_ridge_as_extra_rows() -> None:
    weight, data, moments = layer()
    ridge = np.sqrt(0.3 * float(moments.diagonal().mean()) * len(data))
    rows = np.vstack([data[:, KEPT].numpy(), ridge * np.eye(len(KEPT))])
    wanted = np.vstack([(data @ weight.T).numpy(), ridge * weight[:, KEPT].T.numpy()])
    expected = np.linalg.lstsq(rows, wanted, rcond=None)[0].T
    np.testing.assert_allclose(least_squares(weight, moments, KEPT, damping=0.3).numpy(), expected, rtol=1e-9)


def test_error_is_that_on_the_data() -> None:
    weight, data, moments = layer()
    new = least_squares(weight, moments, KEPT)
    expected = (data @ weight.T - data[:, KEPT] @ new.T).square().mean(dim=0)
    torch.testing.assert_close(reconstruction_error(weight, moments, KEPT, new), expected)


def test_float32_agrees_with_float64() -> None:
    weight, _, moments = layer()
    single = least_squares(weight.float(), moments, KEPT)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), least_squares(weight, moments, KEPT), rtol=1e-4, atol=1e-5)


def test_keeping_all_returns_the_weights() -> None:
    weight, _, moments = layer()
    assert torch.equal(least_squares(weight, moments, torch.arange(9)), weight)
    backwards = torch.arange(9).flip(0)
    assert torch.equal(least_squares(weight, moments, backwards), weight[:, backwards])
    assert float(reconstruction_error(weight, moments, torch.arange(9), weight).max()) == 0.0


def test_keeping_nothing_returns_no_columns() -> None:
    weight, _, moments = layer()
    none = torch.tensor([], dtype=torch.int64)
    assert least_squares(weight, moments, none).shape == (4, 0)
    torch.testing.assert_close(
        reconstruction_error(weight, moments, none, weight[:, none]), (weight @ moments * weight).sum(dim=1)
    )


@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(1, 6), st.integers(1, 12), st.integers(1, 30), st.integers(0, 999))
def test_never_worse_than_selection(data: st.DataObject, outputs: int, inputs: int, samples: int, seed: int) -> None:
    weight, _, moments = layer(outputs, inputs, samples=samples, seed=seed)  # singular when samples < inputs
    kept = torch.tensor(data.draw(st.lists(st.integers(0, inputs - 1), min_size=1, unique=True)))
    damping = data.draw(st.sampled_from([0.0, 1e-8, 1e-4, 1.0]))
    new = least_squares(weight, moments, kept, damping=damping)
    energy = (weight @ moments * weight).sum(dim=1)
    ours = reconstruction_error(weight, moments, kept, new)
    selected = reconstruction_error(weight, moments, kept, weight[:, kept])
    assert bool((ours <= selected + 1e-7 * (selected + energy)).all())


def test_inputs_are_untouched() -> None:
    weight, _, moments = layer()
    before = weight.clone(), moments.clone()
    reconstruction_error(weight, moments, KEPT, least_squares(weight, moments, KEPT))
    assert torch.equal(weight, before[0])
    assert torch.equal(moments, before[1])


def test_singular_moments_fall_back_to_more_damping() -> None:
    weight, _, _ = layer()
    column = torch.ones(9, 1, dtype=torch.float64)
    moments = column @ column.T - 1e-12 * torch.eye(9, dtype=torch.float64)  # rank one, a little indefinite
    new = least_squares(weight, moments, KEPT, damping=0.0)
    error = reconstruction_error(weight, column @ column.T, KEPT, new)
    assert float(error.max()) < 1e-6  # all inputs are equal, so that any one of them can make up for the rest


def test_dead_inputs_leave_the_weights_as_they_are() -> None:
    weight, _, moments = layer()
    assert torch.equal(least_squares(weight, moments * 0.0, KEPT), weight[:, KEPT])


def test_moments_that_are_not_finite_are_an_error() -> None:
    weight, _, moments = layer()
    moments[0, 0] = torch.nan
    with pytest.raises(DataError, match="not finite"):
        least_squares(weight, moments, KEPT)


@pytest.mark.parametrize("solved", [True, False])
def test_errors_as_inputs_go_are_those_of_each_choice_alone(*, solved: bool) -> None:
    weight, _, moments = layer(inputs=12, seed=3)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    found = nested_errors(weight, moments, order, solved=solved)
    assert float(found[:, 0].max()) == 0.0
    for gone in range(1, 12):
        kept = order[gone:]
        new = least_squares(weight, moments, kept, damping=1e-9) if solved else weight[:, kept]
        expected = reconstruction_error(weight, moments, kept, new)
        torch.testing.assert_close(found[:, gone], expected, rtol=0.05 if solved else 1e-9, atol=1e-9)
    torch.testing.assert_close(found[:, 12], (weight @ moments * weight).sum(1), rtol=1e-2, atol=0)


def test_errors_of_independent_inputs() -> None:
    weight, _, _ = layer()
    order = torch.tensor([4, 1, 8, 0, 2, 3, 5, 6, 7])
    expected = nested_errors(weight, torch.eye(9, dtype=torch.float64), order, solved=False)
    torch.testing.assert_close(gone_alone(weight, order), expected)
