"""`BilevelTrainer`: learns outer parameters within a training run, on a stream of meta data.

Sources: "EvoGrad: Efficient Gradient-Based Meta-Learning and Hyperparameter Optimization" (Bohdal
et al., NeurIPS 2021); "Meta-Weight-Net" (Shu et al., NeurIPS 2019); "Faster Meta Update Strategy
for Noise-Robust Deep Learning" (Xu et al., CVPR 2021). Each step takes a training batch and a meta
batch. First the outer parameters, such as example weights, are updated to lower the meta loss after
a step of training. Then the model takes a training step with its own optimizer.

Any Keras model can be used. All passes are stateless: virtual passes do not touch running
statistics or random states, and only the real training step writes them. A compiled step is a
single program.

On several devices, each has its part of both batches. Estimators reduce gradients over replicas
wherever the equations contain a mean over the batch. A step therefore equals that of a single
device, except for layers that depend on the whole batch. On JAX one program sees the whole
batches, and such layers are no exception.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_blur import arguments
from keras_blur.backend import compiled, gradient_for_keras, numbers_of, total, value_of
from keras_blur.backend import mean as mean_of
from keras_blur.bilevel import batches
from keras_blur.bilevel.hypergradient import Bilevel, HypergradientEstimator, OneStep, scaled, unscaled, widest
from keras_blur.bilevel.training_losses import TrainingLoss
from keras_blur.checks import CheckedModel, Expected, checked_validation, model_expects, plain_errors
from keras_blur.core import random
from keras_blur.core.losses import ExampleLosses, as_keras, per_example
from keras_blur.distribution import mean, shard
from keras_blur.layers.base import check_trained_by_gradients
from keras_blur.learners.base import places
from keras_blur.training import settings
from keras_blur.training.loop import OuterLoop, apply_scaled, check_frequency, clips, loss_scale, plain

Array = Any
ORDERS = ("meta", "model")
_TRAIN, _META, _NOISE = range(3)
_METRIC = "metric_"  # begins the names of the state of training metrics in a file


@dataclasses.dataclass
class _Untracked:
    """Variables that Keras does not count among those of the object that holds this."""

    variables: list[keras.Variable]


@keras.saving.register_keras_serializable(package="keras_blur")
class BilevelTrainer(CheckedModel, OuterLoop):
    """Trains a model and, at the same time, outer parameters of its training loss on meta data.

    Args:
        model: any built Keras model.
        meta_model: a `TrainingLoss`, such as `SampleWeightNet`, `LearnedRotation` or
            `Hyperparameters`, or a list of Keras variables used by `training_loss`.
        estimator: estimator of the outer gradient: `OneStep`, `FiniteDifference`, `EvoGrad` or
            `LayerwiseMetaGradient`. `None` is `OneStep()`.
        training_loss: a function of `(model, x, y, losses)` as in `TrainingLoss.training_loss`, if
            `meta_model` is a list of variables. It may not draw random numbers or change variables
            outside `model`; for that, write a `TrainingLoss`.
        first: which update comes first in a step: `"meta"`, as in Meta-Weight-Net, or `"model"`, as
            in EvoGrad's rotation.
        judge_training: whether the model is in training mode when evaluated on meta data.
        seed: random seed of data order and noise.

    Raises:
        ValueError: if an argument is invalid.

    Example:

    >>> from keras_blur.bilevel import EvoGrad, SampleWeightNet
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
        if not isinstance(model, keras.Model) or not model.built or not model.trainable_variables:
            raise ValueError(f"`model` must be a built Keras model with weights to train. Received: {model!r}")
        check_trained_by_gradients("model", model)
        arguments.choice("first", first, ORDERS)
        arguments.flag("judge_training", judge_training)
        arguments.seed(seed)
        estimator = OneStep() if estimator is None else estimator
        kinds = "one of OneStep, FiniteDifference, EvoGrad, LayerwiseMetaGradient"
        arguments.instance("estimator", estimator, HypergradientEstimator, kinds)
        super().__init__(name="bilevel_trainer", dtype=model.dtype_policy)
        self.autocast = False  # the model casts its own inputs
        if isinstance(meta_model, TrainingLoss):
            if training_loss is not None:
                raise ValueError("`training_loss` must be None with a TrainingLoss, which has its own.")
            training_loss, variables = meta_model.training_loss, list(meta_model.trainable_variables)
        else:
            variables = list(meta_model) if isinstance(meta_model, (list, tuple)) else [meta_model]
            if training_loss is None or not all(isinstance(one, keras.Variable) for one in variables):
                raise ValueError(
                    "`meta_model` must be a TrainingLoss, or a list of Keras variables with a `training_loss` that depends "
                    f"on them. {arguments.received('meta_model', meta_model)}"
                )
        if not variables:
            raise ValueError(f"`meta_model` must have trainable variables. Received: {meta_model!r}")
        if any(one is other for one in variables for other in model.trainable_variables):
            raise ValueError("`meta_model` and `model` must not share variables.")
        self.model, self.meta_model, self.estimator = model, meta_model, estimator
        self.first, self.judge_training, self.seed = first, judge_training, seed
        self._training_loss: Any = training_loss
        self.outer = {f"{place}_{variable.name}": variable for place, variable in enumerate(variables)}
        self._trained = {f"{place}_{v.name}": v for place, v in enumerate(model.trainable_variables)}
        names = {id(variable): name for name, variable in self._trained.items()}
        trained = {path: tuple(names[id(v)] for v in own.weights if id(v) in names) for path, own in places(model).items()}
        self._weights_of_layers = {path: own for path, own in trained.items() if own}
        shapes = {layer: [tuple(self._trained[n].shape) for n in own] for layer, own in self._weights_of_layers.items()}
        learnt = estimator.parameters(shapes)
        saved = {id(v) for one in (model, meta_model) if isinstance(one, keras.Model) for v in one.weights}
        self._seeds = [v for v in self._buffers() if id(v) not in saved]  # of dropout: Keras does not save them
        self._kept_seeds = [self.counter(f"seed_{place}", np.array(v.value)) for place, v in enumerate(self._seeds)]
        self._own = {name: self.counter(name.replace("/", "."), value) for name, value in learnt.items()}
        self._read = list(meta_model.read()) if isinstance(meta_model, TrainingLoss) else []
        self.make_counters(("loss", "meta_loss", *estimator.logged, *self._read, "skipped"))
        self.built = True
        self._programs: dict[bool, Any] = {}
        self._validation: dict[str, Any] | None = None
        self._measures = False
        self._metric_state = _Untracked([])

    # Public interface.

    def compile(
        self,
        optimizer: Any = "rmsprop",
        meta_optimizer: Any = None,
        loss: Any = None,
        metrics: Any = None,
        *,
        weighted_metrics: Any = None,
        run_eagerly: bool = False,
        steps_per_execution: int = 1,
        jit_compile: bool = True,
        auto_scale_loss: bool = True,
    ) -> None:
        """Configures training.

        Args:
            optimizer: any Keras optimizer, for the model; RMSprop by default.
            meta_optimizer: any Keras optimizer, for the outer parameters; Adam with 1e-3 by
                default.
            loss: a Keras loss, its name, or a function of labels and predictions. Used per example
                in training and per batch on meta data. Ranks, masks and reductions are handled as
                in Keras's `fit`.
            metrics: as in Keras. Training metrics use the given, possibly noisy labels and the
                first prediction that the training loss computes.
            weighted_metrics: metrics that use the sample weights of validation data.
            run_eagerly: whether to run steps uncompiled, for debugging.
            steps_per_execution: steps between calls of batch callbacks.
            jit_compile: whether to compile steps with XLA. Ignored on several replicas (which
                reduce inside a step), with a sampler (whose branches take minutes to compile), and
                on JAX (which compiles every step). On a CPU, convolutions are many times faster
                without XLA on TensorFlow.
            auto_scale_loss: whether to use loss scaling for both optimizers if the dtype policy of
                the model is mixed_float16, as in Keras.

        Raises:
            ValueError: if `loss` is missing or not a Keras loss; if an optimizer clips on several
                replicas, is used twice or was built for other weights; or if the estimator needs a
                learning rate and the optimizer has none.
        """
        if loss is None:
            raise ValueError("`loss` must be given. Received: loss=None")
        arguments.count("steps_per_execution", steps_per_execution)
        self._loss_of = as_keras(loss)
        measures = {"metrics": metrics, "weighted_metrics": weighted_metrics}
        self._compiled_with = json.dumps(settings.described({"loss": self._loss_of, **measures}))
        meta_optimizer = keras.optimizers.get(meta_optimizer or keras.optimizers.Adam(1e-3))
        scaling = auto_scale_loss and self.dtype_policy.name == "mixed_float16"
        if scaling and not isinstance(meta_optimizer, keras.optimizers.LossScaleOptimizer):
            meta_optimizer = keras.optimizers.LossScaleOptimizer(meta_optimizer)
        super().compile(
            optimizer=optimizer, loss=loss, metrics=metrics, weighted_metrics=weighted_metrics, run_eagerly=run_eagerly,
            steps_per_execution=steps_per_execution, jit_compile=bool(jit_compile) and not run_eagerly,
            auto_scale_loss=auto_scale_loss,
        )  # fmt: skip
        alone = self.runner.replicas == 1 and not self.runner.compiles
        self.jit_step = bool(jit_compile) and not run_eagerly and alone and not self.estimator.branches
        self.meta_optimizer, self.own_optimizer = meta_optimizer, self.estimator.optimizer()
        if not hasattr(self.optimizer, "learning_rate") and getattr(self.estimator, "rate", 1.0) is None:
            raise ValueError(
                "`rate` of the estimator must be given with an optimizer that has no learning rate of its own. Received: "
                f"rate=None with {type(plain(self.optimizer)).__name__}"
            )
        for one in (self.optimizer, self.meta_optimizer):
            if self.runner.replicas > 1 and clips(one):
                raise ValueError(
                    "An optimizer must not clip on several replicas: each replica sees only a part of the gradient."
                )
        self.build_optimizers()
        if self.own_optimizer is not None:
            with self.runner.scope():
                self.own_optimizer.build(list(self._own.values()))
        self._programs = {}
        self._measures, self._metric_state = any(one is not None for one in measures.values()), _Untracked([])

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
        initial_epoch: int = 0,
        validation_data: Any = None,
        validation_batch_size: int | None = None,
        validation_steps: int | None = None,
        validation_freq: int | Sequence[int] = 1,
        checkpoint: str | os.PathLike[str] | None = None,
        callbacks: Sequence[keras.callbacks.Callback] = (),
        verbose: int | str = "auto",
    ) -> keras.callbacks.History:
        """Trains with the progress bar and the callbacks of Keras.

        Args:
            x: inputs `[n, ...]`, or a `tf.data.Dataset` or `PyDataset` of batches `(x, y)`, which
                is repeated. A resumed run skips the batches already seen. They are the same ones if
                the dataset has a reproducible order.
            y: labels, if `x` is an array.
            meta_data: clean data: a pair of arrays or a dataset. The outer parameters are learned
                on them.
            batch_size: batch size for arrays, a multiple of the number of devices.
            meta_batch_size: batch size of meta data given as arrays; `None` uses `batch_size`.
            epochs: number of epochs, including those before an interruption.
            steps_per_epoch: steps per epoch; `None` is one pass over the training data without an
                incomplete last batch.
            meta_every: number of steps between updates of the outer parameters.
            initial_epoch: index of the first epoch, unless a checkpoint says otherwise.
            validation_data: data for `evaluate` after an epoch: a tuple of inputs, labels and
                optional sample weights, or a dataset of such batches.
            validation_batch_size: batch size for validation arrays; `None` uses `batch_size`.
            validation_steps: number of validation batches; `None` for all.
            validation_freq: number of epochs between validations, or a list of epochs, counted from
                1.
            checkpoint, callbacks, verbose: as in `MetaTrainer.fit`.

        Returns:
            Keras's `History`.

        Raises:
            ValueError: if data are missing, do not fit the model or the loss, or are fewer than a
                batch; if the devices do not divide a batch size; or if the checkpoint is damaged or
                has other settings.
            OSError: if the checkpoint cannot be written, for example because the disk is full.
        """
        if not self.compiled:
            raise ValueError("The trainer must be compiled first: call `compile(optimizer=..., loss=...)`.")
        arguments.count("meta_every", meta_every)
        for name, value in (
            ("meta_batch_size", meta_batch_size), ("validation_batch_size", validation_batch_size),
            ("steps_per_epoch", steps_per_epoch),
        ):  # fmt: skip
            if value is not None:
                arguments.count(name, value)
        self._open((x, y) if y is not None else x, meta_data, batch_size, meta_batch_size or batch_size)
        steps = steps_per_epoch or self._sources[0].steps
        if not steps:
            raise ValueError("`steps_per_epoch` must be given for a dataset of unknown length.")
        self.meta_every, self._validation = meta_every, None
        if validation_data is not None:
            check_frequency(validation_freq)
            x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(checked_validation(validation_data, self._expected))
            self._validation = {
                "x": x, "y": y, "sample_weight": sample_weight, "steps": validation_steps,
                "batch_size": None if y is None else validation_batch_size or batch_size,
            }  # fmt: skip
        self._validation_freq = validation_freq
        with plain_errors():
            return self.run_epochs(epochs, steps, checkpoint, callbacks, verbose, initial_epoch)

    def _open(self, train: Any, judge: Any, batch_size: int, meta_batch_size: int) -> None:
        """Checks training and meta data, opens their sources and creates the training metrics."""
        self._sources = [
            batches.source("x", train, batch_size, self.runner, self._expected),
            batches.source("meta_data", judge, meta_batch_size, self.runner, self._expected, within="meta_data"),
        ]
        self._make_metric_state()

    def _make_metric_state(self) -> None:
        """Creates the variables of training metrics.

        They are separate from those of `evaluate`. They are saved, but weights load without them.
        """
        if self._metric_state.variables or not self._measures:
            return
        shapes = [((2, *spec.shape[1:]), keras.backend.standardize_dtype(spec.dtype)) for spec in self._sources[0].spec]
        x, y = (ops.convert_to_tensor(np.zeros(*one)) for one in shapes)
        with self.runner.scope():
            self.compute_metrics(x, y, ops.zeros((2, *self.model.output_shape[1:])))  # Keras makes them when it sees data
            self.reset_metrics()
            self._metric_state = _Untracked(
                [keras.Variable(ops.zeros(v.shape, v.dtype), trainable=False, name=v.name) for v in self.metrics_variables]
            )
        self._programs = {}

    def save_own_variables(self, store: Any) -> None:
        super().save_own_variables(store)
        for place, variable in enumerate(self._metric_state.variables):
            store[f"{_METRIC}{place}"] = variable

    def load_own_variables(self, store: Any) -> None:
        names = list(store.keys())
        super().load_own_variables({name: store[name] for name in names if not name.startswith(_METRIC)})
        for place, variable in enumerate(self._metric_state.variables):
            saved = f"{_METRIC}{place}"
            if saved in names and tuple(store[saved].shape) == tuple(variable.shape):
                variable.assign(store[saved])

    def start_means(self) -> None:
        super().start_means()
        for variable in self._metric_state.variables:
            variable.assign(ops.zeros_like(value_of(variable)))

    def _expected(self) -> Expected:
        """The data specification of the model."""
        return model_expects(self.model, self._loss_of if self.compiled else None)

    @property
    def learned(self) -> Any:
        """The `TrainingLoss`, with its `save(path)`, or the learned variables by name."""
        if isinstance(self.meta_model, TrainingLoss):
            return self.meta_model
        return {name: np.array(variable.value) for name, variable in self.outer.items()}

    def call(self, inputs: Array, training: bool = False) -> Array:
        """The model's prediction."""
        return self.model(inputs, training=training)

    def validate(self, epoch: int, logs: dict[str, float], callbacks: keras.callbacks.CallbackList) -> dict[str, float]:
        often = self._validation_freq
        wanted = (epoch + 1) % often == 0 if isinstance(often, int) else epoch + 1 in often
        if self._validation is None or not wanted:
            return logs
        with self.runner.undivided():
            found = self.evaluate(**self._validation, callbacks=callbacks, verbose=0, return_dict=True)
        return {**logs, **{f"val_{name}": value for name, value in found.items()}}

    # One step.

    def settings(self) -> dict[str, Any]:
        train, judge = self._sources
        learned = isinstance(self.meta_model, TrainingLoss)
        return {
            "model": self.model, "meta_model": self.meta_model, "training_loss": None if learned else self._training_loss,
            "estimator": self.estimator, "first": self.first, "judge_training": self.judge_training, "seed": self.seed,
            **json.loads(self._compiled_with), "meta_every": self.meta_every, "data": train.settings(),
            "meta_data": judge.settings(),
        }  # fmt: skip

    def optimizers(self) -> dict[str, tuple[keras.optimizers.Optimizer, list[keras.Variable]]]:
        return {
            "optimizer": (self.optimizer, list(self._trained.values())),
            "meta_optimizer": (self.meta_optimizer, list(self.outer.values())),
        }

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
        """Runs one step of the model and, every `meta_every` steps, of the outer parameters.

        Returns the running metrics.
        """
        step = int(numbers_of(self.meta_step))
        turn = step % self.meta_every == 0
        batches = [self._next(_TRAIN, step)]
        if turn:
            batches.append(self._next(_META, step // self.meta_every))
        logs = self._program(turn)(*batches)
        return {name: float(value) for name, value in logs.items()}

    def _program(self, turn: bool) -> Any:
        if turn not in self._programs:
            # Nothing that adds up over replicas, or that the runner compiles, may be in a separate
            # function.
            inner = compiled(self._step, jit_compile=True) if self.jit_step else self._step

            def step(*batches: Any) -> dict[str, Array]:
                seed = random.fold_in(random.seed_of(self.seed), _NOISE, value_of(self.meta_step))
                found, metrics = inner(seed, *batches)
                return {**self.count_step(found), **metrics}

            self._programs[turn] = self.runner.program(step, self._all_variables, eager=self.run_eagerly)
        return self._programs[turn]

    def _all_variables(self) -> list[keras.Variable]:
        """What a step may read or assign."""
        optimizers = [self.optimizer, self.meta_optimizer, *([self.own_optimizer] if self.own_optimizer else [])]
        of_optimizers = [variable for one in optimizers for variable in one.variables]
        return [*self.variables, *self._buffers(), *self.outer.values(), *of_optimizers, *self._metric_state.variables]

    def _step(self, seed: Array, train: Any, *judge: Any) -> tuple[dict[str, tuple[Array, Array]], dict[str, Array]]:
        """The replica program: logged values with weights, and training metrics.

        Without a meta batch, the outer parameters are not updated.
        """
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
        sizes = {"loss": _size(train), "meta_loss": _size(judge[0]) if judge else 0.0}  # a short batch weighs less
        return {name: self._weighed(name, found, sizes.get(name, 1.0)) for name in self.logged}, metrics

    def _weighed(self, name: str, found: Mapping[str, Array], size: Array) -> tuple[Array, Array]:
        """A value and its weight in the running mean.

        The weight is 0 if a step lacks the value or skips its estimate.
        """
        if name not in found:
            return ops.zeros((), "float32"), ops.zeros((), "float32")
        value, weight = ops.cast(found[name], "float32"), ops.cast(size, "float32")
        if name == "meta_loss" or name in self.estimator.logged:
            weight = weight * (1.0 - found["skipped"])
            value = ops.where(weight > 0, value, 0.0)
        return value, weight

    def _change_model(self, batch: Any) -> tuple[Array, dict[str, Array]]:
        """Takes the training step; returns its loss and the training metrics."""
        weights, scale = _values(self._trained), loss_scale(self.optimizer)

        def training_loss(values: dict[str, Array]) -> tuple[Array, Any]:
            loss, buffers, prediction = self._pass(_values(self.outer), values, batch)
            return scaled(loss, scale), (loss, buffers, prediction)

        (loss, buffers, prediction), found = gradient_for_keras(training_loss, weights)
        used = {name: value for name, value in found.items() if value is not None}
        if scale is not None or self.runner.replicas > 1:  # else the sparse gradient of a lookup stays, as in Keras
            loss, used = mean((loss, unscaled(used, scale)))
        self._apply(self.optimizer, used, self._trained)
        for variable, value in zip(self._buffers(), buffers, strict=True):
            variable.assign(mean(value) if keras.backend.is_float_dtype(value.dtype) else value)
        for variable, kept_seed in zip(self._seeds, self._kept_seeds, strict=True):
            kept_seed.assign(value_of(variable))
        return loss, self._measure(batch[1], prediction)

    def _measure(self, y: Array, prediction: Array) -> dict[str, Array]:
        """Updates the training metrics of the epoch, with sums over replicas."""
        before = [value_of(variable) for variable in self._metric_state.variables]
        if not before:
            return {}
        with keras.StatelessScope(list(zip(self.metrics_variables, before, strict=True))) as scope:
            self.compute_metrics(None, y, prediction)
        after = [ops.convert_to_tensor(scope.get_current_value(variable)) for variable in self.metrics_variables]
        added = total([new - old for new, old in zip(after, before, strict=True)])
        after = [old + new for old, new in zip(before, added, strict=True)]
        for variable, value in zip(self._metric_state.variables, after, strict=True):
            variable.assign(value)
        with keras.StatelessScope(list(zip(self.metrics_variables, after, strict=True))):
            results = self.get_metrics_result()
        return {name: value for name, value in results.items() if name not in self.logged}

    def _change_outer(self, seed: Array, batch: Any, judge: Any) -> dict[str, Array]:
        """Estimates the outer gradient and updates the outer parameters.

        Non-finite estimates are skipped and counted.
        """
        problem = Bilevel(
            lambda outer, weights: self._pass(outer, weights, batch)[0], lambda weights: self._judge(weights, judge),
            self._weights_of_layers, mean, loss_scale(self.meta_optimizer),
        )  # fmt: skip
        rate = ops.convert_to_tensor(getattr(self.optimizer, "learning_rate", math.nan))  # a MultiOptimizer has none
        own = _values(self._own)
        found, changes = self.estimator.estimate(problem, _values(self.outer), _values(self._trained), rate, seed, own)
        every = [found.loss, *found.gradients.values(), *changes.values()]
        sound = ops.all(ops.stack([ops.all(ops.isfinite(value)) for value in every]))
        self._apply(self.meta_optimizer, found.gradients, self.outer, sound)
        if self.own_optimizer is not None:
            self._apply(self.own_optimizer, changes, self._own, sound)
        skipped = 1.0 - ops.cast(sound, "float32")
        return {"meta_loss": found.loss, **found.logs, "skipped": skipped}

    def _buffers(self) -> list[keras.Variable]:
        meta = self.meta_model.non_trainable_variables if isinstance(self.meta_model, TrainingLoss) else []
        return [*self.model.non_trainable_variables, *meta]

    def _scope(self, outer: Mapping[str, Array], weights: Mapping[str, Array]) -> keras.StatelessScope:
        # On JAX, what the innermost scope lacks would be a constant of the program.
        rate = getattr(self.optimizer, "learning_rate", None)
        read = [*self.outer.values(), *self._buffers(), *([rate] if isinstance(rate, keras.Variable) else [])]
        mapping = [(variable, value_of(variable)) for variable in read]
        mapping += [(self.outer[name], value) for name, value in outer.items()]
        mapping += [(self._trained[name], value) for name, value in weights.items()]
        return keras.StatelessScope(mapping, collect_losses=True)

    def _of_metrics(self) -> set[int]:
        """The variables of metrics that layers update, whose values are not used."""
        models = [one for one in (self.model, self.meta_model) if isinstance(one, keras.Model)]
        return {id(variable) for one in models for layer in one._flatten_layers() for variable in layer.metrics_variables}

    def _pass(
        self, outer: Mapping[str, Array], weights: Mapping[str, Array], batch: Any
    ) -> tuple[Array, list[Array], Array]:
        """The training loss, the updated buffers of the model, and its prediction."""
        losses = ExampleLosses(self._loss_of)
        with self._scope(outer, weights) as scope:
            known = {*scope.state_mapping, *self._of_metrics()}
            loss = self._training_loss(self.model, *batch, losses)
            others = self.model.losses
            dtype = widest([loss, *others])
            loss = sum(ops.cast(ops.sum(one), dtype) for one in (loss, *others))
        if set(scope.state_mapping) - known:
            raise ValueError(
                "`training_loss` must not change variables outside `model`, such as the random state of a dropout layer, "
                "unless they belong to a TrainingLoss as `meta_model`. Received: a training loss that changes some"
            )
        buffers = [scope.get_current_value(variable) for variable in self._buffers()]
        predictions = losses.predictions
        if not predictions:  # a loss of its own kind
            with self._scope(outer, weights):
                predictions.append(self.model(batch[0], training=False))
        return loss, buffers, predictions[0]

    def _judge(self, weights: Mapping[str, Array], batch: Any) -> Array:
        x, y = batch
        with self._scope({}, weights):
            return mean_of(per_example(self._loss_of, y, self.model(x, training=self.judge_training)))

    def _apply(
        self, optimizer: Any, gradients: Mapping[str, Array], variables: Mapping[str, keras.Variable], sound: Any = None
    ) -> None:
        """Takes an optimizer step, unless the gradient is unsound.

        Every replica has the full gradient, but Keras sums over replicas. Each replica therefore
        contributes the gradient divided by the number of replicas. A loss-scaling optimizer skips
        the step itself and lowers its scale.
        """
        parts = dict(gradients)
        if self.runner.replicas > 1:
            parts = {name: value / self.runner.replicas for name, value in gradients.items()}
        touched = [] if sound is None else [*variables.values(), *optimizer.variables]
        if sound is not None and isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            parts = {name: ops.where(sound, value, math.nan) for name, value in parts.items()}
            touched = []
        before = [value_of(variable) for variable in touched]
        apply_scaled(optimizer, [parts.get(name) for name in variables], list(variables.values()))
        for variable, old in zip(touched, before, strict=True):
            variable.assign(ops.where(sound, value_of(variable), old))


def _size(batch: Any) -> Array:
    """The number of examples of a batch over all replicas, which have equal parts."""
    return ops.cast(ops.shape(batch[0])[0] * shard().count, "float32")


def _values(variables: Mapping[str, keras.Variable]) -> dict[str, Array]:
    return {name: value_of(variable) for name, variable in variables.items()}
