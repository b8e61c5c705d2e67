"""Calibration: statistics equal naive loops over samples, whatever the memory bound; a bank survives the disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from networks import CASES, UNet, Vgg, randomised, workbench_of
from torch import Tensor, nn
from torch.nn import functional

from autoprune.bank import calibrate as module
from autoprune.bank import store
from autoprune.bank.build import Bank, rank
from autoprune.bank.calibrate import CalibrationSettings, LayerStatistics, calibrate
from autoprune.errors import DataError
from autoprune.methods import METHODS
from autoprune.model.discover import discover
from autoprune.model.flow import norms_after
from autoprune.progress import Silent

torch.set_num_threads(1)

ALL = CalibrationSettings(patches=10**9, gradient_samples=10**9, movement=True)
NAMES = ["vgg", "vgg in place", "residual in place", "mobile", "grouped 2", "mlp", "waves", "dense"]


def batches_of(name: str, sizes: Sequence[int] = (6, 6)) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(1)
    shape = CASES[name].shape
    inputs = tuple(torch.randn(size, *shape, generator=generator) for size in sizes)
    return inputs, tuple(torch.randint(0, 5, (size,), generator=generator) for size in sizes)


def layers_of(model: nn.Module) -> list[str]:
    kinds = (nn.Conv1d, nn.Conv2d, nn.Linear)
    return [
        name for name, layer in model.named_modules() if isinstance(layer, kinds) and getattr(layer, "groups", 1) <= 2
    ]


def observed(
    model: nn.Module, name: str, settings: CalibrationSettings = ALL, sizes: Sequence[int] = (6, 6)
) -> dict[str, LayerStatistics]:
    inputs, targets = batches_of(name, sizes)
    return calibrate(model, layers_of(model), batches=inputs, targets=targets, settings=settings, progress=Silent())


def inputs_of(model: nn.Module, example: Tensor) -> dict[str, Tensor]:
    """What enters every layer, copied when it enters."""
    seen: dict[str, Tensor] = {}

    def keeper(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def keep(_layer: nn.Module, entered: tuple[Tensor, ...]) -> None:
            seen[name] = entered[0].clone()

        return keep

    handles = [layer.register_forward_pre_hook(keeper(name)) for name, layer in model.named_modules()]
    with torch.no_grad():
        model(example)
    for handle in handles:
        handle.remove()
    return seen


def rows_of(layer: nn.Module, inputs: Tensor) -> Tensor:
    """Input columns by `unfold`, (samples * positions, columns), float64."""
    inputs = inputs.double()
    if isinstance(layer, nn.Linear):
        return inputs.reshape(-1, inputs.shape[-1])
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d))
    if isinstance(layer, nn.Conv1d):
        sizes = {key: (1, getattr(layer, key)[0]) for key in ("kernel_size", "dilation", "stride")}
        columns = functional.unfold(inputs[:, :, None], padding=(0, layer.padding[0]), **sizes)
    else:
        columns = functional.unfold(inputs, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    return columns.transpose(1, 2).flatten(0, 1)


@pytest.mark.parametrize("name", NAMES)
def test_moments_equal_im2col(name: str) -> None:
    model = CASES[name].model()
    seen = inputs_of(model, torch.cat(batches_of(name)[0]))
    for layer, statistics in observed(model, name).items():
        rows = rows_of(model.get_submodule(layer), seen[layer])
        scale = float(rows.square().mean())
        assert statistics.second is not None
        assert statistics.second.dtype == torch.float64
        assert torch.allclose(statistics.second, rows.T @ rows / len(rows), atol=1e-5 * scale, rtol=1e-5)
        assert torch.allclose(statistics.mean, rows.mean(0), atol=1e-5)
        assert torch.allclose(statistics.diagonal, rows.square().mean(0), atol=1e-5 * scale, rtol=1e-5)


@pytest.mark.parametrize("sizes", [(6, 6), (10, 2)], ids=["even", "a short last batch"])
@pytest.mark.parametrize("name", ["vgg", "mlp", "waves"])
def test_activity_is_the_mean_over_samples(name: str, sizes: Sequence[int]) -> None:
    model = CASES[name].model()
    seen = inputs_of(model, torch.cat(batches_of(name, sizes)[0]))
    for layer, statistics in observed(model, name, sizes=sizes).items():
        inputs = seen[layer].double()
        over = tuple(axis for axis in range(inputs.ndim) if axis != 1)
        assert torch.allclose(statistics.mean_abs, inputs.abs().mean(over), atol=1e-6), layer
        assert torch.allclose(statistics.zero_share, (inputs == 0).double().mean(over), atol=1e-6), layer
        assert torch.allclose(
            statistics.per_sample.double(), inputs.flatten(2).mean(2) if inputs.ndim > 2 else inputs, atol=1e-5
        )


def naive_gradients(
    model: nn.Module, inputs: Tensor, targets: Tensor, layers: Sequence[str]
) -> dict[str, tuple[Tensor, Tensor]]:
    """One sample at a time, every layer wrapped so that its input and output stay what they are."""
    sums: dict[str, list[Tensor]] = {}
    for sample, target in zip(inputs, targets, strict=True):
        held: dict[str, tuple[Tensor, Tensor]] = {}

        def wrap(name: str, layer: nn.Module, held: dict[str, tuple[Tensor, Tensor]] = held):  # type: ignore[no-untyped-def]
            plain = type(layer).forward

            def forward(x: Tensor) -> Tensor:
                entered = x  # shared with a shortcut: the gradient of the tensor, by all its ways  # noqa: B023
                out = plain(layer, entered)
                entered.retain_grad()
                out.retain_grad()
                held[name] = (entered, out)
                return out * 1.0  # what is done to it in place is done to a copy

            return forward

        for name in layers:
            layer = model.get_submodule(name)
            layer.__dict__["forward"] = wrap(name, layer)
        try:
            loss = functional.cross_entropy(model(sample[None].clone().requires_grad_()), target[None])
            loss.backward()
        finally:
            for name in layers:
                del model.get_submodule(name).__dict__["forward"]
            for parameter in model.parameters():
                parameter.grad = None
        for name, (x, y) in held.items():
            assert x.grad is not None
            assert y.grad is not None
            product = (x.detach() * x.grad).double()
            gate = product.flatten(2).sum((0, 2)).square() if product.ndim > 2 else product.sum(0).square()
            fisher = y.grad.double().square()
            fisher = fisher.flatten(2).sum((0, 2)) if fisher.ndim > 2 else fisher.sum(0)
            before = sums.get(name, [torch.zeros_like(gate), torch.zeros_like(fisher)])
            sums[name] = [before[0] + gate, before[1] + fisher]
    return {name: (gate, fisher / len(inputs)) for name, (gate, fisher) in sums.items()}


@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_one_sample_at_a_time(name: str) -> None:
    model = CASES[name].model()
    inputs, targets = batches_of(name)
    wanted = naive_gradients(model, torch.cat(inputs), torch.cat(targets), layers_of(model))
    for layer, statistics in observed(model, name).items():
        taylor, fisher = wanted[layer]
        assert torch.allclose(statistics.taylor, taylor, rtol=1e-3, atol=1e-5 * float(taylor.max())), f"{layer}: taylor"
        assert torch.allclose(statistics.output_fisher, fisher, rtol=1e-3, atol=1e-5 * float(fisher.max())), (
            f"{layer}: fisher"
        )


def test_an_activation_in_place_changes_nothing() -> None:
    """The same network with `inplace=True` has the same statistics."""
    plain, inplace = randomised(Vgg(norm=False)), randomised(Vgg(norm=False, inplace=True))
    first, second = observed(plain, "vgg"), observed(inplace, "vgg")
    for layer in first:
        for field in fields(LayerStatistics):
            one, other = getattr(first[layer], field.name), getattr(second[layer], field.name)
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-7), f"{layer}: {field.name}"


@pytest.mark.parametrize("patches", [10**9, 12], ids=["all positions", "sampled positions"])
def test_a_small_memory_bound_gives_the_same(patches: int) -> None:
    model = CASES["vgg"].model()
    whole = observed(model, "vgg", replace(ALL, patches=patches))
    bounded = observed(model, "vgg", replace(ALL, patches=patches, memory_bytes=8 * 30**2))
    for layer, statistics in whole.items():
        for field in fields(LayerStatistics):
            one, other = getattr(statistics, field.name), getattr(bounded[layer], field.name)
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-6), f"{layer}: {field.name}"


def test_the_memory_bound_is_kept() -> None:
    widths = {"a": 30, "b": 40, "c": 100, "d": 10, "e": 7000}
    settings = CalibrationSettings(memory_bytes=8 * (40**2 + 30**2), max_columns=6144)
    passes = list(module._passes({name: (1, width) for name, width in widths.items()}, settings))
    assert [name for together in passes for name in together] == list(widths)
    for together in passes:
        held = sum(8 * widths[name] ** 2 for name in together if widths[name] <= settings.max_columns)
        assert held <= settings.memory_bytes or len(together) == 1


def test_a_layer_too_wide_keeps_its_diagonal() -> None:
    model = CASES["vgg"].model()
    statistics = observed(model, "vgg", replace(ALL, max_columns=70))
    whole = observed(model, "vgg")
    assert statistics["2"].second is None
    assert statistics["9"].second is not None
    assert torch.allclose(statistics["2"].diagonal, whole["2"].diagonal)


def test_gradients_of_tokens_equal_those_of_their_vectors() -> None:
    torch.manual_seed(0)
    vectors, body = nn.Embedding(9, 6), nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 9))
    tokens, wanted = torch.randint(9, (8, 4)), torch.randint(9, (8, 4))
    wanted[:, 0] = -100  # context: not to be counted

    def of(model: nn.Module, layers: list[str], inputs: Tensor) -> list[LayerStatistics]:
        found = calibrate(model, layers, batches=(inputs,), targets=(wanted,), settings=ALL, progress=Silent())
        return [found[layer] for layer in layers]

    with torch.no_grad():
        looked_up = vectors(tokens)
    one = of(nn.Sequential(vectors, body), ["1.0", "1.2"], tokens)
    other = of(body, ["0", "2"], looked_up)
    for mine, theirs in zip(one, other, strict=True):
        assert float(mine.taylor.abs().min()) > 0
        torch.testing.assert_close(mine.taylor, theirs.taylor)
        torch.testing.assert_close(mine.output_fisher, theirs.output_fisher)
    assert vectors.weight.grad is None


def test_repeats_bit_for_bit() -> None:
    model = CASES["vgg"].model()
    settings = CalibrationSettings(patches=60, movement=True)
    first, second = observed(model, "vgg", settings), observed(model, "vgg", settings)
    for layer in first:
        for field in fields(LayerStatistics):
            assert torch.equal(getattr(first[layer], field.name), getattr(second[layer], field.name))


def test_one_map_of_logits_a_sample() -> None:
    """Outputs (samples, classes, height, width) with a class at every position, as the divergence has them."""
    model = randomised(UNet(pooled=False))
    example = torch.randn(4, 3, 8, 8)
    targets = model(example).argmax(1)
    statistics = calibrate(
        model, ["down2.0", "out"], batches=(example,), targets=(targets,), settings=ALL, progress=Silent()
    )
    loss_of = functional.cross_entropy(model(example), targets, reduction="sum")
    assert float(loss_of.detach()) > 0
    assert float(statistics["out"].output_fisher.sum()) > 0


@pytest.mark.parametrize("name", ["grouped 2", "mobile", "dense", "vgg", "mlp"])
def test_every_method_ranks_every_unit(name: str) -> None:
    model = CASES[name].model()
    inputs, targets = batches_of(name)
    anatomy = discover(model, inputs[0][:2])
    norms = norms_after(model, inputs[0][:2])
    readers = list(dict.fromkeys(member.layer for group in anatomy.groups for member in group.on("in")))
    statistics = calibrate(model, readers, batches=inputs, targets=targets, settings=ALL, progress=Silent())
    orders = rank(
        model, anatomy, statistics, norms=norms, methods=list(METHODS), targets=torch.cat(targets), seed=0,
        progress=Silent(),
    )  # fmt: skip
    for group in anatomy.groups:
        assert set(orders[group.root]) == set(METHODS)
        for order in orders[group.root].values():
            assert sorted(order.tolist()) == list(range(group.width))


# ---- the store -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["residual functional", "dense", "mlp"])
def test_a_bank_round_trips(name: str, tmp_path: Path) -> None:
    bench = workbench_of(CASES[name].model(), CASES[name].shape, tmp_path)
    path = tmp_path / "bank" / "x.safetensors"
    moments = store.Moments(path.parent, "k", memory_bytes=10**9, progress=Silent())
    for layer, statistics in bench.bank.statistics.items():
        if statistics.second is not None:
            moments.keep(layer, statistics.second)
    store.save_tensors(path, store.pack(bench.bank), {"key": "k"})
    tensors = store.load_tensors(path, key="k")
    assert tensors is not None
    known = store.unpack(tensors, bench.bank.norms, moments)
    assert known is not None
    assert_same_bank(known, bench.bank)


def assert_same_bank(one: Bank, other: Bank) -> None:
    for layer, statistics in one.statistics.items():
        mine, theirs = statistics.second, other.statistics[layer].second
        assert (mine is None) == (theirs is None)
        assert mine is None or theirs is None or torch.equal(mine, theirs)
    first, second = store.pack(one), store.pack(other)
    assert set(first) == set(second)
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        assert torch.equal(tensor, second[name]), name


def files_of(folder: Path) -> dict[str, float]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}


def without_moments(found: dict[str, float]) -> list[str]:
    return [path for path in found if ".moments" not in path]


def test_a_second_workbench_reads_the_bank(tmp_path: Path) -> None:
    case = CASES["residual functional"]
    first = workbench_of(case.model(), case.shape, tmp_path)
    before = files_of(tmp_path)
    assert len(without_moments(before)) == 2  # the bank and its priors
    second = workbench_of(case.model(), case.shape, tmp_path)
    assert files_of(tmp_path) == before
    assert_same_bank(first.bank, second.bank)
    for name, harms in first.priors.items():
        assert all((one == other).all() for one, other in zip(harms, second.priors[name], strict=True))


def test_a_damaged_bank_is_made_anew(tmp_path: Path) -> None:
    case = CASES["vgg"]
    first = workbench_of(case.model(), case.shape, tmp_path)
    for path in tmp_path.rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-20])
    assert_same_bank(workbench_of(case.model(), case.shape, tmp_path).bank, first.bank)
    for path in tmp_path.rglob("*.safetensors"):
        path.write_bytes(b"not a bank")
    assert_same_bank(workbench_of(case.model(), case.shape, tmp_path).bank, first.bank)


def test_other_weights_or_data_make_another_bank(tmp_path: Path) -> None:
    case = CASES["mlp"]
    workbench_of(case.model(), case.shape, tmp_path)
    workbench_of(case.model(seed=1), case.shape, tmp_path)
    workbench_of(case.model(), case.shape, tmp_path, seed=4)
    assert len(without_moments(files_of(tmp_path))) == 6


@pytest.mark.parametrize("calibration", [1, 129, 300])
@pytest.mark.parametrize("name", ["mlp", "residual functional"])
def test_any_number_of_calibration_samples(name: str, calibration: int, tmp_path: Path) -> None:
    """A last batch of one sample among them: norms over features cannot take it in training mode."""
    try:
        bench = workbench_of(CASES[name].model(), CASES[name].shape, tmp_path, calibration=calibration)
    except DataError as error:
        assert calibration == 1
        assert "calibration" in str(error)  # noqa: PT017
        return
    narrow = {entry.unit.name: entry.options[-1] for entry in bench.space.entries if entry.unit.narrows}
    assert torch.isfinite(bench.stitcher.build(narrow).model(CASES[name].example())).all()


def test_a_damaged_or_foreign_file_is_none(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    assert store.load_tensors(path, key="k") is None
    store.save_tensors(path, {"a": torch.ones(100)}, {"key": "other"})
    assert store.load_tensors(path, key="k") is None
    store.save_tensors(path, {"a": torch.ones(100)}, {"key": "k"})
    content = path.read_bytes()
    for damaged in (b"", b"\x00" * 8, content[:50], content[:-10], b"\xff" * 200):
        path.write_bytes(damaged)
        assert store.load_tensors(path, key="k") is None
    path.write_bytes(content)
    assert store.load_tensors(path, key="k") is not None
