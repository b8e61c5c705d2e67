"""What models return: a tensor, or tensors inside tuples, lists and dicts, as deep as they like.

Knows where the tensors are, first to last, and not what any of them means. Containers of one's own are known once they
are registered with `torch.utils._pytree`, as those of the usual libraries are; a namedtuple is a tuple.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from autoprune.errors import DataError, ModelError

Nested = object
"""A tensor, or tuples, lists and dicts that end in tensors; what else lies among them is left as it is."""


def tensors_of(output: Nested) -> tuple[Tensor, ...]:
    """All tensors in `output`, in the order in which they stand there."""
    if isinstance(output, Tensor):
        return (output,)
    return tuple(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))


def first_tensor(output: Nested) -> Tensor:
    """The tensor that the metrics are about. Raises ModelError where there is none."""
    found = tensors_of(output)
    if not found:
        raise ModelError(
            f"the model returns {type(output).__name__} without a tensor in it; it must return a tensor, or tensors in "
            "tuples, lists and dicts"
        )
    return found[0]


def has_samples(tensor: object, count: int) -> bool:
    """Whether this is a tensor of `count` samples, (samples, ...)."""
    return isinstance(tensor, Tensor) and tensor.ndim > 0 and len(tensor) == count


def joined(outputs: Sequence[Nested], counts: Sequence[int]) -> Nested:
    """The outputs of several batches of `counts` samples as that of one batch.

    Tensors of samples are joined; what is not (a number, a state shared by all samples) is the first batch's.
    Raises DataError where batches come back in different shapes of containers.
    """
    plain = [output for output in outputs if isinstance(output, Tensor)]
    if len(plain) == len(outputs):
        return torch.cat(plain)
    flat = [tree_flatten(output) for output in outputs]
    leaves, structure = flat[0]
    if any(other != structure for _, other in flat[1:]):
        raise DataError("the model returns another structure for another batch; it must be the same for all")
    columns = [[batch[index] for batch, _ in flat] for index in range(len(leaves))]
    return tree_unflatten([_joined(column, counts) for column in columns], structure)


def _joined(column: Sequence[object], counts: Sequence[int]) -> object:
    pairs = zip(column, counts, strict=True)
    tensors = [value for value, count in pairs if isinstance(value, Tensor) and has_samples(value, count)]
    return torch.cat(tensors) if len(tensors) == len(column) else column[0]
