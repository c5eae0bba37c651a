"""The learner that uses a genome: the network step of `Sequential.fit` on plain tensors.

Source: "Meta-Learning Bidirectional Update Rules" (Sandler et al., ICML 2021), sections 3.2 and
3.3.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_blur import arguments
from keras_blur.core import feedback, network
from keras_blur.core.connections.dense import DenseConnection
from keras_blur.core.genome import Genome
from keras_blur.core.graph import Graph, chain
from keras_blur.core.rule import Rule
from keras_blur.distribution import ALL, Shard
from keras_blur.learners.base import Array, Learner, MetaLearner, Outer, draw_kernel

_PLACES = {"kernel": 0, "bias": 1, "backward_kernel": 2}


class Blur(MetaLearner):
    """A network of dense layers that learns by a genome. The genome is its outer parameters.

    Args:
        hidden: units of the hidden layers.
        rule: rule of the genome. A rule that learns from errors descends its loss. Without a loss
            it descends the softmax cross-entropy, or the logistic one for a single output.
        compute_dtype: dtype of matrix products, `"bfloat16"` or `"float16"`. Sums and everything
            else stay float32, as in Keras's mixed precision. `None` is float32.
        std: standard deviation of the random transforms at the start of meta-training.

    Raises:
        ValueError: if the rule keeps neurons or an argument is out of range.

    Example:

    >>> Blur(hidden=(32,), rule=Rule(states=2)).units(10)
    (32, 10)
    """

    def __init__(
        self,
        hidden: tuple[int, ...] = (128,),
        rule: Rule | None = None,
        *,
        compute_dtype: str | None = None,
        std: float = 0.5,
    ):
        if compute_dtype is not None:
            arguments.choice("compute_dtype", compute_dtype, ("bfloat16", "float16"))
        arguments.real("std", std, low=0.0)
        self.compute_dtype, self.std = compute_dtype, std
        self.hidden = arguments.counts("hidden", hidden)
        self.rule = Rule() if rule is None else rule
        arguments.instance("rule", self.rule, Rule, "a keras_blur.Rule or None")
        if self.rule.keep_neurons:
            raise ValueError("`rule` of a learner must have keep_neurons=False: batches of a task are not related.")

    def units(self, outputs: int) -> tuple[int, ...]:
        """Units of each layer, including the output."""
        return (*self.hidden, outputs)

    def graph(self, outputs: int) -> Graph:
        """The network."""
        return chain([DenseConnection(units, compute_dtype=self.compute_dtype) for units in self.units(outputs)])

    def genome(self, outer: Outer) -> Genome:
        """The genome made of outer parameters.

        Its arrays have the layer axis, if any, after the leading axes.
        """
        if self.rule.layers is None:
            return Genome(self.rule, outer)
        own = {name: len(shape) for name, shape in self.rule.shapes().items()}
        return Genome(self.rule, {name: _layers_first(value, own[name]) for name, value in outer.items()})

    def draw(self, seed: int, members: int, features: int, outputs: int) -> dict[str, np.ndarray]:
        return self.parameters(Genome.random(self.rule, seed, std=self.std, synapse_update=-0.01, population=(members,)))

    def learned(self, outer: Mapping[str, np.ndarray]) -> Genome:
        return Genome(self.rule, outer)

    def parameters(self, learned: Any) -> dict[str, np.ndarray]:
        genome = Genome.load(learned) if isinstance(learned, (str, os.PathLike)) else learned
        if not isinstance(genome, Genome) or genome.rule != self.rule or len(genome.population) > 1:
            raise ValueError(
                "`start` must be a genome of the learner's rule, single or one population. "
                f"{arguments.received('start', genome)}"
            )
        return genome.by_member()

    def shares_outer(self, other: Learner) -> bool:
        return isinstance(other, Blur) and other.rule == self.rule

    def check(self, kind: str, outputs: int) -> None:
        rule = self.rule
        if (
            rule.feedback == "error"
            and outputs == 1
            and kind == "classes"
            and "Categorical" in type(rule.keras_loss).__name__
        ):
            raise ValueError(
                "`learner` must have a rule whose loss is of a single output, such as the binary cross-entropy, where the "
                f"tasks have one. Received: loss={rule.loss!r}"
            )
        if rule.feedback == "error" and kind == "values" and feedback.target_kind(loss_of(rule)) != "values":
            raise ValueError(
                "`learner` must have a rule whose loss is of values, such as the mean squared error, where the tasks are of "
                f"values. Received: loss={rule.loss!r}"
            )
        if rule.layers is not None and len(self.hidden) + 1 != rule.layers:
            raise ValueError(f"`learner` must have {rule.layers} layers, as its rule has a genome for each of that many.")

    def init(
        self, outer: Outer, seed: Array, features: int, outputs: int, leading: tuple[int, ...] = (), shard: Shard = ALL
    ) -> network.NetworkState:
        synapses = []
        before = features
        for index, connection in enumerate(self.graph(outputs).holders):

            def draw(name: str, channel: int, shape: tuple[int, ...], index: int = index) -> Array:
                if name == "bias":
                    return tf.zeros((*leading, *shape))
                # Channel 0 of the kernel is what a learner with one kernel a layer starts with.
                return draw_kernel(seed, (index, _PLACES[name], channel), (shape[0], shape[1]), leading, shard)

            synapses.append(connection.init(self.rule, before, draw, feeds_back=index > 0))
            before = connection.units
        return network.NetworkState(tuple(synapses), tf.zeros((), tf.int32))

    def step(self, outer: Outer, state: network.NetworkState, x: Array, y: Array) -> tuple[network.NetworkState, Array]:
        result = network.step(
            self.genome(outer), self.graph(y.shape[-1]), state, x, lambda prediction: self._feedback(y, prediction)
        )
        return result.state, result.output

    def _feedback(self, y: Array, prediction: Array) -> Array:
        """The feedback at the output: the labels, or the gradient of the loss."""
        if self.rule.feedback == "labels":
            return y
        loss = loss_of(self.rule, int(prediction.shape[-1]))
        y = tf.broadcast_to(y, tf.shape(prediction))
        kind = feedback.target_kind(loss)
        targets = {"classes": lambda: tf.argmax(y, -1, tf.int32), "indicators": lambda: 0.5 * (y + 1.0)}
        return feedback.error(loss, targets.get(kind, lambda: y)(), prediction)

    def predict(self, outer: Outer, state: network.NetworkState, x: Array) -> Array:
        genome = self.genome(outer)
        graph = self.graph(int(state.synapses[-1]["kernel"].shape[-1]))
        sweep = network.forward(genome, graph, network.predicting(genome, graph, state), x)
        return network.output(genome, graph, sweep.values)


def loss_of(rule: Rule, outputs: int = 2) -> keras.losses.Loss:
    """The loss of a rule that learns from errors; cross-entropy by default."""
    if rule.keras_loss is not None:
        return rule.keras_loss
    if outputs == 1:
        return keras.losses.BinaryCrossentropy(from_logits=True)
    return keras.losses.CategoricalCrossentropy(from_logits=True)


def check_genome(genome: Genome, hidden: Sequence[int], axes: int = 0) -> None:
    """Raises a `ValueError` if a genome does not fit a network.

    Args:
        genome: a genome with at most `axes` population axes.
        hidden: units of the hidden layers.
        axes: 0 or 1.
    """
    if len(genome.population) > axes or genome.rule.layers not in (None, len(hidden) + 1):
        raise ValueError(
            f"`genome` must be a single one{' or on one population axis' * axes}, for {len(hidden) + 1} layers of synapses "
            f"if each has its own. Received: {genome!r} with layers={genome.rule.layers}"
        )


def _layers_first(value: Array, own: int) -> Array:
    """Moves the layer axis to the front. It is the last axis before the array's own `own` axes."""
    rank = len(value.shape)
    axis = rank - own - 1
    return tf.transpose(value, [axis, *range(axis), *range(axis + 1, rank)])
