"""How exactly the backprop genome is backpropagation: weights after training, against a gradient tape and plain SGD.

    python benchmarks/exact_backprop.py [--data mnist --data_dir DIR] [--steps 50] [--json FILE]

For each loss, nonlinearity and depth, with and without sample weights, two networks start from the same weights and see
the same batches: one under `keras_blur.Sequential.train_on_batch`, the other by `w <- w - rate * gradient` with a tape.
Printed is the largest difference of a weight over the largest weight of its array, over all
arrays. Exit status 1 if one is above 1e-5.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Sequence

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags

import keras_blur as kb
from keras_blur.files import write_text
from keras_blur.tasks.datasets import load_images

_DATA = flags.DEFINE_string("data", "digits", "Image set.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder of prepared sets.")
_STEPS = flags.DEFINE_integer("steps", 50, "Training steps.", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch_size", 64, "Images in a batch.", lower_bound=1)
_RATE = flags.DEFINE_float("learning_rate", 0.1, "Rate.", lower_bound=0.0)
_SEED = flags.DEFINE_integer("seed", 0, "Seed.", lower_bound=0)
_JSON = flags.DEFINE_string("json", None, "File for the numbers.")

TOLERANCE = 1e-5
LOSSES = {
    "mean squared error": keras.losses.MeanSquaredError(),
    "softmax cross-entropy": keras.losses.CategoricalCrossentropy(from_logits=True),
}


def difference(
    loss: keras.losses.Loss, activation: str, depth: int, batches: Sequence[tuple[np.ndarray, ...]], rate: float
) -> float:
    """Largest relative difference of a weight between the two networks after the batches."""
    features, classes = batches[0][0].shape[1], batches[0][1].shape[1]
    hidden = [keras.layers.Dense(units, activation) for units in (64, 48, 32, 24)[:depth]]
    twin = keras.Sequential([keras.Input((features,)), *hidden, keras.layers.Dense(classes)])
    model = kb.convert(twin, kb.genomes.backprop(rate, activation, loss=loss))
    model.compile()

    @tf.function
    def descend(x: tf.Tensor, y: tf.Tensor, weight: tf.Tensor) -> None:
        with tf.GradientTape() as tape:
            value = loss(y, twin(x), sample_weight=weight)
        for variable, gradient in zip(twin.trainable_variables, tape.gradient(value, twin.trainable_variables), strict=True):
            variable.assign_sub(rate * gradient)

    for x, y, weight in batches:
        model.train_on_batch(x, y, sample_weight=weight)
        descend(x, y, weight)
    largest = 0.0
    for ours, theirs in zip(model.layers, twin.layers, strict=True):
        for name, wanted in (("kernel", theirs.kernel), ("bias", theirs.bias)):
            wanted = np.asarray(wanted)
            got = np.asarray(ours.synapses[name]).reshape(wanted.shape)
            largest = max(largest, float(np.max(np.abs(got - wanted)) / np.max(np.abs(wanted))))
    return largest


def main(argv: list[str]) -> None:
    del argv
    images = load_images(_DATA.value, _DATA_DIR.value)
    rng = np.random.default_rng(_SEED.value)
    batches = []
    for _ in range(_STEPS.value):
        chosen = rng.integers(0, len(images.x_train), _BATCH.value)
        x = (images.x_train[chosen] / images.scale).reshape(_BATCH.value, -1).astype(np.float32)
        y = np.eye(images.classes, dtype=np.float32)[images.y_train[chosen]]
        batches.append((x, y, rng.uniform(0.0, 2.0, _BATCH.value).astype(np.float32)))
    print(f"{images.name}, {_STEPS.value} steps of {_BATCH.value}, rate {_RATE.value:g}, seed {_SEED.value}")
    print(f"{'loss':<22} {'nonlinearity':<13} {'hidden layers':<14} {'no weights':>11} {'weights':>11}")
    rows = []
    for (name, loss), activation, depth in itertools.product(LOSSES.items(), ("tanh", "sigmoid", "relu"), (1, 2, 3, 4)):
        found = []
        for weighted in (False, True):
            keras.utils.set_random_seed(_SEED.value)
            used = [(x, y, weight if weighted else np.ones_like(weight)) for x, y, weight in batches]
            found.append(difference(loss, activation, depth, used, _RATE.value))
        rows.append({"loss": name, "activation": activation, "depth": depth, "plain": found[0], "weighted": found[1]})
        print(f"{name:<22} {activation:<13} {depth:<14} {found[0]:>11.1e} {found[1]:>11.1e}", flush=True)
    worst = max(max(row["plain"], row["weighted"]) for row in rows)
    print(f"largest: {worst:.1e} (wanted: at most {TOLERANCE:g})")
    if _JSON.value:
        write_text(_JSON.value, json.dumps(rows, indent=1) + "\n")
    sys.exit(worst > TOLERANCE)


if __name__ == "__main__":
    app.run(main)
