"""Time, arithmetic, memory and compile time of a meta-gradient, as ratios against Keras in the same
run.

    python benchmarks/meta_step.py [--sizes 784,128,10] [--batch_size 128] [--steps 10] [--states 2]
        [--json FILE]

One episode: the gradient of the query's cross-entropy through an unroll, data in memory, as a graph
that TensorFlow runs operation by operation (`jit_compile=False`) and as one program of XLA
(`jit_compile=True`). Both and a Keras SGD step of the same network take turns. The fraction of the
matmul peak counts the multiplications and additions of the matrix products that the equations and
their derivatives need and nothing else (a product has two derivatives, one where an operand is
data). Memory is the peak above the process before the first call, compilation included, each in a
process of its own.
"""

from __future__ import annotations

import json
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
from measure import PeakMemory, operations, peak_flops

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
_MEMORY_OF = flags.DEFINE_string("memory_of", None, "Internal: steps,recompute,jit of a candidate whose memory to print.")

PROGRAMS = {"graph": False, "XLA": True}


class Case:
    """A meta-gradient and its arguments."""

    def __init__(self, steps: int, members: int = 1, *, jit: bool, recompute: bool = False):
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
        self._gradient = tf.function(lambda outer, episodes: estimator(learner, outer, episodes, seed)[0], jit_compile=jit)
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


def memory_of(steps: int, *, jit: bool, recompute: bool) -> float:
    """Peak memory in MB, from a process of its own."""
    forwarded = [f"--{name}={','.join(map(str, value)) if isinstance(value, list) else value}" for name, value in (
        ("sizes", _SIZES.value), ("batch_size", _BATCH.value), ("states", _STATES.value),
    )]  # fmt: skip
    asked = [sys.executable, __file__, *forwarded, f"--memory_of={steps},{int(recompute)},{int(jit)}"]
    return float(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()[-1])


def main(argv: list[str]) -> None:
    del argv
    if _MEMORY_OF.value:
        count, recompute, jit = map(int, _MEMORY_OF.value.split(","))
        with PeakMemory() as memory:
            case = Case(count, jit=bool(jit), recompute=bool(recompute))
            case()
        print(memory.megabytes)
        return
    sizes, steps = [int(size) for size in _SIZES.value], _STEPS.value
    timed: dict[str, Callable[[], float]] = {"sgd": Sgd()}
    compiling = {}
    for name, jit in PROGRAMS.items():
        timed[name], timed["population, " + name] = Case(steps, jit=jit), Case(steps, _POPULATION.value, jit=jit)
        compiling[name] = Case(50, jit=jit).compile_seconds / Case(5, jit=jit).compile_seconds
    times: dict[str, list[float]] = {name: [] for name in timed}
    flops = []
    for _ in range(_REPEATS.value):
        for name, run in timed.items():
            times[name].append(run())
        flops.append(peak_flops())
    seconds = {name: float(np.median(values)) for name, values in times.items()}
    work = operations(sizes, _BATCH.value, steps, _STATES.value)
    peak = float(np.median(flops))
    columns = {}
    for name, jit in PROGRAMS.items():
        ratios = np.array(times[name]) / np.array(times["sgd"])
        columns[name] = {
            "meta-gradient over a Keras SGD step": (seconds[name] / seconds["sgd"], "at most 60"),
            "  the same, lowest tenth of the runs": (float(np.quantile(ratios, 0.1)), ""),
            "  the same, highest tenth": (float(np.quantile(ratios, 0.9)), ""),
            "fraction of the matmul peak": (work / seconds[name] / peak, "at least 0.60"),
            f"population of {_POPULATION.value} over one genome": (
                seconds["population, " + name] / seconds[name], "at most 60"
            ),
            "  its fraction of the matmul peak": (_POPULATION.value * work / seconds["population, " + name] / peak, ""),
            "trace and compile, 50 steps over 5": (compiling[name], "at most 1.5"),
        }  # fmt: skip
        if _MEMORY.value:
            found = memory_of(steps, jit=jit, recompute=False) / 1e3
            columns[name][f"peak memory, {steps} steps, GB"] = (found, "at most 0.15")
        for count in (25, 100, 400) if _MEMORY.value else ():
            found = memory_of(count, jit=jit, recompute=False) / 1e3
            columns[name][f"peak memory, {count} steps, GB"] = (found, "")
            found = memory_of(count, jit=jit, recompute=True) / 1e3
            columns[name][f"  with recomputation, {count} steps"] = (found, "as the root of the steps")
    print(f"{'-'.join(_SIZES.value)}, batch {_BATCH.value}, {steps} steps, k={_STATES.value}, float32; "
          f"{work / 1e9:.2f} GFLOP, matmul peak {peak / 1e9:.0f} GFLOP/s; median of {_REPEATS.value}")  # fmt: skip
    print(f"{'':40}" + "".join(f"{name:>10}" for name in columns))
    for name, (_, wanted) in columns["graph"].items():
        print(f"{name:40}" + "".join(f"{column[name][0]:10.3f}" for column in columns.values()) + f"  {wanted}")
    if _JSON.value:
        values = {name: {row.strip(): value for row, (value, _) in column.items()} for name, column in columns.items()}
        document: dict[str, Any] = {"peak_flops": peak, "arithmetic": work, **values}
        kb.files.write_text(_JSON.value, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
