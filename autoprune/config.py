"""The configuration: what `autoprune.yaml` may hold, and how it is read and overridden.

Knows keys, types and defaults. Does not import the user's model or data, nor torch.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BeforeValidator,
    Field,
    StrictBool,
    ValidationError,
    model_validator,
)

from autoprune.core.budget import Budget, parse_budgets
from autoprune.core.floor import Floor, check_sense, floor_of
from autoprune.core.unit import SizeOf
from autoprune.errors import ConfigError, RunError, listed
from autoprune.files import read_yaml, write_text
from autoprune.problems import given, problems_of
from autoprune.sections import (
    LOWER_IS_BETTER,
    METRICS,
    Drop,
    Factory,
    RayConfig,
    RecoverConfig,
    SearchConfig,
    Section,
    SpaceConfig,
    TargetConfig,
    Worst,
    budget_texts,
    known_metric,
    model_source,
)
from autoprune.source import anchored

FILE_NAME = "autoprune.yaml"
RUN_FILE = "run.json"
DEMO_MODEL = "autoprune.demo.network:model"
DEMO_DATA = "autoprune.demo.data:data"
DEMO_SECONDS = 15.0
DEMO_FINALISTS = 2
GOAL_HELP = (
    "nothing to search for: write `budget: 5ms` (or 50%, 2x, 300MMACs, 2MB, ...), or `max_drop: 1%`, "
    "or `min_accuracy: 0.92`, or `max_loss: 12.5` (on the command line: --budget, --max-drop, --min-accuracy, "
    "--max-loss)"
)

_PATH_KEYS = ("weights", "run", "target.table")
_FACTORY_KEYS = ("model", "data", "metric")


class Config(Section):
    """One search. Paths are relative to the folder of the file it was read from."""

    model: Annotated[str, BeforeValidator(model_source)] = Field(
        description="The trained model: a function without arguments that returns it (`file.py:function`), "
        "`timm:NAME`, `torchvision:NAME`, `hf:FOLDER`, `FILE.onnx` or `FILE.pt2`."
    )
    weights: str | None = Field(default=None, min_length=1, description="State dict to load: .safetensors, or .pt.")
    data: Factory | None = Field(
        default=None, description="Function without arguments that returns calibration and validation data."
    )
    metric: Annotated[str, BeforeValidator(known_metric)] = Field(
        default="top1", description=f"{', '.join(METRICS)} or a function."
    )
    higher_is_better: StrictBool = Field(default=True, description="Sense of a metric that is a function.")
    target: TargetConfig = Field(default_factory=TargetConfig)
    budget: Annotated[tuple[str, ...], BeforeValidator(budget_texts)] | None = Field(
        default=None, description="What a candidate may cost: `5ms`; `3ms,5ms` is a family; a list holds together."
    )
    size: SizeOf = Field(
        default="onnx", description="What a budget on size counts: the ONNX file, the packed file, or plain tensors."
    )
    max_drop: Drop | None = Field(
        default=None,
        description="How much worse than the dense model's the metric may be: 1% (points for top1 and other shares, of "
        "the dense value for others), or a number in its own unit.",
    )
    min_accuracy: Worst | None = Field(
        default=None, description="The least metric allowed, e.g. 0.92, where more is better."
    )
    max_loss: Worst | None = Field(default=None, description="The largest metric allowed, where less is better.")
    space: SpaceConfig = Field(default_factory=SpaceConfig)
    search: SearchConfig = Field(default_factory=SearchConfig)
    recover: RecoverConfig = Field(default_factory=RecoverConfig)
    ray: RayConfig = Field(default_factory=RayConfig)
    run: str | None = Field(default=None, min_length=1, description="Run folder. Default: runs/<this file's name>.")

    @model_validator(mode="before")
    @classmethod
    def _short_space(cls, content: Any) -> Any:
        if isinstance(content, Mapping) and isinstance(content.get("space"), str):
            return {**content, "space": {"preset": content["space"]}}
        return content

    @model_validator(mode="after")
    def _recovery_has_steps(self) -> Config:
        if self.recover.trials and not self.recover.steps:
            raise ValueError("recover.trials: trials cannot be recovered in no steps; write recover.steps, e.g. 100")
        if (self.ray.asha or self.ray.population) and self.search.engine != "ray":
            raise ValueError("ray.asha and ray.population are for search.engine: ray")
        if self.ray.asha and not self.recover.trials:
            raise ValueError("ray.asha stops long trials early; set recover.trials and recover.steps, e.g. 100")
        if self.ray.population and not self.recover.steps:
            raise ValueError("ray.population trains copies of the chosen candidate; set recover.steps, e.g. 300")
        return self

    @model_validator(mode="after")
    def _metric_sense(self) -> Config:
        if self.metric in METRICS and "higher_is_better" in self.model_fields_set:
            raise ValueError(f"higher_is_better is for a metric that is a function; {self.metric} has its own sense")
        try:
            check_sense(
                self.metric, higher_is_better=self.metric_higher_is_better, min_accuracy=self.min_accuracy,
                max_loss=self.max_loss,
            )  # fmt: skip
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return self

    @property
    def floor(self) -> Floor:
        """How bad the metric may become."""
        return floor_of(
            self.metric, higher_is_better=self.metric_higher_is_better, max_drop=self.max_drop,
            min_accuracy=self.min_accuracy, max_loss=self.max_loss,
        )  # fmt: skip

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """The family of budgets; one empty budget when none was given."""
        return parse_budgets(self.budget or ())

    @property
    def metric_higher_is_better(self) -> bool:
        """The sense of the metric, built-in or not."""
        return self.higher_is_better and self.metric not in LOWER_IS_BETTER


def load_config(path: Path | None, overrides: Mapping[str, object], *, goal: bool = True, data: bool = True) -> Config:
    """The configuration in `path` (none: only `overrides`) with `overrides` by dotted key on top.

    Overridden paths are relative to the working folder, those of the file to its own. `goal`: a budget or an accuracy
    floor must be given. `data`: data must be given; otherwise an example's shape will do. Raises one ConfigError that
    lists all problems.
    """
    content = _read(path) if path is not None else {}
    content = _overridden(content, _anchored(overrides, path))
    if content.get("run") is None:
        content["run"] = f"runs/{path.stem if path is not None else 'search'}"
    name = str(path) if path is not None else "configuration"
    problems: list[tuple[str, str]] = []
    if goal and all(content.get(key) in (None, [], ()) for key in ("budget", "max_drop", "min_accuracy", "max_loss")):
        problems.append(("budget", GOAL_HELP))
    config = None
    try:
        config = Config.model_validate(content)
    except ValidationError as error:
        problems = [(key, _remedied(key, text)) for key, text in problems_of(error, Config)] + problems
    if content.get("data") is None and (data or config is None or config.target.example is None):
        rest = "" if data else "; with --example, random inputs of that shape are taken in its place"
        problems.append(("data", _remedied("data", "is missing") + rest))
    if config is None or problems:
        raise _error(problems, name, set(overrides))
    return config


def demo_config(overrides: Mapping[str, object], *, goal: bool = True) -> Config:
    """The embedded demo's configuration with `overrides` by dotted key on top. Raises like `load_config`."""
    demo: dict[str, object] = {"model": DEMO_MODEL, "data": DEMO_DATA, "run": "runs/demo"}
    if overrides.get("search.trials") is None:
        demo |= {"search.seconds": DEMO_SECONDS, "search.finalists": DEMO_FINALISTS}
    return load_config(None, {**demo, **_given(overrides)}, goal=goal)


