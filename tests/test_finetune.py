"""Fine-tuning: it brings a candidate nearer, goes on bit for bit from its state, and leaves what it must not touch."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from networks import CASES, IMAGE, Residual, Transformer, assert_untouched, randomised, snapshot, workbench_of
from test_weights import bench_of
from torch import Tensor, nn

from autoprune.bank.stitch import Candidate, deployable
from autoprune.core.target import Target
from autoprune.core.unit import DROP, Option
from autoprune.errors import ModelError
from autoprune.evaluators.divergence import Head, heads_of
from autoprune.model.cut import CutPlan
from autoprune.model.fold import fold_norms
from autoprune.nest import tensors_of
from autoprune.recover.finetune import DIVERGED, FineTune, Schedule
from autoprune.recover.lesson import Goal, Lesson
from autoprune.recover.refit import refit
from autoprune.searching.scorer import Selection
from autoprune.storage import Weights
from autoprune.subject import in_memory
from autoprune.workbench import Workbench

torch.set_num_threads(1)

SPACE = """
methods:
  - {method: l2, compensate: least_squares}
weights:
  - {method: dense, bits: [8, 16], inputs: [32]}
  - {method: dense, bits: [8], inputs: [8]}
  - {method: magnitude, patterns: ["2:4", 50%, "4x1 50%"], bits: [32]}
  - {method: low_rank, ranks: [25%]}
