"""What a meta-step costs against tasks, population, width, unroll and replicas; and a model that
predicts it.

    python benchmarks/scaling.py [--rounds 9] [--jit] [--json FILE]

Every point is timed in turn with a base point, round after round, and enters as its ratio to the
base; points on several replicas (logical CPUs of this machine) in a process of their own, beside
the same base. The model is a sum with coefficients that are not negative:

    cost = fixed + a steps + b arithmetic + c bytes + (replicas - 1) (d + e steps)

Arithmetic is that of the matrix products. Bytes are those of synapses and states that the unroll
writes and its derivative reads again. Each replica dispatches a loop of its own, and what they add
up is a genome's gradient, a few hundred bytes. Half of the points, drawn by a seed, fit the
coefficients; the others are predicted.
"""

from __future__ import annotations

import dataclasses
import itertools
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

import keras_blur as kb
from keras_blur import learners, meta, tasks
from keras_blur.cli.meta_train import RULE

_ROUNDS = flags.DEFINE_integer("rounds", 9, "Times that each point is timed.", lower_bound=3)
_JIT = flags.DEFINE_boolean("jit", False, "Whether XLA compiles the steps, as on a TPU.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the half that fits.")
_JSON = flags.DEFINE_string("json", None, "File for the numbers.")
_REPLICAS = flags.DEFINE_integer("replicas", None, "Internal: the replicas whose points to print.")

TERMS = ("fixed", "steps", "arithmetic", "bytes", "replicas", "replicas x steps")


@dataclasses.dataclass(frozen=True)
class Point:
    """A meta-step on digits: 64 features, two hidden layers of a width, 10 classes."""

    tasks: int = 4
    members: int = 4
    width: int = 64
    steps: int = 10
    replicas: int = 1
    batch: int = 64

    @property
    def sizes(self) -> list[int]:
        """Units of each layer."""
        return [64, self.width, self.width, 10]

    @property
    def operations(self) -> int:
        """Multiplications and additions of the matrix products of a network's unroll, the query and
        their derivatives, with two states."""
        first, *rest = (2 * self.batch * a * b * 2 for a, b in pairwise(self.sizes))
        # First layer: forward and Hebbian product, one derivative each, since the input is data.
        # Others: forward, backward and the Hebbian products of both directions, two derivatives
        # each.
        step = 4 * first + 12 * sum(rest)
        return self.steps * step + 2 * first + 3 * sum(rest)

    def terms(self) -> list[float]:
        """What the model's coefficients multiply."""
        networks = self.tasks * self.members
        synapses = 2 * 2 * sum(a * b for a, b in pairwise(self.sizes))
        states = 2 * 2 * self.batch * sum(self.sizes)
        others = self.replicas - 1
        return [
            1.0, self.steps, networks * self.operations / 1e9,
            networks * 4 * (self.steps + 1) * (synapses + states) / 1e9, others, others * self.steps,
        ]  # fmt: skip


BASE = Point()
POINTS = [
    *(dataclasses.replace(BASE, tasks=n) for n in (1, 2, 8, 16)),
    *(dataclasses.replace(BASE, members=n) for n in (1, 2, 8, 16)),
    *(dataclasses.replace(BASE, width=n) for n in (16, 32, 128, 256)),
    *(dataclasses.replace(BASE, steps=n) for n in (3, 5, 20, 40)),
    Point(tasks=8, members=1, width=128, steps=5),
    Point(tasks=2, members=8, width=32, steps=20),
    Point(tasks=1, members=16, width=64, steps=20),
    Point(tasks=16, members=2, width=32, steps=5),
    *(dataclasses.replace(BASE, replicas=n, steps=s) for n in (2, 4) for s in (5, 10, 20)),
    *(dataclasses.replace(BASE, replicas=n, tasks=16) for n in (2, 4)),
    *(dataclasses.replace(BASE, replicas=n, width=128) for n in (2, 4)),
]


def stepper(point: Point) -> Any:
    """A function that takes a meta-step; made in a strategy's scope."""
    trainer = meta.MetaTrainer(
        tasks.images("digits", relabel=True),
        learners.Blur((point.width, point.width), kb.Rule(**RULE)),
        meta.Unroll(point.steps),
        members=point.members,
        meta_batch_size=point.tasks,
        batch_size=point.batch,
        query_size=point.batch,
    )
    trainer.compile(keras.optimizers.Adam(1e-3), jit_compile=_JIT.value)
    for _ in range(2):
        trainer.meta_train_step()
    return trainer.meta_train_step


