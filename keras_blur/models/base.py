"""The common part of Keras models that learn with a genome under `fit`.

Source of the learning rule: "Meta-Learning Bidirectional Update Rules" (Sandler et al., ICML 2021).
The model keeps the synapses as Keras variables and calls the network step of
`keras_blur.core.network`. No gradient of the network is taken. The genome does not change while a
network learns, so it is a constant of the compiled step, and the plan omits all terms that its
zeros cancel.
"""

from __future__ import annotations

import fnmatch
import inspect
import json
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_blur import backend
from keras_blur.checks import (
    CheckedModel,
    Expected,
    check_class_weight,
    checked,
    checked_validation,
    is_loader,
    plain_errors,
)
from keras_blur.core import feedback as feedbacks
from keras_blur.core import network
from keras_blur.core.companions import AVERAGE, TRACE
from keras_blur.core.connection import Connection
from keras_blur.core.equations import SharedBatch, averaging_share, remembered_share, update_gate
from keras_blur.core.genome import Genome
from keras_blur.core.graph import Connect, Graph, Pass
from keras_blur.core.losses import ignored_class
from keras_blur.core.rule import Rule
from keras_blur.layers.base import BlurLayer, SynapticLayer, check_keywords, numbers_of, refuse_outer_training
from keras_blur.models import response
from keras_blur.models.reading import read
from keras_blur.models.saving import WholeFiles

Array = Any
_TEXT = (keras.layers.TextVectorization, keras.layers.StringLookup, keras.layers.Hashing)

# Callbacks that read or set state of an optimizer.
_OPTIMIZER_CALLBACKS = (
    keras.callbacks.LearningRateScheduler,
    keras.callbacks.ReduceLROnPlateau,
    keras.callbacks.SwapEMAWeights,
)


def _of_network(name: str, said: str) -> property:
    """An attribute of the network. It raises an `AttributeError` if the model is not built."""

    def read(model: BlurModel) -> Any:
        if model._network is None:
            raise AttributeError(f"A model that is not built has no `{name}`: give it an Input, or call it on a batch.")
        return getattr(model._network, name)

    return property(read, doc=said)


