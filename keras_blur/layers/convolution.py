"""The convolutional layers. Arguments and shapes are those of their Keras twins.

Source: "Meta-Learning Bidirectional Update Rules" (2021), equations 5 to 7, on patches; see
`keras_blur.core.connections.conv`.
"""

from __future__ import annotations

from typing import Any

import keras

from keras_blur import arguments
from keras_blur.core.connection import Connection
from keras_blur.core.connections.conv import ConvConnection, DepthwiseConnection, TransposedConnection
from keras_blur.layers.base import BlurLayer, Plan, Shape, SynapticLayer, refuse_activity

Array = Any


class _Convolution(SynapticLayer):
    """Arguments and layout common to all convolutional layers."""

    _rank = 2
    _paddings: tuple[str, ...] = ("valid", "same")

    def __init__(
        self, kernel_size: Any, strides: Any, padding: str, data_format: str | None, dilation_rate: Any, **kwargs: Any
    ):
        super().__init__(**kwargs)
        self.kernel_size = _numbers("kernel_size", kernel_size, self._rank)
        self.strides = _numbers("strides", strides, self._rank)
        self.dilation_rate = _numbers("dilation_rate", dilation_rate, self._rank)
        self.padding = str(padding).lower()
        arguments.choice("padding", self.padding, self._paddings)
        self.data_format = keras.config.image_data_format() if data_format is None else data_format
        arguments.choice("data_format", self.data_format, ("channels_last", "channels_first"))
        if max(self.strides) > 1 and max(self.dilation_rate) > 1:
            raise ValueError(
                "`strides` must be 1 where `dilation_rate` is not. "
                f"Received: strides={self.strides} and dilation_rate={self.dilation_rate}"
            )
        self.input_spec = keras.layers.InputSpec(ndim=self._rank + 2)

    @property
    def _layout(self) -> dict[str, Any]:
        return {
            "size": self.kernel_size,
            "strides": self.strides,
            "padding": self.padding,
            "dilation": self.dilation_rate,
            "first": self.data_format == "channels_first",
        }

    def _channels(self, source: Shape) -> int:
        return source[0] if self.data_format == "channels_first" else source[-1]

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "kernel_size": self.kernel_size,
            "strides": self.strides,
            "padding": self.padding,
            "data_format": self.data_format,
            "dilation_rate": self.dilation_rate,
        }


