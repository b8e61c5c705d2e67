"""Several policies as one file: their decisions joined, and the kept channels that their side files name.

Mended weights are of each policy alone and cannot be joined; a transfer makes them anew round the same channels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from autoprune.core.comparison import merged, names_of
from autoprune.core.policy import Policy
from autoprune.files import read_policy, write_bytes, write_policy
from autoprune.side_file import KEPT, content_of, read_side_file


def merge_files(paths: Sequence[Path], output: Path) -> Policy:
    """Write what all of `paths` decide to `output`, with a side file of kept channels where all know theirs.

    Raises PolicyError with all conflicts; nothing is written then.
    """
    policies = [read_policy(path) for path in paths]
    joined = merged(dict(zip(names_of(paths), policies, strict=True)))
    prints = {policy.model.fingerprint for policy in policies if policy.model is not None}
    if len(prints) == 1 and all(policy.weights is not None and policy.model is not None for policy in policies):
        kept: dict[str, Tensor] = {}
        for path, policy in zip(paths, policies, strict=True):
            tensors = read_side_file(path, policy)
            kept |= {name: tensor for name, tensor in tensors.items() if name.startswith(KEPT)}
        content, side = content_of(kept), output.with_name(f"{output.stem}.kept.safetensors")
        write_bytes(side, content)
        digest = hashlib.sha256(content).hexdigest()
        joined = joined.model_copy(update={"weights": side.name, "weights_sha256": digest})
    write_policy(output, joined)
    return joined
