"""Gradients of hyperparameters through one step of a model's training: exact, and by differences.

Source: the one-step virtual update of "Meta-Weight-Net: Learning an Explicit Mapping For Sample Weighting" (Shu et al.,
NeurIPS 2019), whose equations "Faster Meta Update Strategy for Noise-Robust Deep Learning" (Xu et al., CVPR 2021) builds on;
the difference quotient is that of "DARTS: Differentiable Architecture Search" (Liu et al., ICLR 2019), equation 8.

A model with weights w learns from a training loss that has outer parameters lambda (weights of examples, the strength of an
augmentation, any hyperparameter). What is wanted is lambda for which the model does well by another loss, on other data, the
meta data. One step of SGD stands for all of training:

    w^ = w - alpha grad_w L_train(w, lambda),   d L_meta(w^) / d lambda = -alpha grad_lambda < grad_w L_train(w, lambda), v >

with v = grad L_meta(w^). Only this product with v is needed, never the matrix of mixed derivatives, and neither w^ nor v
needs a tape that is differentiated again: so the second derivative is one backward pass through one gradient, whatever the
size of lambda.

Every estimator here is a function of arrays. A *virtual* pass is one whose running statistics and random states are thrown
away; all passes of a step see the same batch and the same masks of dropout.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_blur import arguments

Array = Any
Outer = Mapping[str, Array]
Weights = Mapping[str, Array]


class Bilevel(NamedTuple):
    """What is to be differentiated, with the batches of a step in it.

    Attributes:
        train: from outer parameters and weights to the training loss, a scalar.
        judge: from weights to the loss on the meta batch, a scalar.
        layers: paths of the layers with weights, from first to last, and the names of their weights.
        mean: of a nest, over replicas; each has its own part of the batches.
        scale: a factor of each loss while it is differentiated, so that float16 does not underflow; `None` for none.
    """

    train: Callable[[Outer, Weights], Array]
    judge: Callable[[Weights], Array]
    layers: Mapping[str, tuple[str, ...]]
    mean: Callable[[Any], Any] = lambda values: values
    scale: Array | None = None


class Hypergradient(NamedTuple):
    """An estimate of the outer gradient.

    Attributes:
        gradients: by name, as the outer parameters.
        loss: the meta loss at the weights where it was taken, a scalar.
        logs: further scalars, by the names in the estimator's `logged`.
    """

    gradients: dict[str, Array]
    loss: Array
    logs: dict[str, Array]


@dataclasses.dataclass(frozen=True)
class HypergradientEstimator(abc.ABC):
    """How the gradient of the outer parameters is found in a step of `BilevelTrainer`."""

    @property
    def logged(self) -> tuple[str, ...]:
        """Names of what `logs` of an estimate has."""
        return ()

    @property
    def branches(self) -> bool:
        """Whether a step has branches of which one is executed."""
        return False

    def parameters(self, layers: Mapping[str, Sequence[tuple[int, ...]]]) -> dict[str, np.ndarray]:
        """Numbers that the estimator itself learns, by name, where it starts; of most, none.

        Args:
            layers: paths of the model's layers with weights, and the shapes of these.

        Raises:
            ValueError: if the estimator names a layer that is not there.
        """
        del layers
        return {}

    def optimizer(self) -> keras.optimizers.Optimizer | None:
        """What changes the numbers of `parameters`, if there are any."""
        return None

    @abc.abstractmethod
    def estimate(
        self, problem: Bilevel, outer: Outer, weights: Weights, rate: Array, seed: Array, own: Mapping[str, Array]
    ) -> tuple[Hypergradient, dict[str, Array]]:
        """The outer gradient.

        Args:
            problem: what is differentiated.
            outer: outer parameters by name.
            weights: the model's weights by name.
            rate: learning rate of the virtual step, a scalar.
            seed: of noise.
            own: the numbers of `parameters`.

        Returns:
            The estimate, and the gradients of `own`.
        """


@dataclasses.dataclass(frozen=True)
class VirtualStep(HypergradientEstimator):
    """An estimator that looks ahead by one step of SGD which is not taken.

    Args:
        rate: its learning rate; `None` takes that of the model's optimizer at the time, so that a schedule of the one is a
            schedule of the other.
    """

    rate: float | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.rate is not None:
            arguments.positive("rate", self.rate)

    def ahead(
        self, problem: Bilevel, outer: Outer, weights: Weights, rate: Array, names: Sequence[str] | None = None
    ) -> LookAhead:
        """The step; `names` as of `LookAhead`."""
        dtype = widest([rate, *weights.values()])
        alpha = tf.cast(rate, dtype) if self.rate is None else tf.constant(self.rate, dtype)
        return LookAhead(problem, outer, weights, alpha, names)


class LookAhead:
    """A virtual step of SGD, the meta loss after it, and the two ways back, each of as many layers as are wanted.

    Both losses are computed once, when this is made, and both ways back begin there: also those in a branch of a
    conditional, where a compiler could not know that it repeats what has been computed outside. What a way back has no use
    for, a traced function does not keep.

    Args:
        problem, outer, weights: as of `HypergradientEstimator.estimate`.
        alpha: the learning rate, a scalar.
        names: the weights by which the meta loss will be differentiated; `None` for all.

    Attributes:
        training: the training gradient by all weights, a mean over replicas.
        weights: those after the step.
        loss: the meta loss there, of a replica's own batch.
    """

    def __init__(self, problem: Bilevel, outer: Outer, weights: Weights, alpha: Array, names: Sequence[str] | None = None):
        self.alpha, self._scale = alpha, problem.scale
        self._outer = {name: tf.convert_to_tensor(value) for name, value in outer.items()}
        with tf.GradientTape(persistent=True) as self._above:
            self._above.watch(self._outer)
            # Scaled: dividing here would start the backward pass with numbers too small for float16.
            self._first = gradient(lambda values: scaled(problem.train(self._outer, values), problem.scale), weights)[1]
        self.training: dict[str, Array] = problem.mean(unscaled(self._first, problem.scale))
        self.weights = {n: value - tf.cast(alpha, value.dtype) * self.training[n] for n, value in weights.items()}
        with tf.GradientTape(persistent=True) as self._below:
            self._below.watch(self.weights if names is None else {name: self.weights[name] for name in names})
            self.loss = problem.judge(self.weights)
            self._scaled_loss = scaled(self.loss, problem.scale)

    def slope(self, names: Sequence[str]) -> dict[str, Array]:
        """The gradient of the meta loss by some weights, of a replica's own batch: no further down than the lowest."""
        chosen = {name: self.weights[name] for name in names}
        return unscaled(self._below.gradient(self._scaled_loss, chosen, unconnected_gradients="zero"), self._scale)

    def mixed(self, slope: Weights, beside: Weights | None = None) -> dict[str, Array]:
        """-alpha grad_lambda < grad_w L_train, v >, of the weights that v, `slope`, has, of a replica's own batch.

        Args:
            slope: v.
            beside: arrays by the names of some of these weights: grad_lambda < grad_w L_train, beside > is added.
        """
        first = {name: self._first[name] for name in slope}
        upstream = {name: -tf.cast(self.alpha, value.dtype) * value for name, value in slope.items()}
        for name, value in (beside or {}).items():
            upstream[name] = upstream[name] + value
        size = None
        if self._scale is not None:  # float16 holds numbers around 1
            largest = tf.reduce_max([tf.reduce_max(tf.cast(tf.abs(value), tf.float32)) for value in upstream.values()])
            size = tf.where(largest > 0.0, largest, 1.0)
            upstream = unscaled(upstream, size)
        found = self._above.gradient(first, self._outer, output_gradients=upstream, unconnected_gradients="zero")
        return found if size is None else unscaled(found, self._scale / size)


