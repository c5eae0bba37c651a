"""The Keras face of a network: a model that learns by a genome under `fit`.

Source of the learning rule: "Meta-Learning Bidirectional Update Rules" (Sandler et al., ICML 2021). The model keeps the
synapses as Keras variables and calls the one network step of `keras_blur.core.network`; no gradient is taken anywhere. The
genome is a constant of the compiled step: it does not change while a network learns, and a constant lets the compiler
drop the terms that a genome's zeros make vanish.
"""

from __future__ import annotations

import inspect
import itertools
import json
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from keras_blur import arguments, distribution, files
from keras_blur.checks import CheckedModel, Expected, check_class_weight, checked, checked_validation, plain_errors
from keras_blur.core import feedback as feedbacks
from keras_blur.core import network
from keras_blur.core.connection import TRACE, Connection
from keras_blur.core.equations import SharedBatch, update_gate
from keras_blur.core.genome import Genome
from keras_blur.core.losses import ignored_class
from keras_blur.core.rule import Rule
from keras_blur.core.weightless import StructuralMap, structural_map
from keras_blur.layers.dense import Dense, check_keywords, refuse_outer_training

Array = Any
_TEXT = (keras.layers.TextVectorization, keras.layers.StringLookup, keras.layers.Hashing)

# Callbacks that read or set what only an optimizer has.
_OPTIMIZER_CALLBACKS = (
    keras.callbacks.LearningRateScheduler,
    keras.callbacks.ReduceLROnPlateau,
    keras.callbacks.SwapEMAWeights,
)
# Running statistics average over about `1 + step / _FORGETTING` batches, until the rule's momentum caps that: synapses
# change most in the first steps, and older statistics are those of another network.
_FORGETTING = 20.0


