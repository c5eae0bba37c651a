"""Every loss of Keras, taken apart by this library, against a gradient tape on the loss of a
compiled Keras model.

    python benchmarks/losses.py [--execution eager,graph,xla] [--every 1,29,97]

A cell is a loss with its options, a reduction, a rank of labels and outputs, weights of examples, a
mask, and a way of execution. Two parts of the library are asked in each: the derivative that a rule
with `feedback="error"` learns from, and the losses of single examples in `BilevelTrainer`, which
takes no weights. A cell is equal, refused by name, or wrong; cells that Keras itself refuses are
left out. Numbers are float64 where a loss can be given that dtype. `--every` takes each so-many-th
cell: tracing and compiling all of them takes hours.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags

from keras_blur.core import feedback
from keras_blur.core.losses import as_keras, per_example

_EXECUTION = flags.DEFINE_list("execution", ["eager", "graph", "xla"], "Ways of execution.")
_EVERY = flags.DEFINE_list("every", ["1", "29", "97"], "Each so-many-th cell is run, for each way of execution.")

Array = Any
EXAMPLES, STEPS, CLASSES = 6, 5, 4
EXECUTIONS = {"eager": {}, "graph": {"jit_compile": False}, "xla": {"jit_compile": True}}
REDUCTIONS = ("sum_over_batch_size", "mean", "sum", "mean_with_sample_weight", None)
RANKS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {  # shapes of labels and outputs
    "(n,) to (n, 1)": ((EXAMPLES,), (EXAMPLES, 1)),
    "(n, 1) to (n, 1)": ((EXAMPLES, 1), (EXAMPLES, 1)),
    "(n,) to (n, c)": ((EXAMPLES,), (EXAMPLES, CLASSES)),
    "(n, 1) to (n, c)": ((EXAMPLES, 1), (EXAMPLES, CLASSES)),
    "(n, c) to (n, c)": ((EXAMPLES, CLASSES), (EXAMPLES, CLASSES)),
    "(n, t) to (n, t, 1)": ((EXAMPLES, STEPS), (EXAMPLES, STEPS, 1)),
    "(n, t) to (n, t, c)": ((EXAMPLES, STEPS), (EXAMPLES, STEPS, CLASSES)),
    "(n, t, 1) to (n, t, c)": ((EXAMPLES, STEPS, 1), (EXAMPLES, STEPS, CLASSES)),
    "(n, t, c) to (n, t, c)": ((EXAMPLES, STEPS, CLASSES), (EXAMPLES, STEPS, CLASSES)),
}
WEIGHTS: dict[str, tuple[int, ...] | None] = {"no": None, "(n,)": (EXAMPLES,), "(n, 1)": (EXAMPLES, 1)}

# The labels and outputs of each loss.
KINDS = {
    "BinaryCrossentropy": ("indicators", "probabilities"), "BinaryFocalCrossentropy": ("indicators", "probabilities"),
    "CTC": ("classes", "outputs"), "CategoricalCrossentropy": ("distributions", "probabilities"),
    "CategoricalFocalCrossentropy": ("distributions", "probabilities"),
    "CategoricalGeneralizedCrossEntropy": ("classes", "probabilities"), "CategoricalHinge": ("indicators", "outputs"),
    "Circle": ("classes", "outputs"), "CosineSimilarity": ("values", "outputs"), "Dice": ("indicators", "probabilities"),
    "Hinge": ("indicators", "outputs"), "Huber": ("values", "outputs"), "KLDivergence": ("distributions", "probabilities"),
    "LogCosh": ("values", "outputs"), "MeanAbsoluteError": ("values", "outputs"),
    "MeanAbsolutePercentageError": ("values", "outputs"), "MeanSquaredError": ("values", "outputs"),
    "MeanSquaredLogarithmicError": ("values", "outputs"), "Poisson": ("counts", "probabilities"),
    "SparseCategoricalCrossentropy": ("classes", "probabilities"), "SquaredHinge": ("indicators", "outputs"),
    "Tversky": ("indicators", "probabilities"),
}  # fmt: skip
OPTIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "BinaryCrossentropy": (
        {}, {"label_smoothing": 0.2}, {"from_logits": True}, {"from_logits": True, "label_smoothing": 0.2}, {"axis": 1},
        {"axis": 0},
    ),
    "BinaryFocalCrossentropy": (
        {}, {"label_smoothing": 0.2}, {"from_logits": True, "gamma": 1.5}, {"apply_class_balancing": True, "alpha": 0.3},
        {"from_logits": True, "apply_class_balancing": True, "label_smoothing": 0.1},
    ),
    "CategoricalCrossentropy": ({}, {"from_logits": True}, {"from_logits": True, "label_smoothing": 0.2},
                                {"from_logits": True, "axis": 1}, {"from_logits": True, "axis": 0}),
    "CategoricalFocalCrossentropy": ({}, {"from_logits": True}, {"from_logits": True, "label_smoothing": 0.2, "gamma": 1.0},
                                     {"from_logits": True, "alpha": [0.125, 0.25, 0.5, 0.75]}),
    "CategoricalGeneralizedCrossEntropy": ({}, {"q": 0.7}),
    "CosineSimilarity": ({}, {"axis": 1}, {"axis": 0}),
    "Dice": ({}, {"axis": -1}, {"axis": (0, 1)}, {"axis": 0}),
    "Huber": ({}, {"delta": 0.3}),
    "SparseCategoricalCrossentropy": (
        {}, {"from_logits": True}, {"from_logits": True, "ignore_class": 0}, {"from_logits": True, "ignore_class": -1},
        {"from_logits": True, "axis": 1},
    ),
    "Tversky": ({}, {"axis": -1, "alpha": 0.3, "beta": 0.9}, {"alpha": 0.3, "beta": 0.9}),
}  # fmt: skip


@keras.saving.register_keras_serializable(package="benchmark")
class OwnLoss(keras.losses.Loss):
    """A loss of a user."""

    def call(self, y: Array, prediction: Array) -> Array:
        return keras.ops.mean(keras.ops.abs(y - prediction) ** 3, axis=-1)


class Inherited(keras.losses.MeanSquaredError):
    """A loss of a user that looks like one of Keras's."""

    def call(self, y: Array, prediction: Array) -> Array:
        return 3.0 * super().call(y, prediction)


