"""The configuration: every bad input gives one clear ConfigError."""

import json
import re
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from autoprune.config import (
    DEMO_MODEL,
    DEMO_SECONDS,
    Config,
    demo_config,
    json_schema,
    load_config,
    load_run,
    save_run,
)
from autoprune.core.target import Target
from autoprune.errors import ConfigError
from autoprune.flags import FLAGS
from autoprune.init import CONFIG_TEXT

GOOD = "model: net.py:model\ndata: net.py:data\nbudget: 5ms\n"


def written(folder: Path, text: str, name: str = "autoprune.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, GOOD), {})
    assert config.budget == ("5ms",)
    assert config.target.target == Target("onnxruntime", "cpu", 1, 1)
    assert (config.space.preset, config.search.trials, config.search.refit) == ("cnn-channels", 200, True)
    assert config.run == "runs/autoprune"
    assert config.metric_higher_is_better


def test_the_text_of_init_is_a_good_configuration(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, CONFIG_TEXT), {})
    assert [budget.text for budget in config.budgets] == ["50%"]
    every_key = CONFIG_TEXT.replace("# weights", "weights").replace("# run", "run").replace("# max_drop", "max_drop")
    assert load_config(written(tmp_path, every_key), {}).max_drop == 0.01


def test_overrides_by_dotted_key(tmp_path: Path) -> None:
    overrides = {
        "budget": ["3ms,5ms", "2MB"],
        "search.trials": 7,
        "space.protect": ["head*"],
        "target.example": "1,3,32,32",
        "max_drop": "2%",
        "metric": None,
    }
    config = load_config(written(tmp_path, GOOD + "space: mine.yaml\n"), overrides)
    assert [budget.text for budget in config.budgets] == ["3ms + 2MB", "5ms + 2MB"]
    assert (config.space.preset, config.space.protect) == ("mine.yaml", ("head*",))
    assert (config.search.trials, config.target.example, config.max_drop) == (7, (1, 3, 32, 32), 0.02)


@pytest.mark.parametrize(
    ("text", "floor"),
    [
        ("max_drop: 1%\nmin_accuracy: 92%\n", "max drop 1 points + at least 0.92"),
        ("metric: perplexity\nmax_drop: 5%\nmax_loss: 12.5\n", "max rise 5 % of the dense value + at most 12.5"),
        ("metric: psnr\nmax_drop: 0.5dB\nmin_accuracy: 30dB\n", "max drop 0.5 dB + at least 30 dB"),
        ("metric: a.py:f\nhigher_is_better: false\nmax_loss: -2\n", "at most -2"),
    ],
)
def test_floors_are_read_by_the_metric_and_survive_a_resumed_run(tmp_path: Path, text: str, floor: str) -> None:
    config = load_config(written(tmp_path, GOOD + text), {})
    assert config.floor.text == floor
    save_run(config, tmp_path, tmp_path / "run")
    assert load_run(tmp_path / "run", {})[0].floor == config.floor


def test_paths_of_the_command_line_are_relative_to_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "project").mkdir()
    path = written(tmp_path / "project", GOOD)
    monkeypatch.chdir(tmp_path)
    config = load_config(path, {"model": "other.py:net", "run": "here", "metric": "top5", "data": "pkg.mod:data"})
    assert config.model == f"{tmp_path}/other.py:net"
    assert config.run == f"{tmp_path}/here"
    assert (config.metric, config.data) == ("top5", "pkg.mod:data")
    assert load_config(path, {}).model == "net.py:model"


def test_demo() -> None:
    config = demo_config({"budget": ["50%"]})
    assert (config.model, config.search.seconds, config.run) == (DEMO_MODEL, DEMO_SECONDS, "runs/demo")
    assert demo_config({"budget": ["50%"], "search.trials": 5}).search.seconds is None


@pytest.mark.parametrize(
    ("text", "key", "advice"),
    [
        ("budget: 5\n", "budget", "a text with a unit"),
        ("budget: 5 parsecs\n", "budget", "write e.g. 5ms"),
        ("budget: [5ms, 3ms]\n", "budget", "two limits on latency"),
        ("budget: []\n", "budget", "write `budget: 5ms`"),
        ("max_drop: two\n", "max_drop", "write e.g. 1%"),
        ("max_drop: true\n", "max_drop", "a share"),
        ("min_accuracy: 92\n", "min_accuracy", "between 0 and 100%"),
        ("metric: top\n", "metric", "did you mean 'top"),
        ("metric: mse\nmin_accuracy: 0.9\n", "min_accuracy", "more is better"),
        ("metric: mae\nmin_accuracy: 0.9\n", "min_accuracy", "with mae give a budget or max_drop"),
        ("metric: perplexity\nmin_accuracy: 0.9\n", "min_accuracy", "with perplexity give"),
        ("metric: a.py:f\nhigher_is_better: false\nmin_accuracy: 0.9\n", "min_accuracy", "max_loss, the largest value"),
        ("metric: psnr\nmax_loss: 9\n", "max_loss", "min_accuracy, the least value"),
        ("max_loss: 0.9\n", "max_loss", "with top1 give a budget or max_drop, or min_accuracy"),
        ("metric: psnr\nmax_drop: 3dBm\n", "max_drop", "0.5dB (in its own unit)"),
        ("metric: mse\nmax_drop: -0.1\n", "max_drop", "5% (of the dense model's value)"),
        ("metric: mse\nmax_loss: 5%\n", "max_loss", "a number such as 12.5"),
        ("metric: mio\n", "metric", "did you mean 'miou'"),
        ("higher_is_better: false\n", "higher_is_better", "own sense"),
        ("bugdet: 5ms\n", "bugdet", "did you mean 'budget'"),
        ("target: {thread: 2}\n", "target.thread", "did you mean 'threads'"),
        ("target: {device: tpu}\n", "target.device", "'cpu' or 'cuda'"),
        ("target: {threads: 0}\n", "target.threads", "greater than or equal to 1"),
        ("target: {batch: true}\n", "target.batch", "a whole number"),
        ("target: {example: [1, -3]}\n", "target.example", "[1, 3, 32, 32]"),
        ("target: 5\n", "target", "a mapping"),
        ("space: {protect: 7}\n", "space.protect", "a list of unit names"),
        ("search: {trials: many}\n", "search.trials", "a whole number"),
        ("search: {seconds: 0}\n", "search.seconds", "greater than 0"),
        ("search: {seconds: .nan}\n", "search.seconds", "finite"),
        ("search: {seed: -1}\n", "search.seed", "greater than or equal to 0"),
        ("search: {refit: 'yes'}\n", "search.refit", "true or false"),
        ("weights: [a]\n", "weights", "a text"),
    ],
)
def test_each_bad_value_names_file_key_and_remedy(tmp_path: Path, text: str, key: str, advice: str) -> None:
    base = {"model": "net.py:model", "data": "net.py:data"}
    if "budget:" not in text:
        base["budget"] = "5ms"
    path = written(tmp_path, yaml.safe_dump(base) + text)
    with pytest.raises(ConfigError) as error:
        load_config(path, {})
    message = str(error.value)
    assert "problems" not in message
    for part in (str(path), key, advice):
        assert part in message