class BlurModel(WholeFiles, CheckedModel):
    """The common part of `Model` and `Sequential`: learning with a genome over a plan.

    A subclass sets `_network`, a Functional model, when it is built.
    """

    built: bool  # Keras sets it
    _network: Any  # a Functional model, once it is built

    def __init__(self, genome: Any, *, name: str | None = None, **kwargs: Any):
        check_keywords(type(self).__name__, kwargs, ("dtype", "trainable"))
        super().__init__(name=name, autocast=False, **kwargs)
        if not isinstance(genome, Genome):
            raise ValueError(
                "`genome` must be a keras_blur.Genome, for instance keras_blur.genomes.backprop(), "
                f"keras_blur.genomes.load(NAME) or keras_blur.Genome.random(rule, seed). Received: genome={genome!r}"
            )
        if genome.population:
            raise ValueError(
                "`genome` must be a single genome: a model learns with one genome. Received a population of shape "
                f"{genome.population}."
            )
        backend.check_constants(genome.arrays)
        self._genome = genome
        self._network = None
        self._reading: Any = None  # a Reading, once it is built
        self.reading: Any = None  # the same, or one at logits that suits the loss
        self._graphs: dict[tuple[bool, ...], Graph] = {}
        self._neurons: list[keras.Variable] = []
        self._targets = "auto"
        self._learned_loss: Any = None  # of `compile`

    @property
    def genome(self) -> Genome:
        """The genome that updates the synapses."""
        return self._genome

    @genome.setter
    def genome(self, genome: Genome) -> None:
        if not isinstance(genome, Genome) or genome.population:
            raise ValueError(f"`genome` must be a single keras_blur.Genome. Received: {genome!r}")
        backend.check_constants(genome.arrays)
        if self.built and genome.rule.get_config() != self._genome.rule.get_config():
            raise ValueError(
                "A built model takes only a genome of its own rule, since the rule decides which synapses there are. "
                "Make a new model for another rule."
            )
        before, self._genome = self._genome, genome
        try:
            if self._learned_loss is not None:
                self._read_losses()
        except ValueError:
            self._genome = before
            raise
        self.train_function = self.test_function = self.predict_function = None

    @property
    def rule(self) -> Rule:
        """The genome's rule."""
        return self._genome.rule

    # The plan.

    def _plan(self, functional: keras.Model) -> None:
        """Reads the plan of a Functional model and creates the variables for learning."""
        for layer in _all_layers(functional):
            if isinstance(layer, BlurLayer):
                for part in layer.parts():
                    if part.variable_dtype != self.variable_dtype:
                        raise ValueError(
                            f"`dtype` of layer {layer.name!r} must keep synapses in {self.variable_dtype}, as the model "
                            f"does. Received: dtype={layer.dtype_policy.name!r}"
                        )
        self._reading = self.reading = read(functional, self.rule, self._groups)
        self._network = functional
        if self.rule.keep_neurons:
            self._keep_neurons()
        self.learning_step = self.add_weight(
            name="learning_step", shape=(), dtype="int32", initializer="zeros", trainable=False
        )
        if self._normalizing():
            self.statistics_step = self.add_weight(
                name="statistics_step", shape=(), dtype="int32", initializer="zeros", trainable=False
            )
        self.built = True
        if self._learned_loss is not None:
            self._read_losses()

    def _groups(self, layers: Sequence[SynapticLayer]) -> list[int]:
        """For each layer with synapses, the index of its layer of the genome (`Rule.layers`)."""
        rule = self.rule
        if rule.layers is None:
            return [0] * len(layers)
        if isinstance(rule.layers, int):
            if rule.layers != len(layers):
                raise ValueError(
                    f"The genome is for {rule.layers} layers of synapses (`Rule.layers`); the model has {len(layers)}."
                )
            return list(range(len(layers)))
        found = []
        for layer in layers:
            names = (layer.name, type(layer).__name__)
            for place, pattern in enumerate(rule.layers):
                if any(fnmatch.fnmatchcase(name, pattern) for name in names):
                    found.append(place)
                    break
            else:
                raise ValueError(
                    f"`Rule.layers` must have a name or kind for every layer of synapses. Received: {rule.layers!r}, which "
                    f"has none for {layer.name!r} ({type(layer).__name__})"
                )
        return found

    def _keep_neurons(self) -> None:
        batch = self._network.inputs[0].shape[0]
        if batch is None:
            raise ValueError(
                "A rule with `keep_neurons=True` keeps the states of each example of a batch, whose size must be known: "
                "start `layers` with keras.Input(..., batch_size=N)."
            )
        for shape in self.reading.shapes:
            self._neurons.append(
                self.add_weight(
                    name=f"neurons_{len(self._neurons)}", shape=(self.rule.states, batch, *shape), initializer="zeros",
                    trainable=False, autocast=False,
                )
            )  # fmt: skip

    def reset_states(self) -> None:
        """Sets kept neuron states to zero (a rule with `keep_neurons=True`)."""
        for variable in self._neurons:
            variable.assign(ops.zeros(variable.shape, variable.dtype))

    @property
    def _graph(self) -> Graph:
        """The plan in which all layers learn except the frozen ones."""
        flags = tuple(self._learns(layer) for layer in self._synaptic())
        if flags not in self._graphs:
            self._graphs[flags] = self.reading.learning(flags)
        return self._graphs[flags]

    def _learns(self, layer: SynapticLayer) -> bool:
        return layer.trainable and self.trainable

    def _synaptic(self) -> tuple[SynapticLayer, ...]:
        return self.reading.layers

    def _normalizing(self) -> list[SynapticLayer]:
        """The layers with running statistics: all layers with synapses if the rule has any, or
        none."""
        return [layer for layer in self._synaptic() if layer.statistics is not None]

    @property
    def connections(self) -> list[Connection]:
        """The pure operations of each layer with synapses."""
        return list(self.reading.graph.holders)

    def _synapses(self) -> tuple[dict[str, Array], ...]:
        return tuple(
            {name: ops.convert_to_tensor(variable) for name, variable in layer.synapses.items()}
            for layer in self._synaptic()
        )

    def _inputs(self, x: Any) -> list[Array]:
        """Inputs of any structure as a list, in the order and dtypes of the network's inputs."""
        return list(self._network._standardize_inputs(x))

    def _assert_input_compatibility(self, *args: Any) -> None:
        """As in a Functional model of Keras: inputs have the shapes of the network's."""
        if self._network is not None:
            self._network._assert_input_compatibility(*args)

    def _prepared(self, inputs: list[Array], training: bool) -> list[Array]:
        """The arrays that enter the graph."""
        arrays = self.reading.prepare(inputs, training)
        if self._neurons and arrays[0].shape[0] not in (None, self._neurons[0].shape[1]):
            raise ValueError(
                f"A rule with `keep_neurons=True` needs batches of the size that the model was built for, "
                f"{self._neurons[0].shape[1]} (drop a smaller last one). Received a batch of {arrays[0].shape[0]}."
            )
        operations = self.reading.graph.operations
        whole = [isinstance(one, Connect) and one.connection.reads_integers for one in operations]
        read = [one.sources if isinstance(one, Pass) else (one.source,) for one in operations]
        others = {source for sources, integers in zip(read, whole, strict=True) if not integers for source in sources}
        return [ops.cast(value, self.variable_dtype if place in others else "int32") for place, value in enumerate(arrays)]

    def _kept(self) -> tuple[Array, ...]:
        """States before a step. Those of the inputs are overwritten, so they are left empty."""
        if not self._neurons:
            return ()
        inputs = [None] * len(self.reading.graph.features)
        return (*inputs, *(ops.convert_to_tensor(variable) for variable in self._neurons))

    def _statistics(self, training: bool) -> list[Any]:
        """The statistics that normalise the sums of each connection; `None` uses those of the
        batch."""
        layers = self._synaptic()
        found = []
        for one in self.reading.graph.connects:
            own = None if training else layers[one.holder].statistics
            found.append(None if own is None else tuple(ops.convert_to_tensor(value) for value in own))
        return found

    def call(self, inputs: Any, training: bool = False) -> Any:
        """The prediction: state 1 of the outputs, divided by the genome's temperature.

        A frozen model predicts inside another one that trains: `training` affects only
        dropout and layers without weights, as in Keras.

        Raises:
            ValueError: if another Keras model calls this one to train it with an optimizer. On JAX
                this is not detected.
        """
        refuse_outer_training(self)
        graph, learns = self._graph, bool(training and self.trainable)
        sweep = network.forward(
            self._genome,
            graph,
            self._read(graph, learns),
            tuple(self._prepared(self._inputs(inputs), training)),
            neurons=self._kept(),
            statistics=self._statistics(learns),
            training=bool(training),
        )
        return self._predicted(network.output(self._genome, graph, sweep.values))

    def _read(self, graph: Graph, training: bool) -> tuple[Any, ...]:
        """The synapses that a forward pass reads: those that predict, except in training."""
        synapses = self._synapses() if training else [layer.predicting() for layer in self._synaptic()]
        return network.stored(self._genome, graph, synapses)

    def _predicted(self, outputs: Any) -> Any:
        """Applies the heads to the outputs and packs them in the structure of the network's
        outputs; as in Keras, one output in a list is that output."""
        found = [response.predicted(head, value) for head, value in zip(self.reading.heads, _flat(outputs), strict=True)]
        struct = self._network._outputs_struct
        alone = isinstance(struct, (list, tuple)) and len(found) == 1
        return found[0] if alone else keras.tree.pack_sequence_as(struct, found)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return self._network.compute_output_shape(input_shape)

    def compute_output_spec(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        spec = self._network.compute_output_spec(inputs)
        return keras.tree.map_structure(lambda one: keras.KerasTensor(one.shape, self.variable_dtype), spec)

    @property
    def layers(self) -> list[keras.Layer]:
        """The layers, without the inputs."""
        if self._network is None:
            return []
        return [layer for layer in self._network.layers if not isinstance(layer, keras.layers.InputLayer)]

    inputs = _of_network("inputs", "The inputs.")
    outputs = _of_network("outputs", "The outputs.")
    input = _of_network("input", "The input, or the inputs in their structure.")
    output = _of_network("output", "The output, or the outputs in their structure.")
    input_shape = _of_network("input_shape", "Shape of the input, or of each.")
    output_shape = _of_network("output_shape", "Shape of the output, or of each.")
    output_names = _of_network("output_names", "Names of the outputs.")

    # Learning.

    def compile(
        self,
        optimizer: None = None,
        loss: Any = None,
        loss_weights: Any = None,
        metrics: Any = None,
        weighted_metrics: Any = None,
        run_eagerly: bool = False,
        steps_per_execution: int = 1,
        jit_compile: bool | str = "auto",
        auto_scale_loss: bool = True,
        *,
        targets: str = "auto",
    ) -> None:
        """Configures learning and resets the learning step and the momentum traces to 0.

        There is no optimizer. The genome updates the synapses. The synapses that learn are set to
        their slow averages, if the rule has them, so predictions do not change.

        Args:
            optimizer: must be `None`. It exists for compatibility with Keras.
            loss: the loss to report and, with `Rule.feedback="error"`, to learn from: a Keras loss,
                its name, or a function of labels and predictions. For several outputs: a list of
                losses, or a dict by the names of the outputs. Labels must have the form that the
                loss takes. `None` uses the loss of the rule.
            loss_weights: weight of each output's loss, in a list or a dict by the names of the
                outputs. `None` gives equal weights; it must be `None` for a model with one output.
            metrics: as in Keras.
            weighted_metrics: as in Keras.
            run_eagerly: as in Keras.
            steps_per_execution: as in Keras.
            jit_compile: as in Keras. `"auto"` is `False` on TensorFlow without an accelerator.
                Keep `"auto"` there for a rule with `whitening`: XLA factorises slowly on a CPU.
            auto_scale_loss: has no effect, since it concerns the optimizer in Keras. Layers with
                float16 products scale each factor to the range of float16.
            targets: how labels are written, for `Rule.feedback="labels"`: `"classes"` (integers),
                `"indicators"` (0 and 1), `"signs"` (-1 and +1), `"values"` (any numbers, used
                unchanged). `"auto"` follows the loss: integers for a sparse loss, 0 and 1 for a
                cross-entropy, 0 and 1 or -1 and +1 for a hinge loss, values for others.

        Raises:
            ValueError: if an optimizer is given, there is no loss, the losses do not fit the
                outputs, the rule needs the derivative of a loss that is not known, or such a rule
                has a loss of logits after a softmax or a sigmoid.
        """
        if optimizer is not None:
            raise ValueError(
                f"`optimizer` must be left out: the genome updates the synapses. Received: optimizer={optimizer!r}"
            )
        loss = self.rule.keras_loss if loss is None else loss
        if loss is None:
            raise ValueError("`loss` must be a Keras loss or its name. Received: loss=None")
        if targets not in ("auto", *feedbacks.TARGETS):
            known = ", ".join(map(repr, ("auto", *feedbacks.TARGETS)))
            raise ValueError(f"`targets` must be one of {known}. Received: targets={targets!r}")
        one_output = self._network is None or len(self._network.outputs) == 1
        if isinstance(loss, (list, tuple, dict)) and len(loss) == 1 and loss_weights is None and one_output:
            (loss,) = loss.values() if isinstance(loss, dict) else loss
        several = isinstance(loss, (list, tuple, dict))
        if loss_weights is not None and not several:
            raise ValueError(
                f"`loss_weights` must be left out, as the network has one output. Received: loss_weights={loss_weights!r}"
            )
        resolved = keras.tree.map_structure(feedbacks.resolve_loss, loss) if several else feedbacks.resolve_loss(loss)
        self._targets = targets
        self._learned_loss = resolved
        self._loss_weights = loss_weights
        self._read_losses()
        super().compile(
            optimizer=None,
            loss=resolved,
            loss_weights=loss_weights,
            metrics=metrics,
            weighted_metrics=weighted_metrics,
            run_eagerly=run_eagerly,
            steps_per_execution=steps_per_execution,
            jit_compile=jit_compile,
            auto_scale_loss=auto_scale_loss,
        )
        self._asked = types.SimpleNamespace(  # Keras would track metrics in a dict as parts of the model
            loss=resolved,
            loss_weights=loss_weights,
            metrics=metrics,
            weighted_metrics=weighted_metrics,
            targets=targets,
            run_eagerly=run_eagerly,
            steps_per_execution=steps_per_execution,
            jit_compile=jit_compile,
            auto_scale_loss=auto_scale_loss,
        )
        if self.built:
            self._restart()

    def _restart(self) -> None:
        """Resets learning to its first step. The synapses stay, and slow ones become those that
        learn, so predictions stay too."""
        for layer in self._synaptic():
            for name, variable in layer.synapses.items():
                if name.endswith(TRACE):
                    variable.assign(ops.zeros(variable.shape, variable.dtype))
        self.learning_step.assign(0)
        self._match_averages()

    def _match_averages(self) -> None:
        """Makes averages hold in all layers, or in none before the first step.

        A layer that got the variables of a trained one begins with its averages, which predict. One
        that got those of a new layer begins with averages of these.
        """
        layers = {layer: layer.averaged for layer in self._synaptic() if layer.averaged is not None}
        if not layers:
            return
        counts = [self.learning_step.value, *(held.value for held in layers.values())]
        learned, *averaged = np.asarray(ops.stack(counts)) > 0  # together, since each read waits for a device
        for (layer, held), holds in zip(layers.items(), averaged, strict=True):
            if holds == learned:
                continue
            for name, variable in layer.synapses.items():
                if name.endswith(AVERAGE):
                    own = layer.synapses[name.removesuffix(AVERAGE)]
                    back = layer.synapses.get("backward_" + name.removesuffix(AVERAGE))
                    if learned:
                        variable.assign(numbers_of(own))  # a copy, since JAX's trainer donates arrays
                        continue
                    shift = numbers_of(variable) - numbers_of(own)
                    own.assign(own + shift)
                    if back is not None and self.rule.directions == "tied_updates":
                        back.assign(back + shift)
            held.assign(int(learned))

    def make_train_function(self, force: bool = False) -> Any:
        """As in Keras, after making the averages of all layers match the learning step."""
        if self.built:
            self._match_averages()
        return super().make_train_function(force)

    def _read_losses(self) -> None:
        """Reads the network at the logits that losses are computed from. Raises a `ValueError` if a
        loss cannot be learned from.

        A sigmoid loses the gradient of its cross-entropy where it rounds to 0 or 1.
        """
        error, several = self.rule.feedback == "error", not isinstance(self._learned_loss, keras.losses.Loss)
        if several and not error and any(ignored_class(one) is not None for one in keras.tree.flatten(self._learned_loss)):
            raise ValueError(
                "`loss` must not ignore a class where a rule with feedback='labels' learns from several outputs, "
                f"since a weight is that of an example in all of them. Received: {self._learned_loss!r}"
            )
        if not error:
            return
        if self._reading is None:
            for loss in keras.tree.flatten(self._learned_loss):
                feedbacks.check_loss(response.of_logits(loss) or loss)
            return
        losses = [loss for loss, _ in response.losses_of(self._learned_loss, self._loss_weights, self._output_keys())]
        sigmoids = [
            response.takes_probabilities(loss) and self._reading.is_sigmoid(index, self.rule)
            for index, loss in enumerate(losses)
        ]
        for loss, sigmoid in zip(losses, sigmoids, strict=True):
            if sigmoid:
                response.check_probabilities(loss, "sigmoid")
        moved = [sigmoid and self._reads_errors_alone() for sigmoid in sigmoids]
        self.reading, self._graphs = self._reading.at_logits(moved), {}
        for loss, head in zip(losses, self.reading.heads, strict=True):
            if loss is not None:
                feedbacks.check_loss(response.at_logits(loss, head)[0])

    def _reads_errors_alone(self) -> bool:
        """Whether only the prediction reads state 1 of the outputs, so that their sigmoid may as
        well follow the neurons."""
        rule, arrays = self.rule, {name: np.asarray(array) for name, array in self._genome.arrays.items()}
        needed = 1 if rule.backward_update == "multiplicative_after_first" else 0  # states that are sent back
        reading = [arrays["mu_tilde"][..., 0, 0], arrays["mu"][..., 0, needed:]]
        if rule.directions == "untied":  # a backward kernel learns from the outputs as inputs
            reading.append(arrays["nu_tilde"][..., 0, 0])
        read = any(np.any(numbers != 0.0) for numbers in reading) or np.any(arrays["temperature"] != 1.0)
        plain = rule.derivative_state and rule.channels == "tied" and rule.oja == "none"
        return bool(plain and not read and not rule.keep_neurons and not rule.forward_synapse_update)

    def _learns_from_errors_alone(self) -> bool:
        """Whether an example without an error adds 0 to every sum that synapses learn from, as in
        backpropagation."""
        rule = self.rule
        products = rule.backward_update == "multiplicative_after_first" and rule.backward != "sigmoid"
        sums = rule.normalize_activations in ("none", "forward") and not rule.whitening
        known = all(isinstance(array, (np.ndarray, np.generic)) for array in self._genome.arrays.values())
        return bool(products and sums and known and self._reads_errors_alone())

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        """As in Keras, whose cross-entropies of probabilities use the logits where it has them."""
        if self.rule.feedback == "error" and self.reading is not None and y_pred is not None:
            losses = response.losses_of(self._learned_loss, self._loss_weights, self._output_keys())
            flat = [
                backend.with_logits(one) if response.suits(loss, head) else one
                for one, head, (loss, _) in zip(keras.tree.flatten(y_pred), self.reading.heads, losses, strict=True)
            ]
            y_pred = keras.tree.pack_sequence_as(y_pred, flat)
        return super().compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=training)

    def get_compile_config(self) -> dict[str, Any]:
        if not self.compiled:
            return {}
        config = {name: keras.saving.serialize_keras_object(value) for name, value in vars(self._asked).items()}
        config["loss"] = _loss_config(self._learned_loss)
        return config

    def compile_from_config(self, config: Mapping[str, Any]) -> None:
        if config:
            self.compile(**keras.saving.deserialize_keras_object(dict(config)))

    def target_kind(self) -> str:
        """How the labels of a compiled model are written; see `compile`."""
        return self._kind_of(self._learned_loss)

    def _kind_of(self, loss: keras.losses.Loss) -> str:
        return feedbacks.target_kind(loss) if self._targets == "auto" else self._targets

    def _build_for(self, x: Any) -> None:
        """Builds the model for a batch if it is not built."""

    def _output_keys(self) -> list[str]:
        """What losses, labels and weights call the outputs: their keys in a dict, else their
        names."""
        struct, names = self._network._outputs_struct, self._network.output_names
        if not isinstance(struct, Mapping) or len(struct) != len(names):
            return names
        places = keras.tree.pack_sequence_as(struct, list(range(len(names))))
        return sorted(places, key=places.get)

    def _wanted(self, y: Any, weights: Sequence[Any]) -> list[response.Wanted]:
        """What each output is to learn."""
        names = self._output_keys()
        losses = response.losses_of(self._learned_loss, self._loss_weights, names)
        parts = zip(losses, self.reading.heads, response.labels_of(y, names), weights, strict=True)
        wanted = [response.Wanted(*loss, head, labels, weight) for loss, head, labels, weight in parts]
        missing = [name for name, one in zip(names, wanted, strict=True) if one.loss is not None and one.labels is None]
        if missing:
            raise ValueError(f"`y` must have labels for each output with a loss. Received: none for {', '.join(missing)}")
        return wanted

    def _response(self, wanted: Sequence[response.Wanted], shared: SharedBatch | None) -> Callable[[Any], Any]:
        """The feedback into the outputs, as a function of the outputs."""
        total = None if shared is None else lambda number: shared.total([number])[0]

        def respond(outputs: Any) -> Any:
            if self.rule.feedback == "error":
                signals = response.errors(wanted, _flat(outputs), total)
            else:
                signals = response.signs(wanted, _flat(outputs), self._kind_of)
            return tuple(signals) if len(signals) > 1 else signals[0]

        return respond

    def train_step(self, *data: Any) -> Any:
        """One learning step on a batch. Metrics use the prediction before the step, as in Keras."""
        if len(data) == 2:  # JAX: the state of all variables, and the batch
            return _stateless(self, *data)
        return self._learn(data[0])

    def _learn(self, data: Any) -> dict[str, Array]:
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        if not self.built:
            self._build_for(x)
        self._assert_input_compatibility(x)
        rule, layers, graph = self.rule, self._synaptic(), self._graph
        shared = self._shared(keras.tree.flatten(x)[0])
        weights = response.weights_of(sample_weight, self._output_keys(), self.variable_dtype)
        wanted, hebbian_weight = self._wanted(y, weights), None
        if rule.feedback == "labels":
            hebbian_weight = response.one_weight(wanted)
            ignored = ignored_class(self._learned_loss)
            if ignored is not None:
                valid = ops.cast(ops.not_equal(ops.reshape(y, (-1,)), ignored), self.variable_dtype)
                hebbian_weight = valid if hebbian_weight is None else hebbian_weight * valid
        elif not self._learns_from_errors_alone():  # errors include the weights; other states do not
            hebbian_weight = response.teaching(wanted, self._network.outputs, self.variable_dtype)
        prepared = tuple(self._prepared(self._inputs(x), True))
        added = len(self.losses) - sum(variable.regularizer is not None for variable in self.trainable_variables)
        if added:
            raise ValueError(
                "`layers` must add no losses of their own, since a genome learns from the loss of `compile` alone. "
                f"Received: {added} added, by `add_loss` or by layers before the first one with synapses"
            )
        step = ops.convert_to_tensor(self.learning_step)
        result = network.step(
            self._genome,
            graph,
            network.NetworkState(self._synapses(), step, self._kept()),
            prepared,
            self._response(wanted, shared),
            sample_weight=hebbian_weight,
            batch=shared,
        )
        prediction = self._predicted(result.output)
        loss_value = self.compute_loss(x=x, y=y, y_pred=prediction, sample_weight=sample_weight, training=True)
        for holder, layer in enumerate(layers):
            for name, variable in layer.synapses.items():
                if self._learns(layer) or name.endswith(AVERAGE):
                    variable.assign(result.state.synapses[holder][name])
        self._follow_layers(result.sweep, shared)
        if self._normalizing():
            self._follow(result.state, prepared, shared)
        for variable, value in zip(self._neurons, result.state.neurons[len(graph.features) :], strict=True):
            variable.assign(value)
        self._count(step, x)
        self._loss_tracker.update_state(
            loss_value * backend.replicas(),  # Keras divides losses by it
            sample_weight=ops.shape(keras.tree.flatten(prediction)[0])[0],
        )
        return backend.reducible(self.compute_metrics(x, y, prediction, sample_weight=sample_weight))

    def _count(self, step: Array, x: Any) -> None:
        with backend.after(keras.tree.flatten(x)):  # a batch that cannot be read does not count as a step
            self.learning_step.assign(step + 1)
            for layer in self._synaptic():
                if layer.averaged is not None:
                    layer.averaged.assign(1)

    def test_step(self, *data: Any) -> Any:
        """As in Keras."""
        if len(data) == 2:
            return super().test_step(*data)
        return backend.reducible(super().test_step(*data))

    def _get_jax_state(self, **kinds: bool) -> Any:
        """As in Keras, without the variables of an optimizer, since there is none."""
        found: list[list[Any]] = []
        if kinds.get("trainable_variables"):
            found.append([variable.value for variable in self.trainable_variables])
        if kinds.get("non_trainable_variables"):
            found.append([variable.value for variable in self.non_trainable_variables])
        if kinds.get("optimizer_variables"):
            found.append([])
        if kinds.get("metrics_variables"):
            found.append([variable.value for variable in self.metrics_variables])
        return tuple(found)

    def _maybe_symbolic_build(self, iterator: Any = None, data_batch: Any = None) -> None:
        """As in Keras, whose own method creates the metrics and looks at a batch; it cannot do so
        if the batch is spread over several workers."""
        with backend.symbolic_build(self, iterator, data_batch) as (iterator, data_batch):
            super()._maybe_symbolic_build(iterator, data_batch)

    def _symbolic_build(self, iterator: Any = None, data_batch: Any = None) -> None:
        """As in Keras, but the variables were created for the first batch. Keras's method would
        create them while JAX traces."""
        if not self.built:
            if data_batch is None:
                _, _, batches = next(iter(iterator))
                data_batch = batches[0] if isinstance(batches, (list, tuple)) else next(batches)
            self._build_for(keras.utils.unpack_x_y_sample_weight(data_batch)[0])
        super()._symbolic_build(iterator, data_batch)

    def _shared(self, x: Array) -> SharedBatch | None:
        """The batch, if several replicas share it."""
        if backend.replicas() == 1:
            return None
        return SharedBatch(backend.total([ops.cast(ops.shape(x)[0], self.variable_dtype)])[0], backend.total)

    def _follow_layers(self, sweep: network.Sweep, shared: SharedBatch | None) -> None:
        """Moves the moving statistics of normalisation layers towards those of this batch.

        If the rule has slow synapses, the statistics are averages of the same kind, so they fit the
        network that predicts.
        """
        follows, layers = self.reading.follows, self.reading.layers
        for layer in dict.fromkeys(layer for layer, _, _ in follows if layer.trainable):
            uses = [one.moments((sweep.values[value],), shared) for other, one, value in follows if other is layer]
            share = None
            if self.rule.slow_synapses:
                gene = self._graph.genome(self._genome, layers.index(layer) if layer in layers else 0)
                share = averaging_share(gene, self.learning_step)
                uses = [tuple(sum(values) / len(uses) for values in zip(*uses, strict=True))]  # one step, so one share
            for mean, variance in uses:
                layer.follow(mean, variance, share)

    def _follow(self, state: network.NetworkState, prepared: Any, shared: SharedBatch | None) -> None:
        """Moves the running statistics of `predict` towards those of this batch under the new
        synapses.

        The first batch replaces them, so they have no bias; see `equations.remembered_share` for
        the others. Dropout is off, as in prediction.
        """
        graph = self._graph
        synapses = network.predicting(self._genome, graph, state)
        sweep = network.forward(self._genome, graph, synapses, prepared, neurons=state.neurons, batch=shared)
        examples = ops.cast(ops.shape(prepared[0])[0] if shared is None else shared.examples, self.variable_dtype)
        layers = self._synaptic()
        done = set()
        for one, statistics in zip(graph.connects, sweep.statistics, strict=True):
            own = layers[one.holder].statistics
            if own is None or statistics is None or one.holder in done:
                continue
            done.add(one.holder)
            old = remembered_share(self.rule, self.statistics_step, ops.convert_to_tensor(own[0]), statistics, examples)
            for variable, value in zip(own, statistics, strict=True):
                variable.assign(old * variable + (1.0 - old) * value)
        self.statistics_step.assign(self.statistics_step + 1)

    def fit(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        epochs: int = 1,
        verbose: Any = "auto",
        callbacks: Any = None,
        validation_split: float = 0.0,
        validation_data: Any = None,
        shuffle: bool = True,
        class_weight: Any = None,
        sample_weight: Any = None,
        initial_epoch: int = 0,
        steps_per_epoch: int | None = None,
        validation_steps: int | None = None,
        validation_batch_size: int | None = None,
        validation_freq: Any = 1,
    ) -> keras.callbacks.History:
        """As in Keras, but checks the data: shapes, dtypes, labels, weights, and whether numbers
        are finite.

        Arrays and the element specs of datasets are checked before the first step. The batches of a
        `tf.data.Dataset`, a `PyDataset` or a generator are checked as they arrive; those of a
        PyTorch `DataLoader`, of Grain and of `tf.distribute` are not. `validation_data` are checked
        in the same way.

        Raises:
            ValueError: if the model is not compiled, or data do not fit the model or the loss.
        """
        if not self.compiled:
            raise ValueError("The model must be compiled first: call `compile(loss=...)`.")
        given = dict(locals())
        del given["self"]
        given.pop("__class__", None)
        if backend.is_dataset(x) or inspect.isgenerator(x) or is_loader(x):
            given["shuffle"] = False  # Keras warns of its own default there
        self._check_callbacks(callbacks)
        self._warn_of_a_closed_gate()
        check_class_weight(class_weight, sample_weight, self._expected())
        given["x"], given["y"], given["sample_weight"] = checked(x, y, sample_weight, self._expected, learned=True)
        if validation_data is not None:
            given["validation_data"] = checked_validation(validation_data, self._expected)
        with plain_errors():
            return super().fit(**given)

    def _several(self) -> bool:
        """Whether there are several inputs or outputs or dicts of them, whose structure Keras
        checks."""
        made = self._network
        if made is None:
            return False
        keyed = any(isinstance(one, Mapping) for one in (made._inputs_struct, made._outputs_struct))
        return keyed or len(made.inputs) > 1 or len(made.outputs) > 1

    @staticmethod
    def _check_callbacks(callbacks: Any) -> None:
        """Raises a `ValueError` if a callback reads or sets state of an optimizer."""
        for callback in keras.tree.flatten(getattr(callbacks, "callbacks", callbacks)):
            counts = isinstance(callback, keras.callbacks.TensorBoard) and callback.write_steps_per_second
            if counts or isinstance(callback, _OPTIMIZER_CALLBACKS):
                raise ValueError(
                    "`callbacks` must not use a learning rate, averages or step count of the optimizer, since a genome "
                    f"takes its place and has none. Received: {type(callback).__name__}"
                )

    def _warn_of_a_closed_gate(self) -> None:
        """Warns if the synapse update gate has decayed so far that learning nearly stops."""
        if self.rule.update_decay == "none" or not self.built:
            return
        one = np.float32(1.0)
        step = numbers_of(self.learning_step)
        share = float(np.min(ops.convert_to_numpy(update_gate(self.rule, self._genome, one, step))))
        if share < 0.01:
            warnings.warn(
                f"The genome's synapse update gate is {share:.2g} of its initial value after "
                f"{int(step)} learning steps, so little is learned; `compile` resets it.",
                stacklevel=3,
            )

    def _expected(self) -> Expected:
        """The data that the model takes."""
        if self._several():
            return Expected(several=True, one_weight=self.rule.feedback == "labels")
        shape = self._first_shape()
        features = None if shape is None else tuple(shape[1:])
        text = any(isinstance(layer, _TEXT) for layer in self.layers[:1])
        if self._network is not None:
            text = text or any(tensor.dtype == "string" for tensor in self._network.inputs)
        if not self.compiled or self.reading is None:
            return Expected(features, text=text)
        outputs = tuple(self._network.outputs[0].shape[1:])
        error = self.rule.feedback == "error"
        kind = feedbacks.target_kind(self._learned_loss) if error else self.target_kind()
        ignored = ignored_class(self._learned_loss)
        return Expected(features, outputs, kind, max(2, outputs[-1]), ignored, text)

    def _first_shape(self) -> tuple[Any, ...] | None:
        return None if self._network is None else tuple(self._network.inputs[0].shape)

    # Summaries and saving.

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
            f"learning steps so far: {int(numbers_of(self.learning_step)) if self.built else 0}"
        )
        show(self._genome.describe())

    def export(self, filepath: Any, *args: Any, **kwargs: Any) -> None:
        """Exports the prediction for inference, as in Keras.

        Raises:
            ValueError: if the model is not built.
        """
        if not self.built:
            raise ValueError("The model must be built before `export`: start `layers` with a keras.Input, or call `fit`.")
        tensors = [keras.KerasTensor(one.shape, one.dtype) for one in self._network.inputs]
        self(tensors[0] if len(tensors) == 1 else tensors)  # Keras takes the input's shape from a call
        super().export(filepath, *args, **kwargs)

    def quantize(self, *args: Any, **kwargs: Any) -> None:
        """Raises a `ValueError`: the layers of a genome learn, and quantized ones cannot."""
        raise ValueError("A model that learns with a genome cannot be quantized: quantize the one of `to_keras()`.")

    def to_keras(self) -> keras.Model:
        """Converts this network to a plain Keras model with the same predictions.

        Raises:
            ValueError: if the model is not built, or its predictions depend on other states than
                state 1 or on more than the plain weights.

        Example:

        >>> from keras_blur import genomes, layers, Sequential
        >>> model = Sequential([keras.Input((4,)), layers.Dense(3)], genome=genomes.backprop())
        >>> model.to_keras().count_params()
        15
        """
        from keras_blur.models.convert import to_keras  # it makes models of its own

        return to_keras(self)

    @classmethod
    def _from_base_config(cls, config: Mapping[str, Any], *structure: Any) -> Any:
        """Makes the model from its structure and the result of `_base_config`."""
        config = dict(config)
        trainable = config.pop("trainable", True)
        genome = keras.saving.deserialize_keras_object(config.pop("genome"))
        dtype = keras.saving.deserialize_keras_object(config.pop("dtype"))
        model = cls(*structure, genome=genome, dtype=dtype, **config)  # type: ignore[misc]
        if not trainable:  # `True` would unfreeze frozen layers
            model.trainable = False
        return model

    def _base_config(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "trainable": self.trainable,
            "dtype": keras.saving.serialize_keras_object(self.dtype_policy),
            "genome": keras.saving.serialize_keras_object(self._genome),
        }


