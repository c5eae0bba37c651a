"""The densely connected layers: `Dense` and `EinsumDense`.

Source: "Meta-Learning Bidirectional Update Rules" (2021), equations 5 to 7. Arguments and shapes
are those of `keras.layers.Dense` and `keras.layers.EinsumDense`.
"""

from __future__ import annotations

from typing import Any

import keras

from keras_blur import arguments
from keras_blur.core.connection import Connection
from keras_blur.core.connections.dense import DenseConnection
from keras_blur.core.connections.einsum import EinsumConnection, einsum_connection
from keras_blur.layers.base import Shape, SynapticLayer, refuse_activity

Array = Any


@keras.saving.register_keras_serializable(package="keras_blur")
class Dense(SynapticLayer):
    """A densely connected layer that learns with a genome, in place of `keras.layers.Dense`.

    Inside a model that learns with a genome, the layer holds the synapses of the model's rule: k
    channels, and a backward kernel if the rule has one. Inside a plain Keras model it acts as a
    Keras Dense layer, which that model's optimizer trains. A layer must not be in both: on
    TensorFlow, training the plain model raises a `ValueError`; on JAX this is not detected.

    Args:
        units: positive integer, number of neurons.
        activation: nonlinearity of the layer: a Keras activation or its name, or `"relu_tanh"`.
            `None` uses the nonlinearity of the rule, but none in a plain Keras model or if a
            normalisation, activation or merging layer follows.
        use_bias: whether the layer has a bias, a synapse from a constant input of 1.
        kernel_initializer: Keras initializer of each channel of the kernel.
        bias_initializer: Keras initializer of each channel of the bias.
        kernel_regularizer: Keras regularizer of the kernel; its gradient is added to the Hebbian
            term.
        bias_regularizer: Keras regularizer of the bias.
        activity_regularizer: must be `None`, since a genome learns from the loss alone.
        kernel_constraint: Keras constraint of the kernel, applied after each update.
        bias_constraint: Keras constraint of the bias.
        backward_initializer: initializer of each channel of the backward kernel; `None` uses
            `kernel_initializer`.
        **kwargs: `name`, `dtype` and `trainable`, as for every Keras layer. `trainable=False`
            freezes the synapses.

    Input shape:
        `(batch_size, ..., input_dim)`.

    Output shape:
        `(batch_size, ..., units)`.

    Raises:
        ValueError: if an argument is unknown or invalid, or an input axis other than the first has
            an unknown size when the layer is built.

    Example:

    >>> import numpy as np
    >>> layer = Dense(3)
    >>> tuple(layer(np.ones((2, 5), "float32")).shape)
    (2, 3)

    Source: "Meta-Learning Bidirectional Update Rules" (2021), equations 5 to 7.
    """

    def __init__(
        self,
        units: int,
        activation: Any = None,
        use_bias: bool = True,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        kernel_regularizer: Any = None,
        bias_regularizer: Any = None,
        activity_regularizer: Any = None,
        kernel_constraint: Any = None,
        bias_constraint: Any = None,
        *,
        backward_initializer: Any = None,
        **kwargs: Any,
    ):
        refuse_activity(activity_regularizer)
        arguments.count("units", units)
        super().__init__(
            activation=activation,
            use_bias=use_bias,
            kernel_initializer=kernel_initializer,
            bias_initializer=bias_initializer,
            backward_initializer=backward_initializer,
            kernel_regularizer=kernel_regularizer,
            bias_regularizer=bias_regularizer,
            kernel_constraint=kernel_constraint,
            bias_constraint=bias_constraint,
            **kwargs,
        )
        self.units = int(units)
        self.input_spec = keras.layers.InputSpec(min_ndim=2)

    def make_connection(self, source: Shape) -> Connection:
        return DenseConnection(self.units, self.use_bias, self.activation, positions=tuple(source[:-1]))

    def build(self, input_shape: Shape) -> None:
        super().build(input_shape)
        self.input_spec = keras.layers.InputSpec(min_ndim=2, axes={-1: input_shape[-1]})

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "units": self.units}


