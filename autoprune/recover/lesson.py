"""What a fine-tuning learns: the outputs of the dense model for given inputs, and how far a candidate's are from them.

Knows a teacher, inputs, and by the heads which outputs are logits. Does not know labels, nor how to train.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from autoprune.errors import ModelError
from autoprune.evaluators.divergence import Head
from autoprune.nest import tensors_of

MOST_ANSWER_BYTES = 2**28
"""The teacher's outputs for all inputs are kept up to this; beyond, it is run again for every batch."""


@dataclass(frozen=True, slots=True)
class Goal:
    """One output of the dense model to come near to: a `Head` without its values. See there for the fields."""

    index: int
    class_dim: int | None
    energy: float

    def loss(self, dense: Tensor, outputs: Tensor, temperature: float) -> Tensor:
        """How far `outputs` (samples, ...) are from `dense`, a scalar that can be differentiated.

        Of logits T^2 KL(dense || outputs) at the temperature T, mean over samples and positions (arXiv:1503.02531,
        section 2: T^2 keeps the size of the gradients); at 1 it is the mean of `Head.divergence`. Of others the squared
        error relative to `energy`, which no temperature changes. Raises ModelError for another shape.
        """
        if dense.shape != outputs.shape:
            raise ModelError(
                f"the candidate's output {self.index} is {tuple(outputs.shape)} where the dense model's is "
                f"{tuple(dense.shape)}; only a candidate with outputs of the same shapes can be trained to match them"
            )
        exact = torch.promote_types(outputs.dtype, torch.float32)
        one, other, dim = dense.to(exact), outputs.to(exact), self.class_dim
        if dim is None:
            return (one - other).square().sum() / (len(one) * self.energy)
        log_p, log_q = (one / temperature).log_softmax(dim), (other / temperature).log_softmax(dim)
        p = log_p.exp()
        terms = torch.where(p == 0.0, torch.zeros_like(p), p * (log_p - log_q))  # 0 where a class is ruled out by -inf
        return terms.sum(dim).mean() * temperature**2


@dataclass(frozen=True, slots=True)
class Lesson:
    """What all fine-tunings from one dense model share: the model, inputs (samples, ...), and which outputs count.

    `answers` are its outputs for all inputs, one (samples, ...) for each goal, run once for any number of trainings;
    None where they would take too much memory.
    """

    teacher: nn.Module
    inputs: Tensor
    goals: tuple[Goal, ...]
    answers: tuple[Tensor, ...] | None

    @classmethod
    def of(
        cls, teacher: nn.Module, inputs: Tensor, heads: Sequence[Head], *, batch: int = 64,
        most_bytes: int = MOST_ANSWER_BYTES,
    ) -> Self:  # fmt: skip
        """Prepare trainings on `inputs`, `batch` of them at a time. `heads` are the dense model's on any samples, those
        of a `Selection` for one. Raises ValueError without inputs or heads, or for a teacher in training mode.
        """
        if len(inputs) == 0 or not heads:
            raise ValueError("a fine-tuning needs one sample at least, and one output to come near to")
        if any(module.training for module in teacher.modules()):
            raise ValueError("the teacher is in training mode; call .eval() first, or its batch norms would be written")
        goals = tuple(Goal(head.index, head.class_dim, head.energy) for head in heads)
        bare = cls(teacher, inputs, goals, None)
        few = bare._asked(torch.arange(min(batch, len(inputs))))
        needed = sum(answer.nbytes for answer in few) / len(few[0]) * len(inputs)
        if needed > most_bytes:
            return bare
        parts = [bare._asked(chosen) for chosen in torch.split(torch.arange(len(inputs)), batch)]
        return replace(bare, answers=tuple(torch.cat(answers) for answers in zip(*parts, strict=True)))

    def batch(self, chosen: Tensor) -> Tensor:
        """The samples `chosen` (indices) in new memory, laid out as the inputs are."""
        taken = self.inputs[chosen]
        last = self.inputs.ndim == 4 and self.inputs.is_contiguous(memory_format=torch.channels_last)
        return taken.contiguous(memory_format=torch.channels_last) if last else taken

    def answer(self, chosen: Tensor) -> tuple[Tensor, ...]:
        """What the teacher returns for the samples `chosen`, for each goal."""
        return self._asked(chosen) if self.answers is None else tuple(answer[chosen] for answer in self.answers)

    def _asked(self, chosen: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            tensors = tensors_of(self.teacher(self.batch(chosen)))
        return tuple(tensors[goal.index] for goal in self.goals)

    def loss(self, model: nn.Module, chosen: Tensor, temperature: float) -> Tensor:
        """How far `model` is from the teacher on the samples `chosen`: the sum over goals, a scalar.

        Raises ModelError where it returns fewer outputs, or nothing that can be differentiated.
        """
        tensors = tensors_of(model(self.batch(chosen)))
        if self.goals[-1].index >= len(tensors):
            raise ModelError(
                f"the candidate returns {len(tensors)} tensor(s) where the dense model returns "
                f"{self.goals[-1].index + 1} or more; a model must return the same structure for every input"
            )
        wanted = zip(self.goals, self.answer(chosen), strict=True)
        losses = [goal.loss(dense, tensors[goal.index], temperature) for goal, dense in wanted]
        total = torch.stack(losses).sum()
        if not total.requires_grad:
            raise ModelError(
                "the model's outputs do not depend on its weights in a way that torch can differentiate (a detach or "
                "no_grad in its forward pass?); it cannot be fine-tuned"
            )
        return total