levels: 4
"""
MIXED = {
    "layer1.0.conv1": Option("l2", 4, "least_squares"),
    "layer1.0.conv2.weight": Option("magnitude", 288, pattern="50%"),
    "layer1.1.conv1.weight": Option("magnitude", 288, pattern="2:4"),
    "layer1.1.conv2.weight": Option("magnitude", 288, pattern="4x1 50%"),
    "layer2.0.conv1.weight": Option("dense", 864, bits=8),
    "layer2.0.conv2.weight": Option("dense", 1296, bits=8, inputs=8),
    "layer2.1.conv1.weight": Option("low_rank", 252, rank=3),
    "layer2.1.conv2.weight": Option("dense", 1296, bits=16),
}
SPARSE = ("layer1.0.conv2", "layer1.1.conv1", "layer1.1.conv2")
FROZEN = ("layer2.0.conv1", "layer2.0.conv2", "layer2.1.conv1")
HALF = "layer2.1.conv2"
SHORT = Schedule(12, learning_rate=3e-3, batch=32)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return bench_of(
        randomised(Residual()), tmp_path_factory.mktemp("mixed"), size="plain", text=SPACE, target=Target(batch=16)
    )


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return workbench_of(randomised(Residual()), IMAGE, tmp_path_factory.mktemp("bench"), calibration=512)


def lesson_of(bench: Workbench) -> Lesson:
    inputs = bench.subject.task.data.calibration_inputs.contiguous(memory_format=bench.subject.layout)
    return Lesson.of(bench.subject.model, inputs, bench.selection.heads)


def badly_pruned(bench: Workbench) -> Candidate:
    units = (unit for unit in bench.space.units if unit.narrows)
    return bench.stitcher.build({unit.name: Option("l2", max(1, unit.width // 2)) for unit in units})


def whole(model: nn.Module) -> Candidate:
    """A candidate of a model from nowhere."""
    return Candidate(model, CutPlan({}))


def lesson_for(model: nn.Module, inputs: Tensor, *, logits: bool = True) -> Lesson:
    with torch.no_grad():
        tensors = tensors_of(model(inputs.clone()))
    targets = torch.zeros(len(inputs), *tensors[0].shape[1:-1], dtype=torch.int64 if logits else torch.float32)
    return Lesson.of(model, inputs, heads_of(tensors, targets, samples=len(inputs)))


def disturbed(model: nn.Module, scale: float = 0.3) -> nn.Module:
    """A copy with noise on all its weights, as if it had been pruned badly."""
    copied, generator = copy.deepcopy(model), torch.Generator().manual_seed(9)
    for parameter in copied.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data += scale * parameter.data.abs().mean() * noise
    return copied


def assert_same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert set(one) == set(other)
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name].reshape(tensor.shape)), name


# ---- it helps ------------------------------------------------------------------------------------------------------


def test_a_badly_pruned_network_comes_nearer_on_unseen_inputs(bench: Workbench) -> None:
    candidate = badly_pruned(bench)
    before = float(bench.selection.divergences(candidate.model).mean())
    training = FineTune(lesson_of(bench), candidate, schedule=Schedule(80, learning_rate=3e-3), seed=0)
    losses = [training.advance(20) for _ in range(4)]
    assert training.done == 80
    assert training.stopped is None
    assert losses[-1] < 0.7 * losses[0]
    assert float(bench.selection.divergences(training.result().model).mean()) < 0.7 * before


def test_it_goes_on_from_what_a_refit_gave(bench: Workbench) -> None:
    candidate = badly_pruned(bench)
    refit(bench.thorough, candidate)
    before = float(bench.selection.divergences(candidate.model).mean())
    training = FineTune(lesson_of(bench), candidate, schedule=Schedule(60, learning_rate=1e-3), seed=0)
    training.advance(60)
    assert float(bench.selection.divergences(training.result().model).mean()) < before


@pytest.mark.parametrize("name", CASES)
def test_every_network_can_be_trained(name: str) -> None:
    """In-place rectifiers, grouped and one-dimensional layers, maps, shared layers: the loss falls in all of them."""
    model = CASES[name].model()
    lesson = lesson_for(model, CASES[name].example(64))
    training = FineTune(lesson, whole(disturbed(model)), schedule=Schedule(40, 3e-3, batch=64), seed=1)
    first = training.advance(1)
    assert training.advance(39) < first
    assert training.stopped is None


def test_a_model_of_tokens(tmp_path: Path) -> None:
    """Logits (samples, positions, classes), integer inputs."""
    model = randomised(Transformer(seen=False))
    tokens = torch.randint(20, (192, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        heads = heads_of((model(tokens[:64]),), torch.zeros(64, 8, dtype=torch.int64), samples=64)
    assert heads[0].class_dim == 2
    selection = Selection((tokens[:64],), heads)
    candidate = whole(disturbed(model, 0.5))
    training = FineTune(Lesson.of(model, tokens[64:], heads), candidate, schedule=Schedule(60, 3e-3, batch=32), seed=0)
    training.advance(60)
    before, after = (float(selection.divergences(m).mean()) for m in (candidate.model, training.result().model))
    assert after < 0.5 * before


# ---- what it aims at -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2, None])
def test_at_temperature_1_the_loss_is_the_divergence(dim: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    dense, other = torch.randn(6, 5, 7, generator=generator), torch.randn(6, 5, 7, generator=generator)
    head = Head(0, dense, dim, 1.0 if dim else 3.5)
    loss = Goal(0, dim, head.energy).loss(dense, other, 1.0)
    assert float(loss) == pytest.approx(float(head.divergence(other).mean()), rel=1e-5)


def test_a_class_that_is_ruled_out_adds_nothing() -> None:
    dense = torch.tensor([[1.0, 2.0, -math.inf]])
    outputs = torch.tensor([[2.0, 1.0, -math.inf]], requires_grad=True)
    loss = Goal(0, 1, 1.0).loss(dense, outputs, 2.0)
    loss.backward()
    assert math.isfinite(float(loss.detach()))
    assert outputs.grad is not None
    assert bool(outputs.grad.isfinite().all())


class Two(nn.Module):
    """Logits and features, in a dict, with an integer among them."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.logits, self.features = nn.Linear(6, 16), nn.Linear(16, 4), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.body(x).tanh()
        logits = self.logits(x)
        return {"class": logits.argmax(1), "logits": logits, "features": self.features(x)}


def test_all_outputs_count() -> None:
    torch.manual_seed(0)
    model, inputs = Two().eval(), torch.randn(96, 6)
    lesson = lesson_for(model, inputs)
    assert [(goal.index, goal.class_dim) for goal in lesson.goals] == [(1, 1), (2, None)]
    training = FineTune(lesson, whole(disturbed(model, 1.0)), schedule=Schedule(120, 1e-2, batch=96), seed=0)
    training.advance(120)
    before, after = disturbed(model, 1.0), training.result().model
    for goal in lesson.goals:
        place = torch.arange(96)
        alone = replace(lesson, goals=(goal,), answers=None)
        losses = [float(alone.loss(model, place, 1.0).detach()) for model in (before, after)]
        assert losses[1] < 0.2 * losses[0]


