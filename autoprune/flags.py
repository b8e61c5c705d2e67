"""The command line's flags for the configuration: one table, one flag a key. Knows typer, not what the keys do."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer


@dataclass(frozen=True, slots=True)
class Flag:
    """One configuration key on the command line."""

    key: str
    names: tuple[str, ...]
    kind: Any
    help: str

    @property
    def parameter(self) -> str:
        """The name of the Python parameter."""
        return self.key.replace(".", "_")


FLAGS = (
    Flag(
        "model", ("--model",), str, "file.py:function, timm:NAME, torchvision:NAME, hf:FOLDER, FILE.onnx or FILE.pt2."
    ),
    Flag("weights", ("--weights",), str, "State dict to load into it (.safetensors or .pt)."),
    Flag("data", ("--data",), str, "Function that returns the data: file.py:function."),
    Flag("metric", ("--metric",), str, "top1, top5, miou, psnr, mse, perplexity, ..., or file.py:function."),
    Flag("higher_is_better", ("--higher-is-better/--lower-is-better",), bool, "Sense of a metric that is a function."),
    Flag("budget", ("--budget", "-b"), list[str], "5ms, 50%, 2x, 300MMACs, 2MB; 3ms,5ms: a family; repeat to combine."),
    Flag(
        "size",
        ("--size",),
        str,
        "What a budget on size counts: the onnx file, the packed one, or plain tensors.",
    ),
    Flag("max_drop", ("--max-drop",), str, "How much worse the metric may get: 1%, or a number in its own unit."),
    Flag("min_accuracy", ("--min-accuracy",), str, "The least metric allowed, e.g. 0.92."),
    Flag("max_loss", ("--max-loss",), str, "The largest metric allowed, where less is better, e.g. 12.5."),
    Flag("space.preset", ("--space",), str, "Search space: a shipped name or a YAML file."),
    Flag("space.protect", ("--protect",), list[str], "Unit names or patterns to leave alone; repeatable."),
    Flag("target.runtime", ("--runtime",), str, "What executes and times the model."),
    Flag("target.device", ("--device",), str, "cpu or cuda."),
    Flag("target.threads", ("--threads",), int, "Threads of the runtime."),
    Flag("target.batch", ("--batch",), int, "Samples a run."),
    Flag("target.precision", ("--precision",), str, "float32, or float16 or bfloat16 with the runtime torch."),
    Flag("target.table", ("--latency-table",), str, "Times of a device that cannot be reached: CSV `unit,keep,ms`."),
    Flag("target.example", ("--example",), str, "Shape of one input with its batch: 1,3,32,32."),
    Flag("search.trials", ("--trials",), int, "Candidates to evaluate at most."),
    Flag("search.seconds", ("--seconds",), float, "Time limit of the search."),
    Flag("search.seed", ("--seed",), int, "Seed of everything random."),
    Flag("search.sampler", ("--sampler",), str, "Who proposes candidates."),
    Flag("search.finalists", ("--finalists",), int, "Candidates that are really cut, timed and scored."),
    Flag("search.refit", ("--refit/--no-refit",), bool, "Refit the chosen candidate's weights."),
    Flag("search.bank_memory", ("--bank-memory",), str, "What the bank may hold in memory, e.g. 4GB; then on disk."),
    Flag("recover.steps", ("--recover-steps",), int, "Fine-tune what was found by distillation, so many steps."),
    Flag("recover.learning_rate", ("--recover-learning-rate",), float, "Its largest learning rate."),
    Flag("recover.batch", ("--recover-batch",), int, "Samples of a step."),
    Flag("recover.trials", ("--recover-trials/--no-recover-trials",), bool, "Score trials after recovery."),
    Flag("search.engine", ("--engine",), str, "Where work runs: optuna (this machine) or ray (a cluster)."),
    Flag("search.workers", ("--workers",), int, "Candidates evaluated at the same time."),
    Flag("search.retries", ("--retries",), int, "How often an evaluation is begun again whose worker died."),
    Flag("search.storage", ("--storage",), str, "URL of a database for the trials, which machines may share."),
    Flag("ray.address", ("--ray-address",), str, "The Ray cluster's address, or auto."),
    Flag("ray.cpus", ("--ray-cpus",), float, "CPUs of each evaluation."),
    Flag("ray.gpus", ("--ray-gpus",), float, "GPUs of each evaluation; 0.25 shares one."),
    Flag("ray.target_wait", ("--ray-target-wait",), float, "Seconds to wait for a node that is the target."),
    Flag("ray.asha", ("--ray-asha/--no-ray-asha",), bool, "Run recovered trials under Ray Tune and ASHA."),
    Flag("ray.population", ("--ray-population",), int, "Copies that population-based training recovers."),
    Flag("ray.callbacks", ("--ray-callback",), list[str], "A callback of Ray Tune; repeatable."),
    Flag("run", ("--run",), str, "Run folder; a later search in it reuses what was measured."),
)


@dataclass(frozen=True, slots=True)
class Given:
    """What the command line said about the configuration: the file, if any, and values by dotted key."""

    config: Path | None
    overrides: dict[str, object]


def with_flags(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with `--config` and every flag of the table in place of its parameter `given`."""
    return expanded(command, "given", parameters=[_config_parameter(), *map(_parameter, FLAGS)], gather=_given)


def expanded(
    command: Callable[..., None],
    name: str,
    *,
    parameters: Sequence[inspect.Parameter],
    gather: Callable[[dict[str, Any]], object],
) -> Callable[..., None]:
    """`command` with `parameters` in place of its parameter `name`, which gets what `gather` makes of their values."""
    own = [item for item in inspect.signature(command, eval_str=True).parameters.values() if item.name != name]
    everything = [*own, *parameters]

    @functools.wraps(command)
    def wrapped(**values: Any) -> None:
        taken = {item.name: values.pop(item.name) for item in parameters}
        command(**values, **{name: gather(taken)})

    wrapped.__signature__ = inspect.Signature(everything)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {item.name: item.annotation for item in everything}
    return wrapped


def option(name: str, annotation: object, *, default: object = None) -> inspect.Parameter:
    """A keyword parameter as typer reads it; `annotation` is an `Annotated` with its option."""
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _given(values: dict[str, Any]) -> Given:
    overrides = {flag.key: values[flag.parameter] for flag in FLAGS}
    present = {key: value for key, value in overrides.items() if value is not None and value != []}
    return Given(values["config"], present)


def _parameter(flag: Flag) -> inspect.Parameter:
    described = typer.Option(*flag.names, help=flag.help, rich_help_panel="Configuration")
    return option(flag.parameter, Annotated[flag.kind | None, described])


def _config_parameter() -> inspect.Parameter:
    described = typer.Option("--config", "-c", help="Configuration file. Default: autoprune.yaml, else the demo.")
    return option("config", Annotated[Path | None, described])
