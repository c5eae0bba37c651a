"""How exactly the backprop genome is backpropagation: weights after training, against a gradient
tape and plain SGD.

    python benchmarks/exact_backprop.py [--data mnist --data_dir DIR] [--steps 50] [--json FILE]
    python benchmarks/exact_backprop.py --architectures [--only resnet,MobileNetV2] [--float64]
        [--json FILE]

For each loss, nonlinearity and depth, with and without sample weights, two networks start from the
same weights and see the same batches: one under `keras_blur.Sequential.train_on_batch`, the other
by `w <- w - rate * gradient` with a tape. Printed is the largest difference of a weight over the
largest weight of its array, over all arrays. Exit status 1 if one is above 1e-5.

`--architectures` does the same for convolutional, residual, separable and branching nets, a
Transformer, several inputs and outputs, shared layers, and networks of keras.applications, each
against Keras's own training step with SGD (a gradient tape on TensorFlow, `jax.grad` on JAX): 20
steps, and one for the applications, whose dropout is off. Wanted are 1e-8 in float64 and 1e-4 in
float32. Near the kink of a ReLU, float32 rounding decides on which side a neuron is, so SGD does
not even agree with itself: the column "reversed" is how far it is from the same SGD with the
examples of each batch in reverse order. Where ten times this distance exceeds the tolerance, it
replaces the tolerance.

It runs on the backend that KERAS_BACKEND names: TensorFlow runs the steps as graphs, without XLA,
which takes minutes to compile the larger applications; JAX compiles them. Seconds are those of all
three networks: conversion, tracing or compilation, the steps, and conversion back to Keras. LeNet
sees real images, all others random ones.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import networks
import numpy as np
from absl import app, flags

import keras_blur as kb
from keras_blur.files import write_text

_DATA = flags.DEFINE_string("data", "digits", "Image set.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder of prepared sets.")
_STEPS = flags.DEFINE_integer("steps", 50, "Training steps.", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch_size", 64, "Images in a batch.", lower_bound=1)
_RATE = flags.DEFINE_float("learning_rate", 0.1, "Rate.", lower_bound=0.0)
_SEED = flags.DEFINE_integer("seed", 0, "Seed.", lower_bound=0)
_JSON = flags.DEFINE_string("json", None, "File for the numbers.")
_ARCHITECTURES = flags.DEFINE_boolean("architectures", False, "Networks of all kinds instead of dense chains.")
_ONLY = flags.DEFINE_list("only", [], "Names of some of them.")
_FLOAT64 = flags.DEFINE_boolean("float64", False, "Whether they compute in float64.")

TOLERANCE = 1e-5
WANTED = {"float64": 1e-8, "float32": 1e-4}
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
    import tensorflow as tf

    @tf.function
    def descend(x: Any, y: Any, weight: Any) -> None:
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


def relative(ours: keras.Model, theirs: keras.Model) -> tuple[float, str]:
    """The largest relative difference of a weight that trains, and its path.

    An array whose gradient is zero by the network's form (a bias before batch normalisation) holds
    rounding alone, so the difference is relative to the largest weight of the array or to 1e-3,
    whichever is larger.
    """
    worst, where = 0.0, ""
    for own, wanted in zip(ours.trainable_weights, theirs.trainable_weights, strict=True):
        a, b = (np.asarray(keras.ops.convert_to_tensor(one)) for one in (own, wanted))
        found = float(np.max(np.abs(a - b)) / max(float(np.max(np.abs(b))), 1e-3))
        if not found <= worst:  # NaN as well
            worst, where = found, wanted.path
    return worst, where


def compare(name: str, steps: int, size: int) -> dict[str, Any]:
    """One network under the backprop genome and under Keras SGD."""
    keras.utils.set_random_seed(_SEED.value)
    theirs = networks.application(name) if name in networks.APPLICATIONS else networks.ARCHITECTURES[name]()
    for layer in theirs.layers:  # its masks are those of Keras's generator, and ours of our own
        if isinstance(layer, keras.layers.Dropout):
            layer.rate = 0.0
    rng = np.random.default_rng(_SEED.value)
    start = time.perf_counter()
    try:
        ours = kb.convert(theirs, kb.genomes.backprop(0.015625))
    except ValueError as error:
        return {"name": name, "refused": str(error)}
    weights = [0.75, 0.25] if len(theirs.outputs) > 1 else None
    compiled = keras.backend.backend() == "jax"
    theirs.compile(keras.optimizers.SGD(0.015625), networks.losses(theirs), weights, jit_compile=compiled)
    ours.compile(loss=networks.losses(theirs), loss_weights=weights, jit_compile=compiled)
    turned = keras.models.clone_model(theirs)  # sees the examples of each batch in reverse order
    turned.set_weights(theirs.get_weights())
    turned.compile(keras.optimizers.SGD(0.015625), networks.losses(turned), weights, jit_compile=compiled)
    for _ in range(steps):
        x, y = networks.batch(theirs, size, rng)
        if name == "lenet":
            x, y = images_28(size, rng)
        own, wanted = (float(np.ravel(model.train_on_batch(x, y))[0]) for model in (ours, theirs))
        turned.train_on_batch(*keras.tree.map_structure(lambda array: array[::-1].copy(), (x, y)))
    worst, where = relative(ours.to_keras(), theirs)
    return {
        "name": name, "weights": theirs.count_params(), "steps": steps, "worst": worst, "where": where,
        "reversed": relative(turned, theirs)[0],
        "loss": own, "loss_wanted": wanted, "seconds": time.perf_counter() - start,
    }  # fmt: skip


def images_28(size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Digits as 28x28 images: MNIST where `--data mnist` says so, else the small digits three times
    as large."""
    if _DATA.value == "digits":
        from sklearn.datasets import load_digits

        found = load_digits()
        whole, labels = (
            np.pad(np.kron(found.images, np.ones((1, 3, 3))), ((0, 0), (2, 2), (2, 2)))[..., None] / 16,
            found.target,
        )
    else:
        from keras_blur.tasks.datasets import load_images

        images = load_images(_DATA.value, _DATA_DIR.value)
        whole, labels = images.x_train / images.scale, images.y_train
    chosen = rng.integers(0, len(whole), size)
    return whole[chosen].astype(keras.config.floatx()), labels[chosen]