def test_answers_are_the_same_whether_kept_or_asked_for(bench: Workbench) -> None:
    kept = lesson_of(bench)
    asked = Lesson.of(bench.subject.model, kept.inputs, bench.selection.heads, most_bytes=0)
    assert kept.answers is not None
    assert asked.answers is None
    chosen = torch.tensor([5, 1, 200])
    torch.testing.assert_close(kept.answer(chosen)[0], asked.answer(chosen)[0])


def test_inputs_are_not_written_by_a_model_that_works_in_place() -> None:
    model, inputs = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 3)).eval(), torch.randn(40, 6)
    before = inputs.clone()
    FineTune(lesson_for(model, inputs), whole(disturbed(model)), schedule=SHORT, seed=0).advance(3)
    assert torch.equal(inputs, before)


# ---- state ---------------------------------------------------------------------------------------------------------


def test_resumed_is_uninterrupted_bit_for_bit(mixed: Workbench, tmp_path: Path) -> None:
    """Through a file, into a new training, across an epoch, with a candidate of every kind of edit."""
    candidate, lesson = mixed.stitcher.build(MIXED), lesson_of(mixed)
    through = FineTune(lesson, candidate, schedule=SHORT, seed=3)
    wanted = [through.advance(5), through.advance(7)]
    first = FineTune(lesson, candidate, schedule=SHORT, seed=3)
    got = [first.advance(5)]
    safetensors.torch.save_file(first.state(), tmp_path / "state.safetensors")
    second = FineTune(lesson, candidate, schedule=SHORT, seed=3)
    second.load(safetensors.torch.load_file(tmp_path / "state.safetensors"))
    assert second.done == 5
    got.append(second.advance(7))
    assert got == wanted
    assert_same(second.state(), through.state())
    assert_same(second.result().model.state_dict(), through.result().model.state_dict())


def test_how_steps_are_called_for_changes_nothing(bench: Workbench) -> None:
    candidate, lesson = badly_pruned(bench), lesson_of(bench)
    trainings = [FineTune(lesson, candidate, schedule=SHORT, seed=0) for _ in range(2)]
    trainings[0].advance(100)
    for _ in range(12):
        trainings[1].advance(1)
    assert [training.done for training in trainings] == [12, 12]
    assert_same(trainings[0].state(), trainings[1].state())
    assert trainings[0].advance(1) == math.inf


def test_an_earlier_state_can_be_gone_back_to(bench: Workbench) -> None:
    """A rival's state over one's own, as population-based training does it."""
    candidate, lesson = badly_pruned(bench), lesson_of(bench)
    training = FineTune(lesson, candidate, schedule=SHORT, seed=0)
    start = training.state()
    training.advance(4)
    later, loss = training.state(), training.advance(2)
    training.load(start)
    assert training.done == 0
    assert_same(training.result().model.state_dict(), candidate.model.state_dict())
    training.load(later)
    assert training.advance(2) == loss


def test_a_state_of_another_candidate_is_refused(bench: Workbench) -> None:
    lesson = lesson_of(bench)
    training = FineTune(lesson, badly_pruned(bench), schedule=SHORT, seed=0)
    before = training.state()
    other = FineTune(lesson, bench.stitcher.build({"layer1.1": DROP}), schedule=SHORT, seed=0)
    other.advance(1)
    with pytest.raises(ValueError, match="another candidate"):
        training.load(other.state())
    with pytest.raises(ValueError, match="no 'progress'"):
        training.load({})
    assert_same(training.state(), before)
    longer = FineTune(lesson, badly_pruned(bench), schedule=replace(SHORT, steps=20), seed=0)
    longer.advance(20)
    with pytest.raises(ValueError, match="has made 20 steps; the schedule has 12"):
        training.load(longer.state())


def test_another_seed_sees_other_samples(bench: Workbench) -> None:
    lesson, candidate = lesson_of(bench), badly_pruned(bench)
    losses = {FineTune(lesson, candidate, schedule=SHORT, seed=seed).advance(1) for seed in range(4)}
    assert len(losses) == 4


def test_every_sample_is_seen_once_an_epoch(bench: Workbench) -> None:
    training = FineTune(lesson_of(bench), badly_pruned(bench), schedule=replace(SHORT, steps=32), seed=0)
    seen = []
    for _ in range(32):  # two epochs of 512
        seen.append(training._chosen())
        training.advance(1)
    for epoch in (torch.cat(seen[:16]), torch.cat(seen[16:])):
        assert sorted(epoch.tolist()) == list(range(512))
    assert not torch.equal(torch.cat(seen[:16]), torch.cat(seen[16:]))


