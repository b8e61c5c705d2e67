"""A trained ResNet-20 and its CIFAR-10 images, from the folder of real models that $AUTOPRUNE_DATA names."""

import os
import sys

from torch import nn

sys.path.insert(0, os.environ["AUTOPRUNE_DATA"])
zoo = __import__("zoo")


def model() -> nn.Module:
    """With its trained weights."""
    network: nn.Module = zoo.resnet20()
    return network


def data() -> dict[str, object]:
    """Images that it was trained on, and others."""
    few, others = zoo.data("resnet20", "train"), zoo.data("resnet20", "val")
    return {"calibration": tuple(part[:512] for part in few), "validation": tuple(part[:512] for part in others)}
