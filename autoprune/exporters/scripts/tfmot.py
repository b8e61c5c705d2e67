"""Wraps a Keras model for TensorFlow Model Optimization as sparsity.json says. Needs tensorflow-model-optimization.

Run Python with TF_USE_LEGACY_KERAS=1: tfmot takes models of Keras 2 (tf_keras) alone.

from load import wrap
model = wrap(model)   # then compile, and fit with tfmot.sparsity.keras.UpdatePruningStep() among the callbacks
"""

import json
from pathlib import Path

import tensorflow_model_optimization as tfmot
import tf_keras

HERE = Path(__file__).resolve().parent


def wrap(model: tf_keras.Model) -> tf_keras.Model:
    """A copy of `model` whose layers named in sparsity.json are pruned from the first step on. All must be there."""
    said = json.loads((HERE / "sparsity.json").read_text(encoding="utf-8"))["layers"]
    missing = sorted(set(said) - {layer.name for layer in model.layers})
    if missing:
        raise ValueError(f"the model has no layers called {', '.join(missing)}")

    def wrapped(layer: tf_keras.layers.Layer) -> tf_keras.layers.Layer:
        if layer.name not in said:
            return layer
        arguments = {key: tuple(value) for key, value in said[layer.name].items() if key != "sparsity"}
        schedule = tfmot.sparsity.keras.ConstantSparsity(said[layer.name]["sparsity"], begin_step=0, frequency=1)
        return tfmot.sparsity.keras.prune_low_magnitude(layer, pruning_schedule=schedule, **arguments)

    return tf_keras.models.clone_model(model, clone_function=wrapped)
