"""Evaluators: a number for what a model puts out. The table below is all there is built in."""

from __future__ import annotations

from collections.abc import Callable

from autoprune import plugins
from autoprune.evaluators.average_precision import MeanAveragePrecision
from autoprune.evaluators.base import Evaluator
from autoprune.evaluators.mae import MAE
from autoprune.evaluators.miou import ImageMeanIoU, MeanIoU
from autoprune.evaluators.mse import MSE
from autoprune.evaluators.perplexity import Perplexity
from autoprune.evaluators.psnr import PSNR
from autoprune.evaluators.top_k import top1, top5

EVALUATORS: dict[str, Callable[[], Evaluator]] = {
    "top1": top1,
    "top5": top5,
    "miou": MeanIoU,
    "miou_image": ImageMeanIoU,
    "map": MeanAveragePrecision,
    "psnr": PSNR,
    "mse": MSE,
    "mae": MAE,
    "perplexity": Perplexity,
}


def evaluator(name: str) -> Evaluator:
    """The evaluator called `name`: built in, an entry point of `autoprune.evaluators`, or "module:Name".

    A module may hold a class, a function without arguments, or an instance, such as a `Function` round your own metric.
    Raises ConfigError that lists what exists, or says what to install.
    """
    return plugins.resolve("evaluator", name, EVALUATORS)
