"""What XLA compiles: every training, evaluation and meta step, checked one program at a time.

    python benchmarks/compiled.py [--only TEXT] [--json FILE]

A TPU runs nothing that XLA did not compile, with every shape known beforehand. For each program,
compiled as a whole:

- it is lowered from shapes and dtypes alone, since a lowering from values can hide that a shape
  hangs on one of them;
- all shapes, inside too, are static, and every operation has a TPU kernel;
- three steps with different values, each from the same variables as the uncompiled step, give what
  that gives: results and variables, relative to the largest number of each array, or of the
  parameters that it is one of;
- these steps trace nothing anew.

Exit status 1 if a program fails, or if 50 unrolled steps compile in more than 1.5 times the time of
5. Left out are Keras layers before the first layer of synapses, which are Keras's own (its random
ones draw other numbers when compiled).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any
from unittest import mock

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags

import keras_blur as kb
from keras_blur import bilevel, learners, meta, tasks
from keras_blur.cli.meta_train import RULE
from keras_blur.compiling import operations, without_tpu_kernel
from keras_blur.core import feedback, network
from keras_blur.files import write_text
from keras_blur.meta import callbacks
from keras_blur.meta.strategy import Search
from keras_blur.report import evaluation as scoring

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1] / "tests"))

from rule_table import BATCH, COVER, SINGLE, SIZES, dense_chain, draw_batch, draw_genome, draw_synapses

_ONLY = flags.DEFINE_string("only", "", "Only programs whose name has this in it.")
_JSON = flags.DEFINE_string("json", None, "File for the rows.")

Array = Any
Row = dict[str, Any]

CALLS = 3
HIDDEN = (6,)  # of learners
STEP, META = 1e-5, 1e-4  # tolerances: of one learning step, and of what goes through several and their derivatives
FLAT = 1.5  # 50 steps may take so much longer to compile than 5


@dataclasses.dataclass(frozen=True)
class Program:
    """A program of the library and what it is tried on.

    Attributes:
        function: of nests of tensors.
        calls: arguments of successive steps.
        tolerance: of compiled results against uncompiled ones.
    """

    function: Callable[..., Any]
    calls: Sequence[tuple[Any, ...]]
    tolerance: float = STEP


def check(program: Program) -> Row:
    """Compiles a program and says what is wrong with it, in `failures`."""
    leaves = tf.nest.flatten(program.calls[0])
    failures = [f"an argument is no tensor, but {leaf!r}" for leaf in leaves if not tf.is_tensor(leaf)]
    row: Row = {"failures": failures, "tolerance": program.tolerance}
    if failures:
        return row
    plain, whole, specs = _functions(program)
    begin = time.perf_counter()
    try:
        traced = whole.get_concrete_function(*specs)
        row["operations"] = len(operations(traced))
        unknown = without_tpu_kernel(traced)
        if unknown:
            failures.append(f"no TPU kernel for {', '.join(sorted(unknown))}")
        moving = [str(leaf.shape) for leaf in traced.outputs if not leaf.shape.is_fully_defined()]
        lowered = whole.experimental_get_compiler_ir(*specs)(stage="hlo")
        moving += sorted(set(re.findall(r"\w+\[[^\]]*<=[^\]]*\]", lowered)))  # bounded, but not static
        if moving:
            failures.append(f"shapes are not static: {', '.join(moving)}")
        compare_from = functools.partial(_difference, plain, whole, traced.variables)
        row["difference"] = compare_from(program.calls[0])
        row["seconds"] = time.perf_counter() - begin
        row["difference"] = max(row["difference"], *map(compare_from, program.calls[1:]))
    except Exception as error:  # whatever it is that keeps a program from being compiled
        failures.append(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
        return row
    if not row["difference"] <= program.tolerance:
        failures.append(f"compiled differs by {row['difference']:.1e}, more than {program.tolerance:.0e}")
    row["traces"] = max(function.experimental_get_tracing_count() for function in (plain, whole))
    if row["traces"] > 1:
        failures.append(f"{row['traces']} traces")
    return row


def _functions(program: Program) -> tuple[Any, Any, list[tf.TensorSpec]]:
    """A program as a graph, the same compiled, of its arguments one by one, and their shapes and
    dtypes."""
    plain = tf.function(program.function, autograph=False)

    @tf.function(autograph=False, jit_compile=True)
    def whole(*leaves: Array) -> Any:
        return plain(*tf.nest.pack_sequence_as(program.calls[0], leaves))

    return plain, whole, [tf.TensorSpec(leaf.shape, leaf.dtype) for leaf in tf.nest.flatten(program.calls[0])]


def _difference(
    plain: Callable[..., Any], whole: Callable[..., Any], variables: Sequence[tf.Variable], arguments: Any
) -> float:
    """How far a compiled step is from the uncompiled one; the variables are then as the latter
    leaves them."""

    def values() -> list[np.ndarray]:
        return [variable.numpy().copy() for variable in variables]  # copies: what `numpy` gives may change in place

    before = values()
    got = [*map(np.array, tf.nest.flatten(whole(*tf.nest.flatten(arguments)))), *values()]
    for variable, value in zip(variables, before, strict=True):
        variable.assign(value)
    results = [*map(np.array, tf.nest.flatten(plain(*arguments)))]
    wanted = [*results, *values()]
    scales = [*map(_largest, results)]
    # An optimizer's slots of one kind are parts of one gradient, outer parameters parts of one
    # learner: what is small in it is small beside the whole. Prototypes' last bias has a derivative
    # of zero: rounding is all that it moves by.
    parts = [re.search(r"(?<=/)outer(?=_)|(?<=_)(momentum|velocity)(?=(:0)?$)", variable.name) for variable in variables]
    kinds = [part[0] if part else variable.name for part, variable in zip(parts, variables, strict=True)]
    for kind in kinds:
        scales.append(max(_largest(v) for other, v in zip(kinds, wanted[len(results) :], strict=True) if other == kind))
    return max(map(_apart, got, wanted, scales))


def _largest(array: np.ndarray) -> float:
    """The largest number, without those that are not finite."""
    array = array.astype("float64")
    return float(np.max(np.abs(array), where=np.isfinite(array), initial=1e-30))


def _apart(got: np.ndarray, wanted: np.ndarray, scale: float) -> float:
    """The largest difference over a scale; infinite if they are not finite at the same places."""
    got, wanted = got.astype("float64"), wanted.astype("float64")
    finite = np.isfinite(wanted)
    if got.shape != wanted.shape or (np.isfinite(got) != finite).any():
        return float("inf")
    return float(np.max(np.abs(got - wanted), where=finite, initial=0.0)) / scale


# Learning steps: the pure one, with the genome as an argument, and those of the Keras model, where
# it is a constant.


def _constants(nest: Any) -> Any:
    return tf.nest.map_structure(tf.constant, nest)


def pure_step(options: dict[str, Any]) -> Program:
    """`network.step` of a rule."""
    rule = kb.Rule(**options)
    drawn = draw_genome(rule, dtype="float32")

    def step(arrays: Any, synapses: Any, time: Array, neurons: Any, x: Array, y: Array) -> Any:
        def respond(prediction: Array) -> Array:
            return y if rule.feedback == "labels" else feedback.error(learners.blur.loss_of(rule), y, prediction)

        state = network.NetworkState(synapses, time, neurons)
        return network.step(kb.Genome(rule, arrays), dense_chain(), state, x, respond)

    calls = []
    for number in range(CALLS):
        rng = np.random.default_rng(number)
        widths = SIZES if rule.keep_neurons else ()
        kept = tuple(tf.constant(rng.normal(0, 0.5, (rule.states, BATCH, width)), tf.float32) for width in widths)
        x, y = draw_batch(number, dtype="float32")
        calls.append(
            (_constants(dict(drawn.arrays)), _constants(draw_synapses(rule, number, dtype="float32")),
             tf.constant(number), kept, tf.constant(x), tf.constant(y))
        )  # fmt: skip
    return Program(step, calls)


LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def keras_step(
    kind: str, options: dict[str, Any], between: Sequence[keras.Layer] = (), *, weights: bool = False, loss: Any = LOSS,
    dtype: Any = None, frozen: bool = False,
) -> Program:  # fmt: skip
    """`train_step`, `test_step` or `predict_step` of a `Sequential`.

    Args:
        kind: which.
        options: of the rule.
        between: layers between the first and the second layer of synapses.
        weights: whether the examples have weights.
        loss: of `compile`.
        dtype: of the model.
        frozen: whether the first layer does not learn.
    """
    rule = kb.Rule(**options)
    keras.utils.set_random_seed(0)
    dense = [kb.layers.Dense(units, dtype=dtype) for units in SIZES[1:]]
    dense[0].trainable = not frozen
    if between:
        dense[0] = kb.layers.Dense(48)
    model = kb.Sequential(
        [keras.Input(SIZES[:1], batch_size=BATCH if rule.keep_neurons else None), dense[0], *between, *dense[1:]],
        genome=draw_genome(rule, dtype="float32"), dtype=dtype,
    )  # fmt: skip
    batches = []
    for number in range(CALLS):
        x, y = draw_batch(number, dtype="float32")
        classes = feedback.target_kind(loss) == "classes"
        labels = tf.constant(y.argmax(-1)) if classes else tf.constant(0.5 * (y + 1.0))
        weight = np.random.default_rng(number).uniform(0.0, 2.0, BATCH).astype("float32")
        batches.append((tf.constant(x), labels, *([tf.constant(weight)] if weights else [])))
    metrics: dict[str, Any] = {"weighted_metrics" if weights else "metrics": ["accuracy"]}
    model.compile(loss=loss, **metrics, run_eagerly=True)
    model.train_on_batch(*(leaf.numpy() for leaf in batches[0]))  # which makes the metrics' variables
    steps = {"train": model.train_step, "test": model.test_step, "predict": model.predict_step}
    calls = [(batch[0],) if kind == "predict" else (batch,) for batch in batches]
    return Program(steps[kind], calls, 1e-2 if dtype == "mixed_bfloat16" else STEP)


def _structural() -> list[keras.Layer]:
    kl = keras.layers
    return [
        kl.Reshape((4, 4, 3)), kl.MaxPooling2D(2, strides=1, padding="same"), kl.SpatialDropout2D(0.3, seed=1),
        kl.AveragePooling2D(2, strides=2), kl.Permute((2, 1, 3)), kl.Rescaling(0.5, 0.1), kl.Identity(), kl.Flatten(),
        kl.Dropout(0.3, seed=2),
    ]  # fmt: skip


def learned(options: dict[str, Any]) -> kb.Rule:
    """The rule for learners, which keep no neurons."""
    own = {"layers": len(HIDDEN) + 1} if options.get("layers") else {}
    return kb.Rule(**{**options, **own, "keep_neurons": False})


# Meta-steps: all that one replica does in a step, update and counters included.


def meta_step(
    estimator: meta.Estimator | meta.Evolution,
    options: dict[str, Any],
    of: tasks.Tasks | None = None,
    optimizer: keras.optimizers.Optimizer | None = None,
    learner: learners.MetaLearner | None = None,
    **more: Any,
) -> Program:
    """A step of `MetaTrainer`.

    Args:
        estimator: how the outer gradient is found.
        options: of the rule.
        of: the tasks.
        optimizer: of the outer parameters.
        learner: a learner other than `Blur`; `None` makes a `Blur`.
        **more: for `MetaTrainer`.
    """
    rule = learned(options)
    evolution = isinstance(estimator, meta.Evolution)
    members = 1 if evolution else more.pop("members", 2)
    trainer = meta.MetaTrainer(
        of or tasks.functions("blobs3"), learner or learners.Blur(HIDDEN, rule), estimator, members=members,
        **{"meta_batch_size": 2, "batch_size": 6, "query_size": 9, **more}, seed=1,
        start=None if learner else draw_genome(rule, population=() if evolution else (members,), dtype="float32"),
    )  # fmt: skip
    # Adam divides by the root of a square: where a derivative is all but zero, rounding alone would
    # decide its step.
    adam = keras.optimizers.Adam(1e-2, epsilon=1e-3)
    trainer.compile(None if evolution else optimizer or adam, jit_compile=False)  # not a part: below the whole is
    if isinstance(trainer.strategy, Search):  # not the first generation, whose eigenvalues are equal: any vectors are theirs
        root = np.random.default_rng(0).normal(0.0, 1.0, trainer.strategy.state["C"].shape)
        values, vectors = np.linalg.eigh(root @ root.T / len(root) + np.eye(len(root)))
        found = {"C": vectors * values @ vectors.T, "B": vectors, "D": np.sqrt(values)}
        for name, value in found.items():
            trainer.strategy.state[name].assign(value)
    windows = trainer.estimator.windows
    calls = []
    for number in range(CALLS):
        calls.append((trainer._episodes(0, number % windows), tf.constant(number % windows)))
    return Program(trainer._program(0).python_function, calls, META)


def bilevel_step(estimator: Any, meta_model: str = "SampleWeightNet") -> Program:
    """A step of `BilevelTrainer`, of a network with running statistics."""
    init = [keras.initializers.GlorotUniform(seed) for seed in range(2)]
    # No bias below the normalisation: its gradient is nothing but rounding.
    dense = [
        keras.layers.Dense(units, use_bias=units == 3, kernel_initializer=one)
        for units, one in zip((8, 3), init, strict=True)
    ]
    images = meta_model == "LearnedRotation"
    flat = [keras.layers.Flatten()] if images else []
    shape = (5, 5, 1) if images else (4,)
    middle = [keras.layers.BatchNormalization(), keras.layers.Activation("tanh")]
    model = keras.Sequential([keras.Input(shape), *flat, dense[0], *middle, dense[1]])
    options = {"weight_decay": 0.1, "label_smoothing": 0.1, "class_weights": 3} if meta_model == "Hyperparameters" else {}
    trainer = bilevel.BilevelTrainer(model, getattr(bilevel, meta_model)(**options), estimator)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    adam = keras.optimizers.Adam(1e-2, epsilon=1e-3)
    trainer.compile(keras.optimizers.SGD(0.1, momentum=0.9), adam, loss, jit_compile=False)
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((30, *shape)).astype("float32"), rng.integers(0, 3, 30)
    trainer.fit(x, y, meta_data=(x[::-1], y[::-1]), batch_size=6, steps_per_epoch=1, verbose=0)
    calls = [(trainer._next(0, number), trainer._next(1, number)) for number in range(CALLS)]
    # Sample weights begin equal, so that the first outer gradients are small sums of large terms; a
    # difference rounds more.
    tolerance = 1e-2 if isinstance(estimator, bilevel.FiniteDifference) else 1e-3
    return Program(trainer._program(True).python_function, calls, tolerance)


# Evaluation: what the library itself compiles, recorded while it runs.


@contextlib.contextmanager
def recording(module: ModuleType) -> Iterator[list[tuple[Callable[..., Any], list[Any]]]]:
    """The functions that a module compiles while this is open, and the arguments of each call."""
    found: list[tuple[Callable[..., Any], list[Any]]] = []

    def remember(function: Callable[..., Any], *, jit_compile: bool = True) -> Callable[..., Any]:
        del jit_compile
        traced = tf.function(function, autograph=False)
        calls: list[Any] = []
        found.append((function, calls))

        def call(*arguments: Any) -> Any:
            calls.append(arguments)
            return traced(*arguments)

        return call

    with mock.patch.object(module, "compiled", remember):
        yield found


def evaluation(place: str, options: dict[str, Any], members: int = 1) -> Program:
    """How `evaluate` lets a genome learn, or scores it.

    Args:
        place: `"learn"` or `"score"`.
        options: of the rule.
        members: genomes side by side.
    """
    rule = learned(options)
    genome = draw_genome(rule, population=(members,) if members > 1 else (), dtype="float32")
    of = tasks.functions("blobs3")
    how: dict[str, Any] = {"steps": 5, "seeds": 2, "batch_size": 6}
    runs = []
    for seed in range(CALLS):
        with recording(scoring) as found:
            scoring.evaluate(genome, of, HIDDEN, **how, seed=seed)
        runs.append(found[-2 if place == "learn" else -1])
    function = runs[0][0]
    return Program(function, [max(calls, key=_size) for _, calls in runs], tolerance=META)


def _size(arguments: Any) -> int:
    return sum(int(tf.size(leaf)) for leaf in tf.nest.flatten(arguments))


def validation(options: dict[str, Any], of: tasks.Tasks) -> Program:
    """The score of `MetaValidate`, after each of some epochs."""
    rule = learned(options)
    trainer = meta.MetaTrainer(of, learners.Blur(HIDDEN, rule), meta.Unroll(3), batch_size=6, query_size=9)
    trainer.compile(keras.optimizers.Adam(0.05), jit_compile=False)
    with recording(callbacks) as found:
        trainer.fit(CALLS, 1, callbacks=[meta.MetaValidate(of, episodes=2)], verbose=0)
    ((function, calls),) = found
    return Program(function, calls, tolerance=META)


def _rows() -> dict[str, Callable[[], Program]]:
    """All programs by name, each made when it is its turn."""
    rows: dict[str, Callable[[], Program]] = {}

    def add(name: str, make: Callable[..., Program], *arguments: Any, **options: Any) -> None:
        rows[name] = lambda: make(*arguments, **options)

    for name, options in SINGLE.items():
        add(f"network.step, {name}", pure_step, options)
    for name in feedback.differentiable():
        loss = getattr(keras.losses, name)
        loss = loss(from_logits=True) if "Crossentropy" in name else loss()
        if feedback.target_kind(loss) != "classes":  # integer labels have rows of Sequential
            add(f"network.step, error of {name}", pure_step, {"feedback": "error", "loss": loss})

    for kind in ("train", "test", "predict"):
        for name, options in COVER.items():
            add(f"{kind}_step, {name}", keras_step, kind, options)
        add(f"{kind}_step, structural layers", keras_step, kind, RULE, _structural())
        add(f"{kind}_step, mixed_bfloat16", keras_step, kind, RULE, dtype="mixed_bfloat16")
        add(f"{kind}_step, float64", keras_step, kind, RULE, dtype="float64")
    for name in ("three", "pair", "orthogonal"):
        for kind in ("train", "test"):
            add(f"{kind}_step, {name}, weights", keras_step, kind, COVER[name], weights=True)
    add("train_step, a frozen layer", keras_step, "train", {}, frozen=True)
    for loss in (
        keras.losses.CategoricalCrossentropy(from_logits=True),
        keras.losses.MeanSquaredError(),
        keras.losses.Hinge(),
    ):
        for way in ("labels", "error"):
            add(f"train_step, {way} of {loss.name}", keras_step, "train", {"feedback": way}, loss=loss)
    pooling = [keras.layers.Reshape((4, 4, 3)), keras.layers.GlobalMaxPooling2D()]
    add("train_step, global pooling", keras_step, "train", {}, pooling)

    estimators: dict[str, meta.Estimator | meta.Evolution] = {
        "unroll": meta.Unroll(3, trajectory_loss_weight=0.5),
        "truncated": meta.TruncatedUnroll(2, episode_steps=6, trajectory_loss_weight=0.5),
        "es": meta.ES(3, antithetic_pairs=3),
        "pes": meta.PES(2, episode_steps=6, antithetic_pairs=3),
        "cma": meta.Evolution(3, population=6),
    }
    for name, estimator in estimators.items():
        for rule in COVER if name == "unroll" else ("three", "orthogonal"):
            add(f"meta-step, {name}, {rule}", meta_step, estimator, COVER[rule])
        add(f"meta-step, {name}, values", meta_step, dataclasses.replace(estimator, kind="values"), RULE,
            tasks.functions("sine"))  # fmt: skip
    for name, recomputed in (
        ("unroll", meta.Unroll(5, recompute=True)),
        ("truncated", meta.TruncatedUnroll(4, episode_steps=12)),
    ):
        recomputed = dataclasses.replace(recomputed, recompute=True, trajectory_loss_weight=0.5)
        for rule in ("three", "orthogonal"):
            add(f"meta-step, {name}, {rule}, recompute", meta_step, recomputed, COVER[rule])
    for loss in ("binary", "squared"):
        add(f"meta-step, unroll, {loss} loss", meta_step, meta.Unroll(3, loss=loss), RULE)
    add("meta-step, unroll, one output", meta_step, meta.Unroll(3), RULE, tasks.images("digits", size=4, project=5))
    add("meta-step, unroll, SGD, no clipping", meta_step, estimators["unroll"], RULE, clipnorm=None,
        optimizer=keras.optimizers.SGD(0.01, momentum=0.9))  # fmt: skip
    add("meta-step, unroll, one member and task", meta_step, meta.Unroll(3), RULE, members=1, meta_batch_size=1)
    add("meta-step, cma, loss", meta_step, meta.Evolution(3, population=6, fitness="loss"), RULE)

    sgd = keras.optimizers.SGD(0.1, momentum=0.5)
    others: dict[str, tuple[learners.MetaLearner, int]] = {
        "maml": (learners.MAML(sgd, HIDDEN), 3),
        "first-order maml": (learners.MAML(sgd, HIDDEN, first_order=True), 3),
        "prototypes": (learners.Prototypes(HIDDEN, 4), 1),
        "neural process": (learners.NeuralProcess(HIDDEN, 4), 1),
        "warp": (learners.Warp(*learners.warped(2, HIDDEN, 3), sgd), 2),
    }
    add("meta-step, unroll, online rule", meta_step, meta.Unroll(2, kind="bits"), {}, tasks.remember(4), batch_size=1,
        learner=learners.OnlineRule(hidden=4, types=2))  # fmt: skip
    for name, (learner, steps) in others.items():
        add(f"meta-step, unroll, {name}", meta_step, meta.Unroll(steps), {}, learner=learner)
    learner = others["warp"][0]
    for begin in meta.STARTS:
        add(f"meta-step, warpgrad, start {begin}", meta_step, meta.WarpGrad(3, start=begin), {}, learner=learner)
    add("meta-step, warpgrad, first order", meta_step, meta.WarpGrad(3, order="first"), {}, learner=learner)
    add("meta-step, warpgrad, offline", meta_step, meta.OfflineWarpGrad(4, start="leap", thetas=2), {}, learner=learner)
    add("meta-step, warpgrad, three", meta_step, meta.WarpGrad(3), COVER["three"])
    for key in (tasks.LabelPermutation(), tasks.Compose([])):
        of = tasks.augment(tasks.functions("blobs3"), key)
        add(f"meta-step, unroll, {type(key).__name__}", meta_step, meta.Unroll(2), RULE, of)

    inner = {
        "one step": bilevel.OneStep(), "difference": bilevel.FiniteDifference(width=0.1),
        "evograd": bilevel.EvoGrad(3, sigma=0.1),
        "cut": bilevel.LayerwiseMetaGradient("last:1"),
        "sampler": bilevel.LayerwiseMetaGradient(None, bilevel.GradientSampler(target=1, hidden=4)),
    }  # fmt: skip
    for name, one in inner.items():
        add(f"bilevel step, {name}", bilevel_step, one)
    for model in ("LearnedRotation", "Hyperparameters"):
        add(f"bilevel step, {model}", bilevel_step, bilevel.OneStep(), model)

    for place in ("learn", "score"):
        for rule in COVER:
            add(f"evaluate, {place}, {rule}", evaluation, place, COVER[rule])
        add(f"evaluate, {place}, population", evaluation, place, RULE, members=3)
    for rule in ("three", "orthogonal", "layers"):
        add(f"MetaValidate, {rule}", validation, COVER[rule], tasks.functions("blobs3"))
    add("MetaValidate, values", validation, RULE, tasks.functions("sine"))
    return rows


ROWS = _rows()


def compile_seconds(steps: int) -> float:
    """Seconds to trace and compile a meta-step of so many unrolled steps."""
    _, whole, specs = _functions(meta_step(meta.Unroll(steps), RULE))
    begin = time.perf_counter()
    whole.experimental_get_compiler_ir(*specs)(stage="optimized_hlo")
    return time.perf_counter() - begin


def main(argv: list[str]) -> None:
    del argv
    print(f"{'program':<46} {'operations':>10} {'traces':>6} {'difference':>10} {'at most':>8} {'seconds':>8}")
    rows = []
    for name, make in ROWS.items():
        if _ONLY.value not in name:
            continue
        row = {"name": name, **check(make())}
        rows.append(row)
        difference, seconds = (row.get(column, float("nan")) for column in ("difference", "seconds"))
        print(f"{name:<46} {row.get('operations', '-'):>10} {row.get('traces', '-'):>6} {difference:>10.1e} "
              f"{row['tolerance']:>8.0e} {seconds:>8.2f}  {'; '.join(row['failures']) or 'ok'}", flush=True)  # fmt: skip
    failed = sum(bool(row["failures"]) for row in rows)
    print(f"{len(rows) - failed} programs ok, {failed} failed")
    ratio = float(np.median([compile_seconds(50) / compile_seconds(5) for _ in range(3)]))
    print(f"compile time of 50 unrolled steps over 5: {ratio:.2f} (wanted: at most {FLAT})")
    if _JSON.value:
        write_text(_JSON.value, json.dumps({"rows": rows, "compile_time_50_over_5": ratio}, indent=1) + "\n")
    sys.exit(failed > 0 or ratio > FLAT)


if __name__ == "__main__":
    app.run(main)
