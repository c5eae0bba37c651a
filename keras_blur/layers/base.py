"""The common part of all layers with synapses: channels of weights, membership in a network, and
use in a plain Keras model."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import keras
import numpy as np
from keras import initializers, ops

from keras_blur import arguments
from keras_blur.backend import training_elsewhere
from keras_blur.core import equations
from keras_blur.core.companions import AVERAGE, TRACE, companions, slow
from keras_blur.core.connection import Connection
from keras_blur.core.rule import ACTIVATIONS, Rule
from keras_blur.core.weightless import ActivationMap, Elementwise, Sigmoid, Softmax, WeightlessMap

Array = Any
Shape = tuple[Any, ...]

NAMES = ("kernel", "bias", "backward_kernel")


class Plan(Protocol):
    """The plan to which a layer adds its operations when a model reads its graph. Values are
    numbered."""

    def connect(self, layer: SynapticLayer, value: int, activation: equations.Activation | None) -> int:
        """Adds the layer's connection and returns the number of its neurons."""
        ...

    def map(self, weightless: WeightlessMap, *values: int) -> int:
        """Adds a map without synapses and returns the number of its value."""
        ...

    def shape(self, value: int) -> Shape:
        """Shape of the features of a value."""
        ...

    def follow(self, layer: Any, weightless: WeightlessMap, value: int) -> None:
        """Registers a layer with moving statistics, and the map that normalises a value by them."""
        ...


def check_keywords(kind: str, given: Mapping[str, Any], known: tuple[str, ...]) -> None:
    """Raises a `ValueError` if a keyword argument is unknown. Keras's base class ignores some
    silently.

    Args:
        kind: name of the class, for the message.
        given: the keyword arguments.
        known: names of the known arguments.
    """
    for name, value in given.items():
        if name not in known:
            raise ValueError(
                f"keras_blur's {kind} has no argument `{name}`; the genome decides how it learns. Received: {name}={value!r}"
            )


def _outermost(layer: keras.Layer) -> keras.Layer:
    """The outermost layer being called, from which Keras takes `training`; outside of any call, the
    layer itself."""
    context = layer._get_call_context()  # creates a context if there is none, and nothing would end it
    if not hasattr(context, "training"):
        layer._maybe_reset_call_context()
    return context.entry_layer


def refuse_outer_training(layer: keras.Layer) -> None:
    """Raises a `ValueError` if another Keras model calls a layer that a genome trains under a
    gradient tape.

    Args:
        layer: a layer or model that is not frozen, inside its `call`.
    """
    outer = _outermost(layer)
    if outer is not layer and layer.trainable and training_elsewhere():
        error = ValueError(
            f"`{layer.name}` must not be trained inside another Keras model, whose optimizer would change what its "
            "genome learns: train it alone, or set `trainable = False` on it to use it as it is. "
            f"Received: {layer.name!r} inside {outer.name!r}"
        )
        error._keras_call_info_injected = True  # type: ignore[attr-defined]  # Keras wraps other errors of a call
        raise error


def refuse_activity(regularizer: Any) -> None:
    """Raises a `ValueError` unless an activity regularizer is `None`."""
    if regularizer is not None:
        raise ValueError(
            "`activity_regularizer` must be None, since a genome learns from the loss of `compile` alone. "
            f"Received: activity_regularizer={regularizer!r}"
        )


def numbers_of(variable: Any) -> np.ndarray:
    """A copy of a variable's numbers. `ops.convert_to_numpy` would make numpy 2 warn on
    TensorFlow."""
    return np.asarray(ops.convert_to_tensor(variable)).copy()


def seed_generators(layer: keras.Layer) -> list[keras.random.SeedGenerator]:
    """The generators of random numbers of a layer or model, and of the layers inside it."""
    every = (value for one in layer._flatten_layers() for value in vars(one).values())
    return [value for value in every if isinstance(value, keras.random.SeedGenerator)]


class BlurLayer(keras.layers.Layer):
    """A layer that a genome can train: one connection, or several connections with maps between
    them."""

    @abc.abstractmethod
    def trace(self, plan: Plan, *values: int, **arguments: Any) -> int:
        """Adds the layer's operations to a plan.

        Args:
            plan: the plan.
            *values: numbers of the input values.
            **arguments: the other arguments of the call.

        Returns:
            The number of the output value.
        """

    def parts(self) -> list[SynapticLayer]:
        """The layers with synapses in this layer. This is a method, since Keras would save the
        value of a property."""
        return [layer for layer in self._flatten_layers() if isinstance(layer, SynapticLayer)]


