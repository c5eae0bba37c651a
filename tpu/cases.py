"""The steps that `verify.py` checks, each as a strategy would run it, and steps that are wrong on
purpose.

A case is built in a strategy's scope and has the very function that training calls: for
meta-training that of `MetaTrainer`, for `fit` the one that Keras makes around
`Sequential.train_step`. Data are classes of Gaussian points, of any size.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf
from sizes import ESTIMATORS, Gaussians, Size, estimator, meta_trainer

import keras_blur as kb
from keras_blur import bilevel, learners, meta, random
from keras_blur.backend import Runner
from keras_blur.meta import strategy

Array = Any


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


def _variables(model: keras.Model) -> list[keras.Variable]:
    names = ("optimizer", "meta_optimizer", "own_optimizer")
    optimizers = [one for one in (getattr(model, name, None) for name in names) if one]
    return [*model.variables, *model.metrics_variables, *(variable for one in optimizers for variable in one.variables)]


def _meta(size: Size, by: Any, trainer: type[meta.MetaTrainer] = meta.MetaTrainer, learner: Any = None) -> Case:
    made = meta_trainer(size, by, trainer, learner)
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


def bilevel_case(size: Size, by: Any) -> Case:
    """A step of `BilevelTrainer`: weights of examples by an estimator, then the model's own;
    metrics included."""
    dense, seeded = keras.layers.Dense, keras.initializers.GlorotUniform
    layers = [dense(units, "relu", kernel_initializer=seeded(number)) for number, units in enumerate(size.sizes[1:-1])]
    model = keras.Sequential([keras.Input(size.sizes[:1]), *layers, dense(size.sizes[-1], kernel_initializer=seeded(9))])
    made = bilevel.BilevelTrainer(model, bilevel.SampleWeightNet(8), by, seed=3)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    made.compile(keras.optimizers.SGD(0.1), keras.optimizers.Adam(1e-2, epsilon=1e-3), loss, ["accuracy"], jit_compile=False)
    batch = size.batch * size.tasks
    drawn = [Gaussians(size.sizes[0], size.sizes[-1]).examples(random.seed_of(number), batch, "train") for number in (1, 2)]
    train, judge = ((x.numpy(), tf.argmax(y, -1).numpy()) for x, y in drawn)
    made._open(train, judge, batch, batch)
    made.rewind()
    return Case(made._program(True), (made._next(0, 0), made._next(1, 0)), _variables(made))


def _warped(size: Size) -> learners.Warp:
    model, warps = learners.warped(size.sizes[0], size.sizes[1:-1], size.sizes[-1], seed=1)
    return learners.Warp(model, warps, keras.optimizers.SGD(0.1))


def _by(kind: Any, size: Size) -> Case:
    return _meta(size, estimator(kind, size))


CASES: dict[str, Callable[[Size], Case]] = {
    "fit": fit,
    **{name: functools.partial(_by, kind) for name, kind in ESTIMATORS.items()},
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
    "undivided": lambda size: _meta(size, estimator(meta.Unroll, size), Undivided),
    "unreduced": lambda size: _meta(size, estimator(meta.Unroll, size), Unreduced),
    "printing": lambda size: fit(size, Printing),
    "python": lambda size: fit(size, Python),
    "large": lambda size: fit(LARGE),
}
