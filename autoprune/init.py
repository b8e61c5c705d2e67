"""What `autoprune init` writes: a commented configuration and a Python file to fill in. Knows texts alone."""

from __future__ import annotations

from pathlib import Path

from autoprune.config import FILE_NAME
from autoprune.errors import ConfigError
from autoprune.files import write_text

MODEL_NAME = "model.py"

CONFIG_TEXT = """\
# autoprune: what to prune, and how much it may cost. Paths are relative to this file.
# Try it with:  autoprune units      then:  autoprune search

# A function without arguments that returns the trained torch.nn.Module.
model: model.py:model

# Weights to load into it: .safetensors, or .pt with a plain state dict. Leave out if the function loads them.
# weights: model.safetensors

# A function without arguments that returns {"calibration": ..., "validation": ...}.
data: model.py:data

# What "accuracy" is: top1, top5, miou, miou_image, map, psnr, mse, mae, perplexity, or your own "file.py:function".
metric: top1
# higher_is_better: true       # for your own function

# Where latency is measured. A latency means nothing without all four.
target:
  runtime: onnxruntime
  device: cpu
  threads: 1
  batch: 1
  # example: [1, 3, 32, 32]    # shape of one input with its batch; taken from the data if left out

# What the pruned model may cost: 5ms, 50% (of the dense latency), 2x (speed-up), 300MMACs, 50%macs, 2MB, 60%params.
# "3ms,5ms,8ms" searches three at once; a list such as [5ms, 2MB] holds together.
budget: 50%

# Accuracy it may lose at most, or must keep at least. With no budget: as cheap as this allows.
# 1% is one point of top1 and other shares, and 1 % of the dense value of a perplexity, an error or a PSNR.
# max_drop: 1%
# min_accuracy: 0.92           # max_loss: 12.5 where less is better

# What may be done to which part of the model: a shipped search space, or your own YAML file.
space:
  preset: cnn-channels
  protect: []                  # names or patterns that must stay as they are, e.g. ["head", "stage3.*"]

search:
  trials: 200                  # candidates to evaluate at most
  # seconds: 600               # time limit
  seed: 0
  sampler: budget
  finalists: 6                 # candidates that are really cut, exported, timed and scored
  refit: true                  # refit the chosen candidate's weights

# Everything durable goes here; a second search in the same folder reuses what was measured.
# run: runs/autoprune
"""

MODEL_TEXT = '''\
"""The model to prune and the data to judge it by. Fill in both functions; each is called without arguments."""

from torch import nn


def model() -> nn.Module:
    """The trained model."""
    # network = MyNetwork()
    # network.load_state_dict(torch.load("weights.pt", weights_only=True))
    # return network
    raise NotImplementedError("fill in model(): return your trained torch.nn.Module")


def data() -> dict[str, object]:
    """Calibration samples (a few hundred; targets optional) and validation samples the model was not trained on.

    Each part is (inputs, targets) as tensors or numpy arrays, samples first, or a torch Dataset, or a DataLoader.
    Inputs are normalised exactly as in training.
    """
    # return {"calibration": train_dataset, "validation": (test_images, test_labels)}
    raise NotImplementedError("fill in data(): return {'calibration': ..., 'validation': ...}")
'''


def write_files(folder: Path, *, force: bool) -> list[Path]:
    """Write both files into `folder`. Raises ConfigError when one exists, unless `force`; then nothing is written."""
    texts = {folder / FILE_NAME: CONFIG_TEXT, folder / MODEL_NAME: MODEL_TEXT}
    existing = [str(path) for path in texts if path.exists()]
    if existing and not force:
        raise ConfigError(f"init: {' and '.join(existing)} exist already; give --force to overwrite")
    for path, text in texts.items():
        write_text(path, text)
    return list(texts)
