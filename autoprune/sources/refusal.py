"""Why a source cannot be read, and the one door to optional libraries."""

from __future__ import annotations

import importlib
from types import ModuleType


class RefusedError(ValueError):
    """A source cannot be read. The text says why and what to do; it does not repeat which source it is."""


def library(name: str, *, extra: str) -> ModuleType:
    """An optional library. Raises RefusedError with the pip command, or with what is wrong with what is installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.partition(".")[0] not in (name, "torchvision"):
            raise RefusedError(f"{name} cannot be imported: {error}") from error
        raise RefusedError(f"needs {error.name or name}; pip install 'autoprune[{extra}]'") from error
    except (ImportError, RuntimeError, OSError) as error:
        text = " ".join(str(error).split())
        raise RefusedError(
            f"{name} cannot be imported ({text}); libraries with operators of their own, such as torchvision, must be "
            f"of torch's own build: install both from one index, e.g. pip install 'autoprune[{extra}]' in a fresh "
            "environment"
        ) from error
