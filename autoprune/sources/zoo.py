"""Models of timm and torchvision by name, with the library's pretrained weights or with none."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

from autoprune.sources.refusal import RefusedError, library

Keywords = Mapping[str, int | float | bool | str]


def from_timm(name: str, keywords: Keywords, *, pretrained: bool) -> nn.Module:
    """`timm.create_model`. Pretrained weights come from its cache or the network. Raises RefusedError."""
    timm = library("timm", extra="timm")
    known = timm.list_models()
    if name.partition(".")[0] not in known:
        raise RefusedError(f"timm has no model {name!r}; {_near(name.partition('.')[0], known)}")
    return _made(lambda: timm.create_model(name, pretrained=pretrained, **keywords), "timm", pretrained=pretrained)


def from_torchvision(name: str, keywords: Keywords, *, pretrained: bool) -> nn.Module:
    """`torchvision.models.get_model`, with its default weights where `pretrained`. Raises RefusedError."""
    models = library("torchvision", extra="torchvision").models
    known = models.list_models()
    if name.lower() not in known:
        raise RefusedError(f"torchvision has no model {name!r}; {_near(name, known)}")
    weights: dict[str, str | None] = {"weights": "DEFAULT" if pretrained else None}
    if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
        weights["weights_backbone"] = None  # otherwise a backbone is downloaded all the same
    return _made(lambda: models.get_model(name, **weights, **keywords), "torchvision", pretrained=pretrained)


def _made(make: Callable[[], nn.Module], origin: str, *, pretrained: bool) -> nn.Module:
    """What `make` makes, from seed 0 where anything is random. Raises RefusedError with what the library says."""
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return make()
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        remedy = (
            f"; {origin} gets pretrained weights from its own cache or the network: give a state dict with --weights, "
            "or add ?pretrained=false for random ones"
        )
        raise RefusedError(f"{origin} cannot make it ({text[:400]}){remedy if pretrained else ''}") from error


def _near(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=5, cutoff=0.5)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else "its list_models() names them all"