@keras.saving.register_keras_serializable(package="keras_blur")
class EinsumDense(SynapticLayer):
    """An einsum dense layer that learns with a genome, in place of `keras.layers.EinsumDense`.

    Args:
        equation: the einsum, as in Keras. Input and output must begin with the same batch letter.
        output_shape: shape of the output without the batch, as in Keras; `None` for the size of an
            input axis.
        activation: as in `Dense`.
        bias_axes: `None` for no bias, or the letters of all output axes that the kernel has.
        kernel_initializer: as in `Dense`.
        bias_initializer: as in `Dense`.
        kernel_regularizer: as in `Dense`.
        bias_regularizer: as in `Dense`.
        kernel_constraint: as in `Dense`.
        bias_constraint: as in `Dense`.
        backward_initializer: as in `Dense`.
        **kwargs: as in `Dense`.

    Input shape:
        `(batch_size, ...)`, with an axis for each letter of the equation's input.

    Output shape:
        `(batch_size, *output_shape)`.

    Raises:
        ValueError: if an argument is unknown or invalid. If the equation or the shapes do not fit,
            it is raised when the layer is built.

    Example:

    >>> import numpy as np
    >>> layer = EinsumDense("abc,cde->abde", output_shape=(None, 2, 4), bias_axes="de")
    >>> tuple(layer(np.ones((3, 5, 6), "float32")).shape)
    (3, 5, 2, 4)
    """

    def __init__(
        self,
        equation: str,
        output_shape: Any,
        activation: Any = None,
        bias_axes: str | None = None,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        kernel_regularizer: Any = None,
        bias_regularizer: Any = None,
        kernel_constraint: Any = None,
        bias_constraint: Any = None,
        *,
        backward_initializer: Any = None,
        **kwargs: Any,
    ):
        super().__init__(
            activation=activation,
            use_bias=bias_axes is not None,
            kernel_initializer=kernel_initializer,
            bias_initializer=bias_initializer,
            backward_initializer=backward_initializer,
            kernel_regularizer=kernel_regularizer,
            bias_regularizer=bias_regularizer,
            kernel_constraint=kernel_constraint,
            bias_constraint=bias_constraint,
            **kwargs,
        )
        self.equation = equation
        self.partial_output_shape = (output_shape,) if isinstance(output_shape, int) else tuple(output_shape)
        self.bias_axes = bias_axes

    def make_connection(self, source: Shape) -> EinsumConnection:
        return einsum_connection(self.equation, source, self.partial_output_shape, self.bias_axes, self.activation)

    def plain_shapes(self, source: Shape) -> dict[str, Shape]:
        return {**super().plain_shapes(source), "bias": self.make_connection(source).bias_shape}

    def plain_initializers(self, source: Shape) -> dict[str, Any]:
        axes = self.make_connection(source).unit_axes
        drawn = super().plain_initializers(source)
        return {name: _with_axes(one, *axes) if "kernel" in name else one for name, one in drawn.items()}

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        del config["use_bias"]
        own = {"equation": self.equation, "output_shape": self.partial_output_shape, "bias_axes": self.bias_axes}
        return {**config, **own}


def _with_axes(initializer: Any, inputs: list[int], outputs: list[int]) -> Any:
    """A copy of an initializer that scales by the numbers of inputs and outputs, told which axes of
    the kernel these are, as Keras's EinsumDense makes it. Keras 3.12 has no such axes."""
    config = initializer.get_config() if isinstance(initializer, keras.initializers.VarianceScaling) else {}
    if "input_axes" not in config or None not in (config["input_axes"], config["output_axes"]):
        return initializer
    if isinstance(initializer.seed, keras.random.SeedGenerator):
        config["seed"] = initializer.seed  # all copies draw from it in turn
    return type(initializer).from_config({**config, "input_axes": inputs, "output_axes": outputs})