def _loss_config(loss: Any) -> Any:
    """The config of a loss, or of those in a list or dict."""
    if isinstance(loss, dict):
        return {name: _loss_config(one) for name, one in loss.items()}
    if isinstance(loss, (list, tuple)):
        return [_loss_config(one) for one in loss]
    return json.loads(feedbacks.loss_text(loss))


def _all_layers(model: keras.Model) -> list[keras.Layer]:
    """The layers of a model and of all models inside it."""
    found = []
    for layer in model.layers:
        found += _all_layers(layer) if isinstance(layer, keras.Model) else [layer]
    return found


def _flat(outputs: Any) -> tuple[Any, ...]:
    """One output or several as a tuple."""
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _stateless(model: BlurModel, state: Any, data: Any) -> Any:
    """A step of JAX's trainer, with the values of the variables as arguments and results."""
    trainable, others, optimizer, metrics = state
    variables = [*model.trainable_variables, *model.non_trainable_variables, *model.metrics_variables]
    mapping = list(zip(variables, [*trainable, *others, *metrics], strict=True))
    with keras.StatelessScope(state_mapping=mapping, collect_losses=True) as scope:
        logs = model._learn(data)

        def now(kept: Sequence[Any]) -> list[Any]:
            values = [scope.get_current_value(variable) for variable in kept]
            return [one.value if value is None else value for one, value in zip(kept, values, strict=True)]

        new = now(model.trainable_variables), now(model.non_trainable_variables), optimizer, now(model.metrics_variables)
    return logs, new
