"""A model from its source: which reader it is read by. Readers are imported when they are needed."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from torch import nn

from autoprune.sources.refusal import RefusedError

Keyword = int | float | bool | str
_READERS = {
    "timm": ("zoo", "from_timm"),
    "torchvision": ("zoo", "from_torchvision"),
    "hf": ("hugging_face", "from_folder"),
    "onnx": ("onnx_graph", "from_onnx"),
    "export": ("exported", "from_program"),
}


def opened(kind: str, place: str | Path, keywords: dict[str, Keyword], *, pretrained: bool) -> nn.Module:
    """The model in evaluation mode. `place` is a name or a path; weights are the source's own where `pretrained`.

    `keywords` may hold `pretrained: False`, too. Files always hold their weights. Raises RefusedError.
    """
    own = dict(keywords)
    asked = own.pop("pretrained", True)
    if not isinstance(asked, bool):
        raise RefusedError(f"pretrained={asked}: give true or false")
    module, name = _READERS[kind]
    reader: Any = getattr(importlib.import_module(f"{__package__}.{module}"), name)
    if kind in ("timm", "torchvision"):
        model: nn.Module = reader(str(place), own, pretrained=pretrained and asked)
    elif kind == "hf":
        model = reader(Path(place), pretrained=pretrained)
    else:
        model = reader(Path(place))
    return model.eval()
