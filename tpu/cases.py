"""The steps that `verify.py` checks, each as a strategy would run it, and steps that are wrong on
purpose.

A case is built in a strategy's scope and has the very function that training calls: for
meta-training that of `MetaTrainer`, for `fit` the one that Keras makes around
`Sequential.train_step`. Data are classes of Gaussian points, of any size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

import keras_blur as kb
from keras_blur import bilevel, learners, meta, random, tasks
from keras_blur.backend import Runner
from keras_blur.cli.meta_train import RULE
from keras_blur.meta import strategy

Array = Any


@dataclasses.dataclass(frozen=True)
class Size:
    """How large a case is.

    Attributes:
        sizes: units of each layer, the input first.
        batch: examples of a support batch, and of the query; of `fit`, the batch of all cores.
        steps: unrolled steps.
        tasks: episodes of a step, of all cores.
        members: genomes side by side.
        states: of a neuron.
        population: candidates of a CMA-ES generation; half as many antithetic pairs in ES and PES.
    """

    sizes: tuple[int, ...] = (12, 16, 4)
    batch: int = 8
    steps: int = 3
    tasks: int = 8
    members: int = 2
    states: int = 2
    population: int = 8

    @property
    def rule(self) -> kb.Rule:
        """That of `keras-blur meta-train`."""
        return kb.Rule(**{**RULE, "states": self.states})


@dataclasses.dataclass(frozen=True)
class Case:
    """A step and what it works on.

    Attributes:
        step: a `tf.function` that hands one computation to all replicas.
        arguments: of it.
        variables: that it reads and writes.
    """

    step: Any
    arguments: tuple[Any, ...]
    variables: list[keras.Variable]


class Gaussians(tasks.Tasks):
    """Classes of Gaussian points around means that each episode draws anew."""

    kind, name = "classes", "gaussians"

    def __init__(self, features: int, outputs: int):
        self.shape, self.outputs = (features,), outputs

    def available(self, split: str) -> int:
        return 2**24

    def examples(self, seed: Array, count: int, split: str) -> tuple[Array, Array]:
        means = random.normal(random.fold_in(seed, 0), (self.outputs, self.features))
        y = random.integers(random.fold_in(seed, 1, len(split)), (count,), self.outputs)
        x = tf.gather(means, y) + 0.5 * random.normal(random.fold_in(seed, 2, len(split)), (count, self.features))
        return x, 2.0 * tf.one_hot(y, self.outputs) - 1.0


def _variables(model: keras.Model) -> list[keras.Variable]:
    names = ("optimizer", "meta_optimizer", "own_optimizer")
    optimizers = [one for one in (getattr(model, name, None) for name in names) if one]
    return [*model.variables, *model.metrics_variables, *(variable for one in optimizers for variable in one.variables)]


def _meta(size: Size, estimator: Any, trainer: type[meta.MetaTrainer] = meta.MetaTrainer, learner: Any = None) -> Case:
    evolution = isinstance(estimator, meta.Evolution)
    made = trainer(
        Gaussians(size.sizes[0], size.sizes[-1]), learner or learners.Blur(size.sizes[1:-1], size.rule), estimator,
        members=1 if evolution else size.members, meta_batch_size=size.tasks, batch_size=size.batch, query_size=size.batch,
        seed=3,
    )  # fmt: skip
    # Adam divides by the root of a square: where a derivative is all but zero, rounding alone would
    # decide its step.
    made.compile(None if evolution else keras.optimizers.Adam(1e-2, epsilon=1e-3), jit_compile=False)
    arguments = (made._episodes(0, 0), tf.constant(0))
    return Case(made._program(0), arguments, _variables(made))


def fit(size: Size, model: type[kb.Sequential] = kb.Sequential) -> Case:
    """A batch of `Sequential.fit`, metrics included."""
    layers = [
        kb.layers.Dense(units, kernel_initializer=keras.initializers.GlorotUniform(number))
        for number, units in enumerate(size.sizes[1:])
    ]
    made = model([keras.Input(size.sizes[:1]), *layers], genome=kb.Genome.random(size.rule, 0, std=0.3))
    made.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    x, y = Gaussians(size.sizes[0], size.sizes[-1]).examples(random.seed_of(1), size.batch * size.tasks, "train")
    y = tf.argmax(y, -1)
    made._symbolic_build(data_batch=(x[:2], y[:2]))
    data = tf.data.Dataset.from_tensors((x, y)).unbatch().batch(int(x.shape[0]), drop_remainder=True)
    runner = Runner()
    batch = next(iter(tf.distribute.get_strategy().experimental_distribute_dataset(data)))

    def one_step_on_data(data: Any) -> Any:  # as Keras has it, and not a lambda: it gives the TPU's computation its name
        return runner.run(made.train_step, data)

    return Case(tf.function(one_step_on_data, autograph=False), (batch,), _variables(made))


def bilevel_case(size: Size, estimator: Any) -> Case:
    """A step of `BilevelTrainer`: weights of examples by an estimator, then the model's own;
    metrics included."""
    dense, seeded = keras.layers.Dense, keras.initializers.GlorotUniform
    layers = [dense(units, "relu", kernel_initializer=seeded(number)) for number, units in enumerate(size.sizes[1:-1])]
    model = keras.Sequential([keras.Input(size.sizes[:1]), *layers, dense(size.sizes[-1], kernel_initializer=seeded(9))])
    made = bilevel.BilevelTrainer(model, bilevel.SampleWeightNet(8), estimator, seed=3)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    made.compile(keras.optimizers.SGD(0.1), keras.optimizers.Adam(1e-2, epsilon=1e-3), loss, ["accuracy"], jit_compile=False)
    batch = size.batch * size.tasks
    drawn = [Gaussians(size.sizes[0], size.sizes[-1]).examples(random.seed_of(number), batch, "train") for number in (1, 2)]
    train, judge = ((x.numpy(), tf.argmax(y, -1).numpy()) for x, y in drawn)
    made._open(train, judge, batch, batch)
    made.rewind()
    return Case(made._program(True), (random.seed_of(5), made._next(0, 0), made._next(1, 0)), _variables(made))


def _estimator(kind: Any, size: Size) -> Any:
    # A difference of two losses over a small sigma would be rounding magnified.
    noise: dict[str, Any] = {"antithetic_pairs": size.population // 2, "sigma": 0.2}
    if kind is meta.PES:
        return meta.PES(size.steps, episode_steps=2 * size.steps, **noise)
    if kind is meta.TruncatedUnroll:
        return meta.TruncatedUnroll(size.steps, episode_steps=2 * size.steps)
    if kind is meta.ES:
        return meta.ES(size.steps, **noise)
    return meta.Evolution(size.steps, population=size.population) if kind is meta.Evolution else kind(size.steps)


def _warped(size: Size) -> learners.Warp:
    model, warps = learners.warped(size.sizes[0], size.sizes[1:-1], size.sizes[-1], seed=1)
    return learners.Warp(model, warps, keras.optimizers.SGD(0.1))


CASES: dict[str, Callable[[Size], Case]] = {
    "fit": fit,
    "unroll": lambda size: _meta(size, _estimator(meta.Unroll, size)),
    "truncated": lambda size: _meta(size, _estimator(meta.TruncatedUnroll, size)),
    "es": lambda size: _meta(size, _estimator(meta.ES, size)),
    "pes": lambda size: _meta(size, _estimator(meta.PES, size)),
    "cma": lambda size: _meta(size, _estimator(meta.Evolution, size)),
    "bilevel": lambda size: bilevel_case(size, bilevel.OneStep(rate=0.1)),
    "famus": lambda size: bilevel_case(
        size, bilevel.LayerwiseMetaGradient(None, bilevel.GradientSampler(1, hidden=8), rate=0.1)
    ),
    "warpgrad": lambda size: _meta(size, meta.WarpGrad(size.steps, start="leap"), learner=_warped(size)),
}


# Wrong on purpose: verify.py must refuse each.


class UndividedDescent(strategy.Descent):
    """Each replica gives the whole gradient to the optimizer, which adds up over replicas."""

    def apply(self, gradients: Any, sound: Array) -> None:
        super().apply({name: self.runner.replicas * gradient for name, gradient in gradients.items()}, sound)


class UnreducedDescent(strategy.Descent):
    """Each replica goes by what it measured alone."""

    def step(self, *arguments: Any) -> Any:
        whole, strategy.mean = strategy.mean, lambda values: values
        try:
            return super().step(*arguments)
        finally:
            strategy.mean = whole


class Undivided(meta.MetaTrainer):
    """By `UndividedDescent`."""

    descent = UndividedDescent


class Unreduced(meta.MetaTrainer):
    """By `UnreducedDescent`."""

    descent = UnreducedDescent


class Printing(kb.Sequential):
    """Says something from inside the step."""

    def train_step(self, data: Any) -> dict[str, Array]:
        tf.print("step", self.learning_step.value)
        return super().train_step(data)


class Python(kb.Sequential):
    """Calls Python from inside the step."""

    def train_step(self, data: Any) -> dict[str, Array]:
        x, y = data
        return super().train_step((tf.ensure_shape(tf.py_function(lambda x: 2 * x, [x], x.dtype), x.shape), y))


LARGE = Size(sizes=(8, 65536, 4), batch=65536, tasks=8)

CONTROLS: dict[str, Callable[[Size], Case]] = {
    "undivided": lambda size: _meta(size, _estimator(meta.Unroll, size), Undivided),
    "unreduced": lambda size: _meta(size, _estimator(meta.Unroll, size), Unreduced),
    "printing": lambda size: fit(size, Printing),
    "python": lambda size: fit(size, Python),
    "large": lambda size: fit(LARGE),
}
