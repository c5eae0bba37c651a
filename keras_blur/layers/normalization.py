"""The normalisation layers. A map without synapses normalises; a connection has scale and offset.

Source: "Batch normalization" (Ioffe and Szegedy, 2015), "Layer normalization" (Ba et al., 2016),
"Group normalization" (Wu and He, 2018), "Root mean square layer normalization" (Zhang and Sennrich,
2019). Feedback passes through the Jacobian of the map, which includes the derivative of the
statistics: `keras_blur.core.weightless.Normalize`.
"""

from __future__ import annotations

import abc
from typing import Any

import keras
from keras import initializers, ops

from keras_blur import arguments
from keras_blur.core.connection import Connection
from keras_blur.core.connections.scale import scale_connection
from keras_blur.core.weightless import Normalize
from keras_blur.layers.base import Plan, Shape, SynapticLayer, check_keywords, refuse_outer_training

Array = Any

_ESTABLISHED = 2**30  # number of updates after which debiasing has no effect


class _Normalization(SynapticLayer):
    """The common part of the normalisation layers."""

    def __init__(
        self,
        axis: Any,
        epsilon: float,
        center: bool,
        scale: bool,
        *,
        beta_initializer: Any = "zeros",
        gamma_initializer: Any = "ones",
        beta_regularizer: Any = None,
        gamma_regularizer: Any = None,
        beta_constraint: Any = None,
        gamma_constraint: Any = None,
        **kwargs: Any,
    ):
        super().__init__(
            activation="linear",
            use_bias=center,
            kernel_initializer=gamma_initializer,
            bias_initializer=beta_initializer,
            kernel_regularizer=gamma_regularizer,
            bias_regularizer=beta_regularizer,
            kernel_constraint=gamma_constraint,
            bias_constraint=beta_constraint,
            **kwargs,
        )
        arguments.real("epsilon", epsilon, low=0.0)
        self.axis, self.epsilon = axis if isinstance(axis, int) else list(axis), float(epsilon)
        self.center, self.scale = bool(center), bool(scale)

    def _own(self, source: Shape) -> tuple[int, ...]:
        """The feature axes along which scales and offsets vary."""
        axes = (self.axis,) if isinstance(self.axis, int) else tuple(self.axis)
        rank = len(source) + 1
        own = sorted(axis % rank - 1 for axis in axes)
        if min(own) < 0 or len(set(own)) != len(own) or not all(-rank <= axis < rank for axis in axes):
            raise ValueError(f"`axis` of layer {self.name!r} must be axes of features. Received: axis={self.axis!r}")
        return tuple(own)

    def make_connection(self, source: Shape) -> Connection:
        return scale_connection(source, self._own(source), scales=self.scale, offsets=self.center)

    def plain_shapes(self, source: Shape) -> dict[str, Shape]:
        axes = [self.axis] if isinstance(self.axis, int) else sorted(self.axis)
        shape = tuple((None, *source)[axis] for axis in axes)  # Keras puts the axes counted from behind first
        return {"kernel": shape, "bias": shape}

    @abc.abstractmethod
    def make_map(self, source: Shape) -> Normalize:
        """The map that normalises features of shape `source`."""

    def trace(self, plan: Plan, *values: int, **arguments: Any) -> int:
        value = plan.map(self.make_map(plan.shape(values[0])), values[0])
        return plan.connect(self, value, "linear") if self.scale or self.center else value

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return tuple(input_shape)

    def call(self, inputs: Array) -> Array:
        if self._rule is not None:
            refuse_outer_training(self)
        return self.summed(self._normalized(inputs, True))

    def _normalized(self, inputs: Array, training: bool) -> Array:
        weightless = self.make_map(tuple(inputs.shape[1:]))
        states = (inputs[None],)
        return weightless.forward(states, weightless.context(states, training))[0]

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        parts = ("initializer", "regularizer", "constraint")
        return {
            **{name: config[name] for name in ("name", "trainable", "dtype")},
            "axis": self.axis,
            "epsilon": self.epsilon,
            "center": self.center,
            "scale": self.scale,
            **{f"gamma_{part}": config[f"kernel_{part}"] for part in parts},
            **{f"beta_{part}": config[f"bias_{part}"] for part in parts},
        }


