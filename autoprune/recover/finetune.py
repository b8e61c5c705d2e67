"""Fine-tuning of one candidate by distillation from the dense model: in steps, restorable bit for bit, without labels.

Knows steps, and by a `Lesson` how far a candidate is from the dense model. Does not know policies, budgets or how
candidates are found, nor when to stop early: whoever calls `advance` decides that, scores what `result` gives, and
keeps what was there before where that is better.

What a candidate is stays as it is: shapes, zeros inside layers, ties between parameters, statistics of batch norms and
all that is stored otherwise than as floats. Layers of integers, layers in two and layers that compute in integers keep
every bit; the norms behind them are trained, through their rounding.
"""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Self, final

import torch
from torch import Tensor, nn

from autoprune.bank.sparse import Edit
from autoprune.bank.stitch import Candidate
from autoprune.model.coupling import is_matrix
from autoprune.model.integers import integer_layers
from autoprune.recover.lesson import Lesson

MOST_NORM = 1.0
"""Gradients are clipped to it."""
MOST_RESCUES = 3
"""So many in a row end the training."""
DIVERGED = 10.0
"""A loss of so many times the first one (or of so many times 1, where that is more) is as bad as none: 1 is what an
output of all zeros has by squares, and the descent does not come back from there within a short training."""

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and how fast. `warmup` is the share of the `steps` in which the learning rate rises to its height; it
    then falls to 0 as a cosine. `batch` is in samples. Raises ValueError for what makes no sense.

    The default rate lowered the divergence wherever it was tried (ResNet-20, a small ViT); 1e-3 raised it once of six
    times in 100 steps. Over many epochs of few samples top-1 goes on rising when the divergence rises again.
    """

    steps: int
    learning_rate: float = 3e-4
    weight_decay: float = 0.0
    warmup: float = 0.05
    temperature: float = 2.0
    batch: int = 64

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1:
            raise ValueError(f"steps and batch must be at least 1, not {self.steps} and {self.batch}")
        for name in ("learning_rate", "temperature"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be finite and above 0, not {value}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be finite and at least 0, not {self.weight_decay}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is a share of the steps, at least 0 and below 1, not {self.warmup}")

    def rate(self, step: int) -> float:
        """The learning rate of a step, 0 the first one."""
        rising = round(self.warmup * self.steps)
        if step < rising:
            return self.learning_rate * (step + 1) / (rising + 1)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, self.steps - rising)))


@dataclass(slots=True)
class _Progress:
    """What changes as steps go by, beside parameters and moments."""

    done: int = 0
    rescues: int = 0
    """In a row, without one good step from new parameters between them."""
    share: float = 1.0
    """Of the schedule's learning rate: halved by every rescue."""
    first: float = 0.0
    """The loss of the first step, once there is one."""

    def packed(self) -> Tensor:
        """(4,) float64."""
        return torch.tensor([self.done, self.rescues, self.share, self.first], dtype=torch.float64)

    @classmethod
    def of(cls, packed: Tensor) -> Self:
        """The inverse of `packed`."""
        done, rescues, share, first = packed.tolist()
        return cls(int(done), int(rescues), share, first)


@dataclass(frozen=True, slots=True)
class _Trained:
    """The parameters of our own copy that are trained, by name, and the zeros in them that stay, and what they were
    when their loss was last seen to be fine.
    """

    parameters: Mapping[str, nn.Parameter]
    zeros: Mapping[str, Tensor]
    good: Mapping[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "good", {name: each.detach().clone() for name, each in self.parameters.items()})

    @classmethod
    def of(cls, model: nn.Module, edits: Mapping[str, Edit]) -> Self:
        """All floating parameters outside frozen layers. A parameter of several names is frozen if any of them is."""
        frozen = {id(each) for name in _frozen(model, edits) for each in model.get_submodule(name).parameters()}
        parameters = {
            name: each for name, each in model.named_parameters() if each.is_floating_point() and id(each) not in frozen
        }
        names = {id(each): name for name, each in parameters.items()}
        zeros = {
            names[id(weight)]: weight.detach() == 0
            for weight in (model.get_parameter(f"{layer}.weight") for layer, edit in edits.items() if _is_float(edit))
            if id(weight) in names
        }
        return cls(parameters, zeros)

    def keep_zeros(self) -> None:
        """Project the parameters onto their zeros; positive ones, which the packed file stores in no bits."""
        for name, zeros in self.zeros.items():
            self.parameters[name].masked_fill_(zeros, 0.0)

    def clipped(self) -> bool:
        """Take from the gradients what would move zeros, clip the rest; whether they are finite."""
        for name, zeros in self.zeros.items():
            gradient = self.parameters[name].grad
            if gradient is not None:
                gradient.masked_fill_(zeros, 0.0)
        return bool(nn.utils.clip_grad_norm_(list(self.parameters.values()), MOST_NORM).isfinite())


