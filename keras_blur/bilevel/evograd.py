"""EvoGrad: first-order hypergradients from a small population of perturbed weights.

Source: "EvoGrad: Efficient Gradient-Based Meta-Learning and Hyperparameter Optimization" (Bohdal,
Yang, Hospedales, NeurIPS 2021, arXiv 2106.10575). A step of evolution replaces the SGD step:
candidates around the weights are averaged with softmax weights of their training losses. These
weights depend on losses and not on their gradients, so the derivative of the meta loss with respect
to the outer parameters needs no second derivatives:

    theta_k = theta + sigma eps_k,   l_k = L_train(theta_k, lambda),
    w = softmax(-[l_1 .. l_K] / tau),   theta* = sum_k w_k theta_k,
    d L_meta(theta*) / d lambda = sum_k < v, sigma eps_k > dw_k / d lambda,

with v = grad L_meta(theta*).

The weights sum to one, so averaging candidates means averaging perturbations of theta. The formula
is implemented directly: one forward and backward pass of the meta loss and K of the training loss.
For small sigma, the average moves by -sigma^2 (K - 1) / (K tau) times the training gradient in
expectation. An estimate is thus a small and noisy multiple of the exact gradient through one step.
The outer optimizer should not depend on scale; Adam is a good choice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from keras import ops

from keras_blur import arguments, backend
from keras_blur.bilevel.hypergradient import (
    Array,
    Bilevel,
    Hypergradient,
    HypergradientEstimator,
    Outer,
    Weights,
    gradient,
    scaled,
    unscaled,
)
from keras_blur.core import random
from keras_blur.learners.base import resolve

NOISES = ("rademacher", "normal")


@dataclasses.dataclass(frozen=True)
class EvoGrad(HypergradientEstimator):
    """The gradient through a step of evolution.

    Args:
        population: number K of candidates. With one candidate the gradient is exactly 0.
        sigma: scale of perturbations.
        temperature: softmax temperature tau.
        noise: `"rademacher"` (random signs, as used for networks in the source) or `"normal"`.
        scope: layers whose weights are perturbed, by path (such as `"block/dense"`) or unambiguous
            name; `None` for all.

    Raises:
        ValueError: if an argument is invalid; from the trainer, if the model lacks a layer of
            `scope`.

    Example:

    >>> EvoGrad(population=10, sigma=1.0, temperature=0.5, noise="normal").population
    10
    """

    population: int = 2
    sigma: float = 1e-3
    temperature: float = 0.05
    noise: str = "rademacher"
    scope: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        arguments.count("population", self.population)
        arguments.positive("sigma", self.sigma)
        arguments.positive("temperature", self.temperature)
        arguments.choice("noise", self.noise, NOISES)

    @property
    def logged(self) -> tuple[str, ...]:
        return ("candidates",)

    def parameters(self, layers: Mapping[str, Sequence[tuple[int, ...]]]) -> dict[str, np.ndarray]:
        if self.scope is not None:
            named(dict.fromkeys(layers, ()), self.scope, "scope")  # raises where one is unknown
        return {}

    def estimate(
        self, problem: Bilevel, outer: Outer, weights: Weights, rate: Array, seed: Array, own: Mapping[str, Array]
    ) -> tuple[Hypergradient, dict[str, Array]]:
        names = list(weights) if self.scope is None else named(problem.layers, self.scope, "scope")
        noise = [
            {
                name: ops.cast(self._drawn(random.fold_in(seed, k, place), tuple(weights[name].shape)), weights[name].dtype)
                for place, name in enumerate(names)
            }
            for k in range(self.population)
        ]

        def losses(values: Outer) -> dict[str, Array]:
            moved = [{name: weights[name] + self.sigma * eps[name] for name in names} for eps in noise]
            return {"losses": ops.stack([problem.train(values, {**weights, **candidate}) for candidate in moved])}

        own, pull = backend.pullback(losses, dict(outer))
        goodness = -problem.mean(own["losses"]) / self.temperature
        weighing = ops.softmax(goodness) if self.population > 1 else ops.ones_like(goodness)  # Keras warns of a single one
        shares = ops.unstack(weighing)
        merged = {
            name: weights[name]
            + self.sigma * sum(ops.cast(one, eps[name].dtype) * eps[name] for one, eps in zip(shares, noise, strict=True))
            for name in names
        }
        loss, slope = problem.mean(gradient(lambda values: problem.judge({**weights, **values}), merged, problem.scale))
        parts = [[ops.cast(ops.sum(slope[n] * eps[n]), weighing.dtype) for n in names] for eps in noise]
        gains = self.sigma * ops.stack([sum(part) for part in parts])
        by_losses = -weighing * (gains - ops.sum(gains * weighing)) / self.temperature  # sum_k gains_k dw_k / dl
        gradients = unscaled(pull({"losses": scaled(by_losses, problem.scale)}), problem.scale)
        effective = 1.0 / ops.sum(ops.square(weighing))  # K if all weigh the same, 1 if one takes all
        return Hypergradient(problem.mean(gradients), loss, {"candidates": effective}), {}

    def _drawn(self, seed: Array, shape: tuple[int, ...]) -> Array:
        if self.noise == "normal":
            return random.normal(seed, shape)
        return 2.0 * ops.cast(random.integers(seed, shape, 2), "float32") - 1.0


def named(layers: Mapping[str, tuple[str, ...]], chosen: tuple[str, ...], argument: str) -> list[str]:
    """Names of the weights of the given layers, in the order of the model.

    Args:
        layers: names of the weights of each layer, by path.
        chosen: paths or unambiguous names of layers.
        argument: name of the argument, for errors.

    Raises:
        ValueError: if a name matches no layer or several.
    """
    paths = resolve(chosen, layers, argument)
    return [name for layer, names in layers.items() if layer in paths for name in names]
