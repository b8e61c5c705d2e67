"""A local folder of Hugging Face transformers (config.json and safetensors) as a module of one tensor.

Nothing is downloaded, nothing unpickled, and no code of the folder is run.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.sources.refusal import RefusedError, library

CONFIG = "config.json"
INPUTS = ("input_ids", "pixel_values", "input_values", "input_features")


class OneTensor(nn.Module):
    """`network` from its main input (tokens, pixels) to its logits, or to its first output; without a cache."""

    def __init__(self, network: nn.Module, reads: str, vocabulary: int | None) -> None:
        super().__init__()
        self.network = network
        self.reads = reads
        self.vocabulary = vocabulary
        """How many tokens there are; None for inputs that are no tokens."""

    def forward(self, inputs: Tensor) -> Tensor:
        """(samples, ...) -> logits."""
        output = self.network(**{self.reads: inputs}, return_dict=True)
        found: Tensor = output["logits"] if "logits" in output else output[0]
        return found


def from_folder(folder: Path, *, pretrained: bool) -> nn.Module:
    """The model that `architectures` in `folder`'s config.json names, with the folder's weights or with none.

    Raises RefusedError.
    """
    kind, config = _described(folder)
    for key in ("use_cache", "output_attentions", "output_hidden_states"):
        if getattr(config, key, False):
            setattr(config, key, False)
    network = _with_weights(kind, config, folder) if pretrained else kind(config)
    reads = network.main_input_name
    tokens = int(config.get_text_config().vocab_size) if reads == "input_ids" else None
    return OneTensor(network.float().eval(), reads, tokens)


def _described(folder: Path) -> tuple[Any, Any]:
    """The class of the model and its configuration."""
    path = folder / CONFIG
    if not folder.is_dir():
        raise RefusedError(
            f"{folder} is no folder here; models of the hub are not downloaded: save one with "
            "model.save_pretrained(FOLDER), or give the folder it was downloaded to"
        )
    if not path.is_file():
        raise RefusedError(f"{folder} has no {CONFIG}; give a folder that save_pretrained wrote")
    transformers = library("transformers", extra="hf")
    names = _architectures(path)
    kind: Any = getattr(transformers, names[0], None) if names else None
    is_model: bool = inspect.isclass(kind) and issubclass(kind, transformers.PreTrainedModel)
    if not is_model:
        raise RefusedError(f"{path}: architectures is {names}; it must name a model class of transformers")
    try:
        config = kind.config_class.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise RefusedError(f"{path} is not understood: {' '.join(str(error).split())}") from error
    if config.is_encoder_decoder or kind.main_input_name not in INPUTS:
        raise RefusedError(
            f"{names[0]} reads more than one tensor; write a function that wraps it (model: file.py:model)"
        )
    return kind, config


def _architectures(path: Path) -> list[str]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RefusedError(f"{path} is not JSON: {error}") from error
    names = content.get("architectures") if isinstance(content, dict) else None
    return [str(name) for name in names] if isinstance(names, list) else []


def _with_weights(kind: Any, config: Any, folder: Path) -> Any:
    if not any(folder.glob("*.safetensors")):
        raise RefusedError(f"{folder} has no .safetensors; pickled weights are not read: save_pretrained writes them")
    try:
        with _without_bars():
            network, told = kind.from_pretrained(
                folder, config=config, local_files_only=True, use_safetensors=True, dtype=torch.float32,
                output_loading_info=True,
            )  # fmt: skip
    except (OSError, RuntimeError, ValueError) as error:
        raise RefusedError(f"the weights in {folder} cannot be read: {' '.join(str(error).split())[:400]}") from error
    missing = sorted(told["missing_keys"])
    if missing:
        raise RefusedError(
            f"{folder} has no weights for {', '.join(missing[:5])} (of {len(missing)}): it is not trained"
        )
    return network


@contextmanager
def _without_bars() -> Iterator[None]:
    """No progress bars of transformers meanwhile."""
    logging = library("transformers.utils.logging", extra="hf")
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
