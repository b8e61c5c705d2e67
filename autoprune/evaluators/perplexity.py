"""Perplexity of a language model."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from autoprune.evaluators.shapes import check_classes

IGNORED = -100
"""The target of tokens that do not count: context, and padding."""
LARGEST = 1e12
"""What a model without any idea counts as, or one whose output is no number, so that means stay finite."""


@final
class Perplexity:
    """exp of the mean negative log likelihood over all tokens that count; lower is better.

    The mean is over tokens, not over samples, as in lm-evaluation-harness; which ones count is said by the targets (see
    `autoprune.windows`).
    """

    __slots__ = ()

    name: str = "perplexity"
    higher_is_better: bool = False

    def per_sample(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Each sample's own perplexity, (samples,) float64. Its mean is not the metric.

        From logits (samples, tokens, vocabulary) and the next tokens (samples, tokens), integers, -100 for those that
        do not count. Raises DataError on other shapes, tokens that do not exist, and samples in which none counts.
        """
        surprise, counts = self._sums(outputs, targets)
        return _bounded(surprise / counts)

    def total(self, outputs: Tensor, targets: Tensor) -> float:
        """The metric."""
        surprise, counts = self._sums(outputs, targets)
        return float(_bounded(surprise.sum() / counts.sum()))

    def _sums(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """For each sample the nats of all tokens that count, and how many do; (samples,) float64 both."""
        counted = check_classes(
            self.name, outputs, targets, class_dim=-1, ignored=IGNORED,
            expected="(samples, tokens, vocabulary) and (samples, tokens)", remedy="",
        )  # fmt: skip
        nats = [_nats(*sample) for sample in zip(outputs, targets, counted, strict=True)]  # one at a time: memory
        return torch.stack(nats), counted.reshape(len(counted), -1).sum(dim=1).to(torch.float64)


def _nats(logits: Tensor, tokens: Tensor, counted: Tensor) -> Tensor:
    """Negative log likelihood of one sample's tokens that count: logits (tokens, vocabulary), the others (tokens,)."""
    rows = logits[counted].to(torch.float64)
    chosen = rows.gather(1, tokens[counted].to(torch.int64)[:, None])[:, 0]
    return (rows.logsumexp(dim=1) - chosen).sum()


def _bounded(nats: Tensor) -> Tensor:
    return nats.nan_to_num(nan=torch.inf).clamp(max=math.log(LARGEST)).exp()
