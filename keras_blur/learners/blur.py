"""The learner that uses a genome: the network step of `Model.fit` on plain arrays.

Source: "Meta-Learning Bidirectional Update Rules" (Sandler et al., ICML 2021), sections 3.2 and
3.3.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from typing import Any, Self

import keras
import numpy as np
from keras import ops

from keras_blur import arguments
from keras_blur.core import feedback, network
from keras_blur.core.genome import Genome
from keras_blur.core.rule import Rule
from keras_blur.distribution import ALL, Shard
from keras_blur.learners.base import Array, Learner, MetaLearner, Outer
from keras_blur.learners.networks import Network, NetworkPlan, dense_plan, known_plan, network_plan


class Blur(MetaLearner):
    """A network that learns with a genome. The genome is its outer parameters.

    Args:
        network: units of the hidden layers of a dense network; or a function from the shape of an
            example and the number of outputs to a list of Keras layers, or to a Keras model. Its
            layers are those that `keras_blur.Model` or `convert` takes, without random numbers
            (dropout), and its last layer gives the outputs. Kernels start normal with variance 1 /
            fan-in; initializers that draw no random numbers, such as ones, are used unchanged.
            Batch normalisation uses the statistics of the batch at hand, in predictions too.
        rule: rule of the genome; `None` is `Rule()`. A rule that learns from errors descends its
            loss. Without a loss it descends the softmax cross-entropy, or the logistic one for a
            single output.
        compute_dtype: dtype of matrix products of a dense network, `"bfloat16"` or `"float16"`.
            Sums and everything else stay float32, as in Keras's mixed precision. `None` is float32.
            The layers of a function have dtype policies of their own.
        std: standard deviation of the random transforms at the start of meta-training.
        fixed: arrays of the genome, by name, that are not outer parameters, so meta-training leaves
            them as they are; `None` for none. Where transforms are fixed, a step costs less: what
            their zeros would multiply is not computed.

    Raises:
        ValueError: if the rule keeps neurons or an argument is out of range; if `fixed` is not a
            part of a genome of the rule; from `on`, if the function returns something else.

    Example:

    >>> Blur((32,), Rule(states=2)).units(10)
    (32, 10)
    >>> from keras_blur import random
    >>> small = lambda shape, outputs: [
    ...     keras.layers.Conv2D(4, 3, activation="relu"), keras.layers.Flatten(), keras.layers.Dense(outputs)
    ... ]
    >>> state = Blur(small).on((8, 8, 1), 10).init({}, random.seed_of(0), 64, 10)
    >>> tuple(state.synapses[0]["kernel"].shape)
    (2, 3, 3, 1, 4)

    Learn only the gate of an existing genome:

    >>> from keras_blur import genomes
    >>> start = genomes.load("fast")
    >>> fixed = {name: value for name, value in start.arrays.items() if name != "synapse_update"}
    >>> list(Blur((32,), start.rule, fixed=fixed).parameters(start))
    ['synapse_update']

    Source: "Meta-Learning Bidirectional Update Rules" (Sandler et al., ICML 2021), sections 3.2 and
    3.3.
    """

    def __init__(
        self,
        network: Sequence[int] | Network = (128,),
        rule: Rule | None = None,
        *,
        compute_dtype: str | None = None,
        std: float = 0.5,
        fixed: Mapping[str, np.ndarray] | None = None,
    ):
        if compute_dtype is not None:
            arguments.choice("compute_dtype", compute_dtype, ("bfloat16", "float16"))
            if callable(network):
                raise ValueError(
                    "`compute_dtype` must be None where `network` is a function: give its layers a dtype policy. "
                    f"Received: compute_dtype={compute_dtype!r}"
                )
        arguments.real("std", std, low=0.0)
        self.compute_dtype, self.std = compute_dtype, std
        self.network: tuple[int, ...] | Network = network if callable(network) else arguments.counts("network", network)
        self.rule = Rule() if rule is None else rule
        arguments.instance("rule", self.rule, Rule, "a keras_blur.Rule or None")
        if self.rule.keep_neurons:
            raise ValueError("`rule` of a learner must have keep_neurons=False: batches of a task are not related.")
        self.fixed = _part_of_genome(self.rule, fixed or {})
        self._plan: NetworkPlan | None = None  # of a function's network, once the shape is known

    def on(self, shape: tuple[int, ...], outputs: int) -> Self:
        if not callable(self.network):
            return self
        made = copy.copy(self)
        made._plan = network_plan(self.network, Genome.random(self.rule, 0), tuple(shape), outputs)
        return made

    def units(self, outputs: int) -> tuple[int, ...]:
        """Units of each layer of a dense network, including the output.

        Args:
            outputs: number of outputs.

        Raises:
            ValueError: if the network is a function.
        """
        if callable(self.network):
            raise ValueError("`units` is known for a dense network only; this learner's network is a function.")
        return (*self.network, outputs)

    def plan(self, features: int, outputs: int) -> NetworkPlan:
        """The network for examples of a number of features.

        Args:
            features: number of features of an example.
            outputs: number of outputs.

        Raises:
            ValueError: if the network is a function, and `on` was not called, or was called for
                another shape.
        """
        if not callable(self.network):
            return dense_plan(features, self.units(outputs), self.compute_dtype)
        return known_plan(self._plan, features, outputs)

    def genome(self, outer: Outer) -> Genome:
        """The genome made of outer parameters.

        Args:
            outer: arrays by name, `[...]` before the shape of each. A layer axis, if any, comes
                after these leading axes.
        """
        made = Genome.unchecked if self.fixed else Genome  # fixed arrays have no leading axes
        outer = {**self.fixed, **outer}
        if self.rule.layers is None:
            return made(self.rule, outer)
        own = {name: len(shape) for name, shape in self.rule.shapes().items()}
        return made(self.rule, {name: _layers_first(value, own[name]) for name, value in outer.items()})

    def draw(self, seed: int, members: int, features: int, outputs: int) -> dict[str, np.ndarray]:
        drawn = Genome.random(self.rule, seed, std=self.std, synapse_update=-0.01, population=(members,))
        return self._outer(drawn)

    def learned(self, outer: Mapping[str, np.ndarray]) -> Genome:
        return Genome(self.rule, {**self.fixed, **outer})

    def _outer(self, genome: Genome) -> dict[str, np.ndarray]:
        """The arrays of a genome that are outer parameters."""
        return {name: value for name, value in genome.by_member().items() if name not in self.fixed}

    def parameters(self, learned: Any) -> dict[str, np.ndarray]:
        genome = Genome.load(learned) if isinstance(learned, (str, os.PathLike)) else learned
        if not isinstance(genome, Genome) or genome.rule != self.rule or len(genome.population) > 1:
            raise ValueError(
                "`start` must be a genome of the learner's rule, single or one population. "
                f"{arguments.received('start', genome)}"
            )
        for name, value in self.fixed.items():
            if not all(np.array_equal(own, value) for own in genome.by_member()[name]):
                raise ValueError(f"`start` must have the `{name}` that the learner's `fixed` has.")
        return self._outer(genome)

    def shares_outer(self, other: Learner) -> bool:
        return isinstance(other, Blur) and other.rule == self.rule and _same(other.fixed, self.fixed)

    def check(self, kind: str, outputs: int) -> None:
        rule = self.rule
        if (
            rule.feedback == "error"
            and outputs == 1
            and kind == "classes"
            and "Categorical" in type(rule.keras_loss).__name__
        ):
            raise ValueError(
                "`learner` must have a rule whose loss fits a single output, such as the binary cross-entropy, where the "
                f"tasks have one. Received: loss={rule.loss!r}"
            )
        if rule.feedback == "error" and kind == "values" and feedback.target_kind(loss_of(rule)) != "values":
            raise ValueError(
                "`learner` must have a rule whose loss fits values, such as the mean squared error, where the tasks are of "
                f"values. Received: loss={rule.loss!r}"
            )
        if rule.feedback == "error" and kind == "bits":
            raise ValueError(
                "`learner` must have a rule with feedback='labels' where the tasks are of bits, as some are not scored. "
                f"Received: feedback={rule.feedback!r}"
            )
        if rule.layers is not None and not callable(self.network) and len(self.network) + 1 != rule.layers:
            raise ValueError(f"`learner` must have {rule.layers} layers, as its rule has a genome for each of that many.")

    def check_batch(self, batch: int, query: int) -> None:
        rule = self.rule
        if min(batch, query) == 1 and rule.normalize_activations != "none" and rule.normalization_axis == "batch":
            raise ValueError(
                "`batch_size` and `query_size` must be 2 or more where the rule normalises activations over the batch, as "
                "nothing is left of one example. A rule with normalization_axis='units' takes one. Received: "
                f"batch_size={batch}, query_size={query}"
            )

    def init(
        self, outer: Outer, seed: Array, features: int, outputs: int, leading: tuple[int, ...] = (), shard: Shard = ALL
    ) -> network.NetworkState:
        return self.plan(features, outputs).init(self.rule, seed, leading, shard)

    def step(self, outer: Outer, state: network.NetworkState, x: Array, y: Array) -> tuple[network.NetworkState, Array]:
        plan = self.plan(int(x.shape[-1]), int(y.shape[-1]))
        x = plan.entering(x, state.synapses)
        result = network.step(self.genome(outer), plan.graph, state, x, lambda prediction: self._feedback(y, prediction))
        return result.state, result.output

    def _feedback(self, y: Array, prediction: Array) -> Array:
        """The feedback at the output: the labels, or the gradient of the loss."""
        if self.rule.feedback == "labels":
            return y
        loss = loss_of(self.rule, int(prediction.shape[-1]))
        y = ops.broadcast_to(y, ops.shape(prediction))
        kind = feedback.target_kind(loss)
        targets = {"classes": lambda: ops.argmax(y, axis=-1), "indicators": lambda: 0.5 * (y + 1.0)}
        return feedback.error(loss, targets.get(kind, lambda: y)(), prediction, population=len(prediction.shape) - 2)

    def predict(self, outer: Outer, state: network.NetworkState, x: Array) -> Array:
        genome = self.genome(outer)
        plan = self._plan or self.plan(int(x.shape[-1]), int(state.synapses[-1]["kernel"].shape[-1]))
        synapses = network.predicting(genome, plan.graph, state)
        # Batch normalisation has no moving statistics here; nothing else differs in training.
        sweep = network.forward(genome, plan.graph, synapses, plan.entering(x, synapses), training=True)
        return network.output(genome, plan.graph, sweep.values)


def loss_of(rule: Rule, outputs: int = 2) -> keras.losses.Loss:
    """The loss of a rule that learns from errors; cross-entropy by default."""
    if rule.keras_loss is not None:
        return rule.keras_loss
    if outputs == 1:
        return keras.losses.BinaryCrossentropy(from_logits=True)
    return keras.losses.CategoricalCrossentropy(from_logits=True)


def check_genome(genome: Genome, hidden: Sequence[int] | None, axes: int = 0) -> None:
    """Raises a `ValueError` if a genome does not fit a network.

    Args:
        genome: a genome with at most `axes` population axes.
        hidden: units of the hidden layers; `None` for a network that is not a dense one.
        axes: 0 or 1.
    """
    kind = f"`genome` must be a single genome{' or a population on one axis' * axes}"
    if len(genome.population) > axes:
        raise ValueError(f"{kind}. Received: {genome!r}")
    if hidden is not None and genome.rule.layers not in (None, len(hidden) + 1):
        raise ValueError(
            f"{kind}, for {len(hidden) + 1} layers of synapses if each has its own. Received: {genome!r} with "
            f"layers={genome.rule.layers}"
        )


def _part_of_genome(rule: Rule, fixed: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Some arrays of a single genome, not all, checked."""
    arguments.instance("fixed", fixed, Mapping, "a mapping from names to arrays, or None")
    whole = Genome.random(rule, 0).arrays
    if unknown := sorted(set(fixed) - set(whole)):
        raise ValueError(f"`fixed` must have names of {', '.join(whole)}. Received: {', '.join(map(str, unknown))}")
    if len(fixed) == len(whole):
        raise ValueError("`fixed` must leave some arrays of the genome to be learned. Received: all of them")
    for name, value in fixed.items():
        if np.shape(value) != whole[name].shape:
            raise ValueError(f"`fixed[{name!r}]` must have shape {whole[name].shape}. Received shape {np.shape(value)}")
    checked = Genome(rule, {**whole, **fixed})
    return {name: checked.arrays[name] for name in whole if name in fixed}


def _same(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def _layers_first(value: Array, own: int) -> Array:
    """Moves the layer axis to the front. It is the last axis before the array's own `own` axes."""
    rank = len(value.shape)
    axis = rank - own - 1
    return ops.transpose(value, (axis, *range(axis), *range(axis + 1, rank)))