def check_trained_by_gradients(argument: str, model: keras.Model) -> None:
    """Raises a `ValueError` if a layer of a model learns with a genome.

    An optimizer would change its synapses, but not the averages that predict, nor other state of
    the rule.
    """
    learned = [layer.name for layer in model._flatten_layers() if isinstance(layer, BlurLayer)]
    if learned:
        raise ValueError(
            f"`{argument}` must be a Keras model that an optimizer trains; `to_keras()` makes one. "
            f"Received: {model.name}, in which {', '.join(learned[:5])} learn with a genome"
        )


class SynapticLayer(BlurLayer):
    """A layer with one connection. A subclass defines the connection and takes the arguments of its
    Keras twin.

    Inside a model that learns with a genome, the layer holds the synapses of the model's rule: a
    channel of weights for each state, and a backward kernel if the rule has one. Elsewhere it acts
    as its Keras twin, on state 1.
    """

    _keywords = ("name", "dtype", "trainable")
    statistics_prefix = ""

    def __init__(
        self,
        *,
        activation: Any = None,
        use_bias: bool = True,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        backward_initializer: Any = None,
        kernel_regularizer: Any = None,
        bias_regularizer: Any = None,
        kernel_constraint: Any = None,
        bias_constraint: Any = None,
        **kwargs: Any,
    ):
        check_keywords(type(self).__name__, kwargs, self._keywords)
        super().__init__(**kwargs)
        if isinstance(self.dtype_policy, keras.dtype_policies.QuantizedDTypePolicy):
            raise ValueError(f"`dtype` must not be quantized. Received: dtype={self.dtype_policy.name!r}")
        self.activation = checked_activation(activation)
        self.use_bias = bool(use_bias)
        self.kernel_initializer = _from_keras("kernel_initializer", kernel_initializer, initializers)
        self.bias_initializer = _from_keras("bias_initializer", bias_initializer, initializers)
        self.backward_initializer = _from_keras("backward_initializer", backward_initializer, initializers)
        self.kernel_regularizer = _from_keras("kernel_regularizer", kernel_regularizer, keras.regularizers)
        self.bias_regularizer = _from_keras("bias_regularizer", bias_regularizer, keras.regularizers)
        self.kernel_constraint = _from_keras("kernel_constraint", kernel_constraint, keras.constraints)
        self.bias_constraint = _from_keras("bias_constraint", bias_constraint, keras.constraints)
        self._rule: Rule | None = None
        self._feeds_back = False
        self._default: str | None = None
        self._source: Shape | None = None
        self.averaged: keras.Variable | None = None  # 1 where the averages hold, 0 before they do

    # Defined by a subclass.

    @abc.abstractmethod
    def make_connection(self, source: Shape) -> Connection:
        """The connection for features of shape `source`."""

    # Membership in a network.

    def trace(self, plan: Plan, *values: int, **arguments: Any) -> int:
        (value,) = values
        if isinstance(self.activation, str) or self.activation is None or is_elementwise(self.activation):
            return plan.connect(self, value, self.activation)
        neurons = plan.connect(self, value, "linear")
        shape = plan.shape(neurons)
        return plan.map(activation_map(self.activation, shape), neurons)

    def join(self, rule: Rule, *, feeds_back: bool, default: str) -> None:
        """Adds the layer to a network. A model calls this when it reads its graph.

        A built layer gets the synapses of the rule. Its first channel keeps the current weights.

        Args:
            rule: the rule that determines the synapses.
            feeds_back: whether an earlier layer learns from feedback through this one.
            default: nonlinearity of the layer if `activation` is `None`.

        Raises:
            ValueError: if the layer is in another network or has another rule already.
        """
        part = (rule, feeds_back, default)
        if self._rule is not None and part != (self._rule, self._feeds_back, self._default):
            raise ValueError(
                f"Layer {self.name!r} must keep its place and rule, since it has the synapses of one network; make a new "
                f"layer for another. Received: a part in a second network"
            )
        if self._rule is not None:
            return
        self._rule, self._feeds_back, self._default = part
        if not self.built:
            return
        plain = {name: numbers_of(variable)[0] for name, variable in self.synapses.items()}
        others = list(self._non_trainable_variables)
        for variable in (*(getattr(self, name) for name in plain), *others):
            self._untrack_variable(variable)
        self._tracker.unlock()
        self._add_synapses(self.source)
        for variable in others:  # after the synapses, as in a layer that is built later
            self._track_variable(variable)
        self._tracker.lock()
        for name, value in plain.items():
            variable = self.synapses[name]
            variable.assign(np.concatenate([value[None], numbers_of(variable)[1:]]))

    @property
    def source(self) -> Shape:
        """Shape of the input features of a built layer, else `()`."""
        return self._source or ()

    @property
    def rule(self) -> Rule | None:
        """The rule of the synapses; `None` outside a model that learns with a genome."""
        return self._rule

    @property
    def connection(self) -> Connection:
        """The pure operations of a built layer."""
        return self.connection_for(self.source)

    def connection_for(self, source: Shape) -> Connection:
        compute = self.compute_dtype if self.compute_dtype != self.variable_dtype else None
        connection, shapes = self.make_connection(source), self.plain_shapes(source)
        penalties = {"kernel": self.kernel_regularizer, "bias": self.bias_regularizer}
        limits = {"kernel": self.kernel_constraint, "bias": self.bias_constraint}
        return dataclasses.replace(
            connection,
            compute_dtype=compute,
            penalties={name: _penalty(one, shapes[name]) for name, one in penalties.items() if one is not None},
            limits={name: _limit(one, shapes[name]) for name, one in limits.items() if one is not None},
        )

    def plain_shapes(self, source: Shape) -> dict[str, Shape]:
        """Shapes of kernel and bias in the Keras twin, whose initializers, regularizers and
        constraints see them so. A channel has the same numbers in the same order."""
        connection = self.make_connection(source)
        return {"kernel": connection.kernel_shape(source), "bias": (connection.units,)}

    def plain_initializers(self, source: Shape) -> dict[str, Any]:
        """What draws a channel of each array, in the shape of the Keras twin."""
        return {
            "kernel": self.kernel_initializer,
            "bias": self.bias_initializer,
            "backward_kernel": self.backward_initializer or self.kernel_initializer,
        }

    @property
    def statistics_names(self) -> tuple[str, str]:
        """Names of the running statistics, which a rule that normalises over the batch has."""
        return self.statistics_prefix + "moving_mean", self.statistics_prefix + "moving_variance"

    @property
    def statistics(self) -> tuple[keras.Variable, keras.Variable] | None:
        """The running mean and variance if the rule normalises over the batch, else `None`."""
        mean, variance = (getattr(self, name, None) for name in self.statistics_names)
        return None if mean is None or variance is None or not self._normalizes else (mean, variance)

    @property
    def _normalizes(self) -> bool:
        rule = self._rule
        return rule is not None and rule.normalize_activations in ("forward", "both") and rule.normalization_axis == "batch"

    @property
    def synapses(self) -> Mapping[str, keras.Variable]:
        """The weights by their names in `connection`."""
        known = (*NAMES, *(name + end for end in (TRACE, AVERAGE) for name in NAMES))
        return {name: getattr(self, name) for name in known if getattr(self, name, None) is not None}

    def predicting(self) -> Mapping[str, Array]:
        """The synapses that predict, by the same names: the slow ones, if the rule has them and
        they hold."""
        values = {name: ops.convert_to_tensor(variable) for name, variable in self.synapses.items()}
        return values if self._rule is None or self.averaged is None else slow(self._rule, values, self.averaged)

    def build(self, input_shape: Shape) -> None:
        source = tuple(input_shape[1:])
        if any(size is None for size in source):
            raise ValueError(
                f"The input of layer {self.name!r} must have a known size on every axis but the first. "
                f"Received shape {tuple(input_shape)}"
            )
        self._source = source
        self._add_synapses(source)
        self.built = True

    def _add_synapses(self, source: Shape) -> None:
        rule = self._rule or Rule(channels="tied", directions="tied")
        # No autocast: under a mixed policy the connection rounds the factors of products and
        # nothing else.
        add = functools.partial(self.add_weight, autocast=False)
        connection = self.connection_for(source)
        shapes = connection.shapes(rule, source, feeds_back=self._feeds_back)
        drawn, plain = self.plain_initializers(source), self.plain_shapes(source)
        for place, (name, shape) in enumerate(shapes.items()):
            back = name.startswith("backward_")
            stacked = _Channels(drawn[name], place, plain[name.removeprefix("backward_")], as_keras=not back)
            penalty, limit = connection.penalties.get(name), connection.limits.get(name)
            variable = add(
                name=name, shape=shape, initializer=stacked,
                # For the reported loss and for plain Keras models. A network that learns with a
                # genome takes both from the connection.
                regularizer=None if penalty is None else lambda value, penalty=penalty: penalty(value[0]),
                constraint=None if limit is None else lambda value, limit=limit: limit(value[0])[None],
            )  # fmt: skip
            setattr(self, name, variable)  # so that Keras saves it
        for name, like in companions(rule, tuple(shapes)).items() if self._rule else ():
            setattr(self, name, add(name=name, shape=shapes[like], initializer="zeros", trainable=False))
        if self._rule and rule.slow_synapses:
            self.averaged = add(name="averaged", shape=(), dtype="int32", initializer="zeros", trainable=False)
        if self._normalizes:
            shape = connection.statistics_shape(rule)
            for name, start in zip(self.statistics_names, ("zeros", "ones"), strict=True):
                setattr(self, name, add(name=name, shape=shape, initializer=start, trainable=False))

    # Use in a plain Keras model.

    def call(self, inputs: Array) -> Array:
        if self._rule is not None:
            refuse_outer_training(self)
        activation = self.activation or self._default or "linear"
        return equations.activate(activation, self.summed(inputs))

    def summed(self, inputs: Array) -> Array:
        """The summed input of state 1, before the nonlinearity."""
        source = tuple(inputs.shape[1:])
        connection = self.connection_for(source)
        read = {name: value for name, value in self.predicting().items() if name in ("kernel", "bias")}
        values = {name: ops.cast(value, self.compute_dtype)[:1] for name, value in read.items()}
        y = inputs[None]
        if "kernel" in values:
            y = connection.product(values["kernel"], y)
        rows = connection.rows(y)
        if "bias" in values:
            rows = rows + values["bias"]
        return connection.features(rows, source)[0]

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return (input_shape[0], *self.make_connection(tuple(input_shape[1:])).target(tuple(input_shape[1:])))

    def get_config(self) -> dict[str, Any]:
        config = {
            "activation": serialized_activation(self.activation),
            "use_bias": self.use_bias,
            "kernel_initializer": initializers.serialize(self.kernel_initializer),
            "bias_initializer": initializers.serialize(self.bias_initializer),
            "backward_initializer": initializers.serialize(self.backward_initializer),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
            "bias_regularizer": keras.regularizers.serialize(self.bias_regularizer),
            "kernel_constraint": keras.constraints.serialize(self.kernel_constraint),
            "bias_constraint": keras.constraints.serialize(self.bias_constraint),
        }
        return {**super().get_config(), **config}

    def save_own_variables(self, store: Any) -> None:
        """As in Keras, but by name. The order of the variables depends on whether the layer was
        built before it joined a network."""
        for variable in self._trainable_variables + self._non_trainable_variables:
            store[variable.name] = variable

    def load_own_variables(self, store: Any) -> None:
        """As in Keras, but by name.

        Raises:
            ValueError: if the stored names are not those of this layer's variables.
        """
        own = {variable.name: variable for variable in self._trainable_variables + self._non_trainable_variables}
        if set(store.keys()) != set(own):
            raise ValueError(
                f"Layer {self.name!r} must be loaded from variables {sorted(own)}. Received: {sorted(store.keys())}"
            )
        for name, variable in own.items():
            variable.assign(store[name])

    def get_build_config(self) -> dict[str, Any] | None:
        config = super().get_build_config()
        if config is not None and self._rule is not None:
            config = {**config, "part": [self._rule.get_config(), self._feeds_back, self._default]}
        return config

    def build_from_config(self, config: dict[str, Any]) -> None:
        config = dict(config)
        part = config.pop("part", None)
        if part is not None and self._rule is None:
            self.join(Rule.from_config(part[0]), feeds_back=part[1], default=part[2])
        super().build_from_config(config)


