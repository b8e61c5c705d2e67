"""Commands that hand a policy to other tools, take one from them, and compare and join policies."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from autoprune.commands.app import PolicyFile, command, configured, json_of, policies
from autoprune.core.comparison import difference
from autoprune.core.exchange import ExportRecord, ImportRecord
from autoprune.core.policy import Policy
from autoprune.display import Mode, make_display
from autoprune.files import read_policy
from autoprune.flags import Given, with_flags
from autoprune.report import text


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
    config, folder, notice = configured(given, goal=False, data=False)
    where = output or Path("exported") / to.replace(":", "-")
    with make_display(mode) as display:
        display.note(notice)
        record: ExportRecord = policies().export_policy(
            policy, config, folder=folder, tool=to, output=where, allow_lossy=allow_lossy, progress=display
        )
    display.show(text.export_view(record))
    display.result({"export": json_of(record)})


@command
@with_flags
def import_(
    file: Annotated[Path, typer.Argument(help="What another tool wrote.", show_default=False)],
    *,
    tool: Annotated[
        str, typer.Option("--from", help="spdy, nni, distiller, mmrazor, torch-pruning, or plain: layers with ratios.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Policy file to write.")] = Path("policy.yaml"),
    method: Annotated[
        str, typer.Option("--method", help="Chooses which channels go, where the file does not name them.")
    ] = "l2",
    ratio_is: Annotated[
        Literal["removed", "kept"] | None, typer.Option("--ratio-is", help="What plain ratios are. Default: removed.")
    ] = None,
    mode: Mode,
    given: Given,
) -> None:
    """Make a policy of what another tool wrote; what cannot be mapped is listed, not guessed."""
    config, folder, notice = configured(given, goal=False, data=False)
    asked = policies().Import(tool, method, ratio_is)
    with make_display(mode) as display:
        display.note(notice)
        record: ImportRecord = policies().import_policy(
            file, config, folder=folder, asked=asked, output=output, progress=display
        )
    display.show(text.import_view(record))
    display.result({"import": json_of(record)})


@command
def diff(
    before: Annotated[Path, typer.Argument(help="A policy file.", show_default=False)],
    after: Annotated[Path, typer.Argument(help="The one to compare it with.", show_default=False)],
    *,
    mode: Mode,
) -> None:
    """Compare two policies: unit by unit, and in what was measured."""
    found = difference(read_policy(before), read_policy(after))
    display = make_display(mode)
    display.show(text.difference_view(found, names=(str(before), str(after))))
    display.result({"diff": json_of(found)})


@command
def merge(
    files: Annotated[
        list[Path], typer.Argument(help="Policy files of one model.", metavar="POLICY...", show_default=False)
    ],
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="Policy file to write.")] = Path("merged.yaml"),
    mode: Mode,
) -> None:
    """Join policies that decide about different units into one; refused where they conflict."""
    joined: Policy = policies().merge_policies(files, output)
    display = make_display(mode)
    display.show(text.line(f"wrote {output}: {len(joined.units)} units; next: autoprune apply {output} --transfer"))
    display.result({"written": str(output), "units": len(joined.units)})
