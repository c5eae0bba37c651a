"""FaMUS: a one-step outer gradient of which only some layers' parts are computed, fixed ones or those that a sampler picks.

Source: "Faster Meta Update Strategy for Noise-Robust Deep Learning" (Xu et al., CVPR 2021). The gradient through a virtual
step is a sum over the layers of the model (its equation 7); most of the time goes into parts that change it little. The
virtual step itself is always that of all layers; what is left out is only the way back through it.

A fixed cut (`layers`) leaves out the lower layers, and then neither the meta loss nor the virtual step is differentiated
below it. With a `GradientSampler` a small network for each layer looks at that layer's training gradient and says whether
the layer takes part (equations 8 and 9). A gate that multiplies a part by zero saves nothing; so each of the two ways back
has one branch for each lowest layer that a sample can have, of which only the one that is needed is executed. What saves
time is that the lowest layer which takes part is high. All branches begin at passes that are made once, outside. On several
replicas there are none, and a closed gate saves nothing: losses add up over replicas, which a branch cannot.

The sampler is learned too, by three losses (equations 10 to 12): the meta loss; (sum of gates - target)^2; and the squared
distance between the pooled gradients of training and meta loss at the last layer. A gate that is open multiplies its layer's
step, one that is closed multiplies, as one minus itself, a step without a gradient: either way the step's value is
whole, and the derivative by the gate is -alpha <v, g>, or its opposite. The third loss acts on the outer parameters, through
the training gradient of the last layer; the meta side is held.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_blur import arguments, random
from keras_blur.bilevel.hypergradient import Array, Bilevel, Hypergradient, LookAhead, Outer, VirtualStep, Weights
from keras_blur.compiling import with_own_constants
from keras_blur.distribution import shard
from keras_blur.learners.base import resolve


@dataclasses.dataclass(frozen=True)
class GradientSampler:
    """Which layers take part, learned.

    Args:
        target: number of open gates that is aimed at.
        hidden: units of a gate's hidden layer.
        temperature: of the Gumbel softmax.
        count_weight: of (sum of gates - target)^2.
        distance_weight: of the distance of pooled gradients at the last layer.
        learning_rate, momentum: of the sampler's SGD.

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
    """The gradient through one virtual step of SGD, of some layers.

    Args:
        layers: those that take part, by their paths, such as `"block/dense"`, or by names that no other layer has; or
            `"last:N"` for the last N with weights; `None` for all. With a sampler, those among which it chooses.
        sampler: what chooses among them in each step; `None` takes them all. The last layer always takes part.
        rate: as of `VirtualStep`.

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
        """Names of the layers that take part, of all with weights."""
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
        watched = {name: tf.convert_to_tensor(value) for name, value in own.items()}
        with tf.GradientTape() as tape:
            tape.watch(watched)
            gates = self._gates(sampler, chosen, parts, training, seed, watched)
        lowest = tf.argmax(tf.cast(gates > 0.5, tf.int32), output_type=tf.int32)  # the first open one; the last always is
        names = [name for own_names in parts for name in own_names]
        above = [[name for own_names in parts[first:] for name in own_names] for first in range(len(parts))]

        branches = shard().count == 1

        def of_lowest(back: Callable[[list[str]], Any]) -> Any:
            if not branches:
                return back(names)
            return tf.switch_case(lowest, [with_own_constants(functools.partial(back, some)) for some in above])

        def slope_of(some: list[str]) -> dict[str, Array]:
            return {**{name: tf.zeros_like(training[name]) for name in names}, **ahead.slope(some)}

        loss, slope = problem.mean((ahead.loss, of_lowest(slope_of)))
        products = tf.stack(
            [
                tf.add_n([tf.cast(tf.reduce_sum(slope[name] * training[name]), tf.float32) for name in own_names])
                for own_names in parts
            ]
        )
        products = tf.where(tf.range(len(parts)) < lowest, 0.0, products)  # no gate is moved by a way back not taken
        kept = {
            name: tf.cast(gate, slope[name].dtype) * slope[name]
            for gate, own_names in zip(tf.unstack(gates), parts, strict=True)
            for name in own_names
        }
        # The third loss is another product with the last layer's training gradient: 2 (pooled difference) / size.
        distance = {}
        for name in parts[-1]:
            apart = pooled(training[name]) - pooled(slope[name])
            factor = 2.0 * sampler.distance_weight * apart.shape[0] / math.prod(slope[name].shape)
            distance[name] = factor * tf.broadcast_to(apart, slope[name].shape)
        found = problem.mean(of_lowest(lambda some: ahead.mixed({name: kept[name] for name in some}, distance)))
        signs = tf.where(gates > 0.5, -1.0, 1.0)
        count = tf.reduce_sum(gates)
        alpha = tf.cast(ahead.alpha, tf.float32)
        by_gates = alpha * signs * products + 2.0 * sampler.count_weight * (count - sampler.target)
        changes = tape.gradient(gates, watched, output_gradients=by_gates, unconnected_gradients="zero")
        depth = tf.cast(len(chosen) - lowest, tf.float32)
        return Hypergradient(found, loss, {"layers": count, "depth": depth}), changes

    def _gates(
        self, sampler: GradientSampler, chosen: tuple[str, ...], parts: Sequence[tuple[str, ...]], training: Weights,
        seed: Array, own: Mapping[str, Array],
    ) -> Array:  # fmt: skip
        """Zeros and ones `[layers]`, with the derivative of the soft sample (equations 8 and 9)."""
        gates = []
        for place, (layer, names) in enumerate(zip(chosen[:-1], parts[:-1], strict=True)):
            inputs = tf.stop_gradient(tf.concat([tf.cast(pooled(training[name]), tf.float32) for name in names], 0))
            inputs = (inputs - tf.reduce_mean(inputs)) / (tf.math.reduce_std(inputs) + 1e-8)
            hidden = tf.linalg.matvec(own[f"{layer}_first"], inputs, transpose_a=True)
            hidden = tf.maximum(hidden, 0.0) + own[f"{layer}_slope"] * tf.minimum(hidden, 0.0)
            logits = tf.linalg.matvec(own[f"{layer}_second"], hidden, transpose_a=True)
            uniform = random.uniform(random.fold_in(seed, place), (2,), 1e-6, 1.0 - 1e-6)
            soft = tf.nn.softmax((logits - tf.math.log(-tf.math.log(uniform))) / sampler.temperature)[1]
            gates.append(soft + tf.stop_gradient(tf.cast(soft > 0.5, soft.dtype) - soft))
        return tf.stack([*gates, tf.ones(())])


def pooled(value: Array) -> Array:
    """The mean over all axes but the last, `[outputs]`."""
    return tf.reduce_mean(tf.reshape(value, (-1, value.shape[-1] if value.shape.rank else 1)), axis=0)
