"""A policy from what another tool wrote: read, laid over the model's units, and written with what could not be mapped.

Knows importers by their protocol, and files. Does not know any format, nor how wishes become decisions (`mapping`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from autoprune.core.exchange import ImportRecord
from autoprune.core.policy import Policy
from autoprune.errors import ConfigError, PolicyError, listed
from autoprune.evidence import model_identity
from autoprune.files import read_limited, write_policy
from autoprune.importers import importer
from autoprune.importers.base import Found
from autoprune.importers.plain import Plain, RatioIs
from autoprune.importers.reading import MOST_TOLD
from autoprune.mapping import Mapped, mapped
from autoprune.methods import method as method_named
from autoprune.side_file import with_kept
from autoprune.subject import Subject

METHOD = "l2"
"""Chooses which channels of imported units go, where a file does not say."""


@dataclass(frozen=True, slots=True)
class Import:
    """How a file is to be read: as `tool` writes it."""

    tool: str
    method: str = METHOD
    ratio_is: RatioIs | None = None
    """What plain ratios are; None: what the tool says, and of plain ones the removed share."""


def read_import(path: Path, asked: Import) -> Found:
    """What the file at `path` asks for.

    Raises PolicyError for what cannot be read, ConfigError for an unknown tool.
    """
    chosen = importer(asked.tool)
    if asked.ratio_is is not None:
        if not isinstance(chosen, Plain):
            raise ConfigError(
                f"--ratio-is {asked.ratio_is}: {asked.tool} says itself what its ratios are; it is for --from plain"
            )
        chosen = Plain(asked.ratio_is)
    return chosen.read(read_limited(path, error=PolicyError), name=str(path))


def write_import(found: Found, subject: Subject, asked: Import, *, output: Path, title: str) -> ImportRecord:
    """Write the policy that `found` (read from `title`) means for the subject's model to `output`.

    Where the file names channels, the side file `<output's stem>.kept.safetensors` beside it holds those that stay.
    Raises PolicyError with the list where nothing could be mapped; nothing is written then.
    """
    method_named(asked.method)  # an unknown one is told at once
    policy, laid = policy_of(found, subject, method=asked.method, title=title)
    if laid.kept:
        policy = with_kept(policy, laid.kept, output)
    write_policy(output, policy)
    return ImportRecord(
        tool=asked.tool, written=str(output), units=len(policy.units), unmapped=laid.unmapped, notes=laid.notes
    )


def policy_of(found: Found, subject: Subject, *, method: str, title: str) -> tuple[Policy, Mapped]:
    """The policy without a side file, and all that there is to say. Raises PolicyError where it would be empty."""
    laid = mapped(found, subject, method=method)
    if not laid.units:
        told = [*laid.unmapped, *laid.notes][:MOST_TOLD]
        more = len(laid.unmapped) + len(laid.notes) - len(told)
        reasons = listed([*told, f"and {more} more"] if more else told) or "  - it asks for nothing"
        raise PolicyError(f"{title}: nothing in it narrows a unit of {subject.task.name!r}:\n{reasons}")
    return Policy(units=dict(laid.units), model=model_identity(subject)), laid