def cubic(y: Array, prediction: Array) -> Array:
    return keras.ops.mean(keras.ops.abs(y - prediction) ** 3, axis=-1)


def of_batch(y: Array, prediction: Array) -> Array:
    return keras.ops.mean(keras.ops.abs(y - prediction) ** 3)


@dataclasses.dataclass(frozen=True)
class Row:
    """A loss: its name, how it is made from a reduction, and its kinds of labels and outputs."""

    name: str
    make: Callable[..., Any]
    labels: str
    outputs: str
    reductions: tuple[str | None, ...] = REDUCTIONS


def rows() -> list[Row]:
    """All losses: each class of `keras.losses`, and functions, names and losses of a user."""
    found = []
    for name, kind in vars(keras.losses).items():
        if isinstance(kind, type) and issubclass(kind, keras.losses.Loss) and kind is not keras.losses.Loss:
            for options in OPTIONS.get(name, ({},)):
                text = ", ".join(f"{key}={value!r}" for key, value in options.items())
                labels, outputs = KINDS[name]
                outputs = "outputs" if options.get("from_logits") else outputs
                make = functools.partial(kind, **options, dtype="float64")
                found.append(Row(f"{name}({text})", make, labels, outputs))
    found += [
        Row(f"{kind.__name__}, signs", functools.partial(kind, dtype="float64"), "signs", "outputs")
        for kind in (keras.losses.Hinge, keras.losses.SquaredHinge, keras.losses.CategoricalHinge)
    ]
    found += [
        Row("OwnLoss()", functools.partial(OwnLoss, dtype="float64"), "values", "outputs"),
        Row("Inherited()", functools.partial(Inherited, dtype="float64"), "values", "outputs"),
        Row("MeanSquaredError(dtype='float32')", keras.losses.MeanSquaredError, "values", "outputs"),
        Row("MeanSquaredError(dtype='bfloat16')", functools.partial(keras.losses.MeanSquaredError, dtype="bfloat16"),
            "values", "outputs"),
    ]  # fmt: skip
    spelled: dict[str, tuple[Any, str, str]] = {
        "'mse'": ("mse", "values", "outputs"),
        "'MeanAbsoluteError'": ("MeanAbsoluteError", "values", "outputs"),
        "'binary_crossentropy'": ("binary_crossentropy", "indicators", "probabilities"),
        "'sparse_categorical_crossentropy'": ("sparse_categorical_crossentropy", "classes", "probabilities"),
        "keras.losses.huber": (keras.losses.huber, "values", "outputs"),
        "partial of huber": (functools.partial(keras.losses.huber, delta=0.3), "values", "outputs"),
        "partial of sparse cross-entropy": (
            functools.partial(keras.losses.sparse_categorical_crossentropy, from_logits=True), "classes", "outputs",
        ),
        "a function": (cubic, "values", "outputs"),
        "a lambda": (lambda y, p: keras.ops.square(y - p), "values", "outputs"),
        "a function of the batch": (of_batch, "values", "outputs"),
        "a config": (keras.losses.serialize(keras.losses.Huber(0.5)), "values", "outputs"),
    }  # fmt: skip
    found += [
        Row(name, lambda reduction, loss=loss: loss, labels, outputs, ("sum_over_batch_size",))
        for name, (loss, labels, outputs) in spelled.items()
    ]
    return found


