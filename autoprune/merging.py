"""Several policies as one file: their decisions joined, and the kept channels that their side files name.

Mended weights are of each policy alone and cannot be joined; a transfer makes them anew round the same channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from autoprune.core.comparison import merged, names_of
from autoprune.core.policy import Policy
from autoprune.files import read_policy, write_policy
from autoprune.side_file import kept_of, read_side_file, with_kept


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
            kept |= kept_of(read_side_file(path, policy))
        joined = with_kept(joined, kept, output)
    write_policy(output, joined)
    return joined
