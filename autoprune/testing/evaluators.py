"""The contract of evaluators."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from autoprune.errors import DataError
from autoprune.evaluators.base import Evaluator, Pooled


class EvaluatorContract:
    """What every evaluator must do. A subclass gives `make`, and `example` where it does not score a classifier."""

    def make(self) -> Evaluator:
        """A fresh evaluator."""
        raise NotImplementedError("give make(), which returns the evaluator to test")

    def example(self) -> tuple[Tensor, Tensor]:
        """Outputs and targets that the evaluator accepts, at least four samples: here logits and labels."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(12, 7, generator=generator), torch.arange(12) % 7

    def test_describes_itself(self) -> None:
        """Name and sense are of the right types."""
        evaluator = self.make()
        assert isinstance(evaluator.name, str), "an evaluator's name is a str"
        assert evaluator.name, "an evaluator's name is not empty"
        assert isinstance(evaluator.higher_is_better, bool), "higher_is_better is a bool"

    def test_one_finite_value_for_each_sample(self) -> None:
        """(samples,), float64, finite, without a graph."""
        outputs, targets = self.example()
        values = self.make().per_sample(outputs, targets)
        assert values.shape == (len(outputs),), f"values are {tuple(values.shape)}; expected ({len(outputs)},)"
        assert values.dtype == torch.float64, f"values are {values.dtype}; expected float64"
        assert bool(values.isfinite().all()), "values are not finite"

    def test_inputs_are_untouched_and_values_repeat(self) -> None:
        """The same values twice, and inputs bit-identical afterwards."""
        outputs, targets = self.example()
        before = outputs.clone(), targets.clone()
        evaluator = self.make()
        first, second = evaluator.per_sample(outputs, targets), evaluator.per_sample(outputs, targets)
        assert torch.equal(first, second), "two runs differ"
        assert torch.equal(outputs, before[0]), "the evaluator wrote to the outputs"
        assert torch.equal(targets, before[1]), "the evaluator wrote to the targets"

    def test_a_sample_is_scored_alone(self) -> None:
        """How samples are put into batches changes nothing."""
        outputs, targets = self.example()
        evaluator = self.make()
        whole = evaluator.per_sample(outputs, targets)
        parts = [evaluator.per_sample(outputs[part], targets[part]) for part in (slice(0, 3), slice(3, None))]
        assert torch.allclose(whole, torch.cat(parts)), "values depend on the other samples of the batch"

    def test_the_total_of_one_sample_is_its_value(self) -> None:
        """Where the metric is not the mean over samples, it is a finite number, and one sample's is that sample's."""
        outputs, targets = self.example()
        evaluator = self.make()
        if isinstance(evaluator, Pooled):
            whole, one = evaluator.total(outputs, targets), evaluator.total(outputs[:1], targets[:1])
            assert math.isfinite(whole), f"the total is {whole}"
            assert math.isclose(one, float(evaluator.per_sample(outputs[:1], targets[:1])), abs_tol=1e-9)

    def test_sample_counts_that_differ_are_an_error(self) -> None:
        """A DataError, not a silent broadcast."""
        outputs, targets = self.example()
        try:
            self.make().per_sample(outputs, targets[:-1])
        except DataError:
            return
        raise AssertionError(f"{len(outputs)} outputs and {len(targets) - 1} targets were accepted; expected DataError")
