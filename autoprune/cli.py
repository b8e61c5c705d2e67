"""The command line's entry point: every command, and what signals and memory need before the first of them."""

from __future__ import annotations

import contextlib
import signal
import sys

from autoprune.commands import searching  # noqa: F401 (commands are listed in the order in which they are made)

# isort: split
from autoprune.commands import policies  # noqa: F401

# isort: split
from autoprune.commands import exchange  # noqa: F401

# isort: split
from autoprune.commands.app import INTERRUPTED, app
from autoprune.memory import keep_freed_memory

TERMINATED = 143


def main() -> None:
    """The entry point."""
    keep_freed_memory()
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
