"""Fraction of the step time that is spent waiting for data.

    python benchmarks/input_pipeline.py [--data mnist --few_shot omniglot --data_dir DIR]
        [--steps 100] [--json FILE]

Meta-training as `keras-blur meta-train` does it by default, with MetaTrainer's own loop and its own
iterators: the time in `next(iterator)` over that of the whole step, both taken in the same loop,
over all steps and for the tenth of the steps that wait the longest. While a step runs, the pipeline
prepares the next one on the same cores. The last column shows this cost: the step's time divided by
that of a step that always gets the same episodes. Keras owns the iterator of `Sequential.fit`. Its
fraction is therefore the time of a fit divided by that of a fit to one repeated batch, measured in
alternating blocks.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags

import keras_blur as kb
from keras_blur import learners, meta, tasks
from keras_blur.cli.meta_train import RULE
from keras_blur.files import write_text
from keras_blur.tasks.datasets import load_images

_DATA = flags.DEFINE_string("data", "digits", "Image set.")
_FEW_SHOT = flags.DEFINE_string("few_shot", "digits", "Image set of the few-shot episodes.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder of prepared sets.")
_STEPS = flags.DEFINE_integer("steps", 100, "Meta-steps of each kind.", lower_bound=10)
_BATCH = flags.DEFINE_integer("batch_size", 64, "Examples of a batch.", lower_bound=1)
_UNROLL = flags.DEFINE_integer("unroll", 10, "Unrolled steps.", lower_bound=1)
_HIDDEN = flags.DEFINE_list("hidden", ["64", "64"], "Units of the hidden layers.")
_MEMBERS = flags.DEFINE_integer("members", 4, "Genomes side by side.", lower_bound=1)
_JSON = flags.DEFINE_string("json", None, "File for the numbers.")

WANTED = 0.05
WARM_UP = 5  # steps that are not counted: the first ones compile, and start with what was prepared meanwhile


class Timed:
    """An iterator that takes the time of each `next`; with `again`, it gives the first element
    again and again."""

    def __init__(self, iterator: Iterator[Any]):
        self._iterator = iterator
        self._first: Any = None
        self.again, self.seconds = False, 0.0

    def __next__(self) -> Any:
        if self.again:
            return self._first
        start = time.perf_counter()
        element = next(self._iterator)
        self.seconds = time.perf_counter() - start
        if self._first is None:
            self._first = element
        return element


def meta_training(of: tasks.Tasks, meta_batch_size: int) -> dict[str, float]:
    """What a meta-step waits for episodes.

    Args:
        of: the tasks.
        meta_batch_size: episodes of a step.
    """
    learner = learners.Blur(tuple(map(int, _HIDDEN.value)), kb.Rule(**RULE))
    trainer = meta.MetaTrainer(
        of, learner, meta.Unroll(_UNROLL.value, trajectory_loss_weight=1.0), members=_MEMBERS.value,
        meta_batch_size=meta_batch_size, batch_size=_BATCH.value, query_size=min(128, of.available("train") // 2),
        clipnorm=1.0,
    )  # fmt: skip
    trainer.compile(keras.optimizers.Adam(3e-3))
    made: list[Timed] = []

    def deal(dataset_of: Callable[[int, int], tf.data.Dataset]) -> Timed:
        made.append(Timed(iterator_of(dataset_of)))
        return made[-1]

    iterator_of = trainer.runner.deal
    trainer.runner.deal = deal

    def steps(count: int) -> np.ndarray:
        """Seconds of each step, and those of them in `next`."""
        found = []
        for _ in range(count):
            start = time.perf_counter()
            trainer.meta_train_step()
            found.append((time.perf_counter() - start, made[0].seconds))
        return np.array(found)

    steps(WARM_UP)
    seconds, waited = steps(_STEPS.value).T
    made[0].again = True
    time.sleep(0.5)  # until the pipeline has filled its buffers
    alone, _ = steps(_STEPS.value // 2).T
    return {
        "milliseconds": 1e3 * float(np.median(seconds)),
        "fraction": float(waited.sum() / seconds.sum()),
        "highest_tenth": float(np.quantile(waited / seconds, 0.9)),
        "over_step_alone": float(np.median(seconds) / np.median(alone)),
    }


def fit() -> dict[str, float]:
    """What a step of `Sequential.fit` waits for images."""
    images = load_images(_DATA.value, _DATA_DIR.value)
    x, y = images.x_train.reshape(len(images.x_train), -1).astype(np.float32) / images.scale, images.y_train
    x, y = (np.resize(part, (_STEPS.value * 5 * _BATCH.value, *part.shape[1:])) for part in (x, y))
    hidden = [kb.layers.Dense(int(units)) for units in _HIDDEN.value]
    model = kb.Sequential(
        [keras.Input(x.shape[1:]), *hidden, kb.layers.Dense(images.classes)], genome=kb.Genome.random(kb.Rule(**RULE), 0)
    )
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    one = tf.data.Dataset.from_tensors((x[: _BATCH.value], y[: _BATCH.value])).cache().repeat(len(x) // _BATCH.value)

    def seconds(*data: Any) -> float:
        start = time.perf_counter()
        x, y = data if len(data) > 1 else (data[0], None)
        model.fit(x, y, batch_size=None if y is None else _BATCH.value, verbose=0)
        return (time.perf_counter() - start) / (len(x) // _BATCH.value)

    pairs = np.array([(seconds(x, y), seconds(one)) for _ in range(6)])[1:]
    fractions = 1.0 - pairs[:, 1] / pairs[:, 0]
    found, alone = np.median(pairs, axis=0)
    return {
        "milliseconds": 1e3 * float(found),
        "fraction": max(0.0, 1.0 - float(alone / found)),
        "highest_tenth": max(0.0, float(np.quantile(fractions, 0.9))),
        "over_step_alone": float(found / alone),
    }


def main(argv: list[str]) -> None:
    del argv
    image_tasks = tasks.images(_DATA.value, relabel=True, data_dir=_DATA_DIR.value)
    augmented = tasks.images(_DATA.value, relabel=True, permute=True, project=100, data_dir=_DATA_DIR.value)
    few_shot = tasks.episodes(_FEW_SHOT.value, 5, 5, data_dir=_DATA_DIR.value)
    functions = tasks.functions(["xor", "circle", "random_xor", "rotated_moons"], relabel=True)
    candidates: dict[str, Callable[[], dict[str, float]]] = {
        f"{image_tasks.name}": lambda: meta_training(image_tasks, 1),
        f"{image_tasks.name}, 8 tasks": lambda: meta_training(image_tasks, 8),
        f"{augmented.name}, permuted and projected": lambda: meta_training(augmented, 1),
        f"{few_shot.name}": lambda: meta_training(few_shot, 1),
        f"{few_shot.name}, 8 tasks": lambda: meta_training(few_shot, 8),
        "functions": lambda: meta_training(functions, 1),
        "functions, 8 tasks": lambda: meta_training(functions, 8),
        f"fit, {_DATA.value}": fit,
    }
    print(f"hidden {','.join(_HIDDEN.value)}, batch {_BATCH.value}, unroll {_UNROLL.value}, {_MEMBERS.value} members, "
          f"{_STEPS.value} steps, {os.cpu_count()} cores")  # fmt: skip
    print(f"{'':<46} {'ms/step':>8} {'waits':>7} {'highest tenth':>14} {'over a step alone':>18}")
    rows = []
    for name, measure in candidates.items():
        row = {"name": name, **measure()}
        rows.append(row)
        print(f"{name:<46} {row['milliseconds']:8.1f} {row['fraction']:7.2%} {row['highest_tenth']:14.2%} "
              f"{row['over_step_alone']:18.2f}", flush=True)  # fmt: skip
    print(f"wanted: waits at most {WANTED:.0%}")
    if _JSON.value:
        write_text(_JSON.value, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
