"""NNCF: one ratio and what it ignores, with the pruned weights beside it, so that the masks it makes are ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, final

import torch
from torch import Tensor

from autoprune.errors import PolicyError
from autoprune.exporters.base import EXACT, Aspect, Exported, Grade, Resolved, approximated, dropped
from autoprune.exporters.loaders import loader
from autoprune.exporters.masks import dense_state
from autoprune.exporters.texts import about, json_bytes, state_bytes

GRADES: Final[Mapping[Aspect, Grade]] = {
    "sparsity": EXACT,
    "mask": EXACT,
    "weights": EXACT,
    "width": approximated("NNCF takes no channels out: their weights are zero, and masked"),
    "channels": approximated("they are those whose weights are zero"),
    "depth": approximated("the block still runs, with weights of zero"),
    "kernel": approximated("the outer taps are zero, and masked"),
    "bits": approximated("the values are rounded, and stored as floats"),
    "arithmetic": dropped("a mask says nothing of integers"),
    "rank": dropped("NNCF leaves one layer one: it has its dense weights"),
    "resolution": dropped("a mask says nothing of inputs"),
}


@final
class Nncf:
    """`nncf.json` with mode and ratio of `nncf.prune` and the layers it is for; `state.pt`, in the dense shapes.

    NNCF has one ratio for all layers, and every call of `prune` sets it for the masks of earlier calls, too. What makes
    masks of a share of each layer's own is that the weights are zero already: a threshold of zero finds just them.
    """

    __slots__ = ()

    name: str = "nncf"
    tested: tuple[str, ...] = ("nncf 3.4.0",)

    def export(self, resolved: Resolved) -> Exported:
        """Zeros exactly; channels, kernels and blocks as zeros; rounded values as floats; no ranks."""
        state = _zeroed_state(resolved)
        zeros = {name: _share(state[resolved.layers[name].weight]) for name in _pruned(resolved)}
        zeros = {name: share for name, share in zeros.items() if share}
        if not zeros:
            raise PolicyError(f"{resolved.title}: no layer has zeros or fewer channels; NNCF masks nothing else")
        content = {
            **about(resolved, self.tested), "mode": "UNSTRUCTURED_MAGNITUDE_LOCAL", "ratio": min(zeros.values()),
            "sparsity": zeros,
        }  # fmt: skip
        files = {"nncf.json": json_bytes(content), "state.pt": state_bytes(state), "load.py": loader("nncf")}
        return Exported(files, resolved.graded(GRADES))


def _pruned(resolved: Resolved) -> list[str]:
    """The layers that lose weights."""
    return [
        layer.name
        for layer in resolved.layers.values()
        if len(layer.shape) > 1 and (layer.gone or layer.is_cut or layer.pattern)
    ]


def _share(weight: Tensor) -> float:
    return int((weight == 0).sum()) / weight.numel()


def _zeroed_state(resolved: Resolved) -> dict[str, Tensor]:
    """The cut model's state in the dense model's shapes: what does not count is zero, in layers and dropped blocks.

    A dropped block adds nothing to its shortcut, then: its norms have neither scale nor shift.
    """
    parameters = dict(resolved.dense.named_parameters(remove_duplicate=False))
    found = dense_state(resolved)
    for name in resolved.surgery.gone:
        if name in parameters:
            found[name] = torch.zeros_like(found[name])
    for layer in resolved.layers.values():
        if layer.weight in found and len(layer.shape) > 1:
            found[layer.weight] = found[layer.weight] * resolved.mask(layer.name)
    return found