class _Conv(_Convolution):
    """The common part of Conv1D, Conv2D and Conv3D."""

    def __init__(
        self,
        filters: int,
        kernel_size: Any,
        strides: Any = 1,
        padding: str = "valid",
        data_format: str | None = None,
        dilation_rate: Any = 1,
        groups: int = 1,
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
        arguments.count("filters", filters)
        arguments.count("groups", groups)
        super().__init__(
            kernel_size,
            strides,
            padding,
            data_format,
            dilation_rate,
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
        self.filters, self.groups = int(filters), int(groups)
        if self.filters % self.groups:
            raise ValueError(f"`filters` must be a multiple of `groups`. Received: filters={filters} and groups={groups}")

    def make_connection(self, source: Shape) -> Connection:
        if source and self._channels(source) % self.groups:
            raise ValueError(
                f"`groups` of layer {self.name!r} must divide the number of channels, {self._channels(source)}. "
                f"Received: groups={self.groups}"
            )
        return ConvConnection(self.filters, self.use_bias, self.activation, groups=self.groups, **self._layout)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "filters": self.filters, "groups": self.groups}


_CONV = """A convolutional layer that learns with a genome, in place of `keras.layers.{name}`.

    Positions count as rows of the batch, so the rule treats the kernel as that of a dense layer.

    Args:
        filters: number of units at each position.
        kernel_size: {rank} integers, or one for all.
        strides: {rank} integers, or one for all.
        padding: {paddings}.
        data_format: `"channels_last"` or `"channels_first"`; `None` uses Keras's.
        dilation_rate: {rank} integers, or one for all.
        groups: number of groups of channels.
        activation: as in `Dense`.
        use_bias: as in `Dense`.
        kernel_initializer: as in `Dense`.
        bias_initializer: as in `Dense`.
        kernel_regularizer: as in `Dense`.
        bias_regularizer: as in `Dense`.
        activity_regularizer: must be `None`, since a genome learns from the loss alone.
        kernel_constraint: as in `Dense`.
        bias_constraint: as in `Dense`.
        backward_initializer: as in `Dense`.
        **kwargs: as in `Dense`.

    Input shape:
        `(batch_size, *positions, channels)`; with `"channels_first"`,
        `(batch_size, channels, *positions)`.

    Output shape:
        `(batch_size, *new_positions, filters)`; with `"channels_first"`,
        `(batch_size, filters, *new_positions)`.

    Raises:
        ValueError: if an argument is unknown or invalid.

    Example:

    >>> import numpy as np
    >>> tuple({name}(4, 3)(np.ones({example}, "float32")).shape)
    {result}
    """


@keras.saving.register_keras_serializable(package="keras_blur")
class Conv1D(_Conv):
    __doc__ = _CONV.format(
        name="Conv1D", rank=1, paddings='`"valid"`, `"same"` or `"causal"`', example=(2, 8, 3), result=(2, 6, 4)
    )
    _rank = 1
    _paddings = ("valid", "same", "causal")


@keras.saving.register_keras_serializable(package="keras_blur")
class Conv2D(_Conv):
    __doc__ = _CONV.format(
        name="Conv2D", rank=2, paddings='`"valid"` or `"same"`', example=(2, 8, 8, 3), result=(2, 6, 6, 4)
    )
    _rank = 2


@keras.saving.register_keras_serializable(package="keras_blur")
class Conv3D(_Conv):
    __doc__ = _CONV.format(
        name="Conv3D", rank=3, paddings='`"valid"` or `"same"`', example=(2, 4, 4, 4, 3), result=(2, 2, 2, 2, 4)
    )
    _rank = 3


class _Depthwise(_Convolution):
    """The common part of DepthwiseConv1D and DepthwiseConv2D."""

    def __init__(
        self,
        kernel_size: Any,
        strides: Any = 1,
        padding: str = "valid",
        depth_multiplier: int = 1,
        data_format: str | None = None,
        dilation_rate: Any = 1,
        activation: Any = None,
        use_bias: bool = True,
        depthwise_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        depthwise_regularizer: Any = None,
        bias_regularizer: Any = None,
        activity_regularizer: Any = None,
        depthwise_constraint: Any = None,
        bias_constraint: Any = None,
        *,
        backward_initializer: Any = None,
        **kwargs: Any,
    ):
        refuse_activity(activity_regularizer)
        arguments.count("depth_multiplier", depth_multiplier)
        super().__init__(
            kernel_size,
            strides,
            padding,
            data_format,
            dilation_rate,
            activation=activation,
            use_bias=use_bias,
            kernel_initializer=depthwise_initializer,
            bias_initializer=bias_initializer,
            backward_initializer=backward_initializer,
            kernel_regularizer=depthwise_regularizer,
            bias_regularizer=bias_regularizer,
            kernel_constraint=depthwise_constraint,
            bias_constraint=bias_constraint,
            **kwargs,
        )
        self.depth_multiplier = int(depth_multiplier)

    def make_connection(self, source: Shape) -> Connection:
        channels = self._channels(source) if source else 1
        return DepthwiseConnection(
            channels * self.depth_multiplier,
            self.use_bias,
            self.activation,
            groups=channels,
            multiplier=self.depth_multiplier,
            **self._layout,
        )

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        renamed = {name: config.pop(name.replace("depthwise", "kernel")) for name in _DEPTHWISE}
        return {**config, **renamed, "depth_multiplier": self.depth_multiplier}


_DEPTHWISE = ("depthwise_initializer", "depthwise_regularizer", "depthwise_constraint")
_DEPTHWISE_DOC = """A depthwise convolution that learns with a genome, in place of `keras.layers.{name}`.

    Args:
        kernel_size: {rank} integers, or one for all.
        strides: {rank} integers, or one for all.
        padding: `"valid"` or `"same"`.
        depth_multiplier: number of units for each input channel.
        data_format: `"channels_last"` or `"channels_first"`; `None` uses Keras's.
        dilation_rate: {rank} integers, or one for all.
        activation: as in `Dense`.
        use_bias: as in `Dense`.
        depthwise_initializer: Keras initializer of each channel of the kernel.
        bias_initializer: as in `Dense`.
        depthwise_regularizer: as `kernel_regularizer` of `Dense`.
        bias_regularizer: as in `Dense`.
        activity_regularizer: must be `None`, since a genome learns from the loss alone.
        depthwise_constraint: as `kernel_constraint` of `Dense`.
        bias_constraint: as in `Dense`.
        backward_initializer: as in `Dense`.
        **kwargs: as in `Dense`.

    Input shape:
        `(batch_size, *positions, channels)`; with `"channels_first"`,
        `(batch_size, channels, *positions)`.

    Output shape:
        `(batch_size, *new_positions, channels * depth_multiplier)`; with `"channels_first"`,
        `(batch_size, channels * depth_multiplier, *new_positions)`.

    Raises:
        ValueError: if an argument is unknown or invalid.

    Example:

    >>> import numpy as np
    >>> tuple({name}(3)(np.ones({example}, "float32")).shape)
    {result}
    """


@keras.saving.register_keras_serializable(package="keras_blur")
class DepthwiseConv1D(_Depthwise):
    __doc__ = _DEPTHWISE_DOC.format(name="DepthwiseConv1D", rank=1, example=(2, 8, 3), result=(2, 6, 3))
    _rank = 1


@keras.saving.register_keras_serializable(package="keras_blur")
class DepthwiseConv2D(_Depthwise):
    __doc__ = _DEPTHWISE_DOC.format(name="DepthwiseConv2D", rank=2, example=(2, 8, 8, 3), result=(2, 6, 6, 3))
    _rank = 2


@keras.saving.register_keras_serializable(package="keras_blur")
class Conv2DTranspose(_Convolution):
    """Transposed convolution that learns with a genome, in place of `keras.layers.Conv2DTranspose`.

    Args:
        filters: number of units at each position.
        kernel_size: two integers, or one for both.
        strides: two integers, or one for both.
        padding: `"valid"` or `"same"`.
        output_padding: as in Keras.
        data_format: `"channels_last"` or `"channels_first"`; `None` uses Keras's.
        dilation_rate: two integers, or one for both.
        activation: as in `Dense`.
        use_bias: as in `Dense`.
        kernel_initializer: as in `Dense`.
        bias_initializer: as in `Dense`.
        kernel_regularizer: as in `Dense`.
        bias_regularizer: as in `Dense`.
        activity_regularizer: must be `None`, since a genome learns from the loss alone.
        kernel_constraint: as in `Dense`.
        bias_constraint: as in `Dense`.
        backward_initializer: as in `Dense`.
        **kwargs: as in `Dense`.

    Input shape:
        `(batch_size, *positions, channels)`; with `"channels_first"`,
        `(batch_size, channels, *positions)`.

    Output shape:
        `(batch_size, *new_positions, filters)`; with `"channels_first"`,
        `(batch_size, filters, *new_positions)`.

    Raises:
        ValueError: if an argument is unknown or invalid.

    Example:

    >>> import numpy as np
    >>> tuple(Conv2DTranspose(4, 3, strides=2, padding="same")(np.ones((2, 4, 4, 3), "float32")).shape)
    (2, 8, 8, 4)
    """

    def __init__(
        self,
        filters: int,
        kernel_size: Any,
        strides: Any = (1, 1),
        padding: str = "valid",
        output_padding: Any = None,
        data_format: str | None = None,
        dilation_rate: Any = (1, 1),
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
        arguments.count("filters", filters)
        super().__init__(
            kernel_size,
            strides,
            padding,
            data_format,
            dilation_rate,
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
        self.filters = int(filters)
        self.output_padding = None if output_padding is None else _numbers("output_padding", output_padding, 2, least=0)

    def make_connection(self, source: Shape) -> Connection:
        return TransposedConnection(
            self.filters, self.use_bias, self.activation, output_padding=self.output_padding, **self._layout
        )

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "filters": self.filters, "output_padding": self.output_padding}


@keras.saving.register_keras_serializable(package="keras_blur")
class SeparableConv2D(BlurLayer):
    """Separable convolution that learns with a genome, in place of `keras.layers.SeparableConv2D`.

    It consists of a `DepthwiseConv2D` without bias or nonlinearity and a 1x1 `Conv2D`, each with
    its own neurons.

    Args:
        filters: number of units at each position.
        kernel_size: two integers, or one for both.
        strides: two integers, or one for both.
        padding: `"valid"` or `"same"`.
        data_format: `"channels_last"` or `"channels_first"`; `None` uses Keras's.
        dilation_rate: two integers, or one for both.
        depth_multiplier: number of depthwise units for each input channel.
        activation: as in `Dense`.
        use_bias: as in `Dense`.
        depthwise_initializer: Keras initializer of each channel of the depthwise kernel.
        pointwise_initializer: Keras initializer of each channel of the pointwise kernel.
        bias_initializer: as in `Dense`.
        depthwise_regularizer: as `kernel_regularizer` of `Dense`.
        pointwise_regularizer: as `kernel_regularizer` of `Dense`.
        bias_regularizer: as in `Dense`.
        activity_regularizer: must be `None`, since a genome learns from the loss alone.
        depthwise_constraint: as `kernel_constraint` of `Dense`.
        pointwise_constraint: as `kernel_constraint` of `Dense`.
        bias_constraint: as in `Dense`.
        **kwargs: as in `Dense`.

    Input shape:
        `(batch_size, *positions, channels)`; with `"channels_first"`,
        `(batch_size, channels, *positions)`.

    Output shape:
        `(batch_size, *new_positions, filters)`; with `"channels_first"`,
        `(batch_size, filters, *new_positions)`.

    Raises:
        ValueError: if an argument is unknown or invalid.

    Example:

    >>> import numpy as np
    >>> tuple(SeparableConv2D(4, 3)(np.ones((2, 8, 8, 3), "float32")).shape)
    (2, 6, 6, 4)
    """

    def __init__(
        self,
        filters: int,
        kernel_size: Any,
        strides: Any = (1, 1),
        padding: str = "valid",
        data_format: str | None = None,
        dilation_rate: Any = (1, 1),
        depth_multiplier: int = 1,
        activation: Any = None,
        use_bias: bool = True,
        depthwise_initializer: Any = "glorot_uniform",
        pointwise_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        depthwise_regularizer: Any = None,
        pointwise_regularizer: Any = None,
        bias_regularizer: Any = None,
        activity_regularizer: Any = None,
        depthwise_constraint: Any = None,
        pointwise_constraint: Any = None,
        bias_constraint: Any = None,
        **kwargs: Any,
    ):
        refuse_activity(activity_regularizer)
        super().__init__(**kwargs)
        self.depthwise = DepthwiseConv2D(
            kernel_size,
            strides,
            padding,
            depth_multiplier,
            data_format,
            dilation_rate,
            activation="linear",
            use_bias=False,
            depthwise_initializer=depthwise_initializer,
            depthwise_regularizer=depthwise_regularizer,
            depthwise_constraint=depthwise_constraint,
            name="depthwise",
            dtype=self.dtype_policy,
            trainable=self.trainable,
        )
        self.pointwise = Conv2D(
            filters,
            1,
            data_format=data_format,
            activation=activation,
            use_bias=use_bias,
            kernel_initializer=pointwise_initializer,
            bias_initializer=bias_initializer,
            kernel_regularizer=pointwise_regularizer,
            bias_regularizer=bias_regularizer,
            kernel_constraint=pointwise_constraint,
            bias_constraint=bias_constraint,
            name="pointwise",
            dtype=self.dtype_policy,
            trainable=self.trainable,
        )

    def build(self, input_shape: Shape) -> None:
        self.depthwise.build(input_shape)
        self.pointwise.build(self.depthwise.compute_output_shape(input_shape))
        self.built = True

    def call(self, inputs: Array) -> Array:
        return self.pointwise(self.depthwise(inputs))

    def trace(self, plan: Plan, *values: int, **arguments: Any) -> int:
        return self.pointwise.trace(plan, self.depthwise.trace(plan, *values))

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return self.pointwise.compute_output_shape(self.depthwise.compute_output_shape(input_shape))

    def get_config(self) -> dict[str, Any]:
        depthwise, pointwise = self.depthwise.get_config(), self.pointwise.get_config()
        shared = ("kernel_size", "strides", "padding", "data_format", "dilation_rate", "depth_multiplier", *_DEPTHWISE)
        own = ("filters", "activation", "use_bias", "bias_initializer", "bias_regularizer", "bias_constraint")
        renamed = {f"pointwise_{what}": pointwise[f"kernel_{what}"] for what in ("initializer", "regularizer", "constraint")}
        return {
            **super().get_config(),
            **{name: depthwise[name] for name in shared},
            **{name: pointwise[name] for name in own},
            **renamed,
        }


def _numbers(name: str, value: Any, rank: int, least: int = 1) -> tuple[int, ...]:
    """Expands one integer for all axes, or checks one for each axis."""
    values = (value,) * rank if arguments.is_number(value) else value
    if not isinstance(values, (tuple, list)) or len(values) != rank:
        raise ValueError(f"`{name}` must be an integer or {rank} of them. {arguments.received(name, value)}")
    for one in values:
        arguments.integer(name, one, least)
    return tuple(int(one) for one in values)