# ---- what stays ----------------------------------------------------------------------------------------------------


def test_teacher_and_candidate_stay_bit_identical(mixed: Workbench) -> None:
    candidate = mixed.stitcher.build(MIXED)
    dense, given = snapshot(mixed.subject.model), snapshot(candidate.model)
    edits = {name: edit.weight.clone() for name, edit in candidate.edits.items()}
    training = FineTune(lesson_of(mixed), candidate, schedule=SHORT, seed=0)
    training.advance(6)
    result = training.result()
    kept = snapshot(result.model)
    training.advance(6)
    assert_untouched(mixed.subject.model, dense)
    assert_same(candidate.model.state_dict(), given)
    assert_same({name: edit.weight for name, edit in candidate.edits.items()}, edits)
    assert_same(result.model.state_dict(), kept)  # further steps leave a result alone
    for model in (candidate.model, result.model):
        assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
        assert not any(module.training for module in model.modules())


def test_flags_of_gradients_are_given_back(bench: Workbench) -> None:
    candidate = badly_pruned(bench)
    candidate.model.requires_grad_(False)
    candidate.model.get_parameter("head.bias").requires_grad_(True)
    training = FineTune(lesson_of(bench), candidate, schedule=SHORT, seed=0)
    training.advance(2)
    result = training.result().model
    assert [name for name, parameter in result.named_parameters() if parameter.requires_grad] == ["head.bias"]
    assert not torch.equal(result.get_parameter("stem.0.weight"), candidate.model.get_parameter("stem.0.weight"))


def test_what_is_done_inside_layers_stays(mixed: Workbench) -> None:
    candidate = mixed.stitcher.build(MIXED)
    training = FineTune(lesson_of(mixed), candidate, schedule=replace(SHORT, weight_decay=0.1), seed=0)
    training.advance(12)
    result = training.result()
    before, after = candidate.model.state_dict(), result.model.state_dict()
    for layer in SPARSE:
        zeros = before[f"{layer}.weight"] == 0
        assert 0.4 < float(zeros.double().mean()) < 0.6
        assert torch.equal(after[f"{layer}.weight"] == 0, zeros)
        assert not bool(after[f"{layer}.weight"].signbit()[zeros].any())  # -0.0 is a value in a packed file
        assert not torch.equal(before[f"{layer}.weight"], after[f"{layer}.weight"])
    for name in before:
        if name.startswith(FROZEN) or "running" in name:
            assert torch.equal(before[name], after[name]), name
    half = after[f"{HALF}.weight"]
    assert torch.equal(half, half.half().float())
    assert not torch.equal(half, before[f"{HALF}.weight"])
    for layer, edit in result.edits.items():
        if edit.factors is None:
            assert torch.equal(edit.weight, after[f"{layer}.weight"])
        assert (edit.codes, edit.factors, edit.half) == (
            candidate.edits[layer].codes, candidate.edits[layer].factors, candidate.edits[layer].half,
        )  # fmt: skip


def test_a_result_is_scored_deployed_and_measured_as_any_candidate(mixed: Workbench) -> None:
    candidate = mixed.stitcher.build(MIXED)
    training = FineTune(lesson_of(mixed), candidate, schedule=SHORT, seed=0)
    training.advance(12)
    result = training.result()
    ready = deployable(result, mixed.stitcher.norms)
    with torch.no_grad():
        wanted, got = (model(mixed.selection.batches[0]) for model in (result.model, ready))
    assert float((wanted - got).abs().mean()) < 0.02 * float(wanted.abs().mean())
    sizes = [mixed.files.size(each.model, Weights.of(each)) for each in (candidate, result)]
    assert sizes[0] == sizes[1]
    before = training.state()
    fold_norms(result.model, mixed.stitcher.norms)  # as scoring does with what it throws away
    assert_same(training.state(), before)


