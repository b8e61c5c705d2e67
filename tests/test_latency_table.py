"""The latency table, measured on a made-up machine whose law is known: the fit must find it again."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autoprune.core.architecture import Architecture, Layer, Width
from autoprune.core.cost import LatencyTable
from autoprune.core.space import Choice, Space, UnitOptions
from autoprune.core.target import Target
from autoprune.core.unit import DROP, Option, Unit, keep_all
from autoprune.profile.cost_model import CostModel
from autoprune.profile.draw import draw
from autoprune.profile.latency import Bench, measure_table, refitted
from autoprune.progress import Silent

STAGES, BLOCKS = (16, 32, 64), 3
BASE_S, KERNEL_S, BLOCK_S, OUT_S = 2e-4, 3e-5, 4e-6, 2e-6


def space() -> Space:
    entries = []
    for channels in STAGES:
        for number in range(BLOCKS):
            block = Unit(f"s{channels}.{number}", "block", 1, ())
            inner = Unit(f"{block.name}.conv1", "channels", channels, (), parent=block.name)
            keeps = range(channels - channels // 16, 0, -channels // 16)
            entries.append(UnitOptions(block, (keep_all(block), DROP)))
            entries.append(UnitOptions(inner, (keep_all(inner), *(Option("l2", keep) for keep in keeps))))
    return Space(tuple(entries))


def architecture() -> Architecture:
    layers = [Layer("stem", "conv", "stem", Width(3), Width(16), 9, 1, 64, 0, 0, 0)]
    for channels in STAGES:
        for number in range(BLOCKS):
            block = f"s{channels}.{number}"
            full, cut = Width(channels), Width(0, ((f"{block}.conv1", 1),))
            for name, inputs, outputs in (("conv1", full, cut), ("conv2", cut, full)):
                layers.append(
                    Layer(f"{block}.{name}", "conv", f"conv{channels}", inputs, outputs, 9, 1, 64, 0, 0, 0, block)
                )
    return Architecture(tuple(layers))


SPACE, ARCHITECTURE = space(), architecture()


def seconds(choice: Choice, step: int) -> float:
    """The machine's law: a fixed part, then for each kernel a launch, blocks in times blocks out, blocks out."""
    total = BASE_S
    options = dict(
        zip(SPACE.names, (unit.options[i] for unit, i in zip(SPACE.entries, choice, strict=True)), strict=True)
    )
    for channels in STAGES:
        for number in range(BLOCKS):
            if options[f"s{channels}.{number}"] == DROP:
                continue
            wide, kept = math.ceil(channels / step), math.ceil(options[f"s{channels}.{number}.conv1"].keep / step)
            total += 2 * KERNEL_S + 2 * BLOCK_S * wide * kept + OUT_S * (wide + kept)
    return total


class Cut(nn.Module):
    """Stands for a cut model: it only remembers its choice."""

    def __init__(self, choice: Choice) -> None:
        super().__init__()
        self.choice = choice


@dataclass
class FakeMachine:
    """A clock and a runtime in one: running a model moves the clock by what the model costs."""

    step: int
    slowness: Callable[[float], float] = lambda time: 1.0
    name: str = "fake"
    time: float = 0.0
    loaded: list[Choice] = field(default_factory=list)

    def now(self) -> float:
        return self.time

    def version(self) -> str:
        return "1"

    def load(self, model: nn.Module, example: Tensor, target: Target) -> FakeSession:
        assert isinstance(model, Cut)
        self.loaded.append(model.choice)
        return FakeSession(self, seconds(model.choice, self.step))

    def save(self, model: nn.Module, example: Tensor, path: Path) -> None:
        raise NotImplementedError


@dataclass
class FakeSession:
    machine: FakeMachine
    cost: float

    def run(self, inputs: np.ndarray) -> np.ndarray:
        return inputs

    def invoke(self) -> None:
        self.machine.time += self.cost * self.machine.slowness(self.machine.time)


class Listener(Silent):
    def __init__(self) -> None:
        self.phases: list[tuple[str, int | None]] = []
        self.steps = 0

    def phase(self, name: str, steps: int | None = None) -> None:
        self.phases.append((name, steps))

    def step(self, done: int = 1) -> None:
        self.steps += done


def measured(
    machine: FakeMachine, space: Space = SPACE, *, listener: Listener | None = None, seed: int = 0
) -> LatencyTable:
    bench = Bench(Cut, machine, Target("fake"), torch.zeros(1, 3, 8, 8), machine.now)
    return measure_table(space, ARCHITECTURE, bench=bench, key="key", seed=seed, progress=listener or Listener())


@pytest.mark.parametrize("step", [8, 16])
def test_the_fit_finds_the_machines_law(step: int) -> None:
    table = measured(FakeMachine(step))
    assert table.channel_block == step
    assert table.dense_s == pytest.approx(seconds(SPACE.dense, step))
    assert table.check.models == 20
    assert table.check.worst_error < 0.01
    model = CostModel(ARCHITECTURE, SPACE, table)
    unseen = draw(SPACE, 100, np.random.default_rng(99))
    found = model.evaluate("latency", np.asarray(unseen))
    np.testing.assert_allclose(found, [seconds(choice, step) for choice in unseen], rtol=0.01)


