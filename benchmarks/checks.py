"""What checking a `tf.data` stream costs, as ratios in the same run.

    python benchmarks/checks.py [--sizes 784,128,10] [--batch_size 128] [--repeats 60] [--json FILE]

Batches are float32 numbers with integer labels, cached in memory. Three streams take turns in
blocks of batches: as it is; under a `map` that looks at one label, so that TensorFlow keeps it; and
checked, as `fit` checks it. So do training steps on each, of Keras's SGD and of a genome: the
compiled training function on an iterator, as `fit` runs it. Every stream is made three times, since
where its batches lie in memory matters as much as the check.

Printed is the best time of a block over the best on the plain stream, and behind it the median of
that ratio block by block. The last column is what checked batches add to iteration alone, over a
training step: what the check costs a step that waits for all of it and shares no cache or thread
with it. The best of many blocks is what the machine can do when nothing else runs; the median is
what it did.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags

import keras_blur as kb
from keras_blur import checks

_SIZES = flags.DEFINE_list("sizes", ["784", "128", "10"], "Units of each layer, the input first.")
_BATCH = flags.DEFINE_integer("batch_size", 128, "Examples in a batch.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 60, "Rounds, with a block of each copy.", lower_bound=3)
_BLOCK = flags.DEFINE_integer("block", 32, "Batches in a block.", lower_bound=1)
_JSON = flags.DEFINE_string("json", None, "File for the numbers.")

WANTED = 0.02  # of a training step of the genome
COPIES = 3


def network(name: str, sizes: list[int]) -> keras.Model:
    """A compiled network."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    keras.utils.set_random_seed(0)
    if name == "keras SGD":
        hidden = [keras.layers.Dense(units, "tanh") for units in sizes[1:-1]]
        model = keras.Sequential([keras.Input((sizes[0],)), *hidden, keras.layers.Dense(sizes[-1])])
        model.compile(optimizer=keras.optimizers.SGD(0.01), loss=loss)
        return model
    genome = kb.Genome.random(kb.Rule(states=2), seed=0, std=0.5, synapse_update=-1e-5)
    layers = [kb.layers.Dense(units) for units in sizes[1:]]
    model = kb.Sequential([keras.Input((sizes[0],)), *layers], genome=genome)
    model.compile(loss=loss)
    return model


def iteration(dataset: tf.data.Dataset) -> Callable[[], None]:
    """A function that takes a block of batches."""
    iterator = iter(dataset.repeat())

    @tf.function
    def run() -> None:
        for _ in tf.range(_BLOCK.value):
            next(iterator)

    return run.get_concrete_function()


def training(name: str, sizes: list[int], dataset: tf.data.Dataset) -> Callable[[], None]:
    """A function that trains on a block of batches."""
    model, iterator = network(name, sizes), iter(dataset.repeat())
    model.make_train_function()

    def run() -> None:
        for _ in range(_BLOCK.value):
            logs = model.train_function(iterator)
        float(logs["loss"])

    return run


def main(argv: list[str]) -> None:
    del argv
    sizes = [int(size) for size in _SIZES.value]
    rng = np.random.default_rng(0)
    x = rng.standard_normal((_BATCH.value * 8, sizes[0])).astype(np.float32)
    y = rng.integers(0, sizes[-1], len(x))
    keras_model = network("keras SGD", sizes)
    expected = checks.model_expects(keras_model, keras_model.loss)

    def looked_at(x: tf.Tensor, y: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        with tf.control_dependencies([tf.debugging.Assert(y[0] >= 0, ["a label below 0"])]):
            return tf.identity(x), tf.identity(y)

    def stream(of: str) -> tf.data.Dataset:
        plain = tf.data.Dataset.from_tensor_slices((x, y)).batch(_BATCH.value).cache()
        if of == "checked":
            return checks.checked(plain, None, None, lambda: expected)[0]
        return plain.map(looked_at) if of == "mapped" else plain

    makers: dict[str, Callable[[tf.data.Dataset], Callable[[], None]]] = {
        "iteration alone": iteration,
        "keras SGD": lambda dataset: training("keras SGD", sizes, dataset),
        "blur k=2": lambda dataset: training("blur k=2", sizes, dataset),
    }
    streams = ("plain", "mapped", "checked")
    kinds = [(name, of) for _ in range(COPIES) for name in makers for of in streams]
    runs = [((name, of), makers[name](stream(of))) for name, of in kinds]
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key, _ in runs}
    for _, run in runs:
        run()
    for _ in range(_REPEATS.value):
        for key, run in runs:
            start = time.perf_counter()
            run()
            seconds[key].append((time.perf_counter() - start) / _BLOCK.value)
    best = {key: min(found) for key, found in seconds.items()}
    added = best["iteration alone", "checked"] - best["iteration alone", "plain"]
    print(f"{'-'.join(_SIZES.value)}, batch {_BATCH.value}, float32, {os.cpu_count()} cores; "
          f"best of {COPIES * _REPEATS.value} blocks of {_BLOCK.value} batches")  # fmt: skip
    print(f"{'':16} {'mapped':>7} {'(median)':>9} {'checked':>9} {'(median)':>9} "
          f"{'check over a step':>19}")  # fmt: skip
    rows: list[dict[str, Any]] = []
    for name in makers:
        row: dict[str, Any] = {"name": name, "milliseconds": 1e3 * best[name, "plain"]}
        for of in streams[1:]:
            ratios = np.array(seconds[name, of]) / np.array(seconds[name, "plain"])
            row[of] = best[name, of] / best[name, "plain"]
            row[f"{of}_median"] = float(np.median(ratios))
        row["added"] = None if name == "iteration alone" else added / best[name, "plain"]
        rows.append(row)
        share = "" if row["added"] is None else f"{row['added']:.1%}"
        print(f"{name:16} {row['mapped']:7.3f} ({row['mapped_median']:7.3f}) {row['checked']:9.3f} "
              f"({row['checked_median']:7.3f}) {share:>19}")  # fmt: skip
    print(f"wanted for blur k=2: checked at most {1 + WANTED:.2f}")
    if _JSON.value:
        kb.files.write_text(_JSON.value, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
