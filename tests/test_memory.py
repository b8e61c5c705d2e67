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


HOLES = """
import sys
import torch
from autoprune.memory import keep_freed_memory, suit

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

assert keep_freed_memory() and suit(int(sys.argv[1])) == (int(sys.argv[1]) >= 2**28)
weights = [torch.ones(2**21) for _ in range(32)]  # 8 MB each
full = resident()
del weights[::2]
print(full - resident())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc alone maps and unmaps so")
@pytest.mark.parametrize(("model_bytes", "goes_back"), [(2**20, False), (2**29, True)])
def test_weights_of_large_models_leave_no_holes(model_bytes: int, *, goes_back: bool) -> None:
    done = subprocess.run([sys.executable, "-c", HOLES, str(model_bytes)], capture_output=True, text=True, check=True)
    assert (int(done.stdout) > 100e6) == goes_back
