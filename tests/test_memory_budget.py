"""Resident memory: counted lives against hand counts and really cut models, the fit, and real processes."""

from __future__ import annotations

import itertools
import runpy
import subprocess
import sys
from pathlib import Path

import networks
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from autoprune.bank.stitch import shape_only
from autoprune.core.cost import TableCheck
from autoprune.core.memory_table import MemoryTable
from autoprune.core.space import Choice, Space, UnitOptions
from autoprune.core.target import Target
from autoprune.errors import ModelError, TargetError
from autoprune.model.buffers import Buffers
from autoprune.model.discover import Anatomy, discover
from autoprune.model.tape import record
from autoprune.profile import memory
from autoprune.profile.arrange import arranged
from autoprune.profile.cost_model import CostModel
from autoprune.profile.draw import draw
from autoprune.profile.latency import Bench
from autoprune.profile.live_map import LiveMap
from autoprune.profile.memory import MemoryModel, live_map_of, measure_memory
from autoprune.profile.widths import WidthMap
from autoprune.progress import Silent
from autoprune.runtimes import resident as measuring
from autoprune.runtimes import runtime
from autoprune.runtimes.resident import Resident, resident
from autoprune.spaces import load_space, resolve

ONNX = runtime("onnxruntime")
CASES = ("vgg", "vgg in place", "residual functional", "residual in place", "bottleneck", "mobile", "dense", "unet")


class Subject:
    """A case of `networks` with its space, as a bench for a runtime."""

    def __init__(self, name: str, engine: str = "onnxruntime") -> None:
        case = networks.CASES[name]
        self.model, self.example = case.model(), case.example()
        self.anatomy: Anatomy = discover(self.model, self.example)
        self.architecture = self.anatomy.architecture
        self.space: Space = resolve(self.anatomy.units, load_space("cnn-channels", Path()))
        self.bench = Bench(self.build, runtime(engine), Target(engine, batch=len(self.example)), self.example)
        self.widths = WidthMap.of(self.architecture, self.space)

    def build(self, choice: Choice) -> nn.Module:
        return shape_only(self.model, self.anatomy, self.space.options_of(choice))

    def kept(self, choices: list[Choice]) -> np.ndarray:
        rows = np.asarray(choices)
        return self.widths.keeps[np.arange(rows.shape[1]), self.widths.normal(rows)]

    def choices(self, count: int, seed: int = 0) -> list[Choice]:
        return [self.space.dense, *draw(self.space, count, np.random.default_rng(seed))]


def counted(model: nn.Module, example: Tensor, *, planned: bool) -> float:
    """The peak of one model, from its own pass alone."""
    tape = record(model, example, planned=planned)
    buffers = Buffers.of(tape, planned=planned)
    return float((np.asarray(tape.bytes)[list(buffers.values)] @ buffers.needed).max())


@pytest.mark.parametrize(("planned", "peak"), [(True, 1536 + 4096 + 2048), (False, 1536 + 2 * 4096)])
def test_a_chain_needs_what_one_counts_by_hand(planned: bool, peak: int) -> None:
    """Batch 2 of 8x8 floats: input 3 channels, then 8, then 4. Planned, a ReLU writes over what it reads."""
    chain = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(256, 5),
    )  # fmt: skip
    assert counted(chain, torch.zeros(2, 3, 8, 8), planned=planned) == peak


@pytest.mark.parametrize(("planned", "tensors"), [(True, 2), (False, 3)])
def test_a_residual_block_needs_what_one_counts_by_hand(planned: bool, tensors: int) -> None:
    """Batch 4 of 8x8 floats: planned, a block holds its input and one tensor within; the sum goes to the input."""
    case = networks.CASES["residual functional"]
    assert counted(case.model(), case.example(), planned=planned) == 4 * 64 * 4 * (3 + tensors * 8)


@pytest.mark.parametrize("engine", ["onnxruntime", "torch"])
@pytest.mark.parametrize("name", CASES)
def test_any_choice_needs_what_the_really_cut_model_needs(name: str, engine: str) -> None:
    subject = Subject(name, engine)
    live_map, choices = live_map_of(subject.space, subject.bench), subject.choices(12)
    planned = engine == "onnxruntime"
    cut = [counted(subject.build(choice), subject.example, planned=planned) for choice in choices]
    np.testing.assert_allclose(live_map.peak(subject.kept(choices)), cut, rtol=1e-9)
    assert len(set(cut)) > 3


