"""Runs recipe.yaml with llm-compressor. Needs torch, transformers and llmcompressor.

from load import prune
prune(model, batches)  # or: oneshot(model=..., recipe="recipe.yaml", dataset=...), llm-compressor's own call
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from llmcompressor import oneshot
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

RECIPE = Path(__file__).resolve().parent / "recipe.yaml"


def prune(
    model: PreTrainedModel, batches: Iterable[dict[str, torch.Tensor]], tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """`model`, pruned and quantised in place; `batches` of `input_ids` and `attention_mask` calibrate it."""
    data = DataLoader(list(batches), batch_size=None)
    return oneshot(model=model, dataset=data, recipe=str(RECIPE), processor=tokenizer)