class _Channels(initializers.Initializer):
    """Draws each channel of a kernel separately, as if it were the kernel of a Keras layer.

    A Keras initializer returns the same values at each call, so each channel uses a copy with
    another seed.
    """

    def __init__(self, initializer: initializers.Initializer, place: int, plain: Shape, as_keras: bool):
        self.initializer = initializer
        self.place = place
        self.plain = plain
        self.as_keras = as_keras

    def __call__(self, shape: tuple[int, ...], dtype: Any = None) -> Array:
        drawn = [self._copy(channel)(self.plain, dtype=dtype) for channel in range(shape[0])]
        return ops.reshape(ops.stack(drawn), shape)

    def _copy(self, channel: int) -> Callable[..., Array]:
        config = self.initializer.get_config() if hasattr(self.initializer, "get_config") else {}
        seed = config.get("seed")
        if "seed" not in config or not (seed is None or isinstance(seed, int)):
            return self.initializer
        # The first channel of kernel and bias equals that of the Keras twin.
        if seed is not None and not (self.as_keras and channel == 0):
            entropy = [seed % 2**64, self.place, channel]
            config["seed"] = int(np.random.SeedSequence(entropy).generate_state(1)[0] >> 1)
        return type(self.initializer).from_config(config)


def _penalty(regularizer: Any, plain: Shape) -> Callable[[Array], Array]:
    """A Keras regularizer as a function of one channel."""
    return lambda channel: regularizer(ops.reshape(channel, plain))


