"""The Keras layer of dense synapses.

Source: "Meta-Learning Bidirectional Update Rules" (2021), equations 5 to 7; the Keras face follows `keras.layers.Dense`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import initializers, ops
from tensorflow.python.eager import record  # TensorFlow does not export whether a tape records

from keras_blur import arguments
from keras_blur.core import equations
from keras_blur.core.connection import TRACE
from keras_blur.core.connections.dense import DenseConnection
from keras_blur.core.rule import ACTIVATIONS, Rule

Array = Any


def check_keywords(kind: str, given: Mapping[str, Any], known: tuple[str, ...]) -> None:
    """Raises a `ValueError` if a keyword argument is not known, since Keras's base class would take some silently.

    Args:
        kind: what the arguments are of, for the message.
        given: the arguments.
        known: names of those that are taken.
    """
    for name, value in given.items():
        if name not in known:
            raise ValueError(
                f"`{name}` is not an argument of keras_blur's {kind}, whose learning the genome decides. "
                f"Received: {name}={value!r}"
            )


def refuse_outer_training(layer: keras.Layer) -> None:
    """Raises a `ValueError` if a layer that a genome trains is called by another Keras model under a gradient tape.

    Args:
        layer: a layer or model that is not frozen, inside its `call`.
    """
    outer = layer._get_call_context().entry_layer
    if outer is not layer and layer.trainable and record.could_possibly_record():
        error = ValueError(
            f"`{layer.name}` must not be trained inside another Keras model, whose optimizer would change what its "
            "genome learns: train it alone, or set `trainable = False` on it to use it as it is. "
            f"Received: {layer.name!r} inside {outer.name!r}"
        )
        error._keras_call_info_injected = True  # type: ignore[attr-defined]  # Keras wraps other errors of a call
        raise error


@keras.saving.register_keras_serializable(package="keras_blur")
class Dense(keras.layers.Layer):
    """A densely connected layer that learns by a genome: put it where `keras.layers.Dense` was.

    Inside a `keras_blur.Sequential` it holds the synapses of the model's rule (k channels, and a kernel for the way
    back), and the model's genome updates them. Inside an ordinary Keras model it is a Dense layer on state 1, trained by
    that model's optimizer; a layer that a genome trains already is refused there when training begins.

    Args:
        units: positive integer, number of neurons.
        activation: name of the layer's nonlinearity (`"tanh"`, `"relu"`, `"relu_tanh"`, `"sigmoid"`, `"linear"`);
            `None` takes the rule's in a `keras_blur.Sequential`, and none elsewhere.
        use_bias: whether a constant 1 stands beside the inputs.
        kernel_initializer: Keras initializer of each channel of the kernel.
        bias_initializer: Keras initializer of each channel of the bias.
        backward_initializer: initializer of each channel of the backward kernel; `None` takes `kernel_initializer`.
        **kwargs: `name`, `dtype`, `trainable` as for every Keras layer. `trainable=False` keeps the synapses as they are.

    Input shape:
        `(batch_size, ..., input_dim)`; in a `keras_blur.Sequential` `(batch_size, input_dim)`.

    Output shape:
        `(batch_size, ..., units)`.

    Raises:
        ValueError: if an argument is not one of the above.

    Example:

    >>> layer = Dense(3)
    >>> layer(np.ones((2, 5), "float32")).shape
    TensorShape([2, 3])

    Source: "Meta-Learning Bidirectional Update Rules" (2021), equations 5 to 7.
    """

    def __init__(
        self,
        units: int,
        activation: str | None = None,
        use_bias: bool = True,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        backward_initializer: Any = None,
        **kwargs: Any,
    ):
        if isinstance(units, bool) or not isinstance(units, (int, np.integer)) or units <= 0:
            raise ValueError(f"`units` must be a positive integer. Received: units={units!r}")
        if activation is not None and activation not in ACTIVATIONS:
            raise ValueError(
                f"`activation` must be None or one of {', '.join(map(repr, ACTIVATIONS))}, whose derivative the rule "
                f"knows. Received: activation={activation!r}"
            )
        check_keywords("Dense", kwargs, ("name", "dtype", "trainable"))
        super().__init__(**kwargs)
        if isinstance(self.dtype_policy, keras.dtype_policies.QuantizedDTypePolicy):
            raise ValueError(f"`dtype` must not be quantized. Received: dtype={self.dtype_policy.name!r}")
        self.units = int(units)
        self.activation = activation
        self.use_bias = bool(use_bias)
        self.kernel_initializer = _initializer("kernel_initializer", kernel_initializer)
        self.bias_initializer = _initializer("bias_initializer", bias_initializer)
        self.backward_initializer = _initializer("backward_initializer", backward_initializer)
        self.input_spec = keras.layers.InputSpec(min_ndim=2)
        self._rule: Rule | None = None
        self._feeds_back = False
        self._last = False

    def join(self, rule: Rule, *, feeds_back: bool, last: bool) -> None:
        """Takes the part of a layer in a network: called by a model before it builds the layer.

        Args:
            rule: the rule whose synapses to hold.
            feeds_back: whether a layer before this one learns from what flows back through it.
            last: whether it is the output layer.
        """
        part = (rule, feeds_back, last)
        if self.built and part != (self._rule, self._feeds_back, self._last):
            raise ValueError(
                f"Layer {self.name!r} is built for another place or rule; a layer of synapses belongs to one network. "
                "Make a new layer, or pass `weights`."
            )
        self._rule, self._feeds_back, self._last = part

    @property
    def connection(self) -> DenseConnection:
        """The pure operations of this layer."""
        compute = self.compute_dtype if self.compute_dtype != self.variable_dtype else None
        return DenseConnection(self.units, self.use_bias, self.activation, compute)

    @property
    def synapses(self) -> Mapping[str, keras.Variable]:
        """The weights by the names that `connection` knows them by."""
        names = ("kernel", "bias", "backward_kernel")
        known = (*names, *(name + TRACE for name in names))
        return {name: getattr(self, name) for name in known if getattr(self, name, None) is not None}

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        rule = self._rule or Rule(channels="tied", directions="tied")
        inputs = input_shape[-1]
        if inputs is None:
            raise ValueError(
                f"The last axis of the input of layer {self.name!r} must have a known size. Received shape {input_shape}"
            )
        chosen = {
            "kernel": self.kernel_initializer,
            "bias": self.bias_initializer,
            "backward_kernel": self.backward_initializer or self.kernel_initializer,
        }
        # Under a mixed policy the connection rounds the factors of a product, and nothing else is rounded.
        add = functools.partial(self.add_weight, autocast=False)
        for place, (name, shape) in enumerate(self.connection.shapes(rule, inputs, feeds_back=self._feeds_back).items()):
            stacked = _Channels(chosen[name], place)
            setattr(self, name, add(name=name, shape=shape, initializer=stacked))  # so checkpoints see it
            if rule.momentum:
                trace = add(name=name + TRACE, shape=shape, initializer="zeros", trainable=False)
                setattr(self, name + TRACE, trace)
        if rule.normalize_activations in ("forward", "both") and rule.normalization_axis == "batch" and self._rule:
            states = rule.states - 1 if rule.derivative_state else rule.states
            shape = (states, 1, self.units)
            self.moving_mean = add(name="moving_mean", shape=shape, initializer="zeros", trainable=False)
            self.moving_variance = add(name="moving_variance", shape=shape, initializer="ones", trainable=False)
        self.input_spec = keras.layers.InputSpec(min_ndim=2, axes={-1: inputs})
        self.built = True

    def call(self, inputs: Array) -> Array:
        if self._rule is not None:
            refuse_outer_training(self)
        kernel = ops.cast(self.synapses["kernel"], self.compute_dtype)[0]
        y = ops.matmul(inputs, kernel)
        if self.use_bias:
            y = y + ops.cast(self.synapses["bias"], self.compute_dtype)[0, 0]
        default = None
        if self._rule is not None:
            default = self._rule.last_activation if self._last else self._rule.forward_activation
        return equations.activate(self.activation or default or "linear", y)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return (*input_shape[:-1], self.units)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "units": self.units,
            "activation": self.activation,
            "use_bias": self.use_bias,
            "kernel_initializer": initializers.serialize(self.kernel_initializer),
            "bias_initializer": initializers.serialize(self.bias_initializer),
            "backward_initializer": initializers.serialize(self.backward_initializer),
        }

    def get_build_config(self) -> dict[str, Any] | None:
        config = super().get_build_config()
        if config is not None and self._rule is not None:
            config = {**config, "part": [self._rule.get_config(), self._feeds_back, self._last]}
        return config

    def build_from_config(self, config: dict[str, Any]) -> None:
        config = dict(config)
        part = config.pop("part", None)
        if part is not None and self._rule is None:
            self.join(Rule.from_config(part[0]), feeds_back=part[1], last=part[2])
        super().build_from_config(config)


class _Channels(initializers.Initializer):
    """Draws each channel of a kernel on its own, as if it were the kernel of a Keras layer.

    A Keras initializer gives the same values at each call; so each channel has a copy of it with another seed.
    """

    def __init__(self, initializer: initializers.Initializer, place: int):
        self.initializer = initializer
        self.place = place

    def __call__(self, shape: tuple[int, ...], dtype: Any = None) -> Array:
        return ops.stack([self._copy(channel)(shape[1:], dtype=dtype) for channel in range(shape[0])])

    def _copy(self, channel: int) -> initializers.Initializer:
        config = self.initializer.get_config() if hasattr(self.initializer, "get_config") else {}
        seed = config.get("seed")
        if "seed" not in config or not (seed is None or isinstance(seed, int)):
            return self.initializer
        if seed is not None and (self.place, channel) != (0, 0):  # the first kernel is that of the Keras twin
            config["seed"] = int(np.random.SeedSequence([seed, self.place, channel]).generate_state(1)[0] >> 1)
        return type(self.initializer).from_config(config)


def _initializer(name: str, value: Any) -> Any:
    """The Keras initializer that an argument stands for."""
    try:
        return initializers.get(value)
    except (ValueError, TypeError) as error:
        raise ValueError(f"`{name}` must be a Keras initializer or its name. {arguments.received(name, value)}") from error
