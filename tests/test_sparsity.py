"""Sparsifiers against naive loops, patterns against counting, int8 against its own promises."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from autoprune.bank.movement import movement
from autoprune.core.pattern import Pattern, parse_pattern
from autoprune.definite import damped_cholesky, mean_diagonal
from autoprune.errors import ConfigError, DataError
from autoprune.sparsity import SPARSIFIERS, sparsifier
from autoprune.sparsity.base import DAMPING, LayerView
from autoprune.sparsity.masks import kept_mask
from autoprune.sparsity.quantise import quantise, scales_of

PATTERNS = ["50%", "70%", "90%", "2:4", "4:8", "1:4", "1x4 50%", "4x1 50%", "2x2 75%"]


HALF = [parse_pattern("50%")]


def view(outputs: int = 12, inputs: int = 8, positions: int = 9, *, seed: int = 0) -> LayerView:
    """A layer whose inputs are correlated, as activations are."""
    generator = torch.Generator().manual_seed(seed)
    columns = inputs * positions
    latent = torch.randn(4 * columns, columns // 4, generator=generator, dtype=torch.float64)
    mixing = torch.randn(columns // 4, columns, generator=generator, dtype=torch.float64)
    x = latent @ mixing + torch.randn(4 * columns, columns, generator=generator, dtype=torch.float64)
    weight = torch.randn(outputs, columns, generator=generator, dtype=torch.float64)
    return LayerView(weight, x.T @ x / len(x), inputs, movement=torch.randn(weight.shape, generator=generator).double())


def error(layer: LayerView, weight: Tensor) -> float:
    difference = weight - layer.weight
    return float((difference @ layer.moments * difference).sum())


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


@pytest.mark.parametrize("name", SPARSIFIERS)
@pytest.mark.parametrize("text", PATTERNS)
def test_every_sparsifier_keeps_to_the_pattern(name: str, text: str) -> None:
    pattern, layer = parse_pattern(text), view()
    before = layer.weight.clone()
    new = sparsifier(name).sparsify(layer, [pattern], seeded())[0]
    assert torch.equal(layer.weight, before)
    assert new.shape == before.shape
    zeros = new == 0
    if pattern.kind == "n:m":
        groups = zeros.view(12, 9, 8 // pattern.columns, pattern.columns)
        assert (groups.sum(-1) == pattern.columns - pattern.keep).all()
    elif pattern.kind == "block":
        tiles = zeros.view(12 // pattern.rows, pattern.rows, 9, 8 // pattern.columns, pattern.columns)
        share = tiles.permute(0, 2, 3, 1, 4).flatten(3).double().mean(-1)
        assert ((share == 0) | (share == 1)).all()
        assert share.mean() == pytest.approx(pattern.sparsity, abs=0.01)
    else:
        assert zeros.double().mean() == pytest.approx(pattern.sparsity, abs=0.02)


@pytest.mark.parametrize("name", SPARSIFIERS)
def test_nothing_asked_changes_nothing(name: str) -> None:
    layer = view()
    torch.testing.assert_close(
        sparsifier(name).sparsify(layer, [Pattern("unstructured", 0.0)], seeded())[0], layer.weight
    )


def test_magnitude_is_a_sort_over_the_layer() -> None:
    layer = view()
    new = sparsifier("magnitude").sparsify(layer, [parse_pattern("50%")], seeded())[0]
    cut = sorted(abs(value) for value in layer.weight.flatten().tolist())[layer.weight.numel() // 2]
    for old, now in zip(layer.weight.flatten().tolist(), new.flatten().tolist(), strict=True):
        assert now == (old if abs(old) >= cut else 0.0)


def test_wanda_is_a_sort_in_each_output() -> None:
    layer = view(outputs=3, inputs=4, positions=1)
    new = sparsifier("wanda").sparsify(layer, [parse_pattern("50%")], seeded())[0]
    for row in range(3):
        scores = [abs(float(layer.weight[row, c])) * math.sqrt(float(layer.moments[c, c])) for c in range(4)]
        lowest = sorted(range(4), key=scores.__getitem__)[:2]
        assert [c for c in range(4) if new[row, c] == 0] == sorted(lowest)


def dense_obs(layer: LayerView, keep: Tensor) -> Tensor:
    """Columns fixed from left to right; all that follow move by the exact OBS update (arXiv:2301.00774, equation 3),
    with the inverse Hessian of the columns still free computed anew at every step.
    """
    ridge = DAMPING * mean_diagonal(layer.moments)
    hessian = layer.moments + ridge * torch.eye(len(layer.moments), dtype=torch.float64)
    weight = layer.weight.clone()
    for column in range(weight.shape[1]):
        inverse = torch.linalg.inv(hessian[column:, column:])
        for row in range(len(weight)):
            if not keep[row, column]:
                weight[row, column:] -= weight[row, column] / inverse[0, 0] * inverse[0]
                weight[row, column] = 0.0
    return weight


@pytest.mark.parametrize("text", PATTERNS)
def test_sparsegpt_is_the_dense_obs_recursion(text: str) -> None:
    layer = view(outputs=6, inputs=8, positions=18)  # 144 columns: more than one block
    new = sparsifier("sparsegpt").sparsify(layer, [parse_pattern(text)], seeded())[0]
    torch.testing.assert_close(new, dense_obs(layer, new != 0), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("text", PATTERNS)
def test_better_criteria_leave_less_error(text: str) -> None:
    pattern = parse_pattern(text)
    errors = {name: [] for name in SPARSIFIERS}  # type: dict[str, list[float]]
    for seed in range(5):
        layer = view(seed=seed)
        for name, found in errors.items():
            found.append(error(layer, sparsifier(name).sparsify(layer, [pattern], seeded())[0]))
    total = {name: sum(found) for name, found in errors.items()}
    assert total["sparsegpt"] < min(total["wanda"], total["magnitude"])
    assert max(total["wanda"], total["magnitude"]) < total["random"]


def test_an_unknown_sparsifier_lists_the_others() -> None:
    with pytest.raises(ConfigError, match="wanda"):
        sparsifier("wonda")


@given(text=st.sampled_from(PATTERNS))
def test_patterns_are_read_back(text: str) -> None:
    assert parse_pattern(text).text == text
    assert parse_pattern(parse_pattern(text).text) == parse_pattern(text)


@pytest.mark.parametrize("text", ["", "4:2", "0:4", "4:4", "50", "100%", "-3%", "0x4 50%", "2:4:8", "half"])
def test_bad_patterns_say_what_is_allowed(text: str) -> None:
    with pytest.raises(ValueError, match=r"70%.*2:4.*4x1 50%"):
        parse_pattern(text)


@settings(max_examples=50, deadline=None)
@given(
    outputs=st.integers(1, 9), inputs=st.integers(1, 11), positions=st.sampled_from([1, 4, 9]),
    keep=st.integers(1, 7), more=st.integers(1, 7), seed=st.integers(0, 99),
)  # fmt: skip
def test_n_of_m_holds_exactly_at_ragged_widths(
    outputs: int, inputs: int, positions: int, keep: int, more: int, seed: int
) -> None:
    pattern = parse_pattern(f"{keep}:{keep + more}")
    scores = torch.rand(outputs, inputs * positions, generator=torch.Generator().manual_seed(seed))
    mask = kept_mask(scores, pattern, inputs=inputs).view(outputs, positions, inputs)
    for start in range(0, inputs, pattern.columns):
        group = mask[:, :, start : start + pattern.columns]
        assert (group.sum(-1) == math.ceil(keep * group.shape[-1] / pattern.columns)).all()


def test_int8_beats_rounding_and_keeps_zeros() -> None:
    layer = view(outputs=16, inputs=16)
    sparse = sparsifier("sparsegpt").sparsify(layer, [parse_pattern("2:4")], seeded())[0]
    done = quantise(layer, [sparse], [8])[0]
    assert done.codes.dtype == torch.int8
    assert int(done.codes.abs().max()) <= 127
    assert ((done.codes == 0) | (sparse != 0)).all()
    scale = scales_of(sparse, power=layer.moments.diagonal(), limit=torch.full((16,), 127.0)).double()[:, None]
    plain = torch.round(sparse / scale).clamp(-127, 127) * scale
    target = LayerView(sparse, layer.moments, layer.inputs)
    assert error(target, done.dequantised().double()) < 0.8 * error(target, plain)


def test_int8_is_the_dense_recursion() -> None:
    layer = view(outputs=4, inputs=6, positions=25)  # 150 columns: two blocks
    done = quantise(layer, [layer.weight], [8])[0]
    scale = done.scales.double()
    ridge = DAMPING * mean_diagonal(layer.moments)
    hessian = layer.moments + ridge * torch.eye(150, dtype=torch.float64)
    damped_cholesky(hessian, 0.0)  # the oracle needs it definite
    weight, codes = layer.weight.clone(), torch.zeros(4, 150)
    for column in range(150):
        inverse = torch.linalg.inv(hessian[column:, column:])
        codes[:, column] = torch.round(weight[:, column] / scale).clamp(-127, 127)
        owed = (weight[:, column] - codes[:, column] * scale) / inverse[0, 0]
        weight[:, column:] -= owed[:, None] * inverse[0]
    assert torch.equal(done.codes.float(), codes)


def test_movement_goes_by_its_scores() -> None:
    layer = view(outputs=3, inputs=4, positions=1)
    scores = torch.randn(3, 4, generator=seeded(), dtype=torch.float64)
    new = sparsifier("movement").sparsify(LayerView(layer.weight, layer.moments, 4, movement=scores), HALF, seeded())[0]
    lowest = sorted(range(12), key=scores.flatten().tolist().__getitem__)[:6]
    assert [index for index in range(12) if new.flatten()[index] == 0] == sorted(lowest)
    with pytest.raises(DataError, match="no fine-tune was observed"):
        sparsifier("movement").sparsify(LayerView(layer.weight, layer.moments, 4), HALF, seeded())


def test_movement_is_the_sum_over_a_fine_tune() -> None:
    """Against a naive loop: gradients by autograd of the loss written out, steps of momentum by hand."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 5, generator=generator, dtype=torch.float64) * 0.1
    model = nn.Sequential(nn.Linear(5, 3, bias=False)).double()
    model[0].weight.data = weight.clone()
    inputs = torch.randn(64, 5, generator=generator, dtype=torch.float64)
    classes = torch.arange(64) % 3
    found = movement(model, ["0"], batches=[inputs], targets=[classes])["0"]
    now, velocity, total = weight.clone(), torch.zeros_like(weight), torch.zeros_like(weight)
    for step in range(32):
        x, wanted = inputs[32 * (step % 2) :][:32], classes[32 * (step % 2) :][:32]
        probabilities = torch.softmax(x @ now.T, 1)
        probabilities[torch.arange(32), wanted] -= 1.0
        gradient = probabilities.T @ x / 32
        total -= now * gradient
        velocity = 0.9 * velocity + gradient
        now -= 1e-3 * velocity
    torch.testing.assert_close(found, total)
    assert torch.equal(model[0].weight, weight)