def test_drift_and_noise_cost_little() -> None:
    noise = np.random.default_rng(5)

    def slowness(time: float) -> float:
        return (1.5 + 0.5 * math.sin(time / 3)) * (1 + 0.02 * noise.random()) * (20 if noise.random() < 0.05 else 1)

    table = measured(FakeMachine(8, slowness))
    assert table.channel_block in (8, 16)
    model = CostModel(ARCHITECTURE, SPACE, table)
    dense = seconds(SPACE.dense, 8)
    errors = [
        model.cost("latency", choice) / model.dense["latency"] / (seconds(choice, 8) / dense) - 1
        for choice in draw(SPACE, 50, np.random.default_rng(7))
    ]
    assert np.median(np.abs(errors)) < 0.01
    assert np.max(np.abs(errors)) < 0.04


def test_a_narrower_aligned_model_is_never_predicted_slower() -> None:
    model = CostModel(ARCHITECTURE, SPACE, measured(FakeMachine(8)))
    for entry, change in zip(SPACE.entries, model.linearise("latency", SPACE.dense), strict=True):
        aligned = [option.keep in (0, *model.aligned_widths(entry.unit)) for option in entry.options]
        assert (np.diff(change[aligned]) <= 1e-12).all()


def test_widths_that_the_machine_dislikes_are_found() -> None:
    class Picky(FakeMachine):
        def load(self, model: nn.Module, example: Tensor, target: Target) -> FakeSession:
            session = super().load(model, example, target)
            options = zip(SPACE.entries, self.loaded[-1], strict=True)
            keeps = {entry.unit.name: entry.options[index].keep for entry, index in options}
            inner = [keep for name, keep in keeps.items() if name.endswith(".conv1") and keeps[name[:-6]]]
            session.cost += 5e-5 * sum(keep % 4 != 0 for keep in inner)
            return session

    model = CostModel(ARCHITECTURE, SPACE, measured(Picky(8)))
    assert model.table is not None
    assert model.table.check.worst_error < 0.01
    unit = SPACE.names.index("s32.1.conv1")
    keeps = [option.keep for option in SPACE.entries[unit].options]
    change = model.linearise("latency", SPACE.dense)[unit]
    assert change[keeps.index(30)] > 0 > change[keeps.index(24)]
    cheapest = SPACE.options_of(model.cheapest_choice("latency"))
    assert set(cheapest.values()) == {DROP}


def test_a_seed_gives_the_same_table() -> None:
    assert measured(FakeMachine(8), seed=3) == measured(FakeMachine(8), seed=3)


def test_checked_models_are_others_than_fitted_and_progress_counts_all() -> None:
    machine, listener = FakeMachine(8), Listener()
    table = measured(machine, listener=listener)
    dense, *timed = machine.loaded
    assert dense == SPACE.dense
    assert len(timed) == len(set(timed)) == table.fitted_models + table.check.models
    assert 24 <= table.fitted_models <= 64
    assert listener.phases == [("profile", len(timed))]
    assert listener.steps == len(timed)


def test_small_spaces_use_what_they_have() -> None:
    def only(count: int) -> Space:
        kept = [UnitOptions(unit.unit, unit.options[:1]) for unit in SPACE.entries]
        kept[1] = UnitOptions(SPACE.units[1], SPACE.entries[1].options[:count])
        return Space(tuple(kept))

    nothing = measured(FakeMachine(8), only(1))
    assert (nothing.base, nothing.fitted_models, nothing.check.models) == (1.0, 0, 0)
    few = measured(FakeMachine(8), only(6))
    assert (few.fitted_models, few.check.models) == (4, 1)


def test_draws_show_every_block_dropped_and_every_width() -> None:
    choices = draw(SPACE, 64, np.random.default_rng(0))
    assert len(set(choices)) == 64
    assert SPACE.dense not in choices
    for position, entry in enumerate(SPACE.entries):
        seen = {choice[position] for choice in choices}
        if entry.unit.kind == "block":
            assert seen == {0, 1}
        else:
            assert len(seen) >= 0.8 * len(entry.options)
    costs = [seconds(choice, 1) / seconds(SPACE.dense, 1) for choice in choices]
    assert min(costs) < 0.35
    assert max(costs) > 0.8


def test_draws_do_not_run_out_of_a_small_space() -> None:
    small = Space(SPACE.entries[:2])
    assert len(draw(small, 1000, np.random.default_rng(0))) <= 16


def test_models_near_a_budget_mend_the_table_where_it_errs() -> None:
    """A machine that dislikes models with few blocks: nothing that is drawn says so in a form that features have."""
    table = measured(FakeMachine(8))
    slow = [choice for choice in draw(SPACE, 200, np.random.default_rng(0)) if blocks_left(choice) <= 5]
    assert len(slow) >= 10

    def share(choice: Choice) -> float:
        return 1.2 * seconds(choice, 8) / seconds(SPACE.dense, 8)

    def error(of: LatencyTable, choices: list[Choice]) -> float:
        model = CostModel(ARCHITECTURE, SPACE, of)
        predicted = [model.cost("latency", choice) / model.dense["latency"] for choice in choices]
        return float(np.median([abs(p / share(c) - 1) for p, c in zip(predicted, choices, strict=True)]))

    near, unseen = slow[: len(slow) // 2], slow[len(slow) // 2 :]
    again = refitted(table, SPACE, ARCHITECTURE, [(choice, share(choice)) for choice in near], seed=0)
    assert error(again, near) < 0.5 * error(table, near)
    assert error(again, unseen) < 0.7 * error(table, unseen)
    assert again.fitted_models == table.fitted_models + len(near)
    assert LatencyTable.model_validate_json(again.model_dump_json()) == again


def blocks_left(choice: Choice) -> int:
    options = [entry.options[index] for entry, index in zip(SPACE.entries, choice, strict=True)]
    kinds = [entry.unit.kind for entry in SPACE.entries]
    return sum(kind == "block" and option != DROP for kind, option in zip(kinds, options, strict=True))