def _limit(constraint: Any, plain: Shape) -> Callable[[Array], Array]:
    """A Keras constraint as a function of one channel."""
    return lambda channel: ops.reshape(constraint(ops.reshape(channel, plain)), ops.shape(channel))


def _from_keras(name: str, value: Any, kind: Any) -> Any:
    """The Keras object given by an argument, which may be a name or a config."""
    try:
        return kind.get(value)
    except (ValueError, TypeError) as error:
        what = name.rpartition("_")[2]
        raise ValueError(f"`{name}` must be a Keras {what} or its name. {arguments.received(name, value)}") from error


@keras.saving.register_keras_serializable(package="keras_blur")
def relu_tanh(x: Array) -> Array:
    """`relu(tanh(x))`, the activation `"relu_tanh"` of a rule, for a plain Keras model."""
    return ops.relu(ops.tanh(x))


_SAMPLES = np.array([-1e3, -7.0, -3.0, -1.0, -0.3, 0.0, 0.3, 1.0, 3.0, 7.0, 1e3], np.float32)
_SHUFFLED = np.array([6, 2, 9, 0, 4, 10, 1, 7, 3, 8, 5])


def checked_activation(activation: Any) -> Any:
    """An activation as layers store it: a name in `ACTIVATIONS`, a function, or `None`.

    Args:
        activation: a name in `ACTIVATIONS`, a Keras activation or its name, or `None`.

    Raises:
        ValueError: if neither this package nor Keras knows it.
    """
    if activation is None or (isinstance(activation, str) and activation in ACTIVATIONS):
        return activation
    try:
        function = keras.activations.get(activation)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"`activation` must be None, one of {', '.join(map(repr, ACTIVATIONS))}, or a Keras activation or its name. "
            f"{arguments.received('activation', activation)}"
        ) from error
    name = getattr(function, "__name__", "")
    if name in ACTIVATIONS and getattr(keras.activations, name, None) is function:
        return name
    return function


