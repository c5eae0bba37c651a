"""Learns outer parameters inside one ordinary training run: a model, its training data, and a stream of meta data.

Sources: "EvoGrad: Efficient Gradient-Based Meta-Learning and Hyperparameter Optimization" (Bohdal et al., NeurIPS 2021);
"Meta-Weight-Net" (Shu et al., NeurIPS 2019); "Faster Meta Update Strategy for Noise-Robust Deep Learning" (Xu et al., CVPR
2021). Each step takes a batch of either stream. The outer parameters, such as weights of examples, change so that the model
would do better on the meta batch after a step by the training loss; then the model takes that step, with its own optimizer.

The model is any Keras model. Its passes are `stateless`: a virtual one cannot touch running statistics or random states, and
only the step that is really taken writes them. Compiled, a step is one program.

Several devices: each has its part of both batches, gradients are added up over replicas inside an estimate wherever a mean
over the batch stands in the equations, and a step does what one device would do, but for layers that look at a whole batch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from keras_blur import random
from keras_blur.compiling import compiled
from keras_blur.distribution import mean, total
from keras_blur.feedback import target_kind
from keras_blur.learners.base import leaves
from keras_blur.losses import ExampleLosses, as_keras, ignored_class, per_example
from keras_blur.meta import batches
from keras_blur.meta.estimator import check_count
from keras_blur.meta.hypergradient import Bilevel, HypergradientEstimator, OneStep, gradient
from keras_blur.meta.loop import OuterLoop
from keras_blur.meta.training_losses import TrainingLoss

Array = Any
ORDERS = ("meta", "model")
_TRAIN, _META, _NOISE = range(3)


@keras.saving.register_keras_serializable(package="keras_blur")
class BilevelTrainer(OuterLoop):
    """Trains a model and, at the same time, outer parameters of its training loss on meta data.

    Args:
        model: any built Keras model.
        meta_model: a `TrainingLoss`, as `SampleWeightNet`, `LearnedRotation` and `Hyperparameters` are; or a list of Keras
            variables, on which `training_loss` depends.
        estimator: how the outer gradient is found: `OneStep`, `FiniteDifference`, `EvoGrad`, `LayerwiseMetaGradient`.
        training_loss: with variables, a function of `(model, x, y, losses)` as `TrainingLoss.training_loss`.
        first: what changes first in a step, `"meta"`, as in Meta-Weight-Net, or `"model"`, as in EvoGrad's rotation.
        judge_training: whether the model is in training mode where it is judged on meta data.
        seed: of the order of data and of noise.

    Raises:
        ValueError: if an argument does not fit.

    Example:

    >>> from keras_blur.meta import EvoGrad, SampleWeightNet
    >>> x, y = np.eye(4, dtype="float32"), np.arange(4)
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4)])
    >>> trainer = BilevelTrainer(model, SampleWeightNet(), EvoGrad())
    >>> loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    >>> trainer.compile(keras.optimizers.SGD(0.1), keras.optimizers.Adam(1e-3), loss, metrics=["accuracy"])
    >>> history = trainer.fit(x, y, meta_data=(x, y), batch_size=2, epochs=1, verbose=0).history
    >>> sorted(history)
    ['accuracy', 'candidates', 'loss', 'meta_loss', 'skipped']
    """

    def __init__(
        self,
        model: keras.Model,
        meta_model: TrainingLoss | Sequence[keras.Variable],
        estimator: HypergradientEstimator | None = None,
        *,
        training_loss: Callable[..., Array] | None = None,
        first: str = "meta",
        judge_training: bool = True,
        seed: int = 0,
    ):
        super().__init__(name="bilevel_trainer")
        if not isinstance(model, keras.Model) or not model.built or not model.trainable_variables:
            raise ValueError(f"`model` must be a built Keras model with weights to train. Received: {model!r}")
        if first not in ORDERS:
            raise ValueError(f"`first` must be one of {', '.join(map(repr, ORDERS))}. Received: first={first!r}")
        estimator = estimator or OneStep()
        if not isinstance(estimator, HypergradientEstimator):
            raise ValueError(
                "`estimator` must be one of OneStep, FiniteDifference, EvoGrad, LayerwiseMetaGradient. Received: "
                f"{estimator!r}"
            )
        if isinstance(meta_model, TrainingLoss):
            if training_loss is not None:
                raise ValueError("`training_loss` goes with a list of variables; a TrainingLoss has its own.")
            training_loss, variables = meta_model.training_loss, list(meta_model.trainable_variables)
        else:
            variables = list(meta_model)
            if training_loss is None or not all(isinstance(one, keras.Variable) for one in variables):
                raise ValueError(
                    "`meta_model` must be a TrainingLoss, or a list of Keras variables with a `training_loss` that depends "
                    f"on them. Received: {meta_model!r}"
                )
        if not variables:
            raise ValueError(f"`meta_model` must have something to learn. Received: {meta_model!r}")
        if any(one is other for one in variables for other in model.trainable_variables):
            raise ValueError("`meta_model` and `model` must not share variables.")
        self.model, self.meta_model, self.estimator = model, meta_model, estimator
        self.first, self.judge_training, self.seed = first, judge_training, seed
        self._training_loss: Any = training_loss
        self.outer = {f"{place}_{variable.name}": variable for place, variable in enumerate(variables)}
        self._trained = {f"{place}_{v.name}": v for place, v in enumerate(model.trainable_variables)}
        names = {id(variable): name for name, variable in self._trained.items()}
        self._weights_of_layers = {
            layer.name: tuple(names[id(v)] for v in layer.trainable_variables)
            for layer in leaves(model)
            if layer.trainable_variables
        }
        shapes = {layer: [tuple(self._trained[n].shape) for n in own] for layer, own in self._weights_of_layers.items()}
        learnt = estimator.parameters(shapes)
        saved = {id(variable) for variable in model.weights}
        self._seeds = [
            v for v in model.non_trainable_variables if id(v) not in saved
        ]  # of dropout: Keras does not save them
        self._kept_seeds = [self.counter(f"seed_{place}", np.array(v.value)) for place, v in enumerate(self._seeds)]
        self._own = {name: self.counter(name, value) for name, value in learnt.items()}
        self._read = list(meta_model.read()) if isinstance(meta_model, TrainingLoss) else []
        self.make_counters(("loss", "meta_loss", *estimator.logged, *self._read, "skipped"))
        self.built = True
        self._programs: dict[bool, Any] = {}
        self._validation: Any = None
        self._measures = False
        self._metric_state: list[keras.Variable] = []

    # What a person asks of it.

    def compile(
        self,
        optimizer: Any = "rmsprop",
        meta_optimizer: Any = None,
        loss: Any = None,
        metrics: Any = None,
        *,
        jit_compile: bool = True,
    ) -> None:
        """Configures training.

        Args:
            optimizer: any Keras optimizer, of the model.
            meta_optimizer: any Keras optimizer, of the outer parameters; Adam at 1e-3 by default.
            loss: a Keras loss, its name, or a function of labels and predictions: of each example in training, of the
                batch on meta data. Ranks, masks and reductions are those of Keras's `fit`.
            metrics: as in Keras, of validation, and of training with the labels that it has, wrong ones included, and the
                prediction of which a training loss asks the loss first.
            jit_compile: whether XLA compiles a step; not on several replicas, which have to add up inside it, nor with a
                sampler, whose branches take TensorFlow minutes to hand over. On a CPU convolutions are many times as fast
                without.

        Raises:
            ValueError: if `loss` is no Keras loss, or an optimizer clips on several replicas.
        """
        if loss is None:
            raise ValueError("`loss` must be given. Received: loss=None")
        self._loss_of = as_keras(loss)
        meta_optimizer = keras.optimizers.get(meta_optimizer or keras.optimizers.Adam(1e-3))
        super().compile(optimizer=optimizer, loss=loss, metrics=metrics, jit_compile=jit_compile)
        alone = self.runner.replicas == 1 and not self.runner.compiles
        self.jit_step = bool(jit_compile) and alone and not self.estimator.branches
        self.meta_optimizer, self.own_optimizer = meta_optimizer, self.estimator.optimizer()
        with self.runner.scope():
            for one, variables in (
                (self.optimizer, self._trained), (self.meta_optimizer, self.outer), (self.own_optimizer, self._own),
            ):  # fmt: skip
                if one is None:
                    continue
                if self.runner.replicas > 1 and (one.clipnorm or one.clipvalue or one.global_clipnorm):
                    raise ValueError("An optimizer must not clip on several replicas: it would see a part of the gradient.")
                one.build(list(variables.values()))
        self._programs = {}
        self._measures, self._metric_state = metrics is not None, []

    def fit(
        self,
        x: Any,
        y: Any = None,
        *,
        meta_data: Any,
        batch_size: int = 32,
        meta_batch_size: int | None = None,
        epochs: int = 1,
        steps_per_epoch: int | None = None,
        meta_every: int = 1,
        validation_data: Any = None,
        checkpoint: str | os.PathLike[str] | None = None,
        callbacks: Sequence[keras.callbacks.Callback] = (),
        verbose: int | str = "auto",
    ) -> keras.callbacks.History:
        """Trains, with the progress bar and the callbacks of Keras.

        Args:
            x: inputs `[n, ...]`, or a `tf.data.Dataset` of batches `(x, y)`, which is repeated. A run that is resumed goes
                through those before again, without learning; it sees the same ones if the dataset gives them again.
            y: labels that go with arrays.
            meta_data: a pair of arrays, or a dataset, likewise: clean data, on which the model is to do well.
            batch_size: examples of a batch, where arrays are given.
            meta_batch_size: the same of meta data; `None` for the same number.
            epochs: number of epochs, those before an interruption included.
            steps_per_epoch: steps of an epoch; `None` for one pass over the training data, what is left over left out.
            meta_every: outer parameters change in every so many-th step.
            validation_data: a pair of arrays, or a dataset, for `evaluate` after each epoch.
            checkpoint, callbacks, verbose: as in `MetaTrainer.fit`.

        Raises:
            ValueError: if data are missing, not finite, or fewer than a batch; or the checkpoint is of another trainer.
        """
        if not self.compiled:
            raise ValueError("The trainer must be compiled first: call `compile(optimizer=..., loss=...)`.")
        check_count("meta_every", meta_every)
        self._open((x, y) if y is not None else x, meta_data, batch_size, meta_batch_size or batch_size)
        steps = steps_per_epoch or self._sources[0].steps
        if not steps:
            raise ValueError("`steps_per_epoch` must be given: the dataset does not say how long it is.")
        self.meta_every, self._validation = meta_every, validation_data
        return self.run_epochs(epochs, steps, checkpoint, callbacks, verbose)

    def _open(self, train: Any, judge: Any, batch_size: int, meta_batch_size: int) -> None:
        """Checks both kinds of data, keeps where their batches come from, and makes the metrics of such data."""
        replicas = self.runner.replicas
        self._sources = [
            batches.source("x", train, batch_size, replicas, self._classes),
            batches.source("meta_data", judge, meta_batch_size, replicas, self._classes),
        ]
        self._make_metric_state()

    def _make_metric_state(self) -> None:
        """Makes the variables of the metrics of training: apart from those of `evaluate`, and saved with all others."""
        if self._metric_state or not self._measures:
            return
        x, y = (tf.zeros((2, *spec.shape[1:]), spec.dtype) for spec in self._sources[0].spec)
        with self.runner.scope():
            self.compute_metrics(x, y, tf.zeros((2, *self.model.output_shape[1:])))  # Keras makes them when it sees data
            self.reset_metrics()
        self._metric_state = [
            self.counter(f"metric_{place}", np.zeros(v.shape, v.dtype)) for place, v in enumerate(self.metrics_variables)
        ]
        self._programs = {}

    def start_means(self) -> None:
        super().start_means()
        for variable in self._metric_state:
            variable.assign(tf.zeros_like(variable.value))

    def _classes(self) -> int | None:
        """Number of classes if labels are integers, and each is one of them, else `None`."""
        sparse = target_kind(self._loss_of) == "classes" and ignored_class(self._loss_of) is None
        return int(self.model.output_shape[-1]) if sparse else None

    @property
    def learned(self) -> Any:
        """What was learned beside the model: the `TrainingLoss`, which has `save(path)`, or the variables by name."""
        if isinstance(self.meta_model, TrainingLoss):
            return self.meta_model
        return {name: np.array(variable.value) for name, variable in self.outer.items()}

    def call(self, inputs: Array, training: bool = False) -> Array:
        """The model's prediction."""
        return self.model(inputs, training=training)

    def validate(self, logs: dict[str, float]) -> dict[str, float]:
        if self._validation is None:
            return logs
        data = self._validation if isinstance(self._validation, tuple) else (self._validation,)
        found = self.evaluate(*data, batch_size=None if len(data) == 1 else 512, verbose=0, return_dict=True)
        return {**logs, **{f"val_{name}": value for name, value in found.items()}}

    # One step.

    def rewind(self) -> None:
        self._streams: list[Any] = [None, None]
        for variable, kept in zip(self._seeds, self._kept_seeds, strict=True):
            variable.assign(kept.value)

    def _next(self, which: int, done: int) -> Any:
        if self._streams[which] is None:
            source = self._sources[which]
            self._streams[which] = self.runner.deal(
                lambda index, count: source.stream(random.fold_in(random.seed_of(self.seed), which), done, index, count)
            )
        return next(self._streams[which])

    def meta_train_step(self) -> dict[str, float]:
        """One step of the model, and of the outer parameters where it is their turn; returns the running metrics."""
        step = int(self.meta_step.numpy())
        turn = step % self.meta_every == 0
        batches = [self._next(_TRAIN, step)]
        if turn:
            batches.append(self._next(_META, step // self.meta_every))
        seed = random.fold_in(random.seed_of(self.seed), _NOISE, step)
        logs = self._program(turn)(seed, *batches)
        return {name: float(value) for name, value in logs.items()}

    def _program(self, turn: bool) -> Any:
        if turn not in self._programs:
            # Nothing that adds up over replicas, or that a strategy compiles, may stand in a function of its own.
            inner = compiled(self._step, jit_compile=True) if self.jit_step else self._step

            def step(seed: Array, *batches: Any) -> dict[str, Array]:
                found, metrics = inner(seed, *batches)
                return {**self.count_step(found), **metrics}

            def meta_step(*arguments: Any) -> dict[str, Array]:
                return self.runner.run(step, *arguments)

            self._programs[turn] = tf.function(meta_step, autograph=False)
        return self._programs[turn]

    def _step(self, seed: Array, train: Any, *judge: Any) -> tuple[dict[str, tuple[Array, Array]], dict[str, Array]]:
        """A replica's program, its values with weights and the metrics of training; without a meta batch the outer
        parameters stay as they are."""
        found: dict[str, Array] = {}
        if self.first == "model":
            loss, metrics = self._change_model(train)
        for batch in judge:
            found |= self._change_outer(seed, train, batch)
        if self.first == "meta":
            loss, metrics = self._change_model(train)
        found["loss"] = loss
        if isinstance(self.meta_model, TrainingLoss):
            found |= self.meta_model.read()
        one = tf.ones(())
        values = {
            name: (tf.cast(found[name], tf.float32), one) if name in found else (tf.zeros(()), tf.zeros(()))
            for name in self.logged
        }
        return values, metrics

    def _change_model(self, batch: Any) -> tuple[Array, dict[str, Array]]:
        """The step that is taken: its loss, and the metrics of training."""
        kept: list[Any] = []

        def train(weights: Mapping[str, Array]) -> Array:
            loss, *others = self._pass(_values(self.outer), weights, batch)
            kept.extend(others)
            return loss

        loss, slope = mean(gradient(train, _values(self._trained)))
        self._apply(self.optimizer, slope, self._trained)
        for variable, value in zip(self._buffers(), kept[0], strict=True):
            variable.assign(mean(value) if value.dtype.is_floating else value)
        for variable, kept_seed in zip(self._seeds, self._kept_seeds, strict=True):
            kept_seed.assign(variable.value)
        return loss, self._measure(batch[1], kept[1])

    def _measure(self, y: Array, prediction: Array) -> dict[str, Array]:
        """The metrics of training so far in the epoch; what a batch adds to their state is added up over replicas."""
        before = [tf.convert_to_tensor(variable.value) for variable in self._metric_state]
        if not before:
            return {}
        with keras.StatelessScope(list(zip(self.metrics_variables, before, strict=True))) as scope:
            self.compute_metrics(None, y, prediction)
        after = [tf.convert_to_tensor(scope.get_current_value(variable)) for variable in self.metrics_variables]
        added = total([new - old for new, old in zip(after, before, strict=True)])
        after = [old + new for old, new in zip(before, added, strict=True)]
        for variable, value in zip(self._metric_state, after, strict=True):
            variable.assign(value)
        with keras.StatelessScope(list(zip(self.metrics_variables, after, strict=True))):
            results = self.get_metrics_result()
        return {name: value for name, value in results.items() if name not in self.logged}

    def _change_outer(self, seed: Array, batch: Any, judge: Any) -> dict[str, Array]:
        """An estimate, and the step of the outer parameters; one that is not finite is skipped and counted."""
        problem = Bilevel(
            lambda outer, weights: self._pass(outer, weights, batch)[0], lambda weights: self._judge(weights, judge),
            self._weights_of_layers, mean,
        )  # fmt: skip
        rate = tf.cast(self.optimizer.learning_rate, tf.float32)
        own = _values(self._own)
        found, changes = self.estimator.estimate(problem, _values(self.outer), _values(self._trained), rate, seed, own)
        every = [found.loss, *found.gradients.values(), *changes.values()]
        sound = tf.reduce_all([tf.reduce_all(tf.math.is_finite(value)) for value in every])
        self._apply(self.meta_optimizer, found.gradients, self.outer, sound)
        if self.own_optimizer is not None:
            self._apply(self.own_optimizer, changes, self._own, sound)
        skipped = 1.0 - tf.cast(sound, tf.float32)
        return {"meta_loss": found.loss, **found.logs, "skipped": skipped}

    def _buffers(self) -> list[keras.Variable]:
        meta = self.meta_model.non_trainable_variables if isinstance(self.meta_model, TrainingLoss) else []
        return [*self.model.non_trainable_variables, *meta]

    def _scope(self, outer: Mapping[str, Array], weights: Mapping[str, Array]) -> keras.StatelessScope:
        mapping = [(self.outer[name], value) for name, value in outer.items()]
        mapping += [(self._trained[name], value) for name, value in weights.items()]
        mapping += [(variable, tf.convert_to_tensor(variable.value)) for variable in self._buffers()]
        return keras.StatelessScope(mapping, collect_losses=True)

    def _pass(
        self, outer: Mapping[str, Array], weights: Mapping[str, Array], batch: Any
    ) -> tuple[Array, list[Array], Array]:
        """The training loss, what the model's buffers would be, and its prediction."""
        losses = ExampleLosses(self._loss_of)
        with self._scope(outer, weights) as scope:
            loss = self._training_loss(self.model, *batch, losses)
            loss = loss + sum(ops.sum(one) for one in self.model.losses)
        buffers = [scope.get_current_value(variable) for variable in self._buffers()]
        predictions = losses.predictions
        if not predictions:  # a loss of its own kind
            with self._scope(outer, weights):
                predictions.append(self.model(batch[0], training=False))
        return loss, buffers, predictions[0]

    def _judge(self, weights: Mapping[str, Array], batch: Any) -> Array:
        x, y = batch
        with self._scope({}, weights):
            return tf.reduce_mean(per_example(self._loss_of, y, self.model(x, training=self.judge_training)))

    def _apply(
        self, optimizer: Any, gradients: Mapping[str, Array], variables: Mapping[str, keras.Variable], sound: Any = None
    ) -> None:
        """A step of an optimizer, unless the gradient is not sound; every replica has the whole one and gives its share."""
        touched = [] if sound is None else [*variables.values(), *optimizer.variables]
        before = [tf.identity(variable.value) for variable in touched]
        optimizer.apply([gradients[name] / self.runner.replicas for name in variables], list(variables.values()))
        for variable, old in zip(touched, before, strict=True):
            variable.assign(tf.where(sound, variable.value, old))


def _values(variables: Mapping[str, keras.Variable]) -> dict[str, Array]:
    return {name: tf.convert_to_tensor(variable.value) for name, variable in variables.items()}