def save_run(config: Config, folder: Path, run: Path) -> None:
    """Keep in `run` what a resumed search needs: the configuration, and the folder its paths are relative to."""
    kept = config.model_dump(mode="json", exclude_unset=True, exclude={"run"})
    if "storage" in kept.get("search", {}) and config.search.storage is not None:
        kept["search"]["storage"] = without_password(config.search.storage)
    write_text(run / RUN_FILE, json.dumps({"folder": str(folder.resolve()), "config": kept}, indent=1))


def without_password(url: str) -> str:
    """A database's URL as it may be written to disk; the password then comes from where its client looks for one."""
    return re.sub(r"(?s)^([^:/@]+://[^:/@]*):[^@]*@", r"\1@", url)


def load_run(run: Path, overrides: Mapping[str, object]) -> tuple[Config, Path]:
    """The configuration a run was started with, `overrides` on top, and its folder: where that is gone (a cluster's job
    has one for itself, a project was moved), the working folder. Raises RunError for no run.
    """
    path = run / RUN_FILE
    if not os.path.isfile(path):  # unlike Path's, False for a text that can be no path
        raise RunError(
            f"{run!s:.200}: is no autoprune run (it has no {RUN_FILE}); give the folder of an earlier search"
        )
    content = read_yaml(path, error=RunError)
    if not isinstance(content, dict) or not isinstance(content.get("config"), dict) or "folder" not in content:
        raise RunError(f"{path}: is damaged; start the search anew")
    try:
        config = Config.model_validate(_overridden({**content["config"], "run": str(run.resolve())}, _given(overrides)))
    except ValidationError as error:
        raise _error(problems_of(error, Config), str(path), set(overrides)) from None
    folder = str(content["folder"])
    return config, Path(folder) if os.path.isdir(folder) else Path.cwd()