def serialized_activation(activation: Any) -> Any:
    """An activation as a JSON-compatible value."""
    return activation if activation is None or isinstance(activation, str) else keras.activations.serialize(activation)


@functools.lru_cache(maxsize=256)
def is_elementwise(activation: Callable[[Any], Any]) -> bool:
    """Whether a function of arrays is elementwise, by a test on sample values."""
    places = np.stack([np.arange(len(_SAMPLES)), np.arange(len(_SAMPLES))[::-1], _SHUFFLED])
    whole = _SAMPLES[places]
    try:
        together = np.asarray(activation(ops.array(whole)))
        single = [np.asarray(activation(ops.full((1, 2), number)))[0, 0] for number in _SAMPLES]
    except Exception:
        return False
    wanted = np.array(single)[places]
    return together.shape == whole.shape and np.allclose(together, wanted, rtol=1e-4, atol=1e-5, equal_nan=True)


_SQUASHING = {keras.activations.softmax: Softmax, keras.activations.sigmoid: Sigmoid}


def activation_map(activation: Callable[[Any], Any], shape: Shape) -> WeightlessMap:
    """An activation as a map without synapses.

    Args:
        activation: a function of arrays `[batch, *shape]`.
        shape: shape of the features.
    """
    if activation in _SQUASHING:
        return _SQUASHING[activation](shape)
    kind = Elementwise if is_elementwise(activation) else ActivationMap
    return kind(activation, [shape], shape)