@keras.saving.register_keras_serializable(package="keras_blur")
class Sequential(CheckedModel):
    """A stack of layers that learns by a genome: put it where `keras.Sequential` was.

    Args:
        layers: a list of Keras layers: `keras_blur` layers, which hold synapses, and Keras layers without weights. Those
            before the first `keras_blur` layer prepare the input and may be any; between `keras_blur` layers states also
            go back through them, so they must be structural (Flatten, Reshape, Permute, Rescaling, Dropout, pooling). The
            last layer holds synapses. It may start with a `keras.Input`.
        genome: the `Genome` that updates the synapses.
        name: name of the model.
        **kwargs: `dtype` and `trainable`, as for `keras.Model`.

    Raises:
        ValueError: if there is no genome, if it is a population, a layer does not fit in the chain, or an argument is
            unknown.

    Example:

    >>> import numpy as np
    >>> from keras_blur import Genome, Rule, layers
    >>> model = Sequential([keras.Input((4,)), layers.Dense(8), layers.Dense(3)], genome=Genome.random(Rule(), seed=0))
    >>> model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    >>> history = model.fit(np.eye(4, dtype="float32"), np.array([0, 1, 2, 0]), verbose=0)
    >>> model.predict(np.eye(4, dtype="float32"), verbose=0).shape
    (4, 3)

    Source: "Meta-Learning Bidirectional Update Rules" (2021), section 3.3.
    """

    built: bool  # Keras sets it

    def __init__(
        self,
        layers: Iterable[Any] | None = None,
        genome: Genome | None = None,
        *,
        name: str | None = None,
        **kwargs: Any,
    ):
        check_keywords("Sequential", kwargs, ("dtype", "trainable"))
        super().__init__(name=name, autocast=False, **kwargs)
        if not isinstance(genome, Genome):
            raise ValueError(
                "`genome` must be a keras_blur.Genome, for instance keras_blur.genomes.backprop(), "
                f"keras_blur.genomes.load(NAME) or keras_blur.Genome.random(rule, seed). Received: genome={genome!r}"
            )
        if genome.population:
            raise ValueError(
                "`genome` must be a single one: a model learns by one genome. Received a population of shape "
                f"{genome.population}."
            )
        self._genome = genome
        self._chain: list[keras.Layer] = []
        self._input_batch_shape: tuple[int | None, ...] | None = None
        self._maps: list[tuple[StructuralMap, ...]] = []
        self._neurons: list[keras.Variable] = []
        self._targets = "auto"
        if layers is not None and not isinstance(layers, Iterable):
            raise ValueError(f"`layers` must be a list of Keras layers. {arguments.received('layers', layers)}")
        for layer in layers or ():
            self.add(layer)
        if self._input_batch_shape is not None and self._chain:
            self.build(self._input_batch_shape)

    # The chain.

    def add(self, layer: Any) -> None:
        """Adds a layer on top; a `keras.Input` only at the bottom, as the first."""
        if hasattr(layer, "_keras_history"):
            layer = layer._keras_history[0]
        if isinstance(layer, keras.layers.InputLayer):
            if self._chain or self._input_batch_shape is not None:
                raise ValueError("`keras.Input` must be the first entry of `layers`, and the only one.")
            self._input_batch_shape = tuple(layer.batch_shape)
            return
        if not isinstance(layer, keras.Layer):
            raise ValueError(f"`layers` must hold Keras layers. Received: {layer!r}")
        if any(layer.name == other.name for other in self._chain):
            raise ValueError(f"Layers must have different names. Received two layers named {layer.name!r}.")
        if self.built:
            raise ValueError(
                "The model is built, so no layer can be added. Give all layers at once, or add them without a keras.Input."
            )
        self.check_weightless(layer)
        self._chain.append(layer)

    def pop(self) -> keras.Layer:
        """Removes the last layer of a model that is not built yet, and returns it."""
        if self.built or not self._chain:
            raise ValueError("A layer can be removed only while the model is not built, and has layers.")
        return self._chain.pop()

    @property
    def layers(self) -> list[keras.Layer]:
        """The layers, without the input."""
        return list(self._chain)

    @property
    def genome(self) -> Genome:
        """The genome that updates the synapses."""
        return self._genome

    @genome.setter
    def genome(self, genome: Genome) -> None:
        if not isinstance(genome, Genome) or genome.population:
            raise ValueError(f"`genome` must be a single keras_blur.Genome. Received: {genome!r}")
        if self.built and genome.rule.get_config() != self._genome.rule.get_config():
            raise ValueError(
                "A built model takes only a genome of its own rule, since the rule decides which synapses there are. "
                "Make a new model for another rule."
            )
        self._genome = genome
        self.train_function = self.test_function = self.predict_function = None

    @property
    def rule(self) -> Rule:
        """The genome's rule."""
        return self._genome.rule

    @staticmethod
    def check_weightless(layer: keras.Layer) -> None:
        """Raises a `ValueError` if a layer that is none of synapses has weights or a regularizer."""
        if isinstance(layer, Dense):
            return
        if layer.activity_regularizer is not None or isinstance(layer, keras.layers.ActivityRegularization):
            raise ValueError(
                f"Layer {layer.name!r} must have no `activity_regularizer`, since a genome learns from the loss of "
                f"`compile` alone. Received: {layer.activity_regularizer!r}"
            )
        if isinstance(layer, keras.layers.Masking):
            raise ValueError(
                f"Layer {layer.name!r} (Masking) makes a mask, which no layer of synapses passes on: give examples that are "
                "to be left out a sample weight of 0."
            )
        twin = "keras_blur.layers.Dense" if isinstance(layer, keras.layers.Dense) else None
        if layer.weights or twin or isinstance(layer, keras.Model):
            use = f"Use {twin} in its place, or keras_blur.convert(model, genome) for a whole model." if twin else (
                "Use keras_blur.layers.Dense, or apply that layer to the data beforehand."
            )  # fmt: skip
            raise ValueError(
                f"Layer {layer.name!r} ({type(layer).__name__}) has weights of its own, which no genome would update. {use}"
            )

    def build(self, input_shape: tuple[int | None, ...] | None = None) -> None:
        """Makes the synapses for an input shape `(batch or None, *features)`."""
        if self.built:
            return
        shape = tuple(input_shape or self._input_batch_shape or ())
        if not shape:
            raise ValueError("The input shape is not known: start `layers` with a keras.Input, or call the model on data.")
        if self._input_batch_shape is not None and shape[1:] != self._input_batch_shape[1:]:
            raise ValueError(f"The model's input has shape {self._input_batch_shape}. Received shape {shape}.")
        if self._input_batch_shape is None:
            self._input_batch_shape = (None, *shape[1:])
        synaptic = [layer for layer in self._chain if isinstance(layer, Dense)]
        if not synaptic or self._chain[-1] is not synaptic[-1]:
            last = f"Received {self._chain[-1].name!r}." if self._chain else "Received no layers."
            raise ValueError(f"The last layer must hold synapses: use keras_blur.layers.Dense there. {last}")
        if self.rule.layers not in (None, len(synaptic)):
            raise ValueError(
                f"The genome is for {self.rule.layers} layers of synapses (`Rule.layers`); the model has {len(synaptic)}."
            )
        shape = self._input_batch_shape
        maps: list[StructuralMap] = []
        seen = 0
        for layer in self._chain:
            if not isinstance(layer, Dense):
                if not layer.built:
                    layer.build(shape)
                    self.check_weightless(layer)
                if seen:
                    maps.append(structural_map(layer, shape[1:]))
                shape = tuple(layer.compute_output_shape(shape))
                continue
            if len(shape) != 2:
                raise ValueError(
                    f"Layer {layer.name!r} needs an input of shape (batch, features). Received shape {shape}; add a "
                    "keras.layers.Flatten() before it."
                )
            if layer.variable_dtype != self.variable_dtype:
                raise ValueError(
                    f"`dtype` of layer {layer.name!r} must keep synapses in {self.variable_dtype}, as the model does. "
                    f"Received: dtype={layer.dtype_policy.name!r}"
                )
            seen += 1
            layer.join(self.rule, feeds_back=seen > 1, last=seen == len(synaptic))
            if not layer.built:
                layer.build(shape)
            self._maps.append(tuple(maps))
            maps = []
            if self.rule.keep_neurons:
                self._keep_neurons(shape[0], layer)
            shape = tuple(layer.compute_output_shape(shape))
        for index, layer in enumerate(self._chain):
            setattr(self, f"_layer_{index}", layer)  # tf.train.Checkpoint sees attributes, not lists
        self.learning_step = self.add_weight(
            name="learning_step", shape=(), dtype="int32", initializer="zeros", trainable=False
        )
        if self._normalizing():
            self.statistics_step = self.add_weight(
                name="statistics_step", shape=(), dtype="int32", initializer="zeros", trainable=False
            )
        self.built = True

    def _keep_neurons(self, batch: int | None, layer: Dense) -> None:
        if batch is None:
            raise ValueError(
                "A rule with `keep_neurons=True` keeps the states of each example of a batch, whose size must be known: "
                "start `layers` with keras.Input(..., batch_size=N)."
            )
        self._neurons.append(
            self.add_weight(
                name=f"neurons_{len(self._neurons)}", shape=(self.rule.states, batch, layer.units), initializer="zeros",
                trainable=False, autocast=False,
            )
        )  # fmt: skip

    def reset_states(self) -> None:
        """Sets kept neuron states to zero (a rule with `keep_neurons=True`)."""
        for variable in self._neurons:
            variable.assign(ops.zeros_like(variable))

    @property
    def stages(self) -> tuple[network.Stage, ...]:
        """The network as `keras_blur.core.network` takes it."""
        return tuple(
            network.Stage(layer.connection, maps, layer.trainable and self.trainable)
            for layer, maps in zip(self._synaptic(), self._maps, strict=True)
        )

    def _synaptic(self) -> list[Dense]:
        return [layer for layer in self._chain if isinstance(layer, Dense)]

    def _normalizing(self) -> list[Dense]:
        """The layers with running statistics: all layers of synapses, or none."""
        return [layer for layer in self._synaptic() if hasattr(layer, "moving_mean")]

    @property
    def connections(self) -> list[Connection]:
        """The pure operations of each layer of synapses."""
        return [layer.connection for layer in self._synaptic()]

    def _synapses(self) -> tuple[dict[str, Array], ...]:
        return tuple(
            {name: ops.convert_to_tensor(variable) for name, variable in layer.synapses.items()}
            for layer in self._synaptic()
        )

    def _prepared(self, x: Array, training: bool) -> Array:
        for layer in itertools.takewhile(lambda layer: not isinstance(layer, Dense), self._chain):
            takes_training = "training" in inspect.signature(layer.call).parameters
            x = layer(x, training=training) if takes_training else layer(x)
        if self._neurons and x.shape[0] not in (None, self._neurons[0].shape[1]):
            raise ValueError(
                f"A rule with `keep_neurons=True` needs batches of the size it was built for, "
                f"{self._neurons[0].shape[1]} (drop a smaller last one). Received a batch of {x.shape[0]}."
            )
        return ops.cast(x, self.variable_dtype)

    def _kept(self) -> tuple[Array, ...]:
        """States before a step; the input's are overwritten and stand empty."""
        return (None, *(ops.convert_to_tensor(variable) for variable in self._neurons)) if self._neurons else ()

    def call(self, inputs: Array, training: bool = False) -> Array:
        """The prediction: state 1 of the output over the genome's temperature, `(batch, units)`.

        Raises:
            ValueError: if another Keras model calls this one under a gradient tape, to train it by an optimizer.
        """
        refuse_outer_training(self)
        statistics: list[Any] = []
        for layer in self._synaptic():
            usable = hasattr(layer, "moving_mean") and not training
            statistics.append((ops.convert_to_tensor(layer.moving_mean), ops.convert_to_tensor(layer.moving_variance))
                              if usable else None)  # fmt: skip
        stages = self.stages
        sweep = network.forward(
            self._genome,
            stages,
            network.stored(self._genome, stages, self._synapses()),
            self._prepared(inputs, training),
            neurons=self._kept(),
            statistics=statistics,
            training=bool(training),
        )
        return network.output(self._genome, sweep.neurons)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return (input_shape[0], self._synaptic()[-1].units)

    # Learning.

    def compile(
        self,
        optimizer: None = None,
        loss: Any = None,
        loss_weights: None = None,
        metrics: Any = None,
        weighted_metrics: Any = None,
        run_eagerly: bool = False,
        steps_per_execution: int = 1,
        jit_compile: bool | str = "auto",
        auto_scale_loss: bool = True,
        *,
        targets: str = "auto",
    ) -> None:
        """Configures learning and starts it afresh: the learning step and the traces of momentum become 0.

        There is no optimizer: the genome takes its place.

        Args:
            optimizer: must be `None`; stands where Keras has it.
            loss: the loss to report and, with `Rule.feedback="error"`, to learn from: a Keras loss, its name, or a
                function of labels and predictions. Labels are written as it takes them. `None` takes the rule's.
            loss_weights: must be `None`; a network has one output.
            metrics: as in Keras.
            weighted_metrics: as in Keras.
            run_eagerly: as in Keras.
            steps_per_execution: as in Keras.
            jit_compile: as in Keras.
            auto_scale_loss: as in Keras, where it concerns the optimizer: without one it has no effect. Layers with
                float16 products scale each factor to the range of float16.
            targets: how labels are written, for `Rule.feedback="labels"`: `"classes"` (integers), `"indicators"` (0 and 1),
                `"signs"` (-1 and +1), `"values"` (numbers fed as they are); `"auto"` takes what goes with the loss: integers
                with a sparse one, 0 and 1 with a cross-entropy, either with a hinge loss, values with others.

        Raises:
            ValueError: if an optimizer or loss weights are given, no loss is known, or its derivative is needed and
                `feedback.check_loss` refuses it.
        """
        if optimizer is not None:
            raise ValueError(
                f"`optimizer` must be left out: the genome updates the synapses. Received: optimizer={optimizer!r}"
            )
        if loss_weights is not None:
            raise ValueError(
                f"`loss_weights` must be left out: a network has one output. Received: loss_weights={loss_weights!r}"
            )
        loss = self.rule.keras_loss if loss is None else loss
        if loss is None:
            raise ValueError("`loss` must be a Keras loss or its name. Received: loss=None")
        if targets not in ("auto", *feedbacks.TARGETS):
            known = ", ".join(map(repr, ("auto", *feedbacks.TARGETS)))
            raise ValueError(f"`targets` must be one of {known}. Received: targets={targets!r}")
        resolved = feedbacks.resolve_loss(loss)
        if self.rule.feedback == "error":
            feedbacks.check_loss(resolved)
        self._targets = targets
        self._learned_loss = resolved
        super().compile(
            optimizer=None,
            loss=resolved,
            metrics=metrics,
            weighted_metrics=weighted_metrics,
            run_eagerly=run_eagerly,
            steps_per_execution=steps_per_execution,
            jit_compile=jit_compile,
            auto_scale_loss=auto_scale_loss,
        )
        self._asked = {
            "loss": resolved,
            "metrics": metrics,
            "weighted_metrics": weighted_metrics,
            "targets": targets,
            "run_eagerly": run_eagerly,
            "steps_per_execution": steps_per_execution,
            "jit_compile": jit_compile,
            "auto_scale_loss": auto_scale_loss,
        }
        if self.built:
            self.learning_step.assign(0)
            for layer in self._synaptic():
                for name, variable in layer.synapses.items():
                    if name.endswith(TRACE):
                        variable.assign(ops.zeros_like(variable))

    def get_compile_config(self) -> dict[str, Any]:
        if not self.compiled:
            return {}
        config = {name: keras.saving.serialize_keras_object(value) for name, value in self._asked.items()}
        return {**config, "loss": json.loads(feedbacks.loss_text(self._learned_loss))}

    def compile_from_config(self, config: Mapping[str, Any]) -> None:
        if config:
            self.compile(**keras.saving.deserialize_keras_object(dict(config)))

    def target_kind(self) -> str:
        """How the labels of a compiled model are written; see `compile`."""
        return feedbacks.target_kind(self._learned_loss) if self._targets == "auto" else self._targets

    def train_step(self, data: Any) -> dict[str, Array]:
        """One learning step on a batch; metrics are of the prediction before it, as in Keras."""
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        if not self.built:
            with tf.init_scope():
                self.build((None, *x.shape[1:]))
        rule, layers = self.rule, self._synaptic()
        shared = self._shared(x)
        weight = None if sample_weight is None else ops.reshape(ops.cast(sample_weight, self.variable_dtype), (-1,))
        respond: Callable[[Array], Array]
        if rule.feedback == "error":

            def respond(prediction: Array) -> Array:
                total = shared and (lambda number: shared.total([number])[0])
                return feedbacks.error(self._learned_loss, y, prediction, weight, total)
        else:
            labels = feedbacks.encode(y, layers[-1].units, self.target_kind())
            ignored = ignored_class(self._learned_loss)
            if ignored is not None:
                valid = ops.cast(ops.not_equal(ops.reshape(y, (-1,)), ignored), self.variable_dtype)
                weight = valid if weight is None else weight * valid

            def respond(prediction: Array) -> Array:
                return labels

        prepared = self._prepared(x, True)
        if self.losses:
            raise ValueError(
                "`layers` must add no losses of their own, since a genome learns from the loss of `compile` alone. "
                f"Received: {len(self.losses)} added by layers before the first one with synapses"
            )
        step = ops.convert_to_tensor(self.learning_step)
        result = network.step(
            self._genome,
            self.stages,
            network.NetworkState(self._synapses(), step, self._kept()),
            prepared,
            respond,
            sample_weight=weight if rule.feedback == "labels" else None,
            batch=shared,
        )
        for layer, new in zip(layers, result.state.synapses, strict=True):
            if layer.trainable and self.trainable:
                for name, variable in layer.synapses.items():
                    variable.assign(new[name])
        if self._normalizing():
            self._follow(result.state, prepared, shared)
        for variable, value in zip(self._neurons, result.state.neurons[1:], strict=True):
            variable.assign(value)
        with tf.control_dependencies([x]):  # a batch that can't be read is no step
            self.learning_step.assign(step + 1)
        loss_value = self.compute_loss(x=x, y=y, y_pred=result.output, sample_weight=sample_weight, training=True)
        self._loss_tracker.update_state(
            loss_value * distribution.replicas(),  # Keras divides losses by it
            sample_weight=ops.shape(result.output)[0],
        )
        return distribution.reducible(self.compute_metrics(x, y, result.output, sample_weight=sample_weight))

    def test_step(self, data: Any) -> dict[str, Array]:
        """As in Keras."""
        return distribution.reducible(super().test_step(data))

    def _maybe_symbolic_build(self, iterator: Any = None, data_batch: Any = None) -> None:
        """Keras's, which metrics are made in, looks at a batch; of a batch over several workers it cannot."""
        with self.distribute_strategy.scope():
            if iterator is not None and distribution.several_workers():
                iterator, data_batch = None, distribution.local_batch(next(iter(next(iter(iterator))[2])))
        super()._maybe_symbolic_build(iterator, data_batch)

    def _shared(self, x: Array) -> SharedBatch | None:
        """The batch, if several replicas share it."""
        if distribution.replicas() == 1:
            return None
        return SharedBatch(distribution.total([ops.cast(ops.shape(x)[0], self.variable_dtype)])[0], distribution.total)

    def _follow(self, state: network.NetworkState, prepared: Array, shared: SharedBatch | None) -> None:
        """Moves the running statistics of `predict` towards those that the new synapses give on this batch.

        The first batch replaces them, so that they have no bias. No input is dropped, as in prediction.
        """
        synapses = network.stored(self._genome, self.stages, state.synapses)
        sweep = network.forward(self._genome, self.stages, synapses, prepared, neurons=state.neurons, batch=shared)
        time = ops.cast(self.statistics_step, self.variable_dtype)
        old = ops.minimum(self.rule.normalization_momentum, time / (time + _FORGETTING))
        for layer, statistics in zip(self._normalizing(), sweep.statistics, strict=True):
            for variable, value in zip((layer.moving_mean, layer.moving_variance), statistics or (), strict=True):
                variable.assign(old * variable + (1.0 - old) * value)
        self.statistics_step.assign(self.statistics_step + 1)

    def fit(self, x: Any = None, y: Any = None, *args: Any, **kwargs: Any) -> keras.callbacks.History:
        """As in Keras, with the data checked: shapes, dtypes, labels, weights, and numbers that aren't finite.

        Arrays and the element specs of datasets are checked before the first step, the batches of a `tf.data.Dataset`, a
        `PyDataset` or a generator as they arrive; so are `validation_data`.

        Raises:
            ValueError: if data don't fit the model or the loss.
        """
        if not self.compiled:
            raise ValueError("The model must be compiled first: call `compile(loss=...)`.")
        given = inspect.signature(keras.Model.fit).bind(self, x, y, *args, **kwargs).arguments
        del given["self"]
        if isinstance(x, tf.data.Dataset) or inspect.isgenerator(x):
            given.setdefault("shuffle", False)  # Keras warns of its own default there
        weight = given.get("sample_weight")
        check_class_weight(given.get("class_weight"), weight, self._expected())
        given["x"], given["y"], given["sample_weight"] = checked(x, y, weight, self._expected)
        if given.get("validation_data") is not None:
            given["validation_data"] = checked_validation(given["validation_data"], self._expected)
        self._check_callbacks(given.get("callbacks"))
        self._warn_of_a_closed_gate()
        with plain_errors():
            return super().fit(**given)

    @staticmethod
    def _check_callbacks(callbacks: Any) -> None:
        """Raises a `ValueError` if one of the callbacks reads or sets what only an optimizer has."""
        for callback in keras.tree.flatten(getattr(callbacks, "callbacks", callbacks)):
            counts = isinstance(callback, keras.callbacks.TensorBoard) and callback.write_steps_per_second
            if counts or isinstance(callback, _OPTIMIZER_CALLBACKS):
                raise ValueError(
                    "`callbacks` must not use a learning rate, averages or step count of the optimizer, since a genome "
                    f"takes its place and has none. Received: {type(callback).__name__}"
                )

    def _warn_of_a_closed_gate(self) -> None:
        """Warns if the synapse update gate has decayed so far that little can be learned."""
        if self.rule.update_decay == "none" or not self.built:
            return
        one = np.float32(1.0)
        share = float(np.min(update_gate(self.rule, self._genome, one, self.learning_step.value)))
        if share < 0.01:
            warnings.warn(
                f"The genome's synapse update gate is {share:.2g} of its first value after "
                f"{int(self.learning_step.value)} learning steps, so little is learned; `compile` starts it afresh.",
                stacklevel=3,
            )

    def _expected(self) -> Expected:
        """The data that the model takes."""
        features = None if self._input_batch_shape is None else self._input_batch_shape[1:]
        text = any(isinstance(layer, _TEXT) for layer in self._chain[:1])
        if not self.compiled or not self._synaptic():
            return Expected(features, text=text)
        units = self._synaptic()[-1].units
        error = self.rule.feedback == "error"
        kind = feedbacks.target_kind(self._learned_loss) if error else self.target_kind()
        ignored = ignored_class(self._learned_loss)
        return Expected(features, (units,), kind, max(2, units), ignored, text)

    # What a person sees and what is saved.

    def summary(
        self,
        line_length: int | None = None,
        positions: list[float] | None = None,
        print_fn: Callable[[str], Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Prints the layers, as in Keras, then states, synapses and the genome."""
        show = print_fn or print
        super().summary(line_length=line_length, positions=positions, print_fn=print_fn, **kwargs)
        rule = self.rule
        show(
            f"States per neuron: {rule.states}; synapses: {rule.directions} directions, {rule.channels} channels; "
            f"learning steps so far: {int(ops.convert_to_numpy(self.learning_step)) if self.built else 0}"
        )
        show(self._genome.describe())

    def save(self, filepath: Any, overwrite: bool = True, zipped: bool | None = None, **kwargs: Any) -> None:
        """Saves the model, as in Keras. The file is written under another name first and renamed.

        Args:
            filepath: a path that ends in `.keras`.
            overwrite: as in Keras.
            zipped: as in Keras; `False` writes a folder.
            **kwargs: as in Keras.

        Raises:
            ValueError: if the path has another ending.
            OSError: if the file cannot be written; an old one stays as it is.
        """
        path = os.fspath(filepath)
        apart = zipped is False or path.startswith("hf://")
        if not apart and not path.endswith(".keras"):
            raise ValueError(f"`filepath` must end in '.keras'. Received: filepath={path!r}")
        if apart or (not overwrite and files.exists(path)):
            super().save(filepath, overwrite, zipped, **kwargs)
            return
        with files.replacing(path) as temporary:
            super().save(temporary, zipped=zipped, **kwargs)

    def save_weights(self, filepath: Any, overwrite: bool = True, max_shard_size: float | None = None) -> None:
        """Saves the weights, as in Keras. The file is written under another name first and renamed.

        Args:
            filepath: a path that ends in `.weights.h5`.
            overwrite: as in Keras.
            max_shard_size: as in Keras.

        Raises:
            ValueError: if the path has another ending.
            OSError: if the file cannot be written; an old one stays as it is.
        """
        path = os.fspath(filepath)
        if max_shard_size is not None or (not overwrite and files.exists(path)):
            super().save_weights(filepath, overwrite, max_shard_size)
            return
        if not path.endswith(".weights.h5"):
            raise ValueError(f"`filepath` must end in '.weights.h5'. Received: filepath={path!r}")
        with files.replacing(path) as temporary:
            super().save_weights(temporary)

    def export(self, filepath: Any, *args: Any, **kwargs: Any) -> None:
        """Exports the prediction for inference, as in Keras.

        Raises:
            ValueError: if the model is not built.
        """
        if not self.built:
            raise ValueError("The model must be built before `export`: start `layers` with a keras.Input, or call `fit`.")
        self(keras.KerasTensor(self._input_batch_shape, self.input_dtype))  # Keras reads the input's shape off a call
        super().export(filepath, *args, **kwargs)

    def get_config(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "trainable": self.trainable,
            "dtype": keras.saving.serialize_keras_object(self.dtype_policy),
            "input_batch_shape": self._input_batch_shape,
            "layers": [keras.saving.serialize_keras_object(layer) for layer in self._chain],
            "genome": keras.saving.serialize_keras_object(self._genome),
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any], custom_objects: Any = None) -> Sequential:
        config = dict(config)
        shape = config.pop("input_batch_shape")
        trainable = config.pop("trainable", True)
        layers = [keras.saving.deserialize_keras_object(layer, custom_objects) for layer in config.pop("layers")]
        if shape is not None:
            layers.insert(0, keras.layers.InputLayer(batch_shape=tuple(shape)))
        genome = keras.saving.deserialize_keras_object(config.pop("genome"))
        dtype = keras.saving.deserialize_keras_object(config.pop("dtype"))
        model = cls(layers, genome=genome, dtype=dtype, **config)
        model.trainable = trainable
        return model