class Tied(nn.Module):
    """One matrix looks tokens up and makes the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.look_up, self.inner, self.head = nn.Embedding(12, 8), nn.Linear(8, 8), nn.Linear(8, 12, bias=False)
        self.head.weight = self.look_up.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.look_up(x)).relu())


def test_tied_parameters_stay_tied() -> None:
    torch.manual_seed(0)
    model, tokens = Tied().eval(), torch.randint(12, (64, 5))
    training = FineTune(lesson_for(model, tokens), whole(disturbed(model)), schedule=SHORT, seed=0)
    before = training.model.get_parameter("head.weight").detach().clone()
    training.advance(6)
    training.load(training.state())
    training.advance(6)
    result = training.result().model
    assert result.get_parameter("head.weight") is result.get_parameter("look_up.weight")
    assert not torch.equal(result.get_parameter("head.weight"), before)
    safetensors.torch.save(training.state())  # no memory is in it twice


def test_batch_norms_and_dropout_are_as_in_evaluation() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)).eval()
    given = disturbed(model).train()
    lesson = lesson_for(model, torch.randn(64, 6))
    losses = [FineTune(lesson, whole(given), schedule=SHORT, seed=0).advance(1) for _ in range(2)]
    assert losses[0] == losses[1]
    training = FineTune(lesson, whole(given), schedule=SHORT, seed=0)
    training.advance(12)
    result = training.result().model
    assert not any(module.training for module in result.modules())
    assert torch.equal(result.get_buffer("1.running_mean"), given.get_buffer("1.running_mean"))
    assert int(result.get_buffer("1.num_batches_tracked")) == 0
    assert not torch.equal(result.get_parameter("1.weight"), given.get_parameter("1.weight"))


def test_weights_stay_laid_out_as_they_are(bench: Workbench) -> None:
    candidate = badly_pruned(bench)
    in_memory(candidate.model, torch.channels_last)
    training = FineTune(lesson_of(bench), candidate, schedule=SHORT, seed=0)
    training.advance(2)
    training.load(training.state())
    training.advance(2)
    wanted = {name: each.stride() for name, each in candidate.model.named_parameters()}
    assert {name: each.stride() for name, each in training.result().model.named_parameters()} == wanted
    assert bench.subject.layout == torch.channels_last
    assert training._lesson.batch(torch.tensor([3, 1])).is_contiguous(memory_format=torch.channels_last)


def test_a_caller_without_gradients_can_train(bench: Workbench) -> None:
    with torch.no_grad():
        training = FineTune(lesson_of(bench), badly_pruned(bench), schedule=SHORT, seed=0)
        assert math.isfinite(training.advance(2))


# ---- hyperparameters -----------------------------------------------------------------------------------------------


def test_the_learning_rate_rises_and_falls() -> None:
    schedule = Schedule(100, learning_rate=2.0, warmup=0.1)
    rates = [schedule.rate(step) for step in range(101)]
    assert rates[10] == 2.0 == max(rates)
    assert 0 < rates[0] < rates[5] < rates[10] > rates[50] > rates[99] > 0
    assert rates[100] == pytest.approx(0.0, abs=1e-12)
    assert Schedule(1).rate(0) == Schedule(1).learning_rate


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0}, {"batch": 0}, {"learning_rate": 0.0}, {"learning_rate": math.nan}, {"learning_rate": math.inf},
        {"weight_decay": -1.0}, {"weight_decay": math.nan}, {"warmup": 1.0}, {"warmup": -0.1}, {"temperature": 0.0},
    ],
)  # fmt: skip
def test_schedules_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Schedule(**{"steps": 10, **wrong})  # type: ignore[arg-type]


def test_retuning_counts_from_the_next_step(bench: Workbench) -> None:
    lesson, candidate = lesson_of(bench), badly_pruned(bench)

    def after(**changes: float) -> tuple[float, dict[str, Tensor]]:
        training = FineTune(lesson, candidate, schedule=SHORT, seed=0)
        training.advance(3)
        training.retune(**changes)
        loss = training.advance(1)
        return loss, {name: each.detach() for name, each in training.model.named_parameters()}

    plain, faster, colder, smaller = (
        after(),
        after(learning_rate=6e-3),
        after(temperature=1.0),
        after(weight_decay=50.0),
    )
    assert faster[0] == plain[0]  # the loss is that before the step
    assert colder[0] != plain[0]
    for changed in (faster, colder, smaller):
        assert not torch.equal(changed[1]["stem.0.weight"], plain[1]["stem.0.weight"])
    assert float(smaller[1]["stem.0.weight"].norm()) < 0.95 * float(plain[1]["stem.0.weight"].norm())
    assert torch.equal(smaller[1]["head.bias"], plain[1]["head.bias"])  # biases do not decay
    training = FineTune(lesson, candidate, schedule=SHORT, seed=0)
    training.retune(learning_rate=0.5)
    assert training.schedule == replace(SHORT, learning_rate=0.5)
    with pytest.raises(ValueError, match="temperature"):
        training.retune(temperature=-1.0)
    assert training.schedule == replace(SHORT, learning_rate=0.5)


# ---- when it goes wrong --------------------------------------------------------------------------------------------


def test_a_learning_rate_that_makes_nan_is_survived(bench: Workbench) -> None:
    candidate = badly_pruned(bench)
    training = FineTune(lesson_of(bench), candidate, schedule=replace(SHORT, learning_rate=1e30), seed=0)
    training.advance(12)
    assert training.stopped is not None
    assert "3 times in a row" in training.stopped
    assert training.done == 3
    assert training.advance(5) == math.inf
    assert_same(training.result().model.state_dict(), candidate.model.state_dict())  # the last that was good
    resumed = FineTune(lesson_of(bench), candidate, schedule=SHORT, seed=0)
    resumed.load(training.state())
    assert resumed.stopped == training.stopped
    resumed.retune(learning_rate=1e-3)
    assert resumed.stopped is None
    assert math.isfinite(resumed.advance(3))


def test_one_bad_step_is_undone_and_halves_the_learning_rate(bench: Workbench) -> None:
    lesson, candidate = lesson_of(bench), badly_pruned(bench)
    training = FineTune(lesson, candidate, schedule=SHORT, seed=0)
    training.advance(3)
    good = {name: each.detach().clone() for name, each in training.model.named_parameters()}
    training.retune(learning_rate=1e4)
    training.advance(1)
    training.retune(learning_rate=3e-3)
    loss = training.advance(1)  # sees the wreck, goes back, and makes a step at half the rate
    assert training.stopped is None
    assert loss < DIVERGED
    moved = max(float((each - good[name]).detach().abs().max()) for name, each in training.model.named_parameters())
    assert 0 < moved <= 1.01 * 1.5e-3
    assert training.advance(7) < loss


def test_resuming_in_the_middle_of_a_wreck_is_uninterrupted(bench: Workbench) -> None:
    lesson, candidate, wild = lesson_of(bench), badly_pruned(bench), replace(SHORT, learning_rate=1e4)
    through, first, second = (FineTune(lesson, candidate, schedule=wild, seed=0) for _ in range(3))
    for training in (through, first):
        training.advance(1)
    second.load(first.state())
    for training in (through, second):
        training.advance(3)
    assert_same(through.state(), second.state())


def test_a_candidate_that_returns_nan_stops_at_once(bench: Workbench) -> None:
    candidate = badly_pruned(bench)
    candidate.model.get_parameter("head.bias").data.fill_(math.nan)
    training = FineTune(lesson_of(bench), candidate, schedule=SHORT, seed=0)
    assert training.advance(5) == math.inf
    assert training.done == 0
    assert training.stopped is not None


def test_nothing_to_train_is_said() -> None:
    model = nn.Flatten().eval()
    training = FineTune(lesson_for(model, torch.randn(8, 3)), whole(nn.Flatten()), schedule=SHORT, seed=0)
    assert training.advance(3) == math.inf
    assert training.stopped == "every layer is frozen: there is nothing to train"


class Detached(nn.Module):
    """What no gradient passes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_what_cannot_be_trained_is_refused_with_a_reason(bench: Workbench) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(8, 6)
    lesson = lesson_for(nn.Linear(6, 3).eval(), inputs)
    for model, problem in ((Detached(), "cannot be fine-tuned"), (nn.Linear(6, 4), "outputs of the same shapes")):
        with pytest.raises(ModelError, match=problem):
            FineTune(lesson, whole(model), schedule=SHORT, seed=0).advance(1)
    two = lesson_for(Two().eval(), inputs)
    with pytest.raises(ModelError, match=r"returns 1 tensor\(s\) where the dense model returns 3"):
        FineTune(two, whole(nn.Linear(6, 4)), schedule=SHORT, seed=0).advance(1)
    with pytest.raises(ValueError, match="training mode"):
        Lesson.of(nn.Linear(6, 3).train(), inputs, bench.selection.heads)
    with pytest.raises(ValueError, match="one sample at least"):
        Lesson.of(nn.Linear(6, 3).eval(), inputs[:0], bench.selection.heads)