@final
class FineTune:
    """The training of one candidate, on our own copy of it; neither the candidate nor the teacher is written.

    AdamW on the distillation loss of `Lesson`, gradients clipped to norm 1, the whole model in evaluation mode: batch
    norms keep their statistics, dropout is off. The samples of a step depend on `seed` and its number alone.

    A loss that is not finite, or ten times the first, is not stepped on: the parameters of the last good step come
    back, with new moments and half the learning rate. After three times in a row training stops there.
    """

    def __init__(self, lesson: Lesson, candidate: Candidate, *, schedule: Schedule, seed: int) -> None:
        self._lesson, self._candidate, self._schedule, self._seed = lesson, candidate, schedule, seed
        self._model = copy.deepcopy(candidate.model).eval()
        self._flags = {name: each.requires_grad for name, each in self._model.named_parameters()}
        self._trained = _Trained.of(self._model, candidate.edits)
        for each in self._model.parameters():
            each.grad = None
            each.requires_grad_(False)
        for each in self._trained.parameters.values():
            each.requires_grad_(True)
        self._progress = _Progress()
        self._optimizer = self._new_optimizer()

    @property
    def model(self) -> nn.Module:
        """Our own copy as it is now. Steps write it; take `result` for one that stays as it is."""
        return self._model

    @property
    def schedule(self) -> Schedule:
        """What is kept to now, with what `retune` changed."""
        return self._schedule

    @property
    def done(self) -> int:
        """How many steps were made."""
        return self._progress.done

    @property
    def stopped(self) -> str | None:
        """Why no further step will be made before the end of the schedule; None while there is no reason."""
        if not self._trained.parameters:
            return "every layer is frozen: there is nothing to train"
        if self._progress.rescues >= MOST_RESCUES:
            return (
                f"at step {self.done} the loss was not finite, or over {DIVERGED:g} times the first, {MOST_RESCUES} "
                "times in a row; the parameters are those before. Lower the learning rate"
            )
        return None

    def advance(self, steps: int) -> float:
        """Make so many steps, fewer where the schedule ends or training stops; their mean loss.

        Infinity where none was made. Raises ModelError for a model that cannot be trained so, see `Lesson.loss`.
        """
        losses: list[float] = []
        for _ in range(min(steps, self._schedule.steps - self.done)):
            if self.stopped is not None:
                break
            loss = self._step()
            if loss is not None:
                losses.append(loss)
        self._optimizer.zero_grad()  # the memory is free between calls
        return sum(losses) / len(losses) if losses else math.inf

    def retune(
        self, *, learning_rate: float | None = None, weight_decay: float | None = None, temperature: float | None = None
    ) -> None:
        """Change what is given from the next step on; parameters, moments and the place in the schedule stay.

        A learning rate that is given counts in full, whatever was halved before. Raises ValueError as `Schedule` does.
        """
        old = self._schedule
        self._schedule = replace(
            old,
            learning_rate=old.learning_rate if learning_rate is None else learning_rate,
            weight_decay=old.weight_decay if weight_decay is None else weight_decay,
            temperature=old.temperature if temperature is None else temperature,
        )
        if learning_rate is not None:
            self._progress.share, self._progress.rescues = 1.0, 0

    def state(self) -> dict[str, Tensor]:
        """All that steps change, as contiguous copies: parameters, buffers, moments, the step count.

        Schedule, seed and candidate are not in it: a training made with the same goes on bit for bit as this one would.
        """
        live = self._live()
        return {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in live.items()} | {
            "progress": self._progress.packed()
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned. Raises ValueError, with nothing written, for that of another candidate."""
        if "progress" not in state:
            raise ValueError("this is no state of a fine-tuning: it has no 'progress'")
        progress = _Progress.of(state["progress"])
        moments = {name.removeprefix("exp_avg.") for name in state if name.startswith("exp_avg.")}
        known = self._live(moments & set(self._trained.parameters))
        wrong = {"progress", *known} ^ set(state)
        wrong |= {name for name, tensor in known.items() if name in state and tensor.shape != state[name].shape}
        if wrong:
            some = ", ".join(sorted(wrong)[:3])
            raise ValueError(f"this state is of another candidate: {len(wrong)} tensors do not fit, such as {some}")
        if progress.done > self._schedule.steps:
            raise ValueError(f"this state has made {progress.done} steps; the schedule has {self._schedule.steps}")
        self._progress = progress
        self._optimizer = self._new_optimizer()
        for name in moments:
            parameter = self._trained.parameters[name]
            self._optimizer.state[parameter] = {key: known[f"{key}.{name}"] for key in _MOMENTS}
        with torch.no_grad():
            for name, tensor in known.items():
                tensor.copy_(state[name])

    def result(self) -> Candidate:
        """The candidate as it is trained now, in evaluation mode: a copy, which further steps leave alone.

        Gradient flags are the input candidate's; so is the plan. Edits hold the weights as they are now, and weights
        stored as halves are rounded to halves.
        """
        model = copy.deepcopy(self._model)
        for name, each in model.named_parameters():
            each.grad = None
            each.requires_grad_(self._flags[name])
        edits = {name: _renewed(model, name, edit) for name, edit in self._candidate.edits.items()}
        return Candidate(model, self._candidate.plan, edits)

    def _step(self) -> float | None:
        """One step; its loss, or None where training stopped instead."""
        rescued = False
        while not self._is_good(loss := self._backward()):
            self._rescue()
            if self.stopped is not None:
                return None
            rescued = True
        if not rescued:
            self._progress.rescues = 0
        rate = self._schedule.rate(self.done) * self._progress.share
        for group, decay in zip(self._optimizer.param_groups, (self._schedule.weight_decay, 0.0), strict=True):
            group.update(lr=rate, weight_decay=decay)
        with torch.no_grad():
            for name, good in self._trained.good.items():
                good.copy_(self._trained.parameters[name])
            self._optimizer.step()
            self._trained.keep_zeros()
        self._progress.done += 1
        return loss

    def _backward(self) -> float:
        """The loss of the present step, its gradients in place; NaN where these are not finite."""
        self._optimizer.zero_grad()
        with torch.enable_grad():
            loss = self._lesson.loss(self._model, self._chosen(), self._schedule.temperature)
        value = float(loss.detach())
        if not math.isfinite(value):
            return math.nan
        torch.autograd.backward(loss)
        return value if self._trained.clipped() else math.nan

    def _is_good(self, loss: float) -> bool:
        if self._progress.first == 0.0 and math.isfinite(loss):
            self._progress.first = loss
        return loss <= DIVERGED * max(self._progress.first, 1.0)  # False for NaN

    def _rescue(self) -> None:
        """Back to the last good parameters, more slowly. Moments begin anew: a bad gradient may be in them."""
        with torch.no_grad():
            for name, good in self._trained.good.items():
                self._trained.parameters[name].copy_(good)
        self._optimizer = self._new_optimizer()
        self._progress.rescues += 1
        self._progress.share /= 2

    def _chosen(self) -> Tensor:
        """The indices of this step's samples: every sample comes once, in a new order, before any comes again."""
        samples = len(self._lesson.inputs)
        size = min(self._schedule.batch, samples)
        epoch, place = divmod(self.done, samples // size)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self._seed}/{epoch}".encode()))
        return torch.randperm(samples, generator=generator)[place * size : (place + 1) * size]

    def _new_optimizer(self) -> torch.optim.AdamW:
        """Weights decay where that is asked for; biases, scales and shifts never do."""
        parameters = self._trained.parameters.values()
        groups = [[each for each in parameters if each.ndim > 1], [each for each in parameters if each.ndim < 2]]
        return torch.optim.AdamW([{"params": group} for group in groups], lr=0.0, weight_decay=0.0)

    def _live(self, moments: Collection[str] | None = None) -> dict[str, Tensor]:
        """The tensors behind `state`. Moments are those there are, or new ones of the parameters named."""
        found = {f"parameter.{name}": each.data for name, each in self._model.named_parameters()}
        found |= {f"buffer.{name}": each for name, each in self._model.named_buffers()}
        found |= {f"good.{name}": each for name, each in self._trained.good.items()}
        for name, each in self._trained.parameters.items():
            if moments is None:
                found |= {f"{key}.{name}": value for key, value in self._optimizer.state.get(each, {}).items()}
            elif name in moments:
                found |= {f"{key}.{name}": torch.zeros_like(each.data) for key in _MOMENTS[:2]}
                found[f"step.{name}"] = torch.zeros(())
        return found


def _frozen(model: nn.Module, edits: Mapping[str, Edit]) -> set[str]:
    """Layers that stay as they are, to the last bit."""
    return {*integer_layers(model), *(name for name, edit in edits.items() if not _is_float(edit))}


def _is_float(edit: Edit) -> bool:
    """Whether it left one layer whose weights are floats (halves are trained as floats)."""
    return edit.codes is None and edit.factors is None


def _renewed(model: nn.Module, layer: str, edit: Edit) -> Edit:
    """The edit with the weights that the layer of `model` (our own copy) has now, rounded there if it stores halves."""
    if not _is_float(edit):
        return edit
    trained = model.get_submodule(layer)
    assert is_matrix(trained)
    if edit.half:
        trained.weight.data = trained.weight.data.half().to(trained.weight.dtype)
    return replace(edit, weight=trained.weight.detach().clone())
