"""Every error a user can meet. A text says where, what was given, what is allowed and what to do; never a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

_NAME_LENGTH = 300
"""Characters; nothing is alike what is longer, and comparing it would take long."""


class AutopruneError(Exception):
    """Base of all errors that autoprune raises on purpose; `exit_code` is what the command line returns."""

    exit_code = 2


class ConfigError(AutopruneError):
    """A configuration, search space or command-line value is wrong."""


class ModelError(AutopruneError):
    """The user's model cannot be loaded, traced, or cut."""


class DataError(AutopruneError):
    """The user's data is missing, empty, or does not fit the model."""


class PolicyError(AutopruneError):
    """A policy file is damaged, of another version, or belongs to another model."""


class LossyError(AutopruneError):
    """A tool's format cannot say all that a policy does; the text lists what would be approximated or dropped."""


class RunError(AutopruneError):
    """A run folder cannot be read, written or resumed."""


class TargetError(AutopruneError):
    """The target runtime is missing or cannot execute the model."""


class BudgetError(AutopruneError):
    """No policy can meet the budget, or the dense model meets it already; the text proposes one that makes sense."""

    exit_code = 3


class MissedError(AutopruneError):
    """A verified number is outside its budget or below its accuracy floor; the text says by how much."""

    exit_code = 4


class HelpedError(AutopruneError):
    """No error: this machine evaluated trials for a search whose latencies were measured on another one, which alone
    can time the finalists and write the policy.
    """

    exit_code = 0


def near_miss(name: str, known: Iterable[str]) -> str:
    """A sentence that names the closest of `known`, or all of them when few: `"did you mean 'top1'?"`."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5) if len(name) <= _NAME_LENGTH else []
    if close:
        return f"did you mean {' or '.join(repr(match) for match in close)}?"
    return f"known: {', '.join(names)}" if names else "there is none"


def listed(problems: Sequence[str]) -> str:
    """All problems at once, one a line."""
    return "\n".join(f"  - {problem}" for problem in problems)
