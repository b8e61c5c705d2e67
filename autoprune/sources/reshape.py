"""Reshapes that were written down with numbers, as modules whose numbers can be changed when channels go."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

SAME, REST = 0, -1
"""In place of a size: the input's own at this position; what is left over."""


class Reshape(nn.Module):
    """Hands its input on in another shape: `size_0`, `size_1`, ... are sizes, SAME or REST."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.dims = len(sizes)
        for place, size in enumerate(sizes):
            setattr(self, f"size_{place}", size)

    def forward(self, inputs: Tensor) -> Tensor:
        """The same values, in order."""
        sizes = [getattr(self, f"size_{place}") for place in range(self.dims)]
        return inputs.reshape([inputs.shape[i] if size == SAME else size for i, size in enumerate(sizes)])

    def extra_repr(self) -> str:
        """The sizes."""
        return ", ".join(str(getattr(self, f"size_{place}")) for place in range(self.dims))


def flexible(before: Sequence[object], after: Sequence[object]) -> list[int] | None:
    """The sizes of a reshape with as few numbers in it as can be; None where more than one is not known.

    Sizes are integers or whatever stands for an unknown one. Leading sizes that stay are the input's own, so the
    batch is free; of the others one unknown size, or the only one, is what is left over.
    """
    sizes: list[int] = []
    for old, new in zip(before, after, strict=False):
        if old is None or old != new:
            break
        sizes.append(SAME)
    others = list(after[len(sizes) :])
    unknown = [place for place, size in enumerate(others) if not isinstance(size, int)]
    if len(unknown) > 1:
        return None
    rest = unknown[0] if unknown else 0 if len(others) == 1 else None
    tail = [REST if place == rest else int(str(size)) for place, size in enumerate(others)]
    return None if SAME in tail else [*sizes, *tail]
