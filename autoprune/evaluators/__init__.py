"""Evaluators: a number for what a model puts out. The table below is all there is built in."""

from __future__ import annotations

from collections.abc import Callable

from autoprune import plugins
from autoprune.evaluators.base import Evaluator
from autoprune.evaluators.mse import MSE
from autoprune.evaluators.top_k import top1, top5

EVALUATORS: dict[str, Callable[[], Evaluator]] = {
    "top1": top1,
    "top5": top5,
    "mse": MSE,
}


def evaluator(name: str) -> Evaluator:
    """The evaluator called `name`: built in, an entry point of `autoprune.evaluators`, or "module:Name".

    A module may hold a class, a function without arguments, or an instance, such as a `Function` round your own metric.
    Raises ConfigError that lists what exists.
    """
    return plugins.resolve("evaluator", name, EVALUATORS)
