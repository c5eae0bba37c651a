"""Time, arithmetic, memory and compile time of a meta-gradient, as ratios against Keras in the same run.

    python benchmarks/meta_step.py [--sizes 784,128,10] [--batch_size 128] [--steps 10] [--states 2] [--json FILE]

One episode: the gradient of the query's cross-entropy through an unroll, compiled, data in memory. Meta-gradient and a Keras
SGD step of the same network take turns. "arithmetic" counts the multiplications and additions of the matrix products that
the equations and their derivatives need and nothing else (a product has two derivatives, one where an operand is data).
Memory is the peak above the process before the first call, compilation included, each in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from itertools import pairwise
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags
from measure import PeakMemory, peak_flops

import keras_blur as kb
from keras_blur import random

_SIZES = flags.DEFINE_list("sizes", ["784", "128", "10"], "Units of each layer, the input first.")
_BATCH = flags.DEFINE_integer("batch_size", 128, "Examples in a batch.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 10, "Unrolled steps.", lower_bound=1)
_STATES = flags.DEFINE_integer("states", 2, "States of a neuron.", lower_bound=2)
_POPULATION = flags.DEFINE_integer("population", 80, "Genomes of the population.", lower_bound=2)
_REPEATS = flags.DEFINE_integer("repeats", 15, "Times that each is run.", lower_bound=3)
_MEMORY = flags.DEFINE_boolean("memory", True, "Whether to measure memory, in some more processes.")
_JSON = flags.DEFINE_string("json", None, "File for the numbers.")
_MEMORY_OF = flags.DEFINE_string("memory_of", None, "Internal: steps,recompute of a candidate whose memory to print.")


class Case:
    """A compiled meta-gradient and its arguments."""

    def __init__(self, steps: int, members: int = 1, *, recompute: bool = False):
        sizes, batch = [int(size) for size in _SIZES.value], _BATCH.value
        rng = np.random.default_rng(0)
        rule = kb.Rule(states=_STATES.value, batch_reduction="mean")
        genome = kb.Genome.random(rule, 0, std=0.3, synapse_update=-0.01, population=(members,))
        learner = kb.learners.Blur(tuple(sizes[1:-1]), rule)
        estimator = kb.meta.Unroll(steps, recompute=recompute)

        def signs(*shape: int) -> np.ndarray:
            return (2.0 * np.eye(sizes[-1])[rng.integers(0, sizes[-1], shape)] - 1.0).astype("float32")

        episodes = {
            "x": rng.standard_normal((1, steps, batch, sizes[0]), "float32"),
            "y": signs(1, steps, batch),
            "query_x": rng.standard_normal((1, batch, sizes[0]), "float32"),
            "query_y": signs(1, batch),
        }
        self._arguments = (
            {name: tf.constant(array) for name, array in genome.arrays.items()},
            {name: tf.constant(array) for name, array in episodes.items()},
        )
        seed = random.seed_of(0)
        self._gradient = tf.function(lambda outer, episodes: estimator(learner, outer, episodes, seed)[0], jit_compile=True)
        start = time.perf_counter()
        self()
        self.compile_seconds = time.perf_counter() - start

    def __call__(self) -> float:
        """Seconds of a run."""
        start = time.perf_counter()
        float(self._gradient(*self._arguments).loss[0])
        return time.perf_counter() - start


class Sgd:
    """A Keras SGD step of the same network."""

    def __init__(self) -> None:
        sizes, batch = [int(size) for size in _SIZES.value], _BATCH.value
        hidden = [keras.layers.Dense(units, "tanh") for units in sizes[1:-1]]
        model = keras.Sequential([keras.Input((sizes[0],)), *hidden, keras.layers.Dense(sizes[-1])])
        model.compile(keras.optimizers.SGD(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        rng = np.random.default_rng(0)
        x = rng.standard_normal((batch, sizes[0])).astype("float32")
        y = rng.integers(0, sizes[-1], batch)
        self._iterator = iter(tf.data.Dataset.from_tensors((x, y)).cache().repeat().prefetch(2))
        model.make_train_function()
        self._step = model.train_function
        self()

    def __call__(self, steps: int = 10) -> float:
        """Seconds of a step."""
        start = time.perf_counter()
        for _ in range(steps):
            logs = self._step(self._iterator)
        float(logs["loss"])
        return (time.perf_counter() - start) / steps


def operations(sizes: list[int], batch: int, steps: int, states: int) -> int:
    """Multiplications and additions of the matrix products of the unroll, the query and their derivatives."""
    products = [2 * batch * a * b * states for a, b in pairwise(sizes)]
    first, rest = products[0], sum(products[1:])
    # First layer: forward and Hebbian product, one derivative each, since the input is data. Others: forward, backward and
    # the Hebbian products of both directions, two derivatives each.
    step = 4 * first + 12 * rest
    return steps * step + 2 * first + 3 * rest


def memory_of(steps: int, *, recompute: bool) -> float:
    """Peak memory in MB, from a process of its own."""
    forwarded = [f"--{name}={','.join(map(str, value)) if isinstance(value, list) else value}" for name, value in (
        ("sizes", _SIZES.value), ("batch_size", _BATCH.value), ("states", _STATES.value),
    )]  # fmt: skip
    asked = [sys.executable, __file__, *forwarded, f"--memory_of={steps},{int(recompute)}"]
    return float(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()[-1])


def main(argv: list[str]) -> None:
    del argv
    if _MEMORY_OF.value:
        steps, recompute = map(int, _MEMORY_OF.value.split(","))
        with PeakMemory() as memory:
            case = Case(steps, recompute=bool(recompute))
            case()
        print(memory.megabytes)
        return
    sizes, steps = [int(size) for size in _SIZES.value], _STEPS.value
    sgd, single, five, fifty = Sgd(), Case(steps), Case(5), Case(50)
    population = Case(steps, _POPULATION.value)
    times: dict[str, list[float]] = {name: [] for name in ("sgd", "single", "population")}
    flops = []
    for _ in range(_REPEATS.value):
        times["sgd"].append(sgd())
        times["single"].append(single())
        times["population"].append(population())
        flops.append(peak_flops())
    seconds = {name: float(np.median(values)) for name, values in times.items()}
    work = operations(sizes, _BATCH.value, steps, _STATES.value)
    peak = float(np.median(flops))
    ratios = np.array(times["single"]) / np.array(times["sgd"])
    rows: list[tuple[str, float, str]] = [
        ("meta-gradient over a Keras SGD step", seconds["single"] / seconds["sgd"], "at most 60"),
        ("  the same, lowest tenth of the runs", float(np.quantile(ratios, 0.1)), ""),
        ("  the same, highest tenth", float(np.quantile(ratios, 0.9)), ""),
        ("share of the matmul peak", work / seconds["single"] / peak, "at least 0.60"),
        ("  arithmetic, GFLOP", work / 1e9, ""),
        (f"population of {_POPULATION.value} over one genome", seconds["population"] / seconds["single"], "at most 60"),
        ("trace and compile, 50 steps over 5", fifty.compile_seconds / five.compile_seconds, "at most 1.5"),
    ]
    if _MEMORY.value:
        rows.append((f"peak memory, {steps} steps, GB", memory_of(steps, recompute=False) / 1e3, "at most 0.15"))
    for count in (25, 100, 400) if _MEMORY.value else ():
        rows.append((f"peak memory, {count} steps, GB", memory_of(count, recompute=False) / 1e3, ""))
        rows.append(("  with recomputation", memory_of(count, recompute=True) / 1e3, "as the root of the steps"))
    print(f"{'-'.join(_SIZES.value)}, batch {_BATCH.value}, {steps} steps, k={_STATES.value}, float32; matmul peak "
          f"{peak / 1e9:.0f} GFLOP/s; median of {_REPEATS.value}")  # fmt: skip
    for name, value, wanted in rows:
        print(f"{name:44} {value:10.3f}  {wanted}")
    if _JSON.value:
        document: dict[str, Any] = {name.strip(): value for name, value, _ in rows}
        kb.files.write_text(_JSON.value, json.dumps({"peak_flops": peak, **document}, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
