"""From scores to masks: which weights stay under a pattern. The highest scores stay; ties go by place."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from autoprune.core.pattern import Pattern

Scope = Literal["layer", "output"]
"""Where scores of an unstructured pattern are compared: in the whole layer, or in each output alone."""


def kept_mask(scores: Tensor, pattern: Pattern, *, inputs: int, scope: Scope = "layer") -> Tensor:
    """Which of `scores` (outputs, columns) stay, bool; columns go by kernel position, `inputs` channels in each.

    Unstructured: round(sparsity * count) weights go. N:M: of every M inputs N stay; a last group of fewer, r, keeps
    ceil(N r / M). Blocks: round(sparsity * blocks) go, by their mean score; smaller ones at the edges are blocks, too.
    """
    if pattern.kind == "n:m":
        return _groups(scores, pattern, inputs)
    if pattern.kind == "block":
        return _blocks(scores, pattern, inputs)
    rows = scores if scope == "output" else scores.reshape(1, -1)
    gone = round(pattern.sparsity * rows.shape[1])
    return _without_lowest(rows, gone).view_as(scores)


def _without_lowest(scores: Tensor, gone: int) -> Tensor:
    """All but the `gone` lowest of each row of `scores` (rows, columns)."""
    keep = torch.ones(scores.shape, dtype=torch.bool)
    keep.scatter_(1, torch.argsort(scores, dim=1, stable=True)[:, :gone], value=False)
    return keep


def _groups(scores: Tensor, pattern: Pattern, inputs: int) -> Tensor:
    per_position = scores.view(len(scores), -1, inputs)
    parts = []
    for part in torch.split(per_position, pattern.columns, dim=2):
        width = part.shape[2]
        stays = math.ceil(pattern.keep * width / pattern.columns)
        parts.append(_without_lowest(part.reshape(-1, width), width - stays).view_as(part))
    return torch.cat(parts, dim=2).view_as(scores)


def _blocks(scores: Tensor, pattern: Pattern, inputs: int) -> Tensor:
    outputs, positions = len(scores), scores.shape[1] // inputs
    rows = torch.arange(outputs) // pattern.rows
    columns = torch.arange(inputs) // pattern.columns
    across = int(columns[-1]) + 1
    columns = (columns + across * torch.arange(positions)[:, None]).flatten()
    block = rows[:, None] * (across * positions) + columns  # (outputs, columns): which block each weight is in
    count = int(block[-1, -1]) + 1
    total = torch.zeros(count, dtype=scores.dtype).index_add_(0, block.flatten(), scores.flatten())
    size = torch.bincount(block.flatten(), minlength=count)
    keep = _without_lowest((total / size)[None], round(pattern.sparsity * count))[0]
    return keep[block]
