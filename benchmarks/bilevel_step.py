"""What a step of `BilevelTrainer` costs over plain training: time and memory, by estimator.

    python benchmarks/bilevel_step.py [--rounds 20] [--network deep|conv|lenet ...]
        [--nojit_compile] [--nomemory]

Three networks: eight dense layers of 256 units and the small convolutional one of
examples/noisy_labels.py, both with weights of examples, batch 100; LeNet at 28x28 with a learned
rotation, batch 128. Data are random numbers. Plain training is Keras's own training step, without
weights of examples or a rotation. It and the estimators take turns in blocks of five steps. Printed
are medians over rounds of the time over that of plain training in the same round, the 10 % and 90 %
quantiles, and the same over the exact step. Both are compiled by XLA, or with `--nojit_compile`
neither. The last column divides the time of a step compiled the other way by this one's.

Memory is the peak above the process before the network is built, in MB, for three steps of a large
batch, so that what a step holds stands out from the program and its compilation; each in a process
of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags
from measure import PeakMemory

from keras_blur import bilevel
from keras_blur.bilevel.hypergradient import HypergradientEstimator

_ROUNDS = flags.DEFINE_integer("rounds", 20, "Blocks of each estimator.", lower_bound=3)
_NETWORK = flags.DEFINE_multi_enum("network", None, ["deep", "conv", "lenet"], "What to run; all by default.")
_JIT = flags.DEFINE_boolean("jit_compile", True, "Whether XLA compiles the steps.")
_MEMORY = flags.DEFINE_boolean("memory", True, "Whether to measure memory, in some more processes.")
_MEMORY_OF = flags.DEFINE_string("memory_of", None, "Internal: network,place of a candidate whose memory to print.")
_BLOCK, _LARGE = 5, {"deep": 30000, "conv": 3000, "lenet": 3000}

_WEIGHTS: dict[str, HypergradientEstimator] = {
    "exact one step (Meta-Weight-Net)": bilevel.OneStep(),
    "last two layers (FaMUS, fixed cut)": bilevel.LayerwiseMetaGradient("last:2"),
    "sampled, all layers (FaMUS)": bilevel.LayerwiseMetaGradient(None, bilevel.GradientSampler(target=2)),
    "EvoGrad": bilevel.EvoGrad(),
    "finite difference": bilevel.FiniteDifference(),
}
_AMONG = {"sampled, last four layers (FaMUS)": bilevel.LayerwiseMetaGradient("last:4", bilevel.GradientSampler(target=2))}
ESTIMATORS: dict[str, dict[str, HypergradientEstimator]] = {
    "deep": {**_WEIGHTS, **_AMONG},
    "conv": _WEIGHTS,
    "lenet": {
        "exact one step": bilevel.OneStep(),
        "EvoGrad": bilevel.EvoGrad(),
        "finite difference": bilevel.FiniteDifference(),
    },
}


def network(name: str) -> tuple[keras.Model, type[bilevel.TrainingLoss], int]:
    """The model, what is learned beside it, and the size of a batch."""
    dense, conv, pool = keras.layers.Dense, keras.layers.Conv2D, keras.layers.MaxPooling2D
    if name == "deep":
        layers = [keras.Input((32,)), *(dense(256, "relu") for _ in range(8)), dense(10)]
        return keras.Sequential(layers), bilevel.SampleWeightNet, 100
    if name == "conv":
        layers = [keras.Input((28, 28, 1)), conv(16, 3, activation="relu"), pool(2), conv(32, 3, activation="relu"),
                  pool(2), keras.layers.Flatten(), dense(64, "relu"), dense(10)]  # fmt: skip
        return keras.Sequential(layers), bilevel.SampleWeightNet, 100
    first = conv(6, 5, padding="same", activation="relu")
    layers = [keras.Input((28, 28, 1)), first, pool(2), conv(16, 5, activation="relu"),
              pool(2), keras.layers.Flatten(), dense(120, "relu"), dense(84, "relu"), dense(10)]  # fmt: skip
    return keras.Sequential(layers), bilevel.LearnedRotation, 128


def runner(
    name: str, estimator: HypergradientEstimator | None, jit_compile: bool, batch: int | None = None
) -> Callable[[], Any]:
    """A training step after the first ones, with an estimator or, for plain training, Keras's
    own."""
    keras.utils.set_random_seed(0)
    model, of, usual = network(name)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch or 20 * usual, *model.input_shape[1:])).astype("float32")
    y = rng.integers(0, 10, len(x))
    loss, size = keras.losses.SparseCategoricalCrossentropy(from_logits=True), batch or usual
    if estimator is None:
        model.compile(keras.optimizers.SGD(0.01), loss, jit_compile=jit_compile)
        data = tf.data.Dataset.from_tensor_slices((x, y)).batch(size).repeat().prefetch(2)
        model.fit(data, steps_per_epoch=3, shuffle=False, verbose=0)
        stream = iter(data)
        return lambda: float(model.train_function(stream)["loss"])
    trainer = bilevel.BilevelTrainer(model, of(), estimator, first="model" if name == "lenet" else "meta")
    trainer.compile(keras.optimizers.SGD(0.01), keras.optimizers.Adam(1e-4), loss, jit_compile=jit_compile)
    trainer.fit(x, y, meta_data=(x, y), batch_size=size, steps_per_epoch=3, verbose=0)
    return trainer.meta_train_step


def memory_of(name: str, place: int) -> float:
    """Peak memory of a candidate in MB, from a process of its own."""
    asked = [sys.executable, __file__, f"--memory_of={name},{place}", f"--jit_compile={_JIT.value}"]
    return float(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()[-1])


def main(argv: list[str]) -> None:
    """Measures and prints."""
    del argv
    if _MEMORY_OF.value:
        asked, which = _MEMORY_OF.value.split(",")
        with PeakMemory() as peak:
            runner(asked, [None, *ESTIMATORS[asked].values()][int(which)], _JIT.value, _LARGE[asked])
        print(peak.megabytes)
        return
    for name in _NETWORK.value or list(ESTIMATORS):
        candidates: dict[str, HypergradientEstimator | None] = {"plain training": None, **ESTIMATORS[name]}
        ways = (_JIT.value, not _JIT.value)
        made = {(label, way): runner(name, estimator, way) for label, estimator in candidates.items() for way in ways}
        times: dict[tuple[str, bool], list[float]] = {key: [] for key in made}
        for _ in range(_ROUNDS.value):
            for key, step in made.items():
                begin = time.perf_counter()
                for _ in range(_BLOCK):
                    step()
                times[key].append(time.perf_counter() - begin)
        kind = "by XLA" if _JIT.value else "without XLA"
        print(f"{name}, {kind}: time over plain training, 10 % to 90 %, over the exact step, of the other kind over this one"
              + (f", MB for {_LARGE[name]} examples" if _MEMORY.value else ""))  # fmt: skip
        exact = next(iter(ESTIMATORS[name]))
        for place, label in enumerate(candidates):
            own = np.array(times[label, _JIT.value])
            ratios = own / np.array(times["plain training", _JIT.value])
            against = np.median(own / np.array(times[exact, _JIT.value]))
            other = np.median(np.array(times[label, not _JIT.value]) / own)
            low, high = np.quantile(ratios, [0.1, 0.9])
            columns = [f"{label:<35}", f"{np.median(ratios):.2f}", f"{low:.2f} to {high:.2f}", f"{against:.2f}"]
            columns += [f"{other:.2f}"] + ([f"{memory_of(name, place):.0f}"] if _MEMORY.value else [])
            print(" ", "   ".join(columns), flush=True)


if __name__ == "__main__":
    app.run(main)
