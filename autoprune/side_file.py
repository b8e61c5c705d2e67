"""The policy's side file: exact kept indices, the cut model's state, scales and grids of integers, as safetensors.

Knows what the file holds and by which names. Does not know how any of it was found. Nothing in it is unpickled.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from autoprune.bank.stitch import Candidate, Stitcher
from autoprune.core.policy import Policy
from autoprune.core.unit import Option
from autoprune.errors import PolicyError
from autoprune.files import open_file, write_bytes
from autoprune.storage import Weights

WEIGHTS = "policy.safetensors"
"""Its name beside `policy.yaml`."""
KEPT = "kept/"
"""Prefix of the tensors that hold kept channel indices, by unit."""
TENSOR = "tensor/"
"""Prefix of the tensors that hold the cut model's state."""
SCALES = "scales/"
"""Prefix of the tensors that hold the scales of integer weights, by the weights' names in the state."""
GRIDS = "grids/"
"""Prefix of the tensors that hold, by layer, the grids of what a layer reads and makes in integers."""


def side_file(candidate: Candidate, stitcher: Stitcher, options: Mapping[str, Option]) -> bytes:
    """The content for a candidate that `stitcher` built of `options` (and that may have been mended since)."""
    tensors = {KEPT + unit: indices for unit, indices in candidate.plan.units.items()}
    tensors |= {TENSOR + name: tensor for name, tensor in candidate.model.state_dict().items()}
    tensors |= {SCALES + name: codes.scales for name, codes in Weights.of(candidate).quantised.items()}
    for layer, option in stitcher.edited_layers(options).items():
        if option.form == "integer" and layer in candidate.edits:
            tensors[GRIDS + layer] = torch.tensor(stitcher.arithmetic[layer].numbers, dtype=torch.float64)
    return content_of(tensors)


def content_of(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors as the bytes of a side file."""
    return bytes(save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}))


def with_kept(policy: Policy, kept: Mapping[str, Tensor], path: Path) -> Policy:
    """`policy`, to be written to `path`, with a side file beside it that names the channels that stay (by unit) and
    nothing else. The side file is written.
    """
    content = content_of({KEPT + unit: indices for unit, indices in kept.items()})
    side = path.with_name(f"{path.stem}.kept.safetensors")
    write_bytes(side, content)
    return policy.model_copy(update={"weights": side.name, "weights_sha256": digest(content)})


def digest(content: bytes) -> str:
    """By what a policy knows its side file: SHA-256 in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def kept_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The channels that stay, by unit, of a side file's tensors."""
    return {name.removeprefix(KEPT): indices for name, indices in tensors.items() if name.startswith(KEPT)}


def read_side_file(path: Path, policy: Policy) -> dict[str, Tensor]:
    """The tensors in the side file of the policy at `path`. Raises PolicyError where it is missing or another one."""
    if policy.weights is None:
        raise PolicyError(
            f"{path}: it names no side file (`weights:`) with kept indices and weights; "
            "--transfer chooses both anew by the policy's methods"
        )
    if Path(policy.weights).name != policy.weights:
        raise PolicyError(f"{path}: weights: {policy.weights!r} must be a file beside the policy, without folders")
    side = path.parent / policy.weights
    try:
        with open_file(side) as file:
            content = file.read()
    except OSError as error:
        raise PolicyError(f"{side}: cannot be read ({error.strerror}); it belongs beside {path.name}") from None
    except ValueError:  # a null character
        raise PolicyError(f"{path}: weights: {policy.weights!r} is not a file name") from None
    if policy.weights_sha256 is not None and digest(content) != policy.weights_sha256:
        raise PolicyError(f"{side}: is not the file that {path.name} was written with (its SHA-256 differs)")
    try:
        return dict(load(content))
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:  # types and sizes torch has not
        raise PolicyError(f"{side}: is damaged: {error!s:.200}") from None
