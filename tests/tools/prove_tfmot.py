"""tfmot wraps Keras layers of the same names, with the same weights: they reach the sparsities and patterns."""

import json
import os
import sys
from pathlib import Path

os.environ.update(TF_USE_LEGACY_KERAS="1", TF_CPP_MIN_LOG_LEVEL="3", TF_ENABLE_ONEDNN_OPTS="0")

import numpy as np
import tensorflow_model_optimization as tfmot
import tf_keras
from common import Case, tell

case, export = Case(sys.argv[1]), Path(sys.argv[2])
sys.path.insert(0, str(export))
loader = __import__("load")
said = json.loads((export / "sparsity.json").read_text(encoding="utf-8"))["layers"]


def layer_of(name: str, kernel: np.ndarray) -> tf_keras.layers.Layer:
    """A Keras layer with the weights of a torch one: (outputs, inputs, ...) is (..., inputs, outputs) there."""
    if kernel.ndim == 2:
        return tf_keras.layers.Dense(len(kernel), use_bias=False, name=name)
    return tf_keras.layers.Conv2D(len(kernel), kernel.shape[2:], padding="same", use_bias=False, name=name)


def in_keras(kernel: np.ndarray) -> np.ndarray:
    return kernel.transpose() if kernel.ndim == 2 else kernel.transpose(2, 3, 1, 0)


def in_torch(kernel: np.ndarray) -> np.ndarray:
    return kernel.transpose() if kernel.ndim == 2 else kernel.transpose(3, 2, 0, 1)


kernels = {name: case.state[f"{name}.weight"].numpy() for name, mask in case.masks.items() if mask.ndim > 1}
inputs, outputs = [], []
for name, kernel in kernels.items():
    inputs.append(tf_keras.Input((4, 4, kernel.shape[1]) if kernel.ndim == 4 else (kernel.shape[1],)))
    outputs.append(tf_keras.layers.Flatten()(layer_of(name, kernel)(inputs[-1])))
model = tf_keras.Model(inputs, tf_keras.layers.Concatenate()(outputs))
for name, kernel in kernels.items():
    model.get_layer(name).set_weights([in_keras(kernel)])

weights = {name: model.get_layer(name).get_weights() for name in kernels}
pruned = loader.wrap(model)
for layer in pruned.layers:
    name = layer.name.removeprefix("prune_low_magnitude_")
    if name in weights:
        (layer.layer if name in said else layer).set_weights(weights[name])
pruned.compile("sgd", "mse")
tf_keras.backend.set_value(pruned.optimizer.learning_rate, 0.0)
batch = [np.zeros((2, *each.shape[1:]), np.float32) for each in inputs]
steps = [tfmot.sparsity.keras.UpdatePruningStep()]
pruned.fit(batch, np.zeros((2, pruned.output_shape[1]), np.float32), epochs=3, verbose=0, callbacks=steps)
pruned = tfmot.sparsity.keras.strip_pruning(pruned)

same = 0
for name, arguments in said.items():
    kernel = in_torch(pruned.get_layer(name).get_weights()[0])
    zeros, wanted = int((kernel == 0).sum()), arguments["sparsity"]
    assert abs(zeros - wanted * kernel.size) <= 1, f"{name}: {zeros} of {kernel.size} zeros, not {wanted:.2%}"
    if "sparsity_m_by_n" in arguments:
        gone, of = arguments["sparsity_m_by_n"]
        if kernel.shape[1] % of == 0:
            groups = np.moveaxis(kernel, 1, -1).reshape(-1, of)
            assert ((groups == 0).sum(1) == gone).all(), f"{name}: not {gone} zeros in each {of} inputs"
    if "block_size" in arguments:
        columns, rows = arguments["block_size"]
        blocks = kernel.reshape(len(kernel) // rows, rows, kernel.shape[1] // columns, columns)
        assert (blocks.any((1, 3)) == blocks.all((1, 3))).all(), f"{name}: not in blocks of {rows}x{columns}"
    same += bool(((kernel != 0) == case.masks[name].numpy()).all())
for name in set(kernels) - set(said):
    assert (pruned.get_layer(name).get_weights()[0] != 0).all(), f"{name}: pruned, but not to be"
tell(
    ("tensorflow-model-optimization", "tensorflow", "tf_keras"),
    sparsity=f"{len(said)} of {len(said)} layers", same_masks=f"{same} of {len(said)}",
)  # fmt: skip
