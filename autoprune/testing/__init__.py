"""Contract tests for plug-ins: subclass one in a test file, give `make()`, and pytest runs the rest.

    class TestMyMethod(MethodContract):
        def make(self):
            return MyMethod()

Plain asserts, so that importing this needs no test framework. What a plug-in computes is for its own tests to check.
"""

from autoprune.testing.evaluators import EvaluatorContract
from autoprune.testing.exporters import ExporterContract, example_resolved
from autoprune.testing.methods import (
    NEEDS,
    MethodContract,
    assert_permutation,
    example_consumer,
    example_view,
    view_tensors,
)

__all__ = [
    "NEEDS",
    "EvaluatorContract",
    "ExporterContract",
    "MethodContract",
    "assert_permutation",
    "example_consumer",
    "example_resolved",
    "example_view",
    "view_tensors",
]