@pytest.mark.parametrize("spec", ["net.py", "net:", ":model", "net.py:a.b", "no spaces:x", 5])
def test_factories_must_name_a_function(tmp_path: Path, spec: object) -> None:
    with pytest.raises(ConfigError, match=r"model: given .*allowed: 'file\.py:function'"):
        load_config(written(tmp_path, GOOD), {"model": spec})


def test_all_problems_at_once_and_where_they_came_from(tmp_path: Path) -> None:
    path = written(tmp_path, "data: net.py:data\ntarget: {threads: 0, colour: red}\n")
    with pytest.raises(ConfigError) as error:
        load_config(path, {"search.trials": 0})
    message = str(error.value)
    assert message.startswith("5 problems:")
    assert f"{path}: model: is missing; write e.g. `model: model.py:model`" in message
    assert f"{path}: target.colour: unknown key" in message
    assert "command line: search.trials: given 0" in message
    assert "nothing to search for" in message


def test_a_goal_is_asked_for_where_it_is_needed(tmp_path: Path) -> None:
    path = written(tmp_path, "model: net.py:model\ndata: net.py:data\n")
    with pytest.raises(ConfigError, match=r"write `budget: 5ms`.*--max-drop"):
        load_config(path, {})
    assert load_config(path, {}, goal=False).budgets[0].limits == ()
    assert load_config(path, {"max_drop": "1%"}).max_drop == 0.01


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("model: [a\n", "line 2, column 1"),
        ("model: a\nmodel: b\n", "line 2, column 1: the key 'model' is given twice"),
        ("a: &x 1\nb: *x\n", "line 2, column 4: aliases"),
        ("a: !!python/name:os.system\n", "not allowed|cannot read"),
        ("- a\n", "allowed: a mapping"),
        ("\x00", "not a YAML file|not valid YAML"),
    ],
)
def test_broken_yaml_gives_line_and_column(tmp_path: Path, text: str, where: str) -> None:
    with pytest.raises(ConfigError, match=where):
        load_config(written(tmp_path, text), {})


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "absent.yaml", {})
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"model: \xe9\n")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(latin, {})


def test_schema_accepts_what_is_read_and_refuses_what_is_not() -> None:
    validator = Draft202012Validator(json_schema())
    Draft202012Validator.check_schema(json_schema())
    assert validator.is_valid(yaml.safe_load(CONFIG_TEXT))
    assert validator.is_valid({"model": "a.py:b", "data": "a.py:c", "budget": ["1ms"], "max_drop": "1%", "space": "x"})
    assert not validator.is_valid({"model": "a.py:b", "data": "a.py:c", "bugdet": "1ms"})


def test_every_key_has_a_flag() -> None:
    keys = set()
    for name, field in Config.model_fields.items():
        inner = getattr(field.annotation, "model_fields", None)
        keys |= {f"{name}.{key}" for key in inner} if inner else {name}
    assert keys == {flag.key for flag in FLAGS}


@pytest.mark.parametrize(
    ("section", "text"),
    [
        ({"recover": {"trials": True}}, "recover.trials: trials cannot be recovered in no steps"),
        ({"ray": {"asha": True}}, "are for search.engine: ray"),
        ({"search": {"engine": "ray"}, "ray": {"asha": True}}, "ray.asha stops long trials early; set recover.trials"),
        ({"search": {"engine": "ray"}, "ray": {"population": 4}}, "set recover.steps"),
        ({"search": {"storage": "study.db"}}, "allowed: the URL of a database"),
        ({"search": {"engine": "dask"}}, "optuna"),
        ({"search": {"workers": 0}}, "workers"),
    ],
)
def test_settings_of_engines_that_make_no_sense_are_told(section: dict[str, object], text: str, tmp_path: Path) -> None:
    path = tmp_path / "autoprune.yaml"
    path.write_text(json.dumps({"model": "a.py:m", "data": "a.py:d", "budget": "5ms", **section}))
    with pytest.raises(ConfigError, match=re.escape(text)):
        load_config(path, {})
