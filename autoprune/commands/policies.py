"""Commands about a policy and what it makes: show, apply, unpack; init and schema, with which one begins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from autoprune.commands.app import PolicyFile, app, command, configured, json_of, policies
from autoprune.config import json_schema
from autoprune.core.outcome import PackedRecord
from autoprune.core.policy import Policy
from autoprune.display import Mode, make_display
from autoprune.files import read_policy
from autoprune.flags import Given, with_flags
from autoprune.init import write_files
from autoprune.report import text


@command
def show(policy: PolicyFile, *, mode: Mode) -> None:
    """Show a policy file: what it decides, and its evidence."""
    content = read_policy(policy)
    display = make_display(mode)
    display.show(text.policy_view(content))
    display.result({"policy": json_of(content)})


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
    config, folder, notice = configured(given, goal=False)
    with make_display(mode) as display:
        display.note(notice)
        written: dict[str, Path]
        written = policies().apply_policy(policy, config, folder=folder, output=output, anew=transfer, progress=display)
    for kind, path in written.items():
        display.show(text.line(f"{kind}: {path}"))
    display.result({"written": {kind: str(path) for kind, path in written.items()}})


@command
def unpack(
    file: Annotated[Path, typer.Argument(help="A packed model (model.packed).", show_default=False)],
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")] = Path("unpacked.safetensors"),
    mode: Mode,
) -> None:
    """Write the tensors of a packed model as safetensors, bit for bit, and say what takes how many bytes."""
    record: PackedRecord = policies().unpack_file(file, output)
    display = make_display(mode)
    display.show(text.packed_view(record))
    display.result({"packed": json_of(record)})


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
