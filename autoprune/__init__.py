"""Searches which layers of a PyTorch model to prune, how much and by which method, within a measured budget."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from autoprune.api import Outcome, search
    from autoprune.core.policy import Policy
    from autoprune.core.target import Target
    from autoprune.files import read_policy
    from autoprune.goal import Plan

__version__ = "0.1.0"
__all__ = ["Outcome", "Plan", "Policy", "Target", "__version__", "read_policy", "search"]

_HOMES = {
    "search": "autoprune.api",
    "Outcome": "autoprune.api",
    "Plan": "autoprune.goal",
    "Policy": "autoprune.core.policy",
    "Target": "autoprune.core.target",
    "read_policy": "autoprune.files",
}


def __getattr__(name: str) -> object:
    """The public names, imported when first used, so that `import autoprune` is instant."""
    if name not in _HOMES:
        raise AttributeError(f"module 'autoprune' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