@dataclasses.dataclass(frozen=True)
class OneStep(VirtualStep):
    """The exact gradient through one virtual step of SGD; arguments as `VirtualStep`.

    Example:

    >>> OneStep(rate=0.1).rate
    0.1
    """

    def estimate(
        self, problem: Bilevel, outer: Outer, weights: Weights, rate: Array, seed: Array, own: Mapping[str, Array]
    ) -> tuple[Hypergradient, dict[str, Array]]:
        del seed
        ahead = self.ahead(problem, outer, weights, rate)
        loss, slope = problem.mean((ahead.loss, ahead.slope(list(weights))))
        return Hypergradient(problem.mean(ahead.mixed(slope)), loss, {}), {}


@dataclasses.dataclass(frozen=True)
class FiniteDifference(VirtualStep):
    """The gradient through one virtual step of SGD, its mixed derivative by a central difference: no second derivatives.

    Args:
        rate: as of `VirtualStep`.
        width: length of the step in weights, from one side to the other, over the square root of their number. The
            difference has an error of the order of its square; in float32 much smaller ones drown in rounding.

    Example:

    >>> FiniteDifference(width=1e-3).width
    0.001
    """

    width: float = 1e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        arguments.positive("width", self.width)

    def estimate(
        self, problem: Bilevel, outer: Outer, weights: Weights, rate: Array, seed: Array, own: Mapping[str, Array]
    ) -> tuple[Hypergradient, dict[str, Array]]:
        del seed
        ahead = self.ahead(problem, outer, weights, rate)
        loss, slope = problem.mean((ahead.loss, ahead.slope(list(weights))))
        dtype = widest(slope.values())
        length = tf.sqrt(tf.add_n([tf.cast(tf.reduce_sum(tf.square(v)), dtype) for v in slope.values()]))
        number = sum(math.prod(v.shape) for v in slope.values())
        scale = 0.5 * self.width * math.sqrt(number) / tf.maximum(length, 1e-12)

        def outer_gradient(sign: float) -> dict[str, Array]:
            moved = {n: value + tf.cast(sign * scale, value.dtype) * slope[n] for n, value in weights.items()}
            return gradient(lambda values: problem.train(values, moved), outer, problem.scale)[1]

        above, below = outer_gradient(1.0), outer_gradient(-1.0)
        factor = -ahead.alpha / (2.0 * scale)
        found = {name: tf.cast(factor, above[name].dtype) * (above[name] - below[name]) for name in outer}
        return Hypergradient(problem.mean(found), loss, {}), {}