def timed(points: list[Point], strategy: Any) -> list[float]:
    """The cost of each point over that of the base, the median of the rounds."""
    base = stepper(BASE)
    with strategy.scope():
        steppers = [stepper(point) for point in points]
    ratios = np.zeros((_ROUNDS.value, len(points)))
    for row in ratios:
        for number, step in enumerate(steppers):
            times = []
            for run in (base, step, base):
                begin = time.perf_counter()
                run()
                times.append(time.perf_counter() - begin)
            row[number] = 2 * times[1] / (times[0] + times[2])
    return np.median(ratios, axis=0).tolist()


def of_replicas(count: int) -> list[float]:
    """The costs of all points on so many replicas, from a process of its own."""
    asked = [sys.executable, __file__, f"--replicas={count}", f"--rounds={_ROUNDS.value}", f"--jit={_JIT.value}"]
    return json.loads(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def fitted(terms: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """Coefficients that are not negative with the least squares of relative errors: the best over
    sets of terms."""
    scaled = terms / costs[:, None]
    best, least = np.zeros(terms.shape[1]), np.inf
    for size in range(1, terms.shape[1] + 1):
        for chosen in itertools.combinations(range(terms.shape[1]), size):
            found = np.linalg.lstsq(scaled[:, chosen], np.ones(len(costs)), rcond=None)[0]
            error = float(np.sum((scaled[:, chosen] @ found - 1.0) ** 2))
            if (found >= 0.0).all() and error < least:
                best, least = np.zeros(terms.shape[1]), error
                best[list(chosen)] = found
    return best


def main(argv: list[str]) -> None:
    del argv
    counts = sorted({point.replicas for point in POINTS})
    if _REPLICAS.value:
        count = _REPLICAS.value
        devices = [tf.config.LogicalDeviceConfiguration()] * count
        tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], devices)
        names = [f"CPU:{number}" for number in range(count)]
        one = count == 1
        strategy = tf.distribute.get_strategy() if one else tf.distribute.MirroredStrategy(
            names, tf.distribute.ReductionToOneDevice()
        )  # fmt: skip
        print(json.dumps(timed([point for point in POINTS if point.replicas == count], strategy)))
        return
    measured = {count: iter(of_replicas(count)) for count in counts}
    costs = np.array([next(measured[point.replicas]) for point in POINTS])
    terms = np.array([point.terms() for point in POINTS])
    order = np.random.default_rng(_SEED.value).permutation(len(POINTS))
    fit = np.isin(np.arange(len(POINTS)), order[: len(POINTS) // 2])
    coefficients = fitted(terms[fit], costs[fit])
    predicted = terms @ coefficients
    print(f"cost of a meta-step over the base {BASE.tasks} tasks, {BASE.members} members, width {BASE.width}, "
          f"{BASE.steps} steps, 1 replica; {'XLA' if _JIT.value else 'graph'}, median of {_ROUNDS.value}")  # fmt: skip
    print(f"{'tasks':>6}{'members':>8}{'width':>6}{'steps':>6}{'replicas':>9}{'measured':>10}{'model':>8}{'error':>8}")
    for point, cost, guess, used in zip(POINTS, costs, predicted, fit, strict=True):
        print(f"{point.tasks:6}{point.members:8}{point.width:6}{point.steps:6}{point.replicas:9}{cost:10.3f}{guess:8.3f}"
              f"{100 * (guess / cost - 1):+7.0f}%{'  fitted' if used else ''}")  # fmt: skip
    print("model: " + ", ".join(f"{name} {value:.3g}" for name, value in zip(TERMS, coefficients, strict=True)))
    error = np.abs(predicted / costs - 1.0)[~fit]
    print(f"the {len(error)} points not fitted: median error {np.median(error):.0%}, largest {error.max():.0%}, "
          f"{int((error <= 0.25).sum())} within 25 %")  # fmt: skip
    if _JSON.value:
        document = {
            "points": [dataclasses.asdict(point) for point in POINTS], "measured": costs.tolist(), "fitted": fit.tolist(),
            "model": dict(zip(TERMS, coefficients.tolist(), strict=True)), "predicted": predicted.tolist(),
        }  # fmt: skip
        kb.files.write_text(_JSON.value, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