def test_recording_leaves_the_model_and_passes_numbers_to_who_looks_at_them() -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) if float(x.sum()) >= 0 else x

    model = Looks().train()
    before = networks.snapshot(model)
    assert counted(model, torch.ones(2, 4), planned=True) == 2 * 2 * 4 * 4
    networks.assert_untouched(model, before)
    assert model.training
    with pytest.raises(ModelError, match=r"shape \(2, 5\)"):
        record(model, torch.ones(2, 5), planned=True)


@pytest.mark.parametrize(("second", "units"), [(16, 32), (12, 32), (24, 16 + 32 + 24)])
def test_blocks_pad_copy_and_leave_gaps(second: int, units: int) -> None:
    """In blocks of 16, 24 channels take 32. A pool takes whole blocks only: 24 are copied, and fit no gap of 16."""
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, second, 3, padding=1), nn.MaxPool2d(2),
                          nn.Flatten(), nn.Linear(second * 16, 5))  # fmt: skip
    live_map = LiveMap.of(Space(()), lambda _: model, torch.zeros(1, 3, 8, 8), planned=True)
    result = 5 * 4
    assert live_map.needs(np.zeros((1, 0)), block=16).tolist() == [(units + 3) * 8 * 8 * 4 + result]
    assert live_map.peak(np.zeros((1, 0))).tolist() == [(16 + second + 3) * 8 * 8 * 4]


def test_a_width_that_no_kernel_takes_in_blocks_is_copied_and_what_was_copied_is_freed() -> None:
    """18 channels, padded to 32, are copied for the next convolution; what that makes lies where the 32 were."""
    model = nn.Sequential(nn.Conv2d(3, 18, 3, padding=1), nn.Conv2d(18, 16, 3, padding=1), nn.MaxPool2d(8),
                          nn.Flatten(), nn.Linear(16, 5))  # fmt: skip
    live_map = LiveMap.of(Space(()), lambda _: model, torch.zeros(1, 3, 8, 8), planned=True)
    assert live_map.needs(np.zeros((1, 0)), block=16).tolist() == [(32 + 18 + 3) * 8 * 8 * 4 + 5 * 4]


def best_fit(sizes: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> float:
    """One arrangement, one byte range after the other."""
    placed: list[tuple[float, float, int]] = []
    total = 0.0
    for index in np.argsort(starts, kind="stable"):
        alive = sorted((low, high) for low, high, end in placed if end >= starts[index])
        if not sizes[index]:
            continue
        gaps = [(high, low) for (_, high), (low, _) in itertools.pairwise([(0.0, 0.0), *alive, (total, total)])]
        fitting = [(low - high, high) for high, low in gaps if low - high >= sizes[index]]
        place = min(fitting)[1] if fitting else max((high for _, high in alive), default=0.0)
        placed.append((place, place + sizes[index], int(ends[index])))
        total = max(total, place + sizes[index])
    return total


def test_all_arrangements_at_once_are_each_the_best_fit() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(0, 6, (200, 12)).astype(np.float64)
    starts = np.sort(rng.integers(0, 12, 12))
    ends = starts + rng.integers(0, 4, (200, 12))
    expected = [best_fit(row, starts, last) for row, last in zip(sizes, ends, strict=True)]
    assert arranged(sizes, starts, ends).tolist() == expected


def law(subject: Subject, choice: Choice) -> Resident:
    """A machine that holds three bytes a byte of weights and two of what is alive, and four a weight while it loads."""
    weights = CostModel(subject.architecture, subject.space).cost("size", choice)
    live = live_map_of(subject.space, subject.bench).needs(subject.kept([choice]), block=8)[0]
    return Resident(50_000_000, round(10_000 + 4 * weights), round(20_000 + 3 * weights + 2 * live))


def test_the_fit_finds_the_machines_law(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = Subject("bottleneck")
    built: list[Choice] = []

    def build(choice: Choice) -> nn.Module:
        built.append(choice)
        return subject.build(choice)

    monkeypatch.setattr(memory, "resident", lambda *_, **__: law(subject, built[-1]))
    bench = Bench(build, ONNX, Target(), subject.example)
    table = measure_memory(subject.space, subject.architecture, bench=bench, key="key", seed=0, progress=Silent())
    assert table.channel_block == 8
    assert (table.per_weight_byte, table.loading_per_weight_byte) == pytest.approx((3, 4), rel=0.02)
    assert (table.fitted_models, table.check.models) == (17, 8)
    assert table.check.worst_error < 0.01
    assert table.dense_bytes == law(subject, subject.space.dense).model_bytes
    assert MemoryTable.model_validate_json(table.model_dump_json()) == table
    choices = subject.choices(20, seed=9)
    model = MemoryModel(live_map_of(subject.space, subject.bench), table, subject.space, subject.architecture)
    weights = CostModel(subject.architecture, subject.space).evaluate("size", np.asarray(choices))
    expected = [law(subject, choice).model_bytes for choice in choices]
    np.testing.assert_allclose(model.evaluate(np.asarray(choices), weights), expected, rtol=0.01)


@pytest.mark.parametrize("engine", ["onnxruntime", "torch"])
def test_forty_megabytes_of_weights_are_seen(engine: str) -> None:
    example, weights = torch.zeros(1, 1000), 40_000_000

    def measured(width: int) -> Resident:
        model = nn.Sequential(nn.Linear(1000, width), nn.ReLU(), nn.Linear(width, 10))
        return resident(model, example, runtime=runtime(engine), target=Target(engine), repeats=1)

    small, large = measured(10), measured(10_000)
    assert weights <= large.model_bytes - small.model_bytes < 3 * weights
    assert large.process_bytes == large.runtime_bytes + large.model_bytes
    assert abs(large.runtime_bytes - small.runtime_bytes) < 10_000_000


def test_the_process_for_onnx_runtime_holds_no_torch() -> None:
    loader = Path(measuring.__file__).with_name("_onnx_loader.py")
    program = f"import runpy, sys; runpy.run_path({str(loader)!r}); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert callable(runpy.run_path(str(loader))["load"])


def test_a_process_that_fails_tells_its_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "export", lambda *_: b"no graph")
    with pytest.raises(TargetError, match=r"onnxruntime: the model does not run .*INVALID_PROTOBUF"):
        resident(nn.Linear(2, 2), torch.zeros(1, 2), runtime=ONNX, target=Target())


def test_a_process_that_does_not_end_is_a_target_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "_TIMEOUT_S", 0.01)
    with pytest.raises(TargetError, match="TimeoutExpired"):
        resident(nn.Linear(2, 2), torch.zeros(1, 2), runtime=ONNX, target=Target())


