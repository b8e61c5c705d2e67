"""Memory of large tensors is reused instead of being mapped anew, where the C library can be told so."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from autoprune.memory import keep_freed_memory

if sys.argv[1] == "kept":
    assert keep_freed_memory()
def use() -> None:
    for _ in range(32):
        torch.ones(2**24)  # 64 MB


use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc alone maps and unmaps so")
def test_large_tensors_reuse_memory() -> None:
    def faults(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert faults("kept") * 20 < faults("default")
