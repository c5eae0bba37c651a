"""A genome beside tuned optimizers on what is not an image: tables, functions and text.

    python benchmarks/other_data.py [--genome fast] [--steps 200] [--seeds 5]
        [--sets wine,breast_cancer,covtype,functions,text] [--optimizers SGD,Adam,...]
        [--json FILE] [--baselines FILE]

- Tables come with scikit-learn (the extra `data`): wine (13 columns, 3 classes), breast_cancer
  (30 columns, 2 classes), and covtype (54 columns, 7 classes), if scikit-learn has downloaded it
  before. A third of the rows is for the test. Columns are standardised. Hidden layers of 64 and
  64, batches of 32.
- Functions of the plane, drawn anew for each seed: XOR, two moons, concentric circles, five blobs.
  Hidden layers of 20 and 20, batches of 32.
- Text: the next character of Python's own help (`pydoc_data.topics`) after 16 characters, by a
  small Transformer with layer normalisation, batches of 64. Tests are windows outside the batches.

Optimizers are those of `keras-blur compare`: a full grid of rates, constant and decayed, in the
same network and with batch normalisation. The command prints one table for each set.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from absl import app, flags
from keras import layers as kl

import keras_blur as kb
from keras_blur import files, tasks
from keras_blur.report.baselines import GRIDS, OPTIMIZERS
from keras_blur.report.comparison import compare
from keras_blur.report.curves import format_compare
from keras_blur.report.progress import Progress
from keras_blur.tasks.base import Tasks
from keras_blur.tasks.datasets import Images

_GENOME = flags.DEFINE_string("genome", "fast", "The genome, by name or file.")
_SETS = flags.DEFINE_list("sets", ["wine", "breast_cancer", "functions", "text"], "What is learned.")
_STEPS = flags.DEFINE_integer("steps", 200, "Learning steps.", lower_bound=1)
_SEEDS = flags.DEFINE_integer("seeds", 5, "Initial networks and orders, or episodes.", lower_bound=2)
_OPTIMIZERS = flags.DEFINE_list("optimizers", list(OPTIMIZERS), "The optimizers.")
_JSON = flags.DEFINE_string("json", None, "File for the results.")
_BASELINES = flags.DEFINE_string("baselines", None, "File of an earlier --json; its runs of optimizers are not run again.")

FUNCTIONS = ("xor", "two_moons", "concentric_circles", "blobs5")
TABLES = ("wine", "breast_cancer", "covtype")
WINDOW, CHARACTERS = 16, 64  # characters that are read; the most frequent ones, and one for all others


def table(name: str) -> Images:
    """A table of scikit-learn with standardised columns, two thirds of it for training."""
    from sklearn import datasets

    found = datasets.fetch_covtype(download_if_missing=False) if name == "covtype" else getattr(datasets, f"load_{name}")()
    y = np.unique(found.target, return_inverse=True)[1]
    order = np.random.default_rng(0).permutation(len(y))
    train, test = order[len(y) // 3 :], order[: len(y) // 3]
    x = np.asarray(found.data, np.float32)
    x = (x - x[train].mean(0)) / (x[train].std(0) + 1e-6)
    return Images(name, x[train], y[train], x[test], y[test], int(y.max()) + 1, scale=1.0)


def text() -> Tasks:
    """Windows of Python's help and the character after each."""
    from pydoc_data.topics import topics

    letters = np.array(list("".join(topics.values())))
    known, counts = np.unique(letters, return_counts=True)
    frequent = known[np.argsort(-counts, kind="stable")[: CHARACTERS - 1]]
    code = {letter: number for number, letter in enumerate(frequent)}
    codes = np.array([code.get(letter, CHARACTERS - 1) for letter in letters], np.int32)
    windows = np.lib.stride_tricks.sliding_window_view(codes, WINDOW + 1)[::5]
    return tasks.arrays(
        windows[:, :-1], windows[:, -1], classes=CHARACTERS, shares=(0.05, 0.05, 0.9), standardize=False, name="text"
    )


def transformer() -> keras.Model:
    """One block of causal attention, with layer normalisation before each part. Its last place
    predicts the next character."""
    width = 32
    codes = keras.Input((WINDOW,), dtype="int32")
    places = keras.ops.cumsum(keras.ops.ones_like(codes), axis=1) - 1
    h = kl.Add()([kl.Embedding(CHARACTERS, width)(codes), kl.Embedding(WINDOW, width)(places)])
    n = kl.LayerNormalization()(h)
    h = kl.Add()([h, kl.MultiHeadAttention(4, width // 4)(n, n, use_causal_mask=True)])
    n = kl.LayerNormalization()(h)
    h = kl.Add()([h, kl.Dense(width)(kl.Dense(4 * width, activation="gelu")(n))])
    return keras.Model(codes, kl.Dense(CHARACTERS)(kl.LayerNormalization()(h)[:, -1]), name="transformer")


KNOWN = (*TABLES, "functions", "text")
flags.register_validator("sets", lambda names: set(names) <= set(KNOWN), f"must be some of {', '.join(KNOWN)}")


def cases() -> Iterator[tuple[Images | Tasks, Any, int]]:
    """Data, network and batch size of each comparison."""
    for name in _SETS.value:
        if name == "functions":
            for function in FUNCTIONS:
                yield tasks.functions(function), (20, 20), 32
        elif name == "text":
            yield text(), transformer(), 64
        else:
            yield table(name), (64, 64), 32


def tell(progress: Progress) -> None:
    """One line for each learner."""
    if not progress.done:
        print(f"{progress.data}: {progress.arm} ({progress.number} of {progress.arms})", flush=True)


def main(argv: list[str]) -> None:
    del argv
    genome = kb.genomes.load(_GENOME.value)
    known = {} if _BASELINES.value is None else json.loads(files.read_text(_BASELINES.value))
    if _JSON.value is not None:
        files.check_output("--json", _JSON.value)
    results: dict[str, Any] = {}
    for data, network, batch_size in cases():
        found = compare(
            genome, data, network, steps=_STEPS.value, seeds=_SEEDS.value, batch_size=batch_size,
            grids={name: GRIDS[name] for name in _OPTIMIZERS.value}, baselines=known.get(data.name), watch=tell,
        )  # fmt: skip
        results[data.name] = {"name": _GENOME.value, **found}
        print(format_compare(results[data.name]), flush=True)
        if _JSON.value is not None:
            files.write_text(_JSON.value, json.dumps(results))


if __name__ == "__main__":
    app.run(main)
