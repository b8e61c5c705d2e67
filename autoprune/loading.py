"""The user's model and data, brought in from their Python files, weight files and other sources of models.

Knows how to import a function by file or by module and how that fails. Does not know pruning.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import itertools
import pickle
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from autoprune.config import Config
from autoprune.data import Data, as_data, from_factory
from autoprune.errors import AutopruneError, ConfigError, DataError, ModelError, near_miss
from autoprune.files import cause
from autoprune.source import Source, parse_source
from autoprune.sources.hugging_face import OneTensor
from autoprune.sources.opened import opened
from autoprune.sources.refusal import RefusedError

_SHOWN = 5
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_numbers = itertools.count()


def load_factory(spec: str, folder: Path, *, key: str) -> Callable[..., object]:
    """The function that `file.py:name` or `package.module:name` names; `file.py` is relative to `folder`.

    Raises ConfigError, beginning with `key`, with the user's file, line and exception text.
    """
    place, _, name = spec.rpartition(":")
    with _importable(folder):
        module = _from_file(folder / place, key) if place.endswith(".py") else _from_package(place, key)
    found = getattr(module, name, None)
    if found is None:
        names = [other for other, value in vars(module).items() if callable(value) and not other.startswith("_")]
        raise ConfigError(f"{key}: {place} has no {name!r}; {near_miss(name, names)}")
    if not callable(found):
        raise ConfigError(f"{key}: {name!r} in {place} is of type {type(found).__name__}; it must be a function")
    return found  # type: ignore[no-any-return]


def load_model(config: Config, *, folder: Path) -> nn.Module:
    """The user's model with its weights, in evaluation mode. Raises ConfigError or ModelError."""
    source = parse_source(config.model)
    if source.kind == "function":
        model = _called(config.model, folder, key="model", error=ModelError)
    else:
        model = _opened(source, folder, name=config.model, pretrained=config.weights is None)
    if not isinstance(model, nn.Module):
        raise ModelError(f"model: {config.model} returned {type(model).__name__}; it must return a torch.nn.Module")
    if config.weights is not None:
        fit_weights(model, _read_weights(folder / config.weights), name=config.weights)
    _check_finite(model)
    return model.eval()


def load_data(config: Config, *, folder: Path) -> Data:
    """The user's data as tensors. Raises ConfigError or DataError."""
    if config.data is None:
        raise DataError("data: is missing; write e.g. `data: model.py:data`")
    returned = _called(config.data, folder, key="data", error=DataError)
    return from_factory(returned, name=f"data: {config.data}")


def random_data(model: nn.Module, shape: Sequence[int]) -> Data:
    """Four random samples of an example's `shape` (batch, ...), to look at a model that comes without data.

    Tokens where the model says how many there are, otherwise floats from the normal distribution.
    """
    generator, sizes = torch.Generator().manual_seed(0), (4, *shape[1:])
    if isinstance(model, OneTensor) and model.vocabulary is not None:
        inputs = torch.randint(model.vocabulary, sizes, generator=generator)
    else:
        inputs = torch.randn(sizes, generator=generator)
    return as_data(inputs, (inputs, torch.zeros(4, dtype=torch.int64)))


def fit_weights(model: nn.Module, weights: Mapping[str, Tensor], *, name: str) -> None:
    """Load `weights` into `model`. Raises ModelError listing what is missing, unexpected or of another shape."""
    own = model.state_dict()
    missing = [key for key in own if key not in weights and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in weights if key not in own]
    mismatched = [
        f"{key} (file {tuple(weights[key].shape)}, model {tuple(own[key].shape)})"
        for key in own
        if key in weights and weights[key].shape != own[key].shape
    ]
    found = (("missing", missing), ("unexpected", unexpected), ("of another shape", mismatched))
    problems = [f"{kind}: {_some(keys)}" for kind, keys in found if keys]
    if problems:
        raise ModelError(f"weights: {name} does not fit the model; {'; '.join(problems)}")
    model.load_state_dict(dict(weights), strict=False)