def gradient(
    function: Callable[[Any], Array], values: Mapping[str, Array], scale: Array | None = None
) -> tuple[Array, dict[str, Array]]:
    """A function's value, and its gradient by a dictionary of arrays.

    Args:
        function: from the arrays to a scalar.
        values: the arrays.
        scale: a factor of the value while it is differentiated, as of `Bilevel`; the gradient is divided by it.
    """
    values = {name: tf.convert_to_tensor(value) for name, value in values.items()}
    with tf.GradientTape() as tape:
        tape.watch(values)
        result = function(values)
        differentiated = scaled(result, scale)
    found = tape.gradient(differentiated, values, unconnected_gradients="zero")
    return result, unscaled(found, scale)


def scaled(loss: Array, scale: Array | None) -> Array:
    """A loss as it is differentiated."""
    return loss if scale is None else loss * tf.cast(scale, loss.dtype)


def unscaled(gradients: Mapping[str, Array], scale: Array | None) -> dict[str, Array]:
    """Gradients by name, divided by the scale of their loss."""
    dense = {name: tf.convert_to_tensor(g) for name, g in gradients.items()}  # that of a lookup is sparse
    return {name: g if scale is None else g / tf.cast(scale, g.dtype) for name, g in dense.items()}


def widest(values: Iterable[Array]) -> tf.DType:
    """The floating-point type that holds all of some arrays, float32 at least."""
    return max((tf.float32, *(value.dtype for value in values)), key=lambda dtype: dtype.size)
