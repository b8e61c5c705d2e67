"""Scores a choice: builds the candidate, recalibrates it and measures its divergence from the dense model.

On few samples first; a candidate that is clearly worse than the best on the same samples stops there. Differences are
paired by sample, so little data tells much. Knows the selection data and nothing of the held-out part.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.bank.stitch import Candidate, Stitcher
from autoprune.core.space import Choice, Space
from autoprune.engines.base import Best, Score
from autoprune.evaluators.divergence import Head, heads_of, total_divergence
from autoprune.model.fold import fold_norms
from autoprune.nest import Nested, joined, tensors_of

VERSION = 4
"""Rises when the same choice would be scored otherwise: a study goes on only where its scores mean the same."""
STAGES = ((128, 2.5), (256, 2.0), (512, 1.5), (1024, 1.0))
"""Samples after which a candidate may be given up, and by how many standard errors the paired difference must be worse
for that. After the last stage all samples are used.
"""


@dataclass(frozen=True, slots=True)
class Selection:
    """The data that candidates are chosen by, in batches, with what the dense model returns for it."""

    batches: tuple[Tensor, ...]
    heads: tuple[Head, ...]

    @classmethod
    def of(cls, model: nn.Module, batches: Sequence[Tensor], targets: Tensor) -> Selection:
        """Run the dense model once. `targets` (samples, ...) say by their type and shape alone what its outputs are."""
        samples = sum(len(batch) for batch in batches)
        return cls(tuple(batches), heads_of(tensors_of(outputs_of(model, batches)), targets, samples=samples))

    def __len__(self) -> int:
        return len(self.heads[0].dense)

    def first(self, batches: Sequence[Tensor]) -> Selection:
        """The same for the first samples alone, which are given in `batches`. Scales stay those of all samples."""
        count = sum(len(batch) for batch in batches)
        return Selection(tuple(batches), tuple(replace(head, dense=head.dense[:count]) for head in self.heads))

    def beginning(self, count: int) -> Selection:
        """The same for the first batches alone, until they hold `count` samples."""
        held, few = 0, []
        for batch in self.batches:
            if held < count:
                few.append(batch)
                held += len(batch)
        return self.first(few)

    def divergences(self, model: nn.Module) -> Tensor:
        """Of `model` for every sample, (samples,) float64."""
        return torch.cat([values for _, values in self.in_batches(model)])

    def in_batches(self, model: nn.Module) -> Iterator[tuple[int, Tensor]]:
        """Batch by batch: the samples done so far, and the divergences of this batch's."""
        done = 0
        for batch in self.batches:
            with torch.no_grad():
                tensors = tensors_of(model(batch))
            values = total_divergence(self.heads, tensors, start=done)
            done += len(batch)
            yield done, values


def outputs_of(model: nn.Module, batches: Sequence[Tensor]) -> Nested:
    """What `model` returns for all batches, tensors (samples, ...), in the containers that it returns them in."""
    with torch.no_grad():
        return joined([model(batch) for batch in batches], [len(batch) for batch in batches])


def divergences_of(model: nn.Module, selection: Selection, norms: Mapping[str, str]) -> Tensor:
    """Of a model that stays as it is (one in training, say) for every sample, (samples,) float64; `norms` as folding
    takes them.
    """
    still = copy.deepcopy(model)
    fold_norms(still, norms)
    return selection.divergences(still)


class Scorer:
    """Evaluates choices. Remembers nothing of them, so that it can be anywhere."""

    def __init__(self, stitcher: Stitcher, space: Space, selection: Selection) -> None:
        self._stitcher = stitcher
        self._space = space
        self._selection = selection

    @property
    def selection(self) -> Selection:
        """The data that candidates are scored on."""
        return self._selection

    @property
    def norms(self) -> Mapping[str, str]:
        """Layer -> norm that reads it."""
        return self._stitcher.norms

    def candidate(self, choice: Choice) -> Candidate:
        """The candidate of a choice."""
        return self._stitcher.build(self._space.options_of(choice))

    def __call__(self, choice: Choice, best: Best | None) -> Score:
        """The mean divergence of `choice` (nats, or relative squared error). `best` None: all samples are used."""
        candidate = self.candidate(choice)
        fold_norms(candidate.model, self._stitcher.norms)  # ours alone, and thrown away after
        rival = None if best is None or best.seen is None else torch.from_numpy(np.array(best.seen))
        seen, complete = self._observe(candidate, rival)
        error = float(seen.std() / math.sqrt(len(seen)))
        return Score(
            float(seen.mean()), len(seen), pruned=not complete, attrs={"stderr": error},
            seen=seen.numpy() if complete else None,
        )  # fmt: skip

    def _observe(self, candidate: Candidate, rival: Tensor | None) -> tuple[Tensor, bool]:
        """Divergences of the samples looked at, and whether that was all."""
        parts: list[Tensor] = []
        stages = list(STAGES) if rival is not None else []
        for done, values in self._selection.in_batches(candidate.model):
            parts.append(values)
            if rival is not None and stages and stages[0][0] <= done < len(self._selection):
                _, certainty = stages.pop(0)
                seen = torch.cat(parts)
                if _clearly_worse(seen, rival, certainty):
                    return seen, False
        return torch.cat(parts), True


def _clearly_worse(seen: Tensor, rival: Tensor, certainty: float) -> bool:
    """By the samples seen so far, in pairs; `rival` (samples,) has all of them."""
    difference = seen - rival[: len(seen)]
    spread = float(difference.std()) / math.sqrt(len(seen))
    return not float(difference.mean()) <= certainty * spread  # NaN and infinity are worse, too