def architectures() -> None:
    """The table of networks of all kinds."""
    if _FLOAT64.value:
        if keras.backend.backend() == "jax":
            import jax

            jax.config.update("jax_enable_x64", True)
        keras.config.set_floatx("float64")
        keras.config.set_dtype_policy("float64")
    kind = keras.config.floatx()
    ran = {"tensorflow": "graphs on TensorFlow", "jax": "compiled on JAX"}[keras.backend.backend()]
    print(f"{ran}, {kind}, rate 1/64, seed {_SEED.value}; wanted: at most {WANTED[kind]:g}")
    titles = f"{'network':<18} {'weights':>9} {'steps':>5} {'largest':>9} {'reversed':>9}"
    print(f"{titles}  {'loss':>9} {'of SGD':>9} {'seconds':>8}")
    rows = []
    for name in _ONLY.value or [*networks.ARCHITECTURES, *networks.APPLICATIONS]:
        keras.backend.clear_session()
        row = compare(name, 1 if name in networks.APPLICATIONS else 20, 8 if name in networks.APPLICATIONS else 32)
        rows.append(row)
        if "refused" in row:
            print(f"{name:<18} refused: {row['refused']}", flush=True)
            continue
        row["wanted"] = max(WANTED[kind], 10 * row["reversed"])
        gaps = f"{row['worst']:>9.1e} {row['reversed']:>9.1e}"
        print(
            f"{name:<18} {row['weights']:>9} {row['steps']:>5} {gaps}  {row['loss']:>9.5f} {row['loss_wanted']:>9.5f} "
            f"{row['seconds']:>8.0f}  {'' if row['worst'] <= row['wanted'] else row['where']}",
            flush=True,
        )
    if _JSON.value:
        write_text(_JSON.value, json.dumps(rows, indent=1) + "\n")
    sys.exit(not all("wanted" in row and row["worst"] <= row["wanted"] for row in rows))  # a refused network fails


def main(argv: list[str]) -> None:
    del argv
    if _ARCHITECTURES.value:
        architectures()
    from keras_blur.tasks.datasets import load_images

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
