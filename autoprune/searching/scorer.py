"""Scores a choice: builds the candidate, recalibrates it and measures its divergence from the dense model.

On few samples first; a candidate that is clearly worse than the best on the same samples stops there. Differences are
paired by sample, so little data tells much. Knows the selection data and nothing of the held-out part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoprune.bank.stitch import Candidate, Stitcher
from autoprune.core.space import Choice, Space
from autoprune.evaluators.divergence import DivergenceKind, divergence
from autoprune.model.fold import fold_norms
from autoprune.searching.engine import Score

VERSION = 3
"""Rises when the same choice would be scored otherwise: a study goes on only where its scores mean the same."""
STAGES = ((128, 2.5), (256, 2.0), (512, 1.5), (1024, 1.0))
"""Samples after which a candidate may be given up, and by how many standard errors the paired difference must be worse
for that. After the last stage all samples are used.
"""


@dataclass(frozen=True, slots=True)
class Selection:
    """The data that candidates are chosen by, in batches, with the dense model's outputs for it."""

    batches: tuple[Tensor, ...]
    dense: Tensor
    kind: DivergenceKind

    @classmethod
    def of(cls, model: nn.Module, batches: Sequence[Tensor], kind: DivergenceKind) -> Selection:
        """Run the dense model once."""
        return cls(tuple(batches), outputs_of(model, batches), kind)

    def divergences(self, model: nn.Module) -> Tensor:
        """Of `model` for every sample, (samples,) float64."""
        return divergence(self.dense, outputs_of(model, self.batches), self.kind)


def outputs_of(model: nn.Module, batches: Sequence[Tensor]) -> Tensor:
    """Outputs for all batches, (samples, ...); the first output where there are several."""
    with torch.no_grad():
        outputs = [model(batch) for batch in batches]
    return torch.cat([output[0] if isinstance(output, (tuple, list)) else output for output in outputs])


class Scorer:
    """Evaluates choices for `run_search`. Remembers the best one's divergences for comparison, and every full score."""

    def __init__(self, stitcher: Stitcher, space: Space, selection: Selection) -> None:
        self._stitcher = stitcher
        self._space = space
        self._selection = selection
        self._known: dict[Choice, Score] = {}
        self._best: Tensor | None = None

    def __call__(self, choice: Choice, best: float | None) -> Score:
        """The mean divergence of `choice` (nats, or relative squared error). `best` None: all samples are used."""
        if choice in self._known:
            return self._known[choice]
        candidate = self._stitcher.build(self._space.options_of(choice))
        fold_norms(candidate.model, self._stitcher.norms)  # ours alone, and thrown away after
        seen, complete = self._observe(candidate, compare=best is not None)
        value = float(seen.mean())
        score = Score(value, len(seen), pruned=not complete, attrs={"stderr": float(seen.std() / math.sqrt(len(seen)))})
        if complete:
            self._known[choice] = score
            if self._best is None or value < float(self._best.mean()):
                self._best = seen
        return score

    def forget_best(self) -> None:
        """Start comparing anew: another budget has another best."""
        self._best = None

    def _observe(self, candidate: Candidate, *, compare: bool) -> tuple[Tensor, bool]:
        """Divergences of the samples looked at, and whether that was all."""
        outputs: list[Tensor] = []
        stages = list(STAGES) if compare and self._best is not None else []
        done = 0
        for batch in self._selection.batches:
            outputs.append(outputs_of(candidate.model, [batch]))
            done += len(batch)
            if stages and stages[0][0] <= done < len(self._selection.dense):
                _, certainty = stages.pop(0)
                seen = divergence(self._selection.dense[:done], torch.cat(outputs), self._selection.kind)
                if self._clearly_worse(seen, certainty):
                    return seen, False
        return divergence(self._selection.dense, torch.cat(outputs), self._selection.kind), True

    def _clearly_worse(self, seen: Tensor, certainty: float) -> bool:
        assert self._best is not None
        difference = seen - self._best[: len(seen)]
        spread = float(difference.std()) / math.sqrt(len(seen))
        return not float(difference.mean()) <= certainty * spread  # NaN and infinity are worse, too
