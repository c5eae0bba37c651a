"""What products in bfloat16, as a TPU forms them, do to what is learned: digits, several seeds.

    python benchmarks/bfloat16.py [--seeds 5] [--epochs 8] [--steps_per_epoch 100] [--json FILE]

Genomes are meta-trained twice from each seed, on the same tasks, with all products of the inner
loop (and of its derivative) in float32 and in bfloat16, sums in float32. Each then learns in both
on test images that meta-training did not see: mean accuracy over seeds, its standard deviation, and
what bfloat16 costs, a difference within each seed. Rounding is emulated on a CPU, so this says what
is learned and nothing of speed.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags

import keras_blur as kb
from keras_blur import learners, meta, random, tasks
from keras_blur.backend import compiled
from keras_blur.cli.meta_train import RULE
from keras_blur.meta.estimator import InnerLoop, start

_SEEDS = flags.DEFINE_integer("seeds", 5, "Seeds.", lower_bound=2)
_EPOCHS = flags.DEFINE_integer("epochs", 8, "Epochs of meta-training.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps_per_epoch", 100, "Meta-steps of an epoch.", lower_bound=1)
_EPISODES = flags.DEFINE_integer("episodes", 64, "Test episodes.", lower_bound=1)
_JSON = flags.DEFINE_string("json", None, "File for the numbers.")

TYPES = {"float32": None, "bfloat16": "bfloat16"}
HORIZONS = (10, 20, 50)
BATCH, QUERY = 64, 128


def learner(kind: str) -> learners.Blur:
    """A network of one hidden layer, of the rule that `keras-blur meta-train` has."""
    return learners.Blur((64,), kb.Rule(**RULE), compute_dtype=TYPES[kind])


def trained(digits: tasks.Tasks, kind: str, seed: int) -> kb.Genome:
    """A genome meta-trained with products of a type."""
    trainer = meta.MetaTrainer(
        digits,
        learner(kind),
        meta.Unroll(10, trajectory_loss_weight=1.0),
        batch_size=BATCH,
        query_size=QUERY,
        clipnorm=1.0,
        seed=seed,
    )
    trainer.compile(keras.optimizers.Adam(3e-3), jit_compile=False)
    trainer.fit(_EPOCHS.value, _STEPS.value, verbose=0)
    return trainer.genome


@functools.cache
def test(digits: tasks.Tasks, kind: str, steps: int) -> Callable[[Any], Any]:
    """The mean accuracy of an outer nest after so many steps, with products of a type, on episodes
    of test images."""
    stream = digits.dataset(1_000, steps=steps, batch=BATCH, query=QUERY, split="test")
    episodes = next(iter(stream.batch(_EPISODES.value)))
    one, inner = learner(kind), InnerLoop(steps)

    def accuracy(outer: Any) -> Any:
        state = start(one, outer, episodes, random.seed_of(1))
        return tf.reduce_mean(inner.objective(one, outer, episodes, state)[1])

    return compiled(accuracy, jit_compile=False)


def scores(digits: tasks.Tasks, genome: kb.Genome, kind: str) -> list[float]:
    """Test accuracy after each of the horizons, learning with products of a type."""
    outer = {name: tf.constant(value[None]) for name, value in genome.arrays.items()}
    return [float(test(digits, kind, steps)(outer)) for steps in HORIZONS]


def main(argv: list[str]) -> None:
    del argv
    digits = tasks.images("digits", relabel=True)
    found = np.zeros((2, 2, _SEEDS.value, len(HORIZONS)))
    for seed in range(_SEEDS.value):
        for row, trained_in in enumerate(TYPES):
            genome = trained(digits, trained_in, seed)
            for column, learns_in in enumerate(TYPES):
                found[row, column, seed] = scores(digits, genome, learns_in)
        print(f"seed {seed} done", flush=True)
    print(
        f"digits, 64-64-10, batch {BATCH}, {_EPOCHS.value * _STEPS.value} meta-steps at 10 inner steps, {_SEEDS.value} seeds"
    )
    print("test accuracy after".ljust(44) + "".join(f"{steps:>16} steps" for steps in HORIZONS))
    for row, trained_in in enumerate(TYPES):
        for column, learns_in in enumerate(TYPES):
            values = found[row, column]
            cells = "".join(f"{m:14.4f} ±{s:6.4f}" for m, s in zip(values.mean(0), values.std(0, ddof=1), strict=True))
            print(f"meta-trained in {trained_in:9} learns in {learns_in:9}" + cells)
    for label, change in (
        ("bfloat16 throughout, less float32", found[1, 1] - found[0, 0]),
        ("learning only, less float32", found[0, 1] - found[0, 0]),
    ):
        error = change.std(0, ddof=1) / np.sqrt(_SEEDS.value)
        cells = "".join(f"{m:+14.4f} ±{e:6.4f}" for m, e in zip(change.mean(0), error, strict=True))
        print(f"{label:44}" + cells + "  (standard error)")
    if _JSON.value:
        document = {"horizons": HORIZONS, "types": list(TYPES), "accuracy": found.tolist()}
        kb.files.write_text(_JSON.value, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
