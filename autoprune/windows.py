"""A text as samples for a language model: token streams cut into windows, each token scored once.

Knows token ids alone: no tokeniser and no file.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autoprune.errors import DataError

IGNORED = -100
"""The target of tokens that are context only, as in `torch.nn.functional.cross_entropy`."""


def windows(
    tokens: Tensor, *, length: int, stride: int | None = None, prefix: int | None = None
) -> tuple[Tensor, Tensor]:
    """Inputs and next tokens, both (windows, `length`) int64, from a stream of `tokens` (count,) of integers.

    Each window begins `stride` tokens after the one before it (default: `length`, so that windows do not overlap) and
    only its last `stride` tokens are scored, the others being context: their targets are -100. Two windows differ: the
    first is scored whole, because nothing was before it, and the last one begins early enough to end with the stream.
    So every token but the first is scored exactly once; with `prefix`, a token put before the stream (such as its end
    of text), the first one, too. These are the rolling windows of lm-evaluation-harness with
    `context_len = length - stride + 1`.

    Raises DataError on another shape, a stride that is not in 1 to `length`, or a stream shorter than one window.
    """
    step = length if stride is None else stride
    if length < 1 or not 1 <= step <= length:
        raise DataError(f"windows: length {length} and stride {step}; expected 1 <= stride <= length")
    if tokens.ndim != 1 or tokens.is_floating_point() or tokens.is_complex():
        raise DataError(f"windows: tokens are {tuple(tokens.shape)} {tokens.dtype}; expected integers (count,)")
    stream = tokens.to(torch.int64)
    if prefix is not None:
        stream = torch.cat([torch.tensor([prefix], device=stream.device), stream])
    count = len(stream) - 1  # tokens that have one before them
    if count < length:
        raise DataError(
            f"windows: {len(tokens)} tokens make no window of length {length}; give a longer text, or a length of at "
            f"most {max(count, 0)}"
        )
    ends = torch.tensor([*range(length, count, step), count], device=stream.device)
    places = ends[:, None] - length + torch.arange(length, device=stream.device)  # (windows, length)
    before = torch.cat([ends.new_zeros(1), ends[:-1]])  # where the window before ended
    return stream[places], torch.where(places >= before[:, None], stream[places + 1], IGNORED)
