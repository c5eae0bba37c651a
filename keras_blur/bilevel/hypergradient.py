"""Hypergradients through one training step: exact, and by finite differences.

Sources: the one-step virtual update of "Meta-Weight-Net: Learning an Explicit Mapping For Sample
Weighting" (Shu et al., NeurIPS 2019), on whose equations "Faster Meta Update Strategy for
Noise-Robust Deep Learning" (Xu et al., CVPR 2021) builds; the difference quotient of "DARTS:
Differentiable Architecture Search" (Liu et al., ICLR 2019), equation 8.

A model with weights w minimises a training loss with outer parameters lambda, such as example
weights, the strength of an augmentation, or another hyperparameter. The goal is a lambda for which
the model does well on meta data, by another loss. One SGD step stands for the whole training:

    w^ = w - alpha grad_w L_train(w, lambda),
    d L_meta(w^) / d lambda = -alpha grad_lambda < grad_w L_train(w, lambda), v >

with v = grad L_meta(w^). Only this product with v is needed, never the matrix of mixed derivatives.
Neither w^ nor v has to be differentiated again. The second derivative is therefore a single
backward pass through one gradient, whatever the size of lambda.

Every estimator is a function of arrays. A *virtual* pass discards its updates of running statistics
and random states. All passes of a step see the same batch and the same dropout masks.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_blur import arguments, backend
from keras_blur.bilevel.training_losses import recording, replaying

Array = Any
Outer = Mapping[str, Array]
Weights = Mapping[str, Array]


class Bilevel(NamedTuple):
    """The bilevel problem of one step, including its batches.

    Attributes:
        train: maps outer parameters and weights to the training loss, a scalar.
        judge: maps weights to the loss on the meta batch, a scalar.
        layers: names of the weights of each layer, by path, from first to last.
        mean: averages a nest over replicas. Each replica has its own part of the batches.
        scale: loss scale during differentiation, against float16 underflow; `None` for none.
    """

    train: Callable[[Outer, Weights], Array]
    judge: Callable[[Weights], Array]
    layers: Mapping[str, tuple[str, ...]]
    mean: Callable[[Any], Any] = lambda values: values
    scale: Array | None = None


class Hypergradient(NamedTuple):
    """An estimate of the outer gradient.

    Attributes:
        gradients: gradient of each outer parameter by name.
        loss: meta loss at the weights where the gradient was taken, a scalar.
        logs: further scalars, named as in the estimator's `logged`.
    """

    gradients: dict[str, Array]
    loss: Array
    logs: dict[str, Array]


@dataclasses.dataclass(frozen=True)
class HypergradientEstimator(abc.ABC):
    """Base class of outer-gradient estimators for `BilevelTrainer`."""

    @property
    def logged(self) -> tuple[str, ...]:
        """Names of the scalars in `Hypergradient.logs`."""
        return ()

    @property
    def branches(self) -> bool:
        """Whether a step has conditional branches."""
        return False

    def parameters(self, layers: Mapping[str, Sequence[tuple[int, ...]]]) -> dict[str, np.ndarray]:
        """Initial values of the estimator's own trainable parameters by name. Most have none.

        Args:
            layers: shapes of the weights of each layer, by path.

        Raises:
            ValueError: if the estimator names an unknown layer.
        """
        del layers
        return {}

    def optimizer(self) -> keras.optimizers.Optimizer | None:
        """The optimizer of `parameters`, if there are any."""
        return None

    @abc.abstractmethod
    def estimate(
        self, problem: Bilevel, outer: Outer, weights: Weights, rate: Array, seed: Array, own: Mapping[str, Array]
    ) -> tuple[Hypergradient, dict[str, Array]]:
        """Estimates the outer gradient.

        Args:
            problem: the bilevel problem.
            outer: outer parameters by name.
            weights: the model's weights by name.
            rate: learning rate of the virtual step, a scalar.
            seed: seed of noise.
            own: values of `parameters`.

        Returns:
            The estimate, and the gradients of `own`.
        """


@dataclasses.dataclass(frozen=True)
class VirtualStep(HypergradientEstimator):
    """Base class of estimators that look ahead by one virtual SGD step.

    Args:
        rate: learning rate of the step. `None` uses the current one of the model's optimizer,
            including its schedule.
    """

    rate: float | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.rate is not None:
            arguments.positive("rate", self.rate)

    def ahead(
        self, problem: Bilevel, outer: Outer, weights: Weights, rate: Array, names: Sequence[str] | None = None
    ) -> LookAhead:
        """Computes the virtual step. `names` as in `LookAhead`."""
        dtype = widest([rate, *weights.values()])
        alpha = ops.cast(rate, dtype) if self.rate is None else ops.convert_to_tensor(self.rate, dtype)
        return LookAhead(problem, outer, weights, alpha, names)


class LookAhead:
    """A virtual SGD step, the meta loss after it, and two restricted backward passes.

    Both losses are computed once, at construction, and both backward passes start from there, even
    inside a branch of a conditional. A compiler could not detect the repeated computation in a
    branch. A traced function drops whatever a backward pass does not use.

    Args:
        problem, outer, weights: as in `HypergradientEstimator.estimate`.
        alpha: learning rate, a scalar.
        names: weights with respect to which the meta loss will be differentiated; `None` for all.

    Attributes:
        training: training gradient with respect to all weights, averaged over replicas.
        weights: weights after the step.
        loss: meta loss after the step, on the replica's own batch.
    """

    def __init__(self, problem: Bilevel, outer: Outer, weights: Weights, alpha: Array, names: Sequence[str] | None = None):
        self.alpha, self._scale = alpha, problem.scale

        def first(values: Outer) -> dict[str, Array]:
            # Scaled: dividing here would start the backward pass with numbers too small for
            # float16.
            return gradient(lambda own: scaled(problem.train(values, own), problem.scale), weights)[1]

        def judge(values: Weights) -> dict[str, Array]:
            return {"loss": problem.judge({**self.weights, **values})}

        own, self._above = backend.pullback(first, dict(outer))
        self.training: dict[str, Array] = problem.mean(unscaled(own, problem.scale))
        self.weights = {n: value - ops.cast(alpha, value.dtype) * self.training[n] for n, value in weights.items()}
        chosen = self.weights if names is None else {name: self.weights[name] for name in names}
        judged, self._below = backend.pullback(judge, chosen)
        self.loss = judged["loss"]

    def slope(self, names: Sequence[str]) -> dict[str, Array]:
        """The meta gradient with respect to some weights, on the replica's own batch.

        The backward pass stops at the lowest of these weights.
        """
        return unscaled(self._below({"loss": scaled(ops.ones_like(self.loss), self._scale)}, list(names)), self._scale)

    def mixed(self, slope: Weights, beside: Weights | None = None) -> dict[str, Array]:
        """-alpha grad_lambda < grad_w L_train, v > over the weights in v, on the own batch.

        Args:
            slope: v.
            beside: arrays for some of these weights; grad_lambda < grad_w L_train, beside > is
                added.
        """
        upstream = {name: -ops.cast(self.alpha, value.dtype) * value for name, value in slope.items()}
        for name, value in (beside or {}).items():
            upstream[name] = upstream[name] + value
        size = None
        if self._scale is not None:  # float16 holds numbers around 1
            largest = ops.max(ops.stack([ops.max(ops.cast(ops.abs(value), "float32")) for value in upstream.values()]))
            size = ops.where(largest > 0.0, largest, 1.0)
            upstream = unscaled(upstream, size)
        return unscaled(self._above(upstream), None if size is None else self._scale / size)


@dataclasses.dataclass(frozen=True)
class OneStep(VirtualStep):
    """The exact gradient through one virtual SGD step.

    Args:
        rate: learning rate of the virtual step; `None` uses the current one of the model's
            optimizer.

    Raises:
        ValueError: if `rate` is not positive.

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
    """The gradient through one virtual SGD step, with a central difference as mixed derivative.

    No second derivatives are computed. Both points see what the training loss takes as constants
    (`held`) at the weights in between.

    Args:
        rate: learning rate of the virtual step; `None` uses the current one of the model's
            optimizer.
        width: distance between the two points in weight space, divided by the square root of the
            number of weights. The error is quadratic in the width. In float32, much smaller widths
            suffer from rounding.

    Raises:
        ValueError: if `rate` or `width` is not positive.

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
        length = ops.sqrt(sum(ops.cast(ops.sum(ops.square(v)), dtype) for v in slope.values()))
        number = sum(math.prod(v.shape) for v in slope.values())
        scale = 0.5 * self.width * math.sqrt(number) / ops.maximum(length, 1e-12)
        constants: list[Array] = []
        with recording(constants):
            problem.train(outer, weights)

        def outer_gradient(sign: float) -> dict[str, Array]:
            moved = {n: value + ops.cast(sign * scale, value.dtype) * slope[n] for n, value in weights.items()}

            def train(values: Outer) -> Array:
                with replaying(constants):
                    return problem.train(values, moved)

            return gradient(train, outer, problem.scale)[1]

        above, below = outer_gradient(1.0), outer_gradient(-1.0)
        factor = -ahead.alpha / (2.0 * scale)
        found = {name: ops.cast(factor, above[name].dtype) * (above[name] - below[name]) for name in outer}
        return Hypergradient(problem.mean(found), loss, {}), {}


def gradient(
    function: Callable[[Any], Array], values: Mapping[str, Array], scale: Array | None = None
) -> tuple[Array, dict[str, Array]]:
    """The value of a function and its gradient with respect to a dictionary of arrays.

    Args:
        function: maps the arrays to a scalar.
        values: the arrays.
        scale: loss scale during differentiation, as in `Bilevel`. The gradient is divided by it.
    """

    def differentiated(values: Any) -> tuple[Array, Array]:
        result = function(values)
        return scaled(result, scale), result

    result, found = backend.gradient(differentiated, dict(values))
    return result, unscaled(found, scale)


def scaled(loss: Array, scale: Array | None) -> Array:
    """The loss multiplied by the loss scale."""
    return loss if scale is None else loss * ops.cast(scale, loss.dtype)


def unscaled(gradients: Mapping[str, Array], scale: Array | None) -> dict[str, Array]:
    """Gradients divided by the loss scale."""
    dense = {name: backend.dense(g) for name, g in gradients.items()}
    return {name: g if scale is None else g / ops.cast(scale, g.dtype) for name, g in dense.items()}


def widest(values: Iterable[Array]) -> str:
    """The widest floating-point dtype of some arrays, at least float32."""
    return "float64" if "float64" in {keras.backend.standardize_dtype(value.dtype) for value in values} else "float32"
