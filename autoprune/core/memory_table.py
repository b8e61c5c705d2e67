"""The measured part of the memory model: what a process needs for each byte of weights and of activations. A value."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from autoprune.core.cost import Block, Count, TableCheck


class MemoryTable(BaseModel):
    """Peak resident bytes of any choice on one target, above the runtime's own: the larger of loading and running."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Count = 1
    key: str
    """Fingerprint of architecture, target, runtime version and machine: a table of another key is measured anew."""
    dense_bytes: float
    """The dense model's peak, measured."""
    runtime_bytes: float
    """What the process holds before the model is read: to be added for the peak of the whole process."""
    base_bytes: float
    per_weight_byte: float
    per_live_byte: float
    """Of the fullest step of the live map."""
    loading_base_bytes: float
    loading_per_weight_byte: float
    channel_block: Block
    """The runtime computes images in blocks of so many channels, as far as memory shows it; 1: it does not."""
    fitted_models: Count
    check: TableCheck
    correction: float = 1.0
    """Factor learnt by verification: measured over predicted near the chosen policy."""
