"""Programs of `torch.export` (.pt2): what may be in the archive, and the program as modules.

torch's reader unpickles objects and evaluates texts that an archive holds, so an archive is looked through first and
refused where it holds more than tensors and operations.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from autoprune.sources.aten_layers import as_layers
from autoprune.sources.refusal import RefusedError

TOLERANCE = 1e-4
FORCED = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_OPERATION = re.compile(
    r"torch\.ops\.(aten|prims|higher_order)\.\w+(\.\w+)?|_operator\.[a-z]+|torch\.sym_\w+|math\.[a-z]+"
)
_SYMBOL = r"Symbol\('[a-z]{1,3}\d+'(?:, [a-z]+=True)*\)"
_EXPRESSION = re.compile(rf"(?:{_SYMBOL}|\b(?:[a-z]{{1,3}}\d+|[A-Z]\w*|int_oo|oo|\d+(?:\.\d+)?)\b|[-+*/%(),<>=!&|~ ])*")


def from_program(path: Path) -> nn.Module:
    """The model of a .pt2 file in evaluation mode, computing what the program computes. Raises RefusedError."""
    check_archive(path)
    try:
        with _weights_only():
            program = torch.export.load(path)
    except Exception as error:
        raise RefusedError(
            f"{path} cannot be read: {type(error).__name__}: {' '.join(str(error).split())[:400]}"
        ) from error
    example = _example(program)
    with torch.no_grad():
        wanted = program.module()(example)
    model = as_layers(program)
    _check_same(model, example, wanted)
    _check_batches(model, example)
    return model


def check_archive(path: Path) -> None:
    """Raises RefusedError where reading the archive would run more than operations of torch."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.partition("/")[2] for name in archive.namelist()]
            texts = {name: archive.read(name) for name in archive.namelist() if name.endswith(".json")}
    except (OSError, zipfile.BadZipFile) as error:
        raise RefusedError(f"{path} is no torch.export archive; torch.export.save(program, path) writes one") from error
    code = [
        n
        for n in names
        if n.startswith(("data/aotinductor", "data/constants/custom_obj")) or n.endswith((".so", ".pkl"))
    ]
    problems = [f"{name} (code, or an object of Python)" for name in code[:3]]
    for text in texts.values():
        try:
            content = json.loads(text)
        except ValueError as error:
            raise RefusedError(f"{path} holds a damaged description: {error}") from error
        problems += _problems(content)
    if problems:
        raise RefusedError(f"{path} holds more than tensors and operations of torch: {'; '.join(problems[:5])}")


def _problems(content: Any) -> Iterator[str]:
    """What in a description is unpickled, evaluated, or called, and is not what torch writes for plain models."""
    if isinstance(content, list):
        for item in content:
            yield from _problems(item)
        return
    if not isinstance(content, dict):
        return
    for key, value in content.items():
        if key == "use_pickle" and value:
            yield f"a pickled object ({content.get('path_name')})"
        elif key == "guards_code" and value:
            yield from (f"the guard {text!r}" for text in value if "__" in str(text))
        elif key == "expr_str" and not _EXPRESSION.fullmatch(str(value)):
            yield f"the expression {value!r}"
        elif key == "target" and isinstance(value, str) and "inputs" in content and not _OPERATION.fullmatch(value):
            yield f"the operation {value!r}"
        else:
            yield from _problems(value)


@contextmanager
def _weights_only() -> Iterator[None]:
    """torch's unpickler takes tensors alone meanwhile, whatever its callers ask for."""
    before = os.environ.get(FORCED)
    os.environ[FORCED] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[FORCED]
        else:
            os.environ[FORCED] = before


def _example(program: ExportedProgram) -> Tensor:
    """The input it was exported with, or one of its shape."""
    if program.example_inputs is not None:
        leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(program.example_inputs) if isinstance(leaf, Tensor)]
        if len(leaves) == 1:
            return leaves[0]
    raise RefusedError("it takes more than one tensor, or holds no example input; export it with one tensor")


def _check_same(model: nn.Module, example: Tensor, wanted: object) -> None:
    """Raises RefusedError where the modules do not compute what the program does."""
    with torch.no_grad():
        found = model(example)
    pairs = zip(torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(wanted), strict=True)
    off = max((float((a - b).abs().max()) for a, b in pairs if isinstance(a, Tensor) and a.numel()), default=0.0)
    if not off <= TOLERANCE:
        raise RefusedError(f"as modules it computes something else (off by {off:.2g}); please report the model")


def _check_batches(model: nn.Module, example: Tensor) -> None:
    """Raises RefusedError where the model takes no other batch than the one it was exported with."""
    try:
        with torch.no_grad():
            model(torch.cat([example, example[:1]]))
    except (RuntimeError, ValueError) as error:
        raise RefusedError(
            f"it takes a batch of {len(example)} alone; export it with a free one: torch.export.export(model, "
            "(two_samples,), dynamic_shapes=({0: torch.export.Dim.AUTO},))"
        ) from error
