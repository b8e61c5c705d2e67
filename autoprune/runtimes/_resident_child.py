"""Loads and runs one model, and tells what memory that took. A script, for a process that shall hold nothing else.

    python -P _resident_child.py LOADER MODEL EXAMPLE THREADS

Prints one line of JSON, in bytes. Imports the standard library and what the loader imports.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

if sys.platform != "linux":
    import resource

RUNS = 5
"""ONNX Runtime has all its memory after two, PyTorch's tracer after three."""
_STATUS, _FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_FORGET_PEAK = "5"


def _bytes(key: str) -> int:
    """Resident bytes now (`VmRSS`) or at most so far (`VmHWM`); outside Linux always the latter."""
    if sys.platform != "linux":
        peak = int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        return peak if sys.platform == "darwin" else 1024 * peak
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def _forget_peak() -> None:
    """Let the peak begin anew, where the system can do that; else it stays that of the whole process."""
    try:
        _FORGET.write_text(_FORGET_PEAK, encoding="ascii")
    except OSError:
        return


def main(loader: str, model: str, example: str, threads: str) -> None:
    """Measure, and print."""
    load = runpy.run_path(loader)["load"]
    runtime = _bytes("VmRSS")
    _forget_peak()
    run = load(model, example, int(threads))
    loading = _bytes("VmHWM")
    _forget_peak()
    for _ in range(RUNS):
        run()
    print(json.dumps({"runtime": runtime, "loading": loading, "running": _bytes("VmHWM")}))


if __name__ == "__main__":
    main(*sys.argv[1:])
