"""How a network takes a learning step: forward, feedback, backward, synapse update. Pure functions of arrays.

Source: "Meta-Learning Bidirectional Update Rules" (Sandler et al., ICML 2021), section 3.3 and equations 5 to 7.

This is the only loop over layers in the project. `Sequential.fit`, the learners of meta-training and the replay of published
numbers all call it, with variables' values, tensors of an unroll, or arrays of a file. Order inside a step, as published:
neurons start at zero (or where they were), stored synapses are normalised, forward pass, optional synapse update, feedback
into the output, backward pass, synapse update.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from keras import ops

from keras_blur.core import equations
from keras_blur.core.connection import Connection, Synapses
from keras_blur.core.genome import Genome
from keras_blur.core.weightless import StructuralMap

Array = Any
Statistics = tuple[Array, Array] | None


@dataclasses.dataclass(frozen=True)
class Stage:
    """One connection of a network, and the structural layers between the neurons before it and it."""

    connection: Connection
    maps: tuple[StructuralMap, ...] = ()
    learns: bool = True


class NetworkState(NamedTuple):
    """What a learning step reads and writes.

    Attributes:
        synapses: one mapping of arrays a stage.
        step: the learning step, from 0; a Python integer or an integer scalar.
        neurons: states of each layer, the input first, if the rule keeps them; else `()`.
    """

    synapses: tuple[Synapses, ...]
    step: Any = 0
    neurons: tuple[Array, ...] = ()


class Sweep(NamedTuple):
    """What a forward pass leaves.

    Attributes:
        neurons: states of each layer; the input as `[..., 1, batch, *features]`.
        statistics: those that normalised each stage's sums, or `None`s.
        contexts: those of each stage's structural maps.
    """

    neurons: tuple[Array, ...]
    statistics: tuple[Statistics, ...]
    contexts: tuple[tuple[Any, ...], ...]


class StepResult(NamedTuple):
    """The state after a step, and what an observer may want: the output before feedback, and the neurons."""

    state: NetworkState
    output: Array
    neurons: tuple[Array, ...]


def stored(genome: Genome, stages: Sequence[Stage], synapses: Sequence[Synapses]) -> tuple[Synapses, ...]:
    """The synapses as a step starts with them: normalised if the rule normalises the stored ones."""
    if genome.rule.normalize_synapses not in ("stored", "both"):
        return tuple(synapses)
    return tuple(
        stage.connection.normalized(genome.layer(index), own)
        for index, (stage, own) in enumerate(zip(stages, synapses, strict=True))
    )


def forward(
    genome: Genome,
    stages: Sequence[Stage],
    synapses: Sequence[Synapses],
    x: Array,
    *,
    neurons: Sequence[Array] = (),
    statistics: Sequence[Statistics] = (),
    training: bool = False,
    batch: equations.SharedBatch | None = None,
) -> Sweep:
    """The forward pass.

    Args:
        genome: the genome.
        stages: the network.
        synapses: as `stored` gives them.
        x: inputs `[..., batch, *features]`.
        neurons: states of the layers before the pass; `()` for zeros.
        statistics: with which to normalise each stage; `()` takes those of this batch.
        training: whether dropout drops.
        batch: the batch, if x is the part of it that one of several devices holds.

    Returns:
        A `Sweep`.
    """
    features = len(stages[0].maps[0].source) if stages[0].maps else 1
    layers = [ops.expand_dims(x, -2 - features)]
    used, contexts = [], []
    for index, (stage, own) in enumerate(zip(stages, synapses, strict=True)):
        pre, context = _enter(stage, layers[-1], None, training)
        states, moments = stage.connection.forward(
            genome.layer(index),
            own,
            pre,
            neurons[index + 1] if neurons else None,
            last=index == len(stages) - 1,
            statistics=statistics[index] if statistics else None,
            batch=batch,
        )
        layers.append(states)
        used.append(moments)
        contexts.append(context)
    return Sweep(tuple(layers), tuple(used), tuple(contexts))


def output(genome: Genome, neurons: Sequence[Array]) -> Array:
    """The network's prediction `[..., batch, units]`: state 1 of the last layer over the genome's temperature."""
    state = neurons[-1][..., 0, :, :]
    return state / equations.per_state(_last(genome, neurons).temperature, state, 2)


def _last(genome: Genome, neurons: Sequence[Array]) -> Genome:
    """The genome of the output layer."""
    return genome.layer(len(neurons) - 2)


def step(
    genome: Genome,
    stages: Sequence[Stage],
    state: NetworkState,
    x: Array,
    feedback: Callable[[Array], Array],
    *,
    sample_weight: Array | None = None,
    batch: equations.SharedBatch | None = None,
    training: bool = True,
) -> StepResult:
    """One learning step on one batch.

    Args:
        genome: the genome.
        stages: the network.
        state: synapses, step counter and kept neurons.
        x: inputs `[..., batch, *features]`.
        feedback: maps the output `[..., batch, units]` to what state 2 of the last layer receives, of the same shape.
        sample_weight: weight of each example in the Hebbian term, `[..., batch]`, or `None`.
        batch: the batch, if x is the part of it that one of several devices holds: statistics and Hebbian sums are added
            up over devices, before saturation and the other stabilisers, and every device comes to the same synapses.
        training: whether dropout drops.

    Returns:
        A `StepResult`.
    """
    rule = genome.rule
    synapses = stored(genome, stages, state.synapses)
    sweep = forward(genome, stages, synapses, x, neurons=state.neurons, training=training, batch=batch)
    prediction = output(genome, sweep.neurons)

    def learn(synapses: tuple[Synapses, ...], neurons: Sequence[Array], prefix: str) -> tuple[Synapses, ...]:
        before = sweep.neurons if rule.presynaptic == "forward" else neurons
        new = []
        for index, (stage, own) in enumerate(zip(stages, synapses, strict=True)):
            if not stage.learns:
                new.append(own)
                continue
            gene = genome.layer(index)
            pre, _ = _enter(stage, before[index], sweep.contexts[index], training)
            sums = stage.connection.hebbian(
                gene, own, pre, neurons[index + 1], prefix=prefix, step=state.step, sample_weight=sample_weight, batch=batch
            )
            new.append(stage.connection.update(gene, own, sums, prefix=prefix, step=state.step))
        return tuple(new)

    if rule.forward_synapse_update:
        synapses = learn(synapses, sweep.neurons, "forward_" if rule.separate_forward_synapse else "")

    def supervised() -> tuple[tuple[Synapses, ...], tuple[Array, ...]]:
        neurons = list(sweep.neurons)
        neurons[-1] = _with_feedback(_last(genome, neurons), neurons[-1], feedback(prediction))
        for index in range(len(stages) - 1, 0, -1):
            stage = stages[index]
            z = stage.connection.backward(genome.layer(index), synapses[index], neurons[index + 1])
            for structural, context in zip(reversed(stage.maps), reversed(sweep.contexts[index]), strict=True):
                z = structural.transpose(z, context)
            neurons[index] = equations.backward_neurons(rule, genome.layer(index), z, neurons[index], batch)
        return learn(synapses, neurons, ""), tuple(neurons)

    if rule.supervised_every == 1:
        synapses, neurons = supervised()
    elif isinstance(state.step, int):
        synapses, neurons = (synapses, sweep.neurons) if state.step % rule.supervised_every else supervised()
    else:
        synapses, neurons = ops.cond(
            ops.equal(state.step % rule.supervised_every, 0), supervised, lambda: (synapses, sweep.neurons)
        )
    kept = neurons if rule.keep_neurons else ()
    return StepResult(NetworkState(synapses, state.step + 1, kept), prediction, neurons)


def _enter(stage: Stage, states: Array, contexts: Any, training: bool) -> tuple[Array, tuple[Any, ...]]:
    """States of the layer before, through the structural maps, as the connection sees them."""
    used = []
    for index, structural in enumerate(stage.maps):
        context = structural.context(states, training) if contexts is None else contexts[index]
        states = structural.forward(states, context)
        used.append(context)
    return states, tuple(used)


def _with_feedback(genome: Genome, last: Array, signal: Array) -> Array:
    """The output layer for the backward pass (section 3.3): state 1 kept, state 2 the feedback, the rest zero."""
    signal = ops.cast(ops.expand_dims(signal, -3), last.dtype)
    if genome.rule.feedback == "error":
        # dL/da_L: the prediction is state 1 over the temperature; with the pair, times s' as eq. 2 asks.
        signal = signal / equations.scalar(genome.temperature, signal)
        if genome.rule.derivative_state:
            signal = signal * last[..., 1:2, :, :]
    signal = ops.broadcast_to(signal, ops.shape(last[..., :1, :, :]))
    return ops.concatenate([last[..., :1, :, :], signal, ops.zeros_like(last[..., 2:, :, :])], axis=-3)
