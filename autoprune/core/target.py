"""The target: what a latency is measured on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Device = Literal["cpu", "cuda"]
Precision = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True, slots=True)
class Target:
    """Runtime, device, threads, batch and precision; a latency means nothing without all of them."""

    runtime: str = "onnxruntime"
    device: Device = "cpu"
    threads: int = 1
    batch: int = 1
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        if self.threads < 1 or self.batch < 1:
            raise ValueError("threads and batch must be at least 1")

    @property
    def text(self) -> str:
        """For people and cache keys: `onnxruntime cpu, 1 thread, batch 1`."""
        threads = f"{self.threads} thread{'s' * (self.threads > 1)}"
        precision = "" if self.precision == "float32" else f", {self.precision}"
        return f"{self.runtime} {self.device}, {threads}, batch {self.batch}{precision}"
