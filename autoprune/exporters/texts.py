"""The texts of exported files: who wrote them, from what, for which tool; the same bytes for the same policy."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version

import torch
from torch import Tensor

from autoprune import yamls
from autoprune.exporters.base import Resolved


def about(resolved: Resolved, tested: Sequence[str]) -> dict[str, str]:
    """What every exported file says of itself."""
    return {
        "written_by": f"autoprune {version('autoprune')}",
        "policy": resolved.title,
        "tested_with": ", ".join(tested),
    }


def comment(resolved: Resolved, tested: Sequence[str]) -> str:
    """The same as comment lines (`# ...`) of a YAML or text file."""
    return "".join(f"# {key.replace('_', ' ')}: {text}\n" for key, text in about(resolved, tested).items())


def json_bytes(content: object) -> bytes:
    """`content` as JSON, its own order kept."""
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()


def yaml_bytes(content: object, *, head: str = "") -> bytes:
    """`content` as YAML that every reader reads alike, after `head`, comment lines."""
    return (head + yamls.text(content)).encode()


def state_bytes(state: Mapping[str, Tensor]) -> bytes:
    """Tensors as `torch.load(..., weights_only=True)` reads them: whoever has torch needs nothing else."""
    buffer = io.BytesIO()
    torch.save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}, buffer)
    return buffer.getvalue()
