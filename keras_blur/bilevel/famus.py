"""FaMUS: one-step hypergradients restricted to some layers, fixed or chosen by a sampler.

Source: "Faster Meta Update Strategy for Noise-Robust Deep Learning" (Xu et al., CVPR 2021). The
gradient through a virtual step is a sum over layers (equation 7). Most of its cost comes from terms
that hardly change it. The virtual step itself always updates all layers; only the backward passes
through it are restricted.

A fixed cut (`layers`) drops the lower layers. Neither the meta loss nor the virtual step is then
differentiated below the cut. With a `GradientSampler`, a small network per layer looks at that
layer's training gradient and decides whether the layer takes part (equations 8 and 9). Multiplying
a term by zero saves no time. Each of the two backward passes therefore has one branch for every
possible lowest layer, and only one branch is executed. The time saved depends on how high the
lowest chosen layer is. All branches start from passes made once outside. On several replicas of
TensorFlow there are no branches and closed gates save nothing, because losses are reduced over
replicas, which is impossible in a branch. On JAX there are branches on several devices, too.

The sampler is trained by three losses (equations 10 to 12): the meta loss; (sum of gates -
target)^2; and the squared distance between the pooled training and meta gradients of the last
layer. An open gate multiplies the step of its layer. A closed gate, as one minus itself, multiplies
a step without a gradient. In both cases the value of the step is unchanged, and the derivative with
respect to the gate is -alpha <v, g> or its negative. The third loss also acts on the outer
parameters, through the training gradient of the last layer; the meta gradient is taken as a
constant.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_blur import arguments, backend
from keras_blur.bilevel.hypergradient import Array, Bilevel, Hypergradient, LookAhead, Outer, VirtualStep, Weights
from keras_blur.core import random
from keras_blur.distribution import shard
from keras_blur.learners.base import resolve


@dataclasses.dataclass(frozen=True)
class GradientSampler:
    """A learned choice of the layers that take part.

    Args:
        target: target number of open gates, at most the number of candidate layers. The gate of the
            last one is always open.
        hidden: units of the hidden layer of a gate.
        temperature: temperature of the Gumbel softmax.
        count_weight: weight of (sum of gates - target)^2.
        distance_weight: weight of the distance between pooled gradients of the last layer.
        learning_rate, momentum: parameters of the sampler's SGD.

    Raises:
        ValueError: if an argument is out of range.

    Example:

    >>> GradientSampler(target=2).hidden
    128
    """

    target: int = 4
    hidden: int = 128
    temperature: float = 5.0
    count_weight: float = 0.1
    distance_weight: float = 0.1
    learning_rate: float = 0.1
    momentum: float = 0.9

    def __post_init__(self) -> None:
        arguments.count("target", self.target)
        arguments.count("hidden", self.hidden)
        arguments.positive("temperature", self.temperature)
        arguments.positive("learning_rate", self.learning_rate)
        for name in ("count_weight", "distance_weight", "momentum"):
            arguments.real(name, getattr(self, name), low=0.0)


@dataclasses.dataclass(frozen=True)
class LayerwiseMetaGradient(VirtualStep):
    """The gradient through one virtual SGD step, restricted to some layers.

    Args:
        layers: layers that take part: a sequence of paths (such as `"block/dense"`) or unambiguous
            names, `"last:N"` for the last N layers with weights, or `None` for all. With a sampler,
            the candidates.
        sampler: chooses among the layers in each step; `None` uses all. The last layer always takes
            part. There must be at least as many layers as its `target`.
        rate: learning rate of the virtual step; `None` uses the current one of the model's
            optimizer.

    Raises:
        ValueError: if an argument is invalid; from the trainer, if the model lacks a layer or has
            fewer of them than the sampler's `target`.

    Example:

    >>> LayerwiseMetaGradient("last:2").layers
    'last:2'
    """

    layers: str | tuple[str, ...] | None = "last:2"
    sampler: GradientSampler | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.layers, str) and not (
            self.layers.startswith("last:") and self.layers[5:].isdigit() and int(self.layers[5:]) > 0
        ):
            raise ValueError(f"`layers` must be 'last:N', names of layers, or None. Received: layers={self.layers!r}")

    @property
    def logged(self) -> tuple[str, ...]:
        return ("layers", "depth") if self.sampler else ()

    @property
    def branches(self) -> bool:
        return self.sampler is not None

    def chosen(self, layers: Mapping[str, Any]) -> tuple[str, ...]:
        """The paths of the layers that take part."""
        every = tuple(layers)
        if self.layers is None:
            return every
        if isinstance(self.layers, str):
            return every[-int(self.layers[5:]) :]
        wanted = resolve(self.layers, every, "layers")
        return tuple(path for path in every if path in wanted)

    def parameters(self, layers: Mapping[str, Sequence[tuple[int, ...]]]) -> dict[str, np.ndarray]:
        chosen = self.chosen(layers)
        if self.sampler is None:
            return {}
        if self.sampler.count_weight and self.sampler.target > len(chosen):
            raise ValueError(
                f"`target` of the sampler must be at most {len(chosen)}, the number of layers among which it chooses by "
                f"layers={self.layers!r}. Received: target={self.sampler.target}"
            )
        made = {}
        for place, name in enumerate(chosen[:-1]):
            rng, hidden = np.random.default_rng(place), self.sampler.hidden
            inputs = sum(shape[-1] if shape else 1 for shape in layers[name])
            made[f"{name}_first"] = rng.standard_normal((inputs, hidden)) / math.sqrt(inputs)
            made[f"{name}_slope"] = np.full(hidden, 0.25)
            made[f"{name}_second"] = rng.standard_normal((hidden, 2)) / math.sqrt(hidden)
        return {name: value.astype("float32") for name, value in made.items()}

    def optimizer(self) -> keras.optimizers.Optimizer | None:
        return self.sampler and keras.optimizers.SGD(self.sampler.learning_rate, self.sampler.momentum)

    def estimate(
        self, problem: Bilevel, outer: Outer, weights: Weights, rate: Array, seed: Array, own: Mapping[str, Array]
    ) -> tuple[Hypergradient, dict[str, Array]]:
        chosen = self.chosen(problem.layers)
        parts = [problem.layers[layer] for layer in chosen]
        names = [name for own_names in parts for name in own_names]
        ahead = self.ahead(problem, outer, weights, rate, names)
        if self.sampler is None:
            loss, slope = problem.mean((ahead.loss, ahead.slope(names)))
            return Hypergradient(problem.mean(ahead.mixed(slope)), loss, {}), {}
        return self._sampled(self.sampler, problem, ahead, chosen, parts, seed, own)

    def _sampled(
        self, sampler: GradientSampler, problem: Bilevel, ahead: LookAhead, chosen: tuple[str, ...],
        parts: Sequence[tuple[str, ...]], seed: Array, own: Mapping[str, Array],
    ) -> tuple[Hypergradient, dict[str, Array]]:  # fmt: skip
        training = ahead.training
        values, pull = backend.pullback(
            lambda own: {"gates": self._gates(sampler, chosen, parts, training, seed, own)}, dict(own)
        )
        gates = values["gates"]
        lowest = ops.cast(ops.argmax(ops.cast(gates > 0.5, "int32")), "int32")  # the first open one; the last always is
        names = [name for own_names in parts for name in own_names]
        above = [[name for own_names in parts[first:] for name in own_names] for first in range(len(parts))]

        branches = shard().count == 1

        def of_lowest(back: Callable[[list[str]], Any]) -> Any:
            if not branches:
                return back(names)
            return backend.branch(lowest, [functools.partial(back, some) for some in above])

        def slope_of(some: list[str]) -> dict[str, Array]:
            return {**{name: ops.zeros_like(training[name]) for name in names}, **ahead.slope(some)}

        loss, slope = problem.mean((ahead.loss, of_lowest(slope_of)))
        products = ops.stack(
            [sum(ops.cast(ops.sum(slope[name] * training[name]), "float32") for name in own_names) for own_names in parts]
        )
        below = ops.arange(len(parts), dtype="int32") < lowest
        products = ops.where(below, 0.0, products)  # gates below the backward pass get no gradient
        kept = {
            name: ops.cast(gate, slope[name].dtype) * slope[name]
            for gate, own_names in zip(ops.unstack(gates), parts, strict=True)
            for name in own_names
        }
        # The third loss is another product with the last layer's training gradient: 2 (pooled
        # difference) / size.
        distance = {}
        for name in parts[-1]:
            apart = pooled(training[name]) - pooled(slope[name])
            factor = 2.0 * sampler.distance_weight * apart.shape[0] / math.prod(slope[name].shape)
            rows = math.prod(slope[name].shape) // apart.shape[0]
            distance[name] = factor * ops.reshape(ops.broadcast_to(apart, (rows, apart.shape[0])), slope[name].shape)
        found = problem.mean(of_lowest(lambda some: ahead.mixed({name: kept[name] for name in some}, distance)))
        signs = ops.cast(ops.where(gates > 0.5, -1.0, 1.0), "float32")
        count = ops.sum(gates)
        alpha = ops.cast(ahead.alpha, "float32")
        by_gates = alpha * signs * products + 2.0 * sampler.count_weight * (count - sampler.target)
        changes = pull({"gates": by_gates})
        depth = ops.cast(len(chosen) - lowest, "float32")
        return Hypergradient(found, loss, {"layers": count, "depth": depth}), changes

    def _gates(
        self, sampler: GradientSampler, chosen: tuple[str, ...], parts: Sequence[tuple[str, ...]], training: Weights,
        seed: Array, own: Mapping[str, Array],
    ) -> Array:  # fmt: skip
        """Gates `[layers]` of 0 or 1 with the derivative of the soft sample (equations 8 and 9)."""
        gates = []
        for place, (layer, names) in enumerate(zip(chosen[:-1], parts[:-1], strict=True)):
            inputs = ops.stop_gradient(ops.concatenate([ops.cast(pooled(training[name]), "float32") for name in names]))
            inputs = (inputs - ops.mean(inputs)) / (ops.std(inputs) + 1e-8)
            hidden = ops.matmul(inputs, own[f"{layer}_first"])
            hidden = ops.maximum(hidden, 0.0) + own[f"{layer}_slope"] * ops.minimum(hidden, 0.0)
            logits = ops.matmul(hidden, own[f"{layer}_second"])
            uniform = random.uniform(random.fold_in(seed, place), (2,), 1e-6, 1.0 - 1e-6)
            soft = ops.softmax((logits - ops.log(-ops.log(uniform))) / sampler.temperature)[1]
            gates.append(soft + ops.stop_gradient(ops.cast(soft > 0.5, soft.dtype) - soft))
        return ops.stack([*gates, ops.ones((), "float32")])


def pooled(value: Array) -> Array:
    """The mean over all axes except the last, `[outputs]`."""
    return backend.mean(ops.reshape(value, (-1, value.shape[-1] if len(value.shape) else 1)), axis=0)