@keras.saving.register_keras_serializable(package="keras_blur")
class BatchNormalization(_Normalization):
    """Batch normalisation that learns with a genome, in place of `keras.layers.BatchNormalization`.

    Moving statistics are those of Keras without the bias towards their initial values: after t
    batches they are the weighted mean over these t batches. Predictions are therefore already
    accurate after a few steps.

    Args:
        axis: integer, the axis of the features.
        momentum: weight of the old value in the moving statistics, from 0 to 1.
        epsilon: added to the variance.
        center: whether there is an offset.
        scale: whether there is a scale.
        beta_initializer: Keras initializer of the offset.
        gamma_initializer: Keras initializer of the scale.
        moving_mean_initializer: Keras initializer of the moving mean.
        moving_variance_initializer: Keras initializer of the moving variance.
        beta_regularizer: as `bias_regularizer` of `Dense`.
        gamma_regularizer: as `kernel_regularizer` of `Dense`.
        beta_constraint: as `bias_constraint` of `Dense`.
        gamma_constraint: as `kernel_constraint` of `Dense`.
        synchronized: has no effect: in a model that learns with a genome, statistics are always
            over the batch of all replicas.
        **kwargs: as in `Dense`. `trainable=False` normalises by the moving statistics, as in Keras.

    Input shape:
        `(batch_size, ...)`, of any rank from 2.

    Output shape:
        As the input.

    Raises:
        ValueError: if an argument is unknown or invalid.

    Example:

    >>> import numpy as np
    >>> tuple(BatchNormalization()(np.ones((4, 3), "float32")).shape)
    (4, 3)
    """

    def __init__(
        self,
        axis: int = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        beta_initializer: Any = "zeros",
        gamma_initializer: Any = "ones",
        moving_mean_initializer: Any = "zeros",
        moving_variance_initializer: Any = "ones",
        beta_regularizer: Any = None,
        gamma_regularizer: Any = None,
        beta_constraint: Any = None,
        gamma_constraint: Any = None,
        *,
        synchronized: bool = False,
        **kwargs: Any,
    ):
        if not isinstance(axis, int):
            raise ValueError(f"`axis` must be an integer. {arguments.received('axis', axis)}")
        super().__init__(
            axis,
            epsilon,
            center,
            scale,
            beta_initializer=beta_initializer,
            gamma_initializer=gamma_initializer,
            beta_regularizer=beta_regularizer,
            gamma_regularizer=gamma_regularizer,
            beta_constraint=beta_constraint,
            gamma_constraint=gamma_constraint,
            **kwargs,
        )
        arguments.real("momentum", momentum, low=0.0, high=1.0)
        self.momentum, self.synchronized = float(momentum), bool(synchronized)
        self.moving_mean_initializer = initializers.get(moving_mean_initializer)
        self.moving_variance_initializer = initializers.get(moving_variance_initializer)

    statistics_prefix = "rule_"

    def build(self, input_shape: Shape) -> None:
        super().build(input_shape)
        source = tuple(input_shape[1:])
        shape = tuple(source[axis] for axis in self._own(source))
        self.moving_mean = self.add_weight(
            name="moving_mean", shape=shape, initializer=self.moving_mean_initializer, trainable=False, autocast=False
        )
        self.moving_variance = self.add_weight(
            name="moving_variance", shape=shape, initializer=self.moving_variance_initializer, trainable=False,
            autocast=False,
        )  # fmt: skip
        self.updates = self.add_weight(name="updates", shape=(), dtype="int32", initializer="zeros", trainable=False)

    def make_map(self, source: Shape) -> Normalize:
        own = self._own(source)
        axes = [0, *(axis + 1 for axis in range(len(source)) if axis not in own)]

        def given() -> tuple[Array, Array]:
            return ops.convert_to_tensor(self.moving_mean), ops.convert_to_tensor(self.moving_variance)

        return Normalize(source, axes, self.epsilon, given=given, active=lambda: self.trainable)

    def trace(self, plan: Plan, *values: int, **arguments: Any) -> int:
        plan.follow(self, self.make_map(plan.shape(values[0])), values[0])
        return super().trace(plan, *values, **arguments)

    def follow(self, mean: Array, variance: Array, share: Array | None = None) -> None:
        """Updates the moving statistics with those of a batch.

        Args:
            mean: mean of the batch, in the shape of the features with axes of size 1.
            variance: variance of the batch, in the same shape.
            share: weight of the new values in the average; `None` uses the debiased weight for
                `momentum`.
        """
        count = ops.cast(self.updates + 1, self.variable_dtype)
        momentum = ops.convert_to_tensor(self.momentum, dtype=self.variable_dtype)
        weight = (1.0 - momentum) / ops.maximum(1.0 - ops.power(momentum, count), 1e-30)
        weight = ops.where(self.momentum == 0.0, ops.ones_like(weight), weight)
        weight = weight if share is None else ops.cast(share, weight.dtype)
        for variable, value in ((self.moving_mean, mean), (self.moving_variance, variance)):
            value = ops.cast(ops.reshape(value, variable.shape), variable.dtype)
            variable.assign(variable + weight * (value - variable))
        self.updates.assign(ops.minimum(self.updates + 1, _ESTABLISHED))

    def settle(self) -> None:
        """Marks the moving statistics as those of a trained network, so that later batches enter
        with weight `1 - momentum`."""
        self.updates.assign(_ESTABLISHED)

    def call(self, inputs: Array, training: bool | None = None, mask: None = None) -> Array:
        if mask is not None:
            raise ValueError(f"`mask` in the call of layer {self.name!r} must be None. Received: a mask")
        if self._rule is not None:
            refuse_outer_training(self)
        normalized = self._normalized(inputs, bool(training))
        if training and self.trainable:
            self.follow(*self.make_map(tuple(inputs.shape[1:])).moments((inputs[None],)))
        return self.summed(normalized)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "momentum": self.momentum,
            "synchronized": self.synchronized,
            "moving_mean_initializer": initializers.serialize(self.moving_mean_initializer),
            "moving_variance_initializer": initializers.serialize(self.moving_variance_initializer),
        }


