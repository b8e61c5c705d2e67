"""Movement: weights that a fine-tune draws towards zero go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from autoprune.core.pattern import Pattern
from autoprune.errors import DataError
from autoprune.sparsity.base import LayerView, SparsityNeed
from autoprune.sparsity.masks import kept_mask


@final
class Movement:
    """Score - sum over steps of w_ij * dL/dw_ij, compared in the layer (arXiv:2005.07683, section 4).

    The scores come from a short fine-tune on calibration data; the weights that stay are those before it.
    """

    __slots__ = ()

    name: str = "movement"
    version: int = 1
    needs: frozenset[SparsityNeed] = frozenset({"movement"})

    def sparsify(self, view: LayerView, patterns: Sequence[Pattern], generator: torch.Generator) -> list[Tensor]:  # noqa: ARG002
        """The weights with zeros; what stays is as it was. Raises DataError without scores."""
        if view.movement is None:
            raise DataError("method movement: no fine-tune was observed for this layer; make the bank anew")
        return [view.weight * kept_mask(view.movement, pattern, inputs=view.inputs) for pattern in patterns]