def _opened(source: Source, folder: Path, *, name: str, pretrained: bool) -> nn.Module:
    """A model that no function of the user's returns. Raises ModelError."""
    place = str(folder / source.place) if source.is_path else source.place
    if source.kind in ("onnx", "export") and not Path(place).is_file():
        raise ModelError(f"model: there is no file {place}")
    try:
        return opened(source.kind, place, dict(source.keywords), pretrained=pretrained)
    except RefusedError as error:
        raise ModelError(f"model: {name}: {error}") from error


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """The user's own modules can be imported meanwhile."""
    entry = str(folder.resolve())
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(entry)


def _called(spec: str, folder: Path, *, key: str, error: type[AutopruneError]) -> object:
    factory = load_factory(spec, folder, key=key)
    place = spec.rpartition(":")[0]
    path = folder / place if place.endswith(".py") else None
    _check_signature(factory, spec, key)
    try:
        with _importable(path.parent if path is not None else folder), torch.random.fork_rng(devices=[]):
            return factory()
    except AutopruneError:
        raise
    except (Exception, SystemExit) as raised:
        raise error(f"{key}: {spec} failed: {_told(raised, path)}") from raised


def _check_signature(factory: Callable[..., object], spec: str, key: str) -> None:
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):  # built in: calling it will tell
        return
    try:
        signature.bind()
    except TypeError as raised:
        raise ConfigError(f"{key}: {spec} must be callable without arguments: {raised}") from raised


def _from_file(path: Path, key: str) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"{key}: there is no file {path}; `autoprune init` writes one to fill in")
    name = f"_autoprune_user_{next(_numbers)}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{key}: {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        with _importable(path.parent):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as raised:
        del sys.modules[name]
        raise ConfigError(f"{key}: {path} cannot be imported: {_told(raised, path)}") from raised
    return module


def _from_package(name: str, key: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as raised:
        hint = f"; a file is written {name.replace('.', '/')}.py:..." if raised.name == name.partition(".")[0] else ""
        raise ConfigError(f"{key}: module {name} cannot be imported: {raised}{hint}") from raised
    except (Exception, SystemExit) as raised:
        raise ConfigError(f"{key}: module {name} cannot be imported: {_told(raised, None)}") from raised


def _told(raised: BaseException, path: Path | None) -> str:
    """`file, line 3: ValueError: text`, with the deepest line of the user's file (or the last line at all)."""
    text = f"{type(raised).__name__}: {raised}".removesuffix(": ")
    if isinstance(raised, SyntaxError):
        return f"{raised.filename}, line {raised.lineno}: SyntaxError: {raised.msg}"
    frames = traceback.extract_tb(raised.__traceback__)
    own = [frame for frame in frames if path is not None and Path(frame.filename).resolve() == path.resolve()]
    chosen = own[-1] if own else frames[-1]
    return f"{chosen.filename}, line {chosen.lineno}: {text}"


def _read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from .safetensors, or from a .pt that holds nothing but tensors."""
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ModelError(f"weights: {path} cannot be read: {cause(error)}") from error
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ModelError(
            f"weights: {path} is not a file of tensors alone; write one with "
            "safetensors.torch.save_file(model.state_dict(), ...) or torch.save(model.state_dict(), ...)"
        ) from error
    return _state_dict(content, path)


def _state_dict(content: object, path: Path) -> dict[str, Tensor]:
    if isinstance(content, dict):
        inner = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), dict)), None)
        content = content if inner is None else inner
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ModelError(f"weights: {path} does not hold a state dict (a mapping of names to tensors)")
    state = {str(key): value for key, value in content.items()}
    if state and all(key.startswith("module.") for key in state):  # saved from DataParallel
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return state


def _check_finite(model: nn.Module) -> None:
    bad = [
        name
        for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers())
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
    ]
    if bad:
        raise ModelError(f"model: weights hold NaN or infinity: {_some(bad)}; load a trained, finite checkpoint")


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + rest