@keras.saving.register_keras_serializable(package="keras_blur")
class LayerNormalization(_Normalization):
    """Layer normalisation that learns with a genome, in place of `keras.layers.LayerNormalization`.

    Args:
        axis: integer or list of integers, the axes over which the statistics are computed.
        epsilon: added to the variance.
        center: whether there is an offset.
        scale: whether there is a scale.
        beta_initializer: Keras initializer of the offset.
        gamma_initializer: Keras initializer of the scale.
        beta_regularizer: as `bias_regularizer` of `Dense`.
        gamma_regularizer: as `kernel_regularizer` of `Dense`.
        beta_constraint: as `bias_constraint` of `Dense`.
        gamma_constraint: as `kernel_constraint` of `Dense`.
        **kwargs: as in `Dense`.

    Input shape:
        `(batch_size, ...)`, of any rank from 2.

    Output shape:
        As the input.

    Raises:
        ValueError: if an argument is unknown or invalid.

    Example:

    >>> import numpy as np
    >>> tuple(LayerNormalization()(np.ones((4, 3), "float32")).shape)
    (4, 3)
    """

    def __init__(
        self,
        axis: Any = -1,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        beta_initializer: Any = "zeros",
        gamma_initializer: Any = "ones",
        beta_regularizer: Any = None,
        gamma_regularizer: Any = None,
        beta_constraint: Any = None,
        gamma_constraint: Any = None,
        **kwargs: Any,
    ):
        super().__init__(
            axis,
            epsilon,
            center,
            scale,
            beta_initializer=beta_initializer,
            gamma_initializer=gamma_initializer,
            beta_regularizer=beta_regularizer,
            gamma_regularizer=gamma_regularizer,
            beta_constraint=beta_constraint,
            gamma_constraint=gamma_constraint,
            **kwargs,
        )

    def make_map(self, source: Shape) -> Normalize:
        return Normalize(source, [axis + 1 for axis in self._own(source)], self.epsilon)