def draw(row: Row, rank: str) -> tuple[np.ndarray, np.ndarray]:
    """Labels and outputs."""
    rng = np.random.default_rng(0)
    shape, outputs = RANKS[rank]
    classes = outputs[-1]
    made = {
        "values": lambda: rng.normal(0, 1.5, shape),
        "counts": lambda: rng.uniform(0, 3, shape),
        "indicators": lambda: rng.integers(0, 2, shape),
        "signs": lambda: 2 * rng.integers(0, 2, shape) - 1,
        "classes": lambda: rng.integers(0, classes, shape),
        # The tape takes it that labels add up to 1, as those of one column do if all are 1.
        "distributions": lambda: rng.dirichlet(np.ones(classes), shape[:-1]) if shape[-1] == classes else np.ones(shape),
    }  # fmt: skip
    y = np.asarray(made[row.labels]())
    if "ignore_class=-1" in row.name:
        y = np.where(rng.random(shape) < 0.3, -1, y)
    p = rng.normal(0, 1.5, outputs)
    return y, 1 / (1 + np.exp(-p)) if row.outputs == "probabilities" else p


@functools.cache
def _compiled(row: Row, reduction: str | None) -> keras.Model:
    model = keras.Sequential([keras.Input((1,)), keras.layers.Identity()])
    model.compile(loss=row.make(reduction=reduction))
    return model


@dataclasses.dataclass(frozen=True)
class Cell:
    """What is asked, and how."""

    part: str
    row: Row
    reduction: str | None
    rank: str
    weights: str
    masked: bool

    def __str__(self) -> str:
        mask = "mask" if self.masked else "no mask"
        return f"{self.part}, {self.row.name}, {self.reduction}, {self.rank}, weights {self.weights}, {mask}"

    def tensors(self) -> tuple[Array, Array, Array]:
        """Labels, outputs and weights."""
        y, p = draw(self.row, self.rank)
        shape = WEIGHTS[self.weights]
        weight = None if shape is None else tf.constant(np.random.default_rng(1).uniform(0, 2, shape), tf.float64)
        return tf.constant(y), tf.constant(p), weight

    def mask(self, prediction: Array) -> None:
        """Puts a mask on a prediction, as Keras's layers do."""
        if self.masked:
            kept = np.random.default_rng(2).random(prediction.shape[:-1]) < 0.6
            prediction._keras_mask = tf.constant(kept)

    def by_keras(self, y: Array, p: Array, weight: Array) -> tuple[Array, Array]:
        """Keras's loss, and its derivative by a tape; the sum where it has no reduction, which
        `fit` descends."""
        model = _compiled(self.row, self.reduction)
        with tf.GradientTape() as tape:
            tape.watch(p)
            prediction = tf.identity(p)
            self.mask(prediction)
            loss = model.compute_loss(y=y, y_pred=prediction, sample_weight=weight)
        return tf.reduce_sum(loss), tape.gradient(loss, p)

    def by_library(self, y: Array, p: Array, weight: Array) -> tuple[Array | None, Array]:
        """The library's loss, where it has one, and the derivative."""
        loss = self.row.make(reduction=self.reduction)
        if self.part == "feedback":
            prediction = tf.identity(p)
            self.mask(prediction)
            return None, feedback.error(feedback.resolve_loss(loss), y, prediction, weight)
        with tf.GradientTape() as tape:
            tape.watch(p)
            prediction = tf.identity(p)
            self.mask(prediction)
            value = tf.reduce_mean(per_example(as_keras(loss), y, prediction))
        return value, tape.gradient(value, p)

    @property
    def tolerance(self) -> float:
        """Of the largest number: rounding of the loss's dtype, and of float32 where losses of
        examples are averaged."""
        own = {"float64": 1e-9, "bfloat16": 2e-2}.get(as_keras(self.row.make(reduction=self.reduction)).dtype, 2e-6)
        return max(own, 3e-7) if self.part == "examples" else own


