"""torch.nn.utils.prune: exact masks, and what makes such masks again, parameter by parameter."""

from __future__ import annotations

from typing import Final, final

import torch
from torch import Tensor
from torch.nn.utils import prune

from autoprune.errors import PolicyError
from autoprune.exporters.base import EXACT, Aspect, Exported, Grade, Resolved, approximated, final_weights
from autoprune.exporters.dense_shape import in_place, parameter_masks
from autoprune.exporters.loaders import loader
from autoprune.exporters.texts import comment, state_bytes, yaml_bytes

AS_ZEROS: Final = approximated("as zeros: masks leave every shape as it is")


@final
class TorchPrune:
    """`masks.pt`: bool by parameter of the dense model, biases and norms of removed channels among them; `load.py`
    applies them with `custom_from_mask`. `prune.yaml` says the same as calls, where some call makes such masks.

    `state.pt` holds mended tensors in the dense shapes, where there are some.
    """

    __slots__ = ()

    name: str = "torch.nn.utils.prune"
    tested: tuple[str, ...] = ("torch 2.13.0",)

    def export(self, resolved: Resolved) -> Exported:
        """All that zeros can say. Raises PolicyError where nothing is zero."""
        masks = parameter_masks(resolved)
        if not masks:
            raise PolicyError(f"{resolved.title}: no weight of it is zero, and torch.nn.utils.prune knows masks alone")
        # With these alone the masked model does what the cut one does.
        whole = resolved.says_only("width", "channels", "depth", "sparsity", "mask", "kernel", "weights")
        files = {
            "prune.yaml": yaml_bytes([_call(resolved, name, mask) for name, mask in masks.items()],
                                     head=comment(resolved, self.tested)),
            "masks.pt": state_bytes(masks),
            "load.py": loader("torch_prune"),
        }  # fmt: skip
        if whole and resolved.mended:
            files["state.pt"] = state_bytes({name: in_place(resolved, name) for name in resolved.mended})
        grades: dict[Aspect, Grade] = {
            "width": AS_ZEROS, "channels": EXACT, "kernel": AS_ZEROS, "sparsity": EXACT, "mask": EXACT,
            "weights": final_weights(whole=whole),
            "depth": approximated("as zeros: a dropped block still runs and adds nothing"),
        }  # fmt: skip
        return Exported(files, resolved.graded(grades))


def _call(resolved: Resolved, parameter: str, mask: Tensor) -> dict[str, object]:
    """`prune.METHOD(module, name, amount=..., ...)` if it makes just this mask on the dense model's weights."""
    module, _, name = parameter.rpartition(".")
    call: dict[str, object] = {"module": module, "name": name}
    dense = resolved.dense.get_parameter(parameter).detach().contiguous()
    gone = mask.numel() - int(mask.sum())
    if mask.ndim > 1:
        rows = int((~mask.flatten(1).any(1)).sum())
        if _makes(prune.LnStructured(rows, n=2, dim=0), dense, mask):
            return {**call, "method": "ln_structured", "amount": rows, "n": 2, "dim": 0}
        if _makes(prune.L1Unstructured(gone), dense, mask):
            return {**call, "method": "l1_unstructured", "amount": gone}
    return {**call, "method": "custom", "amount": gone}


def _makes(method: prune.BasePruningMethod, weight: Tensor, mask: Tensor) -> bool:
    made: Tensor = method.compute_mask(weight, torch.ones_like(weight))  # type: ignore[no-untyped-call]
    return torch.equal(made.bool(), mask)