def test_what_is_not_measured_is_told() -> None:
    class Other:
        name = "other"

    with pytest.raises(TargetError, match="'other', only with onnxruntime, torch"):
        resident(nn.Linear(2, 2), torch.zeros(1, 2), runtime=Other(), target=Target("other"))  # type: ignore[arg-type]
    with pytest.raises(TargetError, match="device: cpu"):
        resident(nn.Linear(2, 2), torch.zeros(1, 2), runtime=ONNX, target=Target(device="cuda"))


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_memory_of_neighbours_is_exact(remembered: CostModel, data: st.DataObject) -> None:
    sizes = remembered.space.sizes
    choice = tuple(data.draw(st.integers(0, size - 1)) for size in sizes)
    now, changes = remembered.cost("memory", choice), remembered.linearise("memory", choice)
    unit = data.draw(st.integers(0, len(sizes) - 1))
    for option in range(sizes[unit]):
        neighbour = (*choice[:unit], option, *choice[unit + 1 :])
        assert remembered.cost("memory", neighbour) - now == pytest.approx(float(changes[unit][option]), abs=1e-3)


def test_what_is_reachable_is_below_the_dense_model(remembered: CostModel) -> None:
    least, dense = remembered.range("memory")
    assert least < remembered.cost("memory", remembered.space.dense)
    assert dense == remembered.dense["memory"]


@pytest.fixture(scope="module")
def remembered() -> CostModel:
    """The law of a machine, and what it makes of a residual net."""
    subject = Subject("residual functional")
    table = MemoryTable(
        key="k", dense_bytes=2e7, runtime_bytes=5e7, base_bytes=1e6, per_weight_byte=3.0, per_live_byte=2.0,
        loading_base_bytes=5e5, loading_per_weight_byte=2.0, channel_block=8, fitted_models=1,
        check=TableCheck(models=0, median_error=0.0, worst_error=0.0),
    )  # fmt: skip
    architecture = subject.architecture
    live = live_map_of(subject.space, subject.bench)
    return CostModel(architecture, subject.space, memory=MemoryModel(live, table, subject.space, architecture))


def test_a_space_with_fewer_options_costs_the_same(remembered: CostModel) -> None:
    """Every second option is left out: what is left is counted otherwise, and costs what it did."""
    whole, memory = remembered.space, remembered.memory
    assert memory is not None
    fewer = Space(tuple(UnitOptions(entry.unit, entry.options[::2]) for entry in whole.entries))
    less = CostModel(remembered.architecture, fewer, memory=memory.on(fewer, remembered.architecture))
    choice = tuple(size - 1 for size in fewer.sizes)
    same = whole.choice_of(fewer.options_of(choice))
    assert less.cost("memory", choice) == remembered.cost("memory", same)
    assert same != choice