def cells() -> Iterator[Cell]:
    """All cells."""
    for row, (rank, (_, outputs)) in itertools.product(rows(), RANKS.items()):
        for reduction, masked in itertools.product(row.reductions, (False, True)):
            yield Cell("examples", row, reduction, rank, "no", masked)
            if len(outputs) == 2:
                for weights in WEIGHTS:
                    yield Cell("feedback", row, reduction, rank, weights, masked)


def judge(cell: Cell, execution: str) -> str:
    """`"equal"`, `"refused"`, `"refused by Keras"`, or what is wrong."""

    def run(function: Callable[..., Any]) -> Any:
        tensors = cell.tensors()
        if execution == "eager":
            return function(*tensors)
        return tf.function(function, autograph=False, **EXECUTIONS[execution])(*tensors)

    with warnings.catch_warnings():
        for category in (SyntaxWarning, UserWarning):  # Keras's, of a softmax over one class
            warnings.simplefilter("ignore", category)
        try:
            wanted = run(cell.by_keras)
        except (ValueError, TypeError, AttributeError, tf.errors.OpError):
            return "refused by Keras"
        try:
            found = run(cell.by_library)
        except ValueError as error:
            return "refused" if "Received" in str(error) else f"unclear error: {error}"
    for got, expected in zip(found, wanted, strict=True):
        if got is None:
            continue
        got, expected = np.asarray(got), np.asarray(expected)
        if got.shape != expected.shape or got.dtype != expected.dtype:
            return f"{got.dtype} {got.shape} where Keras has {expected.dtype} {expected.shape}"
        scale = max(1e-3, float(np.nanmax(np.abs(expected), initial=0.0)))
        # Keras's loss is float32 in the end, whatever the dtype of its terms.
        tolerance = max(cell.tolerance, 2e-6) * 10 if got.ndim == 0 else cell.tolerance
        if not np.allclose(got / scale, expected / scale, rtol=0, atol=tolerance, equal_nan=True):
            return f"off by {np.nanmax(np.abs(got - expected)) / scale:.1e}"
    return "equal"


def main(argv: list[str]) -> None:
    del argv
    counts: dict[str, collections.Counter[str]] = {}
    wrong = 0
    for execution, every in zip(_EXECUTION.value, _EVERY.value, strict=False):
        for cell in itertools.islice(cells(), 0, None, int(every)):
            found = judge(cell, execution)
            kind = found if found in ("equal", "refused", "refused by Keras") else "wrong"
            if kind == "wrong":
                wrong += 1
                print(f"wrong: {execution}, {cell}: {found}", flush=True)
            for key in (f"{cell.part}, {execution}", f"loss {cell.row.name}", f"reduction {cell.reduction}",
                        f"rank {cell.rank}", "all"):  # fmt: skip
                counts.setdefault(key, collections.Counter())[kind] += 1
    print(f"{'':<75} {'cells':>7} {'equal':>7} {'refused':>8} {'wrong':>6}")
    for name, count in counts.items():
        total = count["equal"] + count["refused"] + count["wrong"]
        print(f"{name:<75} {total:>7} {count['equal']:>7} {count['refused']:>8} {count['wrong']:>6}")
    print(f"left out, since Keras refuses them: {counts['all']['refused by Keras']}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    app.run(main)
