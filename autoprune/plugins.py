"""Finds a plug-in by name: built in, installed (entry points), or written as `module:Name`. Knows no plug-in itself."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import TypeVar, cast

from autoprune.errors import ConfigError, near_miss

T = TypeVar("T")


def resolve(kind: str, name: str, builtins: Mapping[str, Callable[[], T]]) -> T:
    """A fresh plug-in of `kind` (`method`, `runtime`, `evaluator`, `exporter`, `importer`).

    Looked up in `builtins`, then among the entry points of group `autoprune.<kind>s`; a name with a colon is imported
    as `module:Name`. Classes and functions are called without arguments, anything else is taken as it is.
    Raises ConfigError that lists what exists and the nearest match.
    """
    if name in builtins:
        return builtins[name]()
    if ":" in name:
        return cast(T, _made(_imported(kind, name)))
    installed = {point.name: point for point in entry_points(group=f"autoprune.{kind}s")}
    if name in installed:
        return cast(T, _made(_loaded(kind, installed[name])))
    known = sorted({*builtins, *installed})
    raise ConfigError(
        f"{kind}: unknown {kind} {name!r}; {near_miss(name, known)} There is: {', '.join(known) or 'none'}; "
        f"or name your own as 'module:Name'"
    )


def optional(module: str, *, needed_by: str, extra: str) -> ModuleType:
    """The module of an optional package. Raises ConfigError that says which of our extras brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ConfigError(
            f"{needed_by} needs the package {package}, which cannot be imported ({error}); "
            f"pip install 'autoprune[{extra}]', or pip install {package}"
        ) from error


def _made(found: object) -> object:
    return found() if callable(found) else found


def _loaded(kind: str, point: EntryPoint) -> object:
    try:
        return point.load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"{kind}: {point.name!r} is installed as {point.value!r} but cannot be loaded ({error}); "
            f"reinstall the package that brings it"
        ) from error


def _imported(kind: str, name: str) -> object:
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"{kind}: cannot import {module_name!r} of {name!r} ({error}); write 'module:Name' with a module that "
            f"Python can import from here"
        ) from error
    if attribute not in vars(module):
        public = [member for member in vars(module) if not member.startswith("_")]
        raise ConfigError(f"{kind}: {module_name!r} has no {attribute!r}; {near_miss(attribute, public)}")
    return cast(object, vars(module)[attribute])
