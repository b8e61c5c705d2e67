"""torch.ao.pruning: a config for WeightNormSparsifier, by weight, and the exact masks that it is prepared with."""

from __future__ import annotations

from typing import Final, final

from autoprune.core.pattern import Pattern, parse_pattern
from autoprune.errors import PolicyError
from autoprune.exporters.base import (
    EXACT,
    Aspect,
    Exported,
    Grade,
    LayerCut,
    Resolved,
    approximated,
    dropped,
    final_weights,
)
from autoprune.exporters.dense_shape import in_place, sparse_layers, sparsity_of
from autoprune.exporters.loaders import loader
from autoprune.exporters.texts import about, json_bytes, state_bytes

AS_ZEROS: Final = approximated("as zeros: its masks leave every shape as it is")


@final
class TorchAO:
    """`sparsity.json`, whose `config` is what `WeightNormSparsifier().prepare(model, config)` takes, and `masks.pt`.

    A block's shape is (outputs, inputs), as ours: `4x1 50%` is `[4, 1]`, and `2:4` is two zeros in each `[1, 4]`. The
    sparsifier can rank two-dimensional weights alone, so `step()` fails on convolutions; `load.py` prepares all weights
    with our masks, which needs no step. Its structured pruner is not used: it knows few patterns of layers.
    """

    __slots__ = ()

    name: str = "torch.ao.pruning"
    tested: tuple[str, ...] = ("torch 2.13.0",)

    def export(self, resolved: Resolved) -> Exported:
        """Zeros of weights, removed channels among them. Raises PolicyError where no weight is zero."""
        sparse = [cut for cut in sparse_layers(resolved) if cut.weight in resolved.dense.state_dict()]
        if not sparse:
            raise PolicyError(f"{resolved.title}: no weight of it is zero, and torch.ao.pruning knows masks alone")
        whole = resolved.says_only("width", "channels", "sparsity", "mask", "kernel", "weights")
        content = {**about(resolved, self.tested), "config": [_entry(resolved, cut) for cut in sparse]}
        files = {
            "sparsity.json": json_bytes(content),
            "masks.pt": state_bytes({cut.weight: resolved.mask(cut.name) for cut in sparse}),
            "load.py": loader("torch_ao"),
        }
        if whole and resolved.mended:
            files["state.pt"] = state_bytes({name: in_place(resolved, name) for name in resolved.mended})
        grades: dict[Aspect, Grade] = {
            "width": AS_ZEROS, "channels": EXACT, "kernel": AS_ZEROS, "sparsity": EXACT, "mask": EXACT,
            "weights": final_weights(whole=whole),
            "depth": dropped("a mask of weights leaves a block's biases and norms"),
        }  # fmt: skip
        return Exported(files, resolved.graded(grades))


def _entry(resolved: Resolved, cut: LayerCut) -> dict[str, object]:
    pattern = _own_pattern(cut)
    level, shape, each = sparsity_of(resolved, cut), [1, 1], 1
    if pattern is not None and pattern.kind == "n:m":
        level, shape, each = 1.0, [1, pattern.columns], pattern.columns - pattern.keep
    elif pattern is not None and pattern.kind == "block":
        shape, each = [pattern.rows, pattern.columns], pattern.rows * pattern.columns
    return {
        "tensor_fqn": cut.weight, "sparsity_level": level, "sparse_block_shape": shape, "zeros_per_block": each,
    }  # fmt: skip


def _own_pattern(cut: LayerCut) -> Pattern | None:
    """Of zeros alone: where channels or a kernel's rim go too, the zeros have none."""
    return parse_pattern(cut.pattern) if cut.pattern and not cut.is_cut else None
