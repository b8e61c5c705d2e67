"""What records of results have in common. A value: checked when made, and never changed."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """Facts by name, all of them known."""

    model_config = ConfigDict(frozen=True, extra="forbid")