def json_schema() -> dict[str, Any]:
    """The JSON schema of `autoprune.yaml`, for editors."""
    schema = Config.model_json_schema()
    text_or_number: dict[str, list[Any]] = {"anyOf": [{"type": "string"}, {"type": "number"}]}
    one_or_more: dict[str, list[Any]] = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
    properties = schema["properties"]
    shapes = {**dict.fromkeys(("max_drop", "min_accuracy", "max_loss"), text_or_number), "budget": one_or_more}
    for key, shape in shapes.items():
        described = {name: properties[key][name] for name in ("description", "title") if name in properties[key]}
        properties[key] = {**described, "anyOf": [*shape["anyOf"], {"type": "null"}], "default": None}
    properties["space"] = {"anyOf": [properties["space"], {"type": "string"}]}
    schema["required"] = [*schema["required"], "data"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": FILE_NAME}


def _read(path: Path) -> dict[str, object]:
    content = read_yaml(path, error=ConfigError)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: given {given(content)}, allowed: a mapping (model: ..., data: ..., budget: ...)")
    return dict(content)


def _given(overrides: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in overrides.items() if value is not None}


def _anchored(overrides: Mapping[str, object], path: Path | None) -> dict[str, object]:
    """Overrides whose paths stay true when they are read relative to the file's folder."""
    found = _given(overrides)
    if path is None or path.resolve().parent == Path.cwd():
        return found
    for key in (*_PATH_KEYS, *_FACTORY_KEYS, "space.preset"):
        value = found.get(key)
        if key == "model" and isinstance(value, str):
            found[key] = anchored(value, Path.cwd())
        elif isinstance(value, str) and (key in _PATH_KEYS or ".py:" in value or value.endswith((".yaml", ".yml"))):
            found[key] = os.path.join(os.getcwd(), value)
    return found


def _overridden(content: Mapping[str, object], overrides: Mapping[str, object]) -> dict[str, Any]:
    result: dict[str, Any] = copy.deepcopy(dict(content))
    if isinstance(result.get("space"), str):
        result["space"] = {"preset": result["space"]}
    for key, value in overrides.items():
        section, _, name = key.rpartition(".")
        place = result
        if section:
            if result.get(section) is None:
                result[section] = {}
            place = result[section]
        if isinstance(place, dict):  # otherwise the file's own mistake is reported
            place[name] = list(value) if isinstance(value, tuple) else value
    return result


def _remedied(key: str, text: str) -> str:
    if text != "is missing":
        return text
    return f"is missing; write e.g. `{key}: model.py:{key}` (`autoprune init` writes a model.py to fill in)"


def _error(problems: list[tuple[str, str]], name: str, overridden: set[str]) -> ConfigError:
    texts = []
    for key, text in problems:
        source = "command line" if any(key == given or key.startswith(given + ".") for given in overridden) else name
        texts.append(f"{source}: {key}: {text}" if key != "(top)" else f"{source}: {text}")
    return ConfigError(texts[0] if len(texts) == 1 else f"{len(texts)} problems:\n{listed(texts)}")
