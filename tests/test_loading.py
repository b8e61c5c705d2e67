"""The user's model and data files, and the ways in which they fail."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from autoprune.config import Config, demo_config
from autoprune.errors import AutopruneError, ConfigError, DataError, ModelError
from autoprune.loading import load_data, load_factory, load_model

HEAD = "import torch\nfrom torch import nn\n"
NET = HEAD + "def model():\n    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))\n"


def configured(folder: Path, source: str, **more: str) -> Config:
    (folder / "net.py").write_text(source, encoding="utf-8")
    return Config.model_validate({"model": "net.py:model", "data": "net.py:data", **more})


def test_a_model_from_a_file_with_its_own_helpers(tmp_path: Path) -> None:
    (tmp_path / "helper_of_test_loading.py").write_text("WIDTH = 7\n")
    source = HEAD + (
        "from dataclasses import dataclass\nfrom helper_of_test_loading import WIDTH\n"
        "@dataclass\nclass A:\n    width: int = WIDTH\ndef model():\n    return nn.Linear(A().width, 2)\n"
    )
    model = load_model(configured(tmp_path, source), folder=tmp_path)
    assert isinstance(model, nn.Linear)
    assert (model.in_features, model.training) == (7, False)


def test_the_demo_is_loaded_by_module() -> None:
    config = demo_config({"budget": ["50%"]})
    assert not load_model(config, folder=Path()).training
    data = load_data(config, folder=Path())
    assert data.validation_inputs.shape[0] == data.validation_targets.shape[0] > 100


@pytest.mark.parametrize(
    ("source", "error", "parts"),
    [
        ("import torch\n\nraise ValueError('boom')\n", ConfigError, ["net.py, line 3", "ValueError: boom"]),
        ("def model(:\n", ConfigError, ["net.py, line 1", "SyntaxError"]),
        ("import no_such_module_at_all\n", ConfigError, ["line 1", "no_such_module_at_all"]),
        ("import sys\nsys.exit(3)\n", ConfigError, ["line 2", "SystemExit"]),
        ("def modle(): pass\n", ConfigError, ["no 'model'", "did you mean 'modle'"]),
        ("model = 5\n", ConfigError, ["'model'", "of type int"]),
        ("def model(width): pass\n", ConfigError, ["without arguments", "'width'"]),
        ("def model():\n    return 5\n", ModelError, ["returned int", "torch.nn.Module"]),
        ("def model():\n    x = 1\n    return [][x]\n", ModelError, ["net.py, line 3", "IndexError"]),
        ("def model():\n    raise NotImplementedError('fill in')\n", ModelError, ["line 2", "fill in"]),
    ],
)
def test_failures_name_file_line_and_reason(
    tmp_path: Path, source: str, error: type[AutopruneError], parts: list[str]
) -> None:
    with pytest.raises(error) as raised:
        load_model(configured(tmp_path, source), folder=tmp_path)
    text = str(raised.value)
    assert text.startswith("model: ")
    assert "Traceback" not in text
    for part in parts:
        assert part in text


def test_missing_files_and_modules(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data: there is no file .*absent\.py"):
        load_factory("absent.py:data", tmp_path, key="data")
    with pytest.raises(ConfigError, match=r"module absent_package\.net cannot be imported"):
        load_factory("absent_package.net:model", tmp_path, key="model")


def test_weights_are_loaded(tmp_path: Path) -> None:
    config = configured(tmp_path, NET, weights="w.safetensors")
    state = {name: torch.full_like(tensor, 2) for name, tensor in load_model_plain(tmp_path).state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    assert torch.equal(load_model(config, folder=tmp_path).state_dict()["0.weight"], torch.full((3, 4), 2.0))
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, tmp_path / "w.pt")
    config = config.model_copy(update={"weights": "w.pt"})
    assert torch.equal(load_model(config, folder=tmp_path).state_dict()["0.bias"], torch.full((3,), 2.0))


def load_model_plain(folder: Path) -> nn.Module:
    return load_model(configured(folder, NET), folder=folder)


def test_weights_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    state = dict(load_model_plain(tmp_path).state_dict())
    del state["0.bias"]
    state["extra"] = torch.ones(1)
    state["1.weight"] = torch.ones(5)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ModelError) as error:
        load_model(configured(tmp_path, NET, weights="w.safetensors"), folder=tmp_path)
    text = str(error.value)
    for part in ("missing: 0.bias", "unexpected: extra", "1.weight (file (5,), model (3,))"):
        assert part in text


def test_weight_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    (tmp_path / "bad.pt").write_bytes(b"nothing")
    torch.save(nn.Linear(2, 2), tmp_path / "whole.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    reasons = {
        "absent.safetensors": "no such file",
        "absent.pt": "no such file",
        "bad.safetensors": "tensors alone",
        "bad.pt": "tensors alone",
        "whole.pt": "tensors alone",
        "list.pt": "state dict",
    }
    for name, reason in reasons.items():
        with pytest.raises(ModelError, match=reason):
            load_model(configured(tmp_path, NET, weights=name), folder=tmp_path)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_weights_must_be_finite(tmp_path: Path, value: str) -> None:
    source = (
        HEAD + f"def model():\n    net = nn.Linear(2, 2)\n    net.bias.data[0] = float('{value}')\n    return net\n"
    )
    with pytest.raises(ModelError, match="NaN or infinity: bias"):
        load_model(configured(tmp_path, source), folder=tmp_path)


def test_data_failures_are_data_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"net\.py, line 3: ZeroDivisionError"):
        load_data(configured(tmp_path, HEAD + "def data(): 1 / 0\n"), folder=tmp_path)
    with pytest.raises(DataError, match=r"net\.py:data must return .* it returned NoneType"):
        load_data(configured(tmp_path, "def data(): pass\n"), folder=tmp_path)
