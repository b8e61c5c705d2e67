"""Fingerprints: is this the same model, the same structure, the same data? SHA-256 over names, shapes and bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from torch import Tensor, nn


def weights_fingerprint(model: nn.Module) -> str:
    """Covers every parameter and buffer of `model`, with names, types and shapes."""
    return of_tensors(sorted(model.state_dict().items()))


def structure_fingerprint(model: nn.Module) -> str:
    """Covers names, types and shapes alone: equal for a retrained model of the same architecture."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def of_tensors(named: Iterable[tuple[str, Tensor | None]]) -> str:
    """Covers named tensors in the order given; None is a value of its own."""
    digest = hashlib.sha256()
    for name, tensor in named:
        if tensor is None:
            digest.update(f"{name} none\n".encode())
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def of_text(*parts: object) -> str:
    """Covers the texts of `parts`."""
    return hashlib.sha256("\n".join(str(part) for part in parts).encode()).hexdigest()


def differences(model: nn.Module, expected: Iterable[tuple[str, tuple[int, ...]]]) -> list[str]:
    """How the tensors of `model` differ from `expected` names and shapes, a line each."""
    wanted = dict(expected)
    have = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    missing = [f"{name} is missing" for name in wanted if name not in have]
    extra = [f"{name} is new" for name in have if name not in wanted]
    changed = [f"{n} has shape {have[n]}, not {s}" for n, s in wanted.items() if n in have and have[n] != s]
    return [*changed, *missing, *extra]
