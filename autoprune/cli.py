"""The command line. Knows commands and flags; all work is done behind one door, so that help and `show` are instant."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import typer
from pydantic import BaseModel

from autoprune import __version__
from autoprune.config import FILE_NAME, Config, demo_config, json_schema, load_config, load_run
from autoprune.core.exchange import ExportRecord
from autoprune.core.outcome import OutcomeRecord, PackedRecord, UnitsRecord, VerifyRecord
from autoprune.core.policy import Policy
from autoprune.display import Mode, fail, make_display
from autoprune.errors import AutopruneError, MissedError, RunError
from autoprune.files import cause, read_policy
from autoprune.flags import Given, expanded, option, with_flags
from autoprune.init import write_files
from autoprune.memory import keep_freed_memory
from autoprune.report import text

INTERRUPTED, TERMINATED = 130, 143

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


def _version(on: bool) -> None:
    if on:
        typer.echo(f"autoprune {__version__}")
        raise typer.Exit


def main() -> None:
    """The entry point."""
    keep_freed_memory()
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


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
    return app.command(function.__name__)(expanded(guarded, "mode", parameters=flags, gather=_mode))


@command
@with_flags
def search(
    *,
    resume: Annotated[Path | None, typer.Option("--resume", help="Continue the search in this run folder.")] = None,
    mode: Mode,
    given: Given,
) -> None:
    """Search for the best policy within a budget; everything is written into the run folder."""
    if resume is not None:
        config, folder = load_run(resume, given.overrides)
        notice = f"continuing {resume}"
    else:
        config, folder, notice = _configured(given, goal=True)
    run = folder / str(config.run)
    with make_display(mode) as display:
        display.note(notice)
        try:
            outcomes: list[OutcomeRecord] = _api().search_config(config, folder=folder, progress=display)
        except KeyboardInterrupt:
            display.note(f"nothing is lost; continue with: autoprune search --resume {shlex.quote(str(_short(run)))}")
            raise
    for outcome in outcomes:
        display.show(text.outcome_view(outcome))
    display.note(f"everything is in {_short(run)}")
    display.result({"outcomes": [_json(outcome) for outcome in outcomes]})


@command
@with_flags
def units(
    *,
    latency: Annotated[bool, typer.Option("--latency", help="Measure each unit's share of the latency too.")] = False,
    mode: Mode,
    given: Given,
) -> None:
    """List what can be pruned in the model, how much of it that is, and why the rest cannot."""
    config, folder, notice = _configured(given, goal=False, data=False)
    with make_display(mode) as display:
        display.note(notice)
        record: UnitsRecord = _api().units_of(config, folder=folder, latency=latency, progress=display)
    display.show(text.units_view(record))
    display.result(
        {
            "units": [_json(unit) for unit in record.units],
            "coverage": _json(record.coverage),
            "notes": list(record.notes),
        }
    )


@command
def show(policy: PolicyFile, *, mode: Mode) -> None:
    """Show a policy file: what it decides, and its evidence."""
    content = read_policy(policy)
    display = make_display(mode)
    display.show(text.policy_view(content))
    display.result({"policy": _json(content)})


@command
@with_flags
def apply(
    policy: PolicyFile,
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write the pruned model into.")] = Path(
        "pruned"
    ),
    transfer: Annotated[
        bool, typer.Option("--transfer", help="To other weights: the policy's methods choose anew what goes.")
    ] = False,
    mode: Mode,
    given: Given,
) -> None:
    """Apply a policy to the model and write the pruned model."""
    config, folder, notice = _configured(given, goal=False)
    with make_display(mode) as display:
        display.note(notice)
        written: dict[str, Path]
        written = _api().apply_policy(policy, config, folder=folder, output=output, anew=transfer, progress=display)
    for kind, path in written.items():
        display.show(text.line(f"{kind}: {path}"))
    display.result({"written": {kind: str(path) for kind, path in written.items()}})


@command
@with_flags
def export(
    policy: PolicyFile,
    *,
    to: Annotated[str, typer.Option("--to", help="The tool: torch-pruning, modelopt, nni, onnx, python, ...")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write into. Default: exported/TOOL.")
    ] = None,
    allow_lossy: Annotated[
        bool, typer.Option("--allow-lossy", help="Write what the tool can be told, where that is not all.")
    ] = False,
    mode: Mode,
    given: Given,
) -> None:
    """Write a policy as another tool reads it, and say what was kept exactly, approximated and dropped."""
    config, folder, notice = _configured(given, goal=False, data=False)
    where = output or Path("exported") / to.replace(":", "-")
    with make_display(mode) as display:
        display.note(notice)
        record: ExportRecord = _api().export_policy(
            policy, config, folder=folder, tool=to, output=where, allow_lossy=allow_lossy, progress=display
        )
    display.show(text.export_view(record))
    display.result({"export": _json(record)})


@command
def unpack(
    file: Annotated[Path, typer.Argument(help="A packed model (model.packed).", show_default=False)],
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")] = Path("unpacked.safetensors"),
    mode: Mode,
) -> None:
    """Write the tensors of a packed model as safetensors, bit for bit, and say what takes how many bytes."""
    record: PackedRecord = _api().unpack_file(file, output)
    display = make_display(mode)
    display.show(text.packed_view(record))
    display.result({"packed": _json(record)})


@command
@with_flags
def verify(policy: PolicyFile, *, mode: Mode, given: Given) -> None:
    """Measure a policy again on this machine; exit code 4 when it misses what it was made for, or the limits given."""
    config, folder, notice = _configured(given, goal=False)
    goals = (
        "budget",
        "max_drop",
        "min_accuracy",
        "max_loss",
    )  # those of the file are for searches; a policy has its own
    config = config.model_copy(update={key: None for key in goals if key not in given.overrides})
    with make_display(mode) as display:
        display.note(notice)
        record: VerifyRecord = _api().verify_policy(policy, config, folder=folder, progress=display)
    display.show(text.verify_view(record, metric=config.metric))
    display.result({"verify": _json(record)})
    if not record.met:
        raise MissedError(record.verdict)


@command
def init(
    folder: Annotated[Path, typer.Argument(help="Where to write.", show_default=False)] = Path(),
    *,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what is there.")] = False,
    mode: Mode,
) -> None:
    """Write a commented autoprune.yaml and a model.py to fill in."""
    written = [str(path) for path in write_files(folder, force=force)]
    display = make_display(mode)
    display.show(text.line(f"wrote {' and '.join(written)}; fill in model.py, then: autoprune units"))
    display.result({"written": written})


@app.command()
def schema(
    kind: Annotated[Literal["config", "policy"], typer.Argument(help="Whose schema: config or policy.")] = "config",
) -> None:
    """Print the JSON schema of autoprune.yaml, or of the policy file."""
    content = json_schema() if kind == "config" else Policy.model_json_schema()
    typer.echo(json.dumps(content, indent=2))


@app.callback()
def _root(*, version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_version)] = False) -> None:
    """Searches which layers of a PyTorch model to prune, how much and by which method, within a measured budget."""


def _api() -> ModuleType:
    """The one door to torch and everything heavy."""
    return importlib.import_module("autoprune.api")


def _configured(given: Given, *, goal: bool, data: bool = True) -> tuple[Config, Path, str]:
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


def _short(path: Path) -> Path:
    """Relative to the working folder where that is shorter."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _json(record: BaseModel) -> object:
    return json.loads(record.model_dump_json())
