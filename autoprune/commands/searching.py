"""Commands that look for a policy: search, units, verify."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from autoprune.commands.app import PolicyFile, api, command, configured, json_of, policies, short
from autoprune.config import load_run
from autoprune.core.outcome import OutcomeRecord, UnitsRecord, VerifyRecord
from autoprune.display import Mode, make_display
from autoprune.errors import MissedError
from autoprune.flags import Given, with_flags
from autoprune.report import text


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
        config, folder, notice = configured(given, goal=True)
    run = folder / str(config.run)
    with make_display(mode) as display:
        display.note(notice)
        try:
            outcomes: list[OutcomeRecord] = api().search_config(config, folder=folder, progress=display)
        except KeyboardInterrupt:
            display.note(f"nothing is lost; continue with: autoprune search --resume {shlex.quote(str(short(run)))}")
            raise
    for outcome in outcomes:
        display.show(text.outcome_view(outcome))
    display.note(f"everything is in {short(run)}")
    display.result({"outcomes": [json_of(outcome) for outcome in outcomes]})


@command
@with_flags
def units(
    *,
    latency: Annotated[bool, typer.Option("--latency", help="Measure each unit's share of the latency too.")] = False,
    mode: Mode,
    given: Given,
) -> None:
    """List what can be pruned in the model, how much of it that is, and why the rest cannot."""
    config, folder, notice = configured(given, goal=False, data=False)
    with make_display(mode) as display:
        display.note(notice)
        record: UnitsRecord = api().units_of(config, folder=folder, latency=latency, progress=display)
    display.show(text.units_view(record))
    display.result(
        {
            "units": [json_of(unit) for unit in record.units],
            "coverage": json_of(record.coverage),
            "notes": list(record.notes),
        }
    )


@command
@with_flags
def verify(policy: PolicyFile, *, mode: Mode, given: Given) -> None:
    """Measure a policy again on this machine; exit code 4 when it misses what it was made for, or the limits given."""
    config, folder, notice = configured(given, goal=False)
    goals = (
        "budget",
        "max_drop",
        "min_accuracy",
        "max_loss",
    )  # those of the file are for searches; a policy has its own
    config = config.model_copy(update={key: None for key in goals if key not in given.overrides})
    with make_display(mode) as display:
        display.note(notice)
        record: VerifyRecord = policies().verify_policy(policy, config, folder=folder, progress=display)
    display.show(text.verify_view(record, metric=config.metric))
    display.result({"verify": json_of(record)})
    if not record.met:
        raise MissedError(record.verdict)