@keras.saving.register_keras_serializable(package="keras_blur")
class GroupNormalization(_Normalization):
    """Group normalisation that learns with a genome, in place of `keras.layers.GroupNormalization`.

    Args:
        groups: number of groups of channels; -1 for one group per channel.
        axis: integer, the axis of the channels.
        epsilon: added to the variance.
        center: whether there is an offset.
        scale: whether there is a scale.
        beta_initializer: Keras initializer of the offset.
        gamma_initializer: Keras initializer of the scale.
        beta_regularizer: as `bias_regularizer` of `Dense`.
        gamma_regularizer: as `kernel_regularizer` of `Dense`.
        beta_constraint: as `bias_constraint` of `Dense`.
        gamma_constraint: as `kernel_constraint` of `Dense`.
        **kwargs: as in `Dense`.

    Input shape:
        `(batch_size, ...)`, of any rank from 2.

    Output shape:
        As the input.

    Raises:
        ValueError: if an argument is unknown or invalid, or the groups do not divide the channels
            when the layer is built.

    Example:

    >>> import numpy as np
    >>> tuple(GroupNormalization(2)(np.ones((4, 5, 6), "float32")).shape)
    (4, 5, 6)
    """

    def __init__(
        self,
        groups: int = 32,
        axis: int = -1,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        beta_initializer: Any = "zeros",
        gamma_initializer: Any = "ones",
        beta_regularizer: Any = None,
        gamma_regularizer: Any = None,
        beta_constraint: Any = None,
        gamma_constraint: Any = None,
        **kwargs: Any,
    ):
        super().__init__(
            axis,
            epsilon,
            center,
            scale,
            beta_initializer=beta_initializer,
            gamma_initializer=gamma_initializer,
            beta_regularizer=beta_regularizer,
            gamma_regularizer=gamma_regularizer,
            beta_constraint=beta_constraint,
            gamma_constraint=gamma_constraint,
            **kwargs,
        )
        if groups != -1:
            arguments.count("groups", groups)
        self.groups = int(groups)

    def make_map(self, source: Shape) -> Normalize:
        (place,) = self._own(source)
        channels = source[place]
        groups = channels if self.groups == -1 else self.groups
        if channels % groups:
            raise ValueError(
                f"`groups` of layer {self.name!r} must divide the number of channels, {channels}. Received: groups={groups}"
            )
        shape = (*source[:place], groups, channels // groups, *source[place + 1 :])
        axes = [axis + 1 for axis in range(len(shape)) if axis != place]
        return Normalize(source, axes, self.epsilon, groups=shape)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "groups": self.groups}


@keras.saving.register_keras_serializable(package="keras_blur")
class RMSNormalization(_Normalization):
    """Root mean square normalisation that learns with a genome, in place of
    `keras.layers.RMSNormalization`.

    Args:
        axis: integer or list of integers, the axes over which the mean square is computed.
        epsilon: added to the mean square.
        **kwargs: as in `Dense`.

    Input shape:
        `(batch_size, ...)`, of any rank from 2.

    Output shape:
        As the input.

    Raises:
        ValueError: if an argument is unknown or invalid.

    Example:

    >>> import numpy as np
    >>> tuple(RMSNormalization()(np.ones((4, 3), "float32")).shape)
    (4, 3)
    """

    def __init__(self, axis: Any = -1, epsilon: float = 1e-6, **kwargs: Any):
        check_keywords("RMSNormalization", kwargs, self._keywords)
        super().__init__(axis, epsilon, False, True, **kwargs)

    def make_map(self, source: Shape) -> Normalize:
        return Normalize(source, [axis + 1 for axis in self._own(source)], self.epsilon, center=False)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        return {name: config[name] for name in ("name", "trainable", "dtype", "axis", "epsilon")}
