"""The command line's frame: the app, what every command shares, and the one door to everything heavy."""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer
from pydantic import BaseModel

from autoprune import __version__
from autoprune.config import FILE_NAME, Config, demo_config, load_config
from autoprune.display import Mode, fail
from autoprune.errors import AutopruneError, RunError
from autoprune.files import cause
from autoprune.flags import Given, expanded, option

INTERRUPTED = 130

app = typer.Typer(
    name="autoprune",
    help="Searches which layers of a PyTorch model to prune, how much and by which method, within a measured budget.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

PolicyFile = Annotated[Path, typer.Argument(help="The policy file.", metavar="POLICY", show_default=False)]
_QUIET = Annotated[bool, typer.Option("--quiet", "-q", help="Errors only.")]
_JSON = Annotated[bool, typer.Option("--json", help="JSON lines on standard output; the last one is the result.")]


def _mode(values: dict[str, Any]) -> Mode:
    return "json" if values["as_json"] else "quiet" if values["quiet"] else "auto"


def command(function: Callable[..., None]) -> Callable[..., None]:
    """`function` as a command: `--quiet` and `--json` in place of `mode`, a user's errors told in a line or two."""

    @functools.wraps(function)
    def guarded(*, mode: Mode, **values: Any) -> None:
        try:
            function(mode=mode, **values)
        except AutopruneError as error:
            raise _failed(error, mode) from error
        except OSError as error:
            place = f"{error.filename}: " if error.filename is not None else ""
            raise _failed(RunError(f"{place}{cause(error)}"), mode) from error
        except KeyboardInterrupt as error:
            fail("interrupted", mode=mode, kind="Interrupted", exit_code=INTERRUPTED)
            raise typer.Exit(INTERRUPTED) from error

    flags = [option("quiet", _QUIET, default=False), option("as_json", _JSON, default=False)]
    return app.command(function.__name__.rstrip("_"))(expanded(guarded, "mode", parameters=flags, gather=_mode))


def api() -> ModuleType:
    """The door to searches, and to torch and everything heavy."""
    return importlib.import_module("autoprune.api")


def policies() -> ModuleType:
    """The door to what is done with policies."""
    return importlib.import_module("autoprune.policies")


def configured(given: Given, *, goal: bool, data: bool = True) -> tuple[Config, Path, str]:
    """Configuration, the folder its paths are relative to, and a line that says where it came from."""
    path = given.config
    if path is None and Path(FILE_NAME).is_file():
        path = Path(FILE_NAME)
    if path is not None:
        return load_config(path, given.overrides, goal=goal, data=data), path.resolve().parent, f"configuration: {path}"
    if {"model", "data"} & set(given.overrides):
        return (
            load_config(None, given.overrides, goal=goal, data=data),
            Path.cwd(),
            f"no {FILE_NAME}; using the flags alone",
        )
    notice = f"no {FILE_NAME} here; running the embedded demo (`autoprune init` begins your own)"
    return demo_config(given.overrides, goal=goal), Path.cwd(), notice


def _failed(error: AutopruneError, mode: Mode) -> typer.Exit:
    fail(str(error), mode=mode, kind=type(error).__name__, exit_code=error.exit_code)
    return typer.Exit(error.exit_code)


def short(path: Path) -> Path:
    """Relative to the working folder where that is shorter."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def json_of(record: BaseModel) -> object:
    """A record as plain values."""
    return json.loads(record.model_dump_json())


def _version(on: bool) -> None:
    if on:
        typer.echo(f"autoprune {__version__}")
        raise typer.Exit


@app.callback()
def _root(*, version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_version)] = False) -> None:
    """Searches which layers of a PyTorch model to prune, how much and by which method, within a measured budget."""
