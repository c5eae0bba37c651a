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
from keras_blur.core.connections.einsum import einsum_connection
from keras_blur.layers.base import Shape, SynapticLayer, refuse_activity

Array = Any


@keras.saving.register_keras_serializable(package="keras_blur")
class Dense(SynapticLayer):
    """A densely connected layer that learns by a genome: put it where `keras.layers.Dense` was.

    Inside a model that learns by a genome, it holds the synapses of the model's rule: k channels,
    and a kernel for the feedback path if the rule has one. Inside an ordinary Keras model, it is a
    Dense layer on state 1, which that model's optimizer trains. If a genome trains the layer
    already, TensorFlow refuses to train such a model. JAX cannot see it.

    Args:
        units: positive integer, number of neurons.
        activation: nonlinearity of the layer: a Keras activation or its name, or `"relu_tanh"`.
            `None` takes the nonlinearity of the rule; there is none if a normalisation, activation
            or merging layer follows, and none in a plain Keras model.
        use_bias: whether the layer has a bias: a constant 1 beside the inputs.
        kernel_initializer: Keras initializer of each channel of the kernel.
        bias_initializer: Keras initializer of each channel of the bias.
        kernel_regularizer: Keras regularizer of the kernel; its gradient is added to the Hebbian
            term.
        bias_regularizer: Keras regularizer of the bias.
        activity_regularizer: must be `None`, since a genome learns from the loss alone.
        kernel_constraint: Keras constraint of the kernel, applied after each update.
        bias_constraint: Keras constraint of the bias.
        backward_initializer: initializer of each channel of the backward kernel; `None` takes
            `kernel_initializer`.
        **kwargs: `name`, `dtype` and `trainable`, as for every Keras layer. `trainable=False` keeps
            the synapses as they are.

    Input shape:
        `(batch_size, ..., input_dim)`.

    Output shape:
        `(batch_size, ..., units)`.

    Raises:
        ValueError: if an argument is not one of the above.

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
    """An einsum dense layer that learns by a genome: put it where `keras.layers.EinsumDense` was.

    Args:
        equation: the einsum, as in Keras. Input and output begin with the letter of the batch.
        output_shape: shape of the output without the batch; `None` for an axis of the input.
        activation: as of `Dense`.
        bias_axes: letters of the output axes that have a bias: `None` for no bias, or all those
            that the kernel has.
        kernel_initializer: as of `Dense`.
        bias_initializer: as of `Dense`.
        kernel_regularizer: as of `Dense`.
        bias_regularizer: as of `Dense`.
        kernel_constraint: as of `Dense`.
        bias_constraint: as of `Dense`.
        backward_initializer: as of `Dense`.
        **kwargs: as of `Dense`.

    Input shape:
        `(batch_size, ...)`, as the equation says.

    Output shape:
        `(batch_size, *output_shape)`.

    Raises:
        ValueError: if an argument is not one of the above, or the equation has another form.

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

    def make_connection(self, source: Shape) -> Connection:
        return einsum_connection(self.equation, source, self.partial_output_shape, self.bias_axes, self.activation)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        del config["use_bias"]
        own = {"equation": self.equation, "output_shape": self.partial_output_shape, "bias_axes": self.bias_axes}
        return {**config, **own}
