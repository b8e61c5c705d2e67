"""From a configuration to what it asks for: the task, with its model and data, and how long and where to search."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from autoprune.config import Config
from autoprune.core.unit import NARROWED
from autoprune.engines.settings import EngineSettings, RaySettings
from autoprune.errors import ConfigError
from autoprune.evaluators import evaluator
from autoprune.evaluators.base import Evaluator
from autoprune.evaluators.function import Function
from autoprune.goal import Plan, Recover
from autoprune.loading import load_data, load_factory, load_model, random_data
from autoprune.memory import suit
from autoprune.model.kernels import SMALLEST
from autoprune.profile.device_table import read_table
from autoprune.spaces import Narrowing, WeightChoice, load_space
from autoprune.subject import Task
from autoprune.verify import size_bytes


def task_of(config: Config, folder: Path) -> Task:
    """The task, without a table of times."""
    data = None if config.data is None else load_data(config, folder=folder)
    model = load_model(config, folder=folder)
    suit(size_bytes(model))
    if ":" in config.metric:
        function: Any = load_factory(config.metric, folder, key="metric")
        judge_by: Evaluator = Function(function, config.metric, higher_is_better=config.higher_is_better)
    else:
        judge_by = evaluator(config.metric)
    spec = load_space(config.space.preset, folder)
    spec = spec.model_copy(update={"protect": (*spec.protect, *config.space.protect)})
    target, shape = config.target.target, config.target.example
    if shape is not None:
        target = replace(target, batch=shape[0])
    if data is None:
        if shape is None:
            raise ConfigError("data: is missing; write e.g. `data: model.py:data`, or give an example's shape")
        data = random_data(model, shape)
    return Task(
        model, type(model).__name__, data, judge_by, target, spec, None if shape is None else shape[1:],
        config.search.seed, config.size, config.search.bank_memory,
    )  # fmt: skip


def with_table(task: Task, config: Config, folder: Path) -> Task:
    """The task with the times of its device, where the configuration names a table of them."""
    table = config.target.table
    return task if table is None else replace(task, table=read_table(folder / table))


def any_policy(task: Task) -> Task:
    """The task with every kind of unit that a policy may name, whatever space it was searched in."""
    weights, kernels = task.spec.weights or (WeightChoice(bits=(8,)),), task.spec.kernels or (SMALLEST,)
    resolutions = task.spec.resolutions or (0.5,)
    kinds: dict[str, object] = {**dict.fromkeys(NARROWED, Narrowing()), "blocks": True, "only": ()}
    kinds |= {"weights": weights, "kernels": kernels, "resolutions": resolutions}
    return replace(task, spec=task.spec.model_copy(update=kinds))


def plan_of(config: Config, folder: Path) -> Plan:
    """How long to search, by what, and where."""
    asked, ray, recover = config.search, config.ray, config.recover
    callbacks = [_callback(spec, folder) for spec in ray.callbacks]
    settings = RaySettings(
        ray.address, ray.cpus, ray.gpus, ray.target_wait, asha=ray.asha, population=ray.population,
        callbacks=tuple(callbacks),
    )  # fmt: skip
    return Plan(
        asked.trials, asked.seconds, asked.sampler, asked.finalists, asked.refit,
        Recover(recover.steps, recover.learning_rate, recover.batch, recover.trials),
        EngineSettings(asked.engine, asked.workers, asked.retries, settings), asked.storage,
    )  # fmt: skip


def _callback(spec: str, folder: Path) -> object:
    """A callback of Ray Tune by 'module:Name' or 'file.py:function'."""
    return load_factory(spec, folder, key="ray.callbacks")()
