"""How a network takes a learning step: forward, feedback, backward, synapse update. Pure functions
of arrays.

Source: "Meta-Learning Bidirectional Update Rules" (Sandler et al., ICML 2021), section 3.3 and
equations 5 to 7.

This is the only loop over layers in the project. `Model.fit`, the learners of meta-training and the
replay of published numbers all call it: with the values of variables, the tensors of an unroll, or
the arrays of a file. The order inside a step is the published one: neurons start at zero (or keep
their states), stored synapses are normalised, forward pass, optional synapse update, feedback into
the outputs, backward pass, synapse update.

If several operations read a value, the backward pass sums what comes back from them (the transpose
of a copy) before equation 6. If several connections share synapses, these change by the sum of the
Hebbian terms. With a genome for each layer, neurons change in the backward pass by the genome of
the connection that reads them, as published; if several read them, by that of the first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from keras import ops

from keras_blur.core import equations
from keras_blur.core.companions import averaged, slow
from keras_blur.core.connection import Sums, Synapses
from keras_blur.core.genome import Genome
from keras_blur.core.graph import Connect, Graph, Pass
from keras_blur.core.maps import Shape
from keras_blur.core.states import Parts, between, first_states, joined, later_states, mapped

if TYPE_CHECKING:
    from jaxtyping import Shaped

Array = Any
Statistics = tuple[Array, Array] | None
Inputs = Array | tuple[Array, ...]


class NetworkState(NamedTuple):
    """The state of a network, which a learning step reads and replaces.

    Attributes:
        synapses: one mapping of arrays for each of the graph's `holders`.
        step: the learning step, from 0; a Python integer or an integer scalar.
        neurons: states of the inputs and of each layer, if the rule keeps them; else `()`.
    """

    synapses: tuple[Synapses, ...]
    step: Any = 0
    neurons: tuple[Array, ...] = ()


class Sweep(NamedTuple):
    """The results of a forward pass.

    Attributes:
        values: states of each value of the graph, as arrays or in parts; an input is
            `[..., 1, batch, *features]`.
        statistics: the mean and the variance that normalised the sums of each connection, or
            `None`.
        contexts: what each map drew, such as a dropout mask, by the number of its value.
    """

    values: tuple[Array, ...]
    statistics: tuple[Statistics, ...]
    contexts: Mapping[int, Any]


class StepResult(NamedTuple):
    """The state after a step, and what an observer may want to see.

    Attributes:
        state: the state.
        output: the prediction before feedback, `[..., batch, *features]`; a tuple if there are
            several outputs.
        neurons: states of the inputs and of each layer.
        sweep: the forward pass.
    """

    state: NetworkState
    output: Any
    neurons: tuple[Array, ...]
    sweep: Sweep


def predicting(genome: Genome, graph: Graph, state: NetworkState) -> tuple[Synapses, ...]:
    """The synapses that a prediction reads: the slow ones, if the rule has them."""
    return stored(genome, graph, [slow(genome.rule, own, state.step) for own in state.synapses])


def stored(genome: Genome, graph: Graph, synapses: Sequence[Synapses]) -> tuple[Synapses, ...]:
    """The synapses at the start of a step: normalised, if the rule normalises stored synapses."""
    if genome.rule.normalize_synapses not in ("stored", "both"):
        return tuple(synapses)
    return tuple(
        connection.normalized(graph.genome(genome, holder), own)
        for holder, (connection, own) in enumerate(zip(graph.holders, synapses, strict=True))
    )


def forward(
    genome: Genome,
    graph: Graph,
    synapses: Sequence[Synapses],
    x: Inputs,
    *,
    neurons: Sequence[Array] = (),
    statistics: Sequence[Statistics] = (),
    training: bool = False,
    batch: equations.SharedBatch | None = None,
) -> Sweep:
    """The forward pass.

    Args:
        genome: the genome.
        graph: the network.
        synapses: the result of `stored`.
        x: inputs `[..., batch, *features]`; a tuple of them if there are several.
        neurons: states of inputs and layers before the pass; `()` for zeros.
        statistics: mean and variance to normalise the sums of each connection with; `()` uses those
            of this batch.
        training: whether dropout is active, and normalising maps use the statistics of the batch.
        batch: the batch, if x is the part of it that one of several devices holds.

    Returns:
        A `Sweep`.
    """
    inputs = x if isinstance(x, tuple) else (x,)
    values = [ops.expand_dims(one, -2 - axes) for one, axes in zip(inputs, graph.features, strict=True)]
    before = dict(zip(graph.nodes, neurons, strict=True)) if neurons else {}
    given = iter(statistics or [None] * len(graph.connects))
    read = _read_forward(genome)
    used: list[Statistics] = []
    contexts: dict[int, Any] = {}
    for one in graph.operations:
        if isinstance(one, Pass):
            entering = _entering(one, values, read)
            contexts[one.target] = one.map.context(entering, training)
            values.append(one.map.forward(entering, contexts[one.target], batch))
            continue
        states, moments = one.connection.forward(
            graph.genome(genome, one.holder),
            synapses[one.holder],
            values[one.source],
            before.get(one.target),
            last=one.target in graph.last,
            statistics=next(given),
            batch=batch,
        )
        values.append(states)
        used.append(moments)
    return Sweep(tuple(values), tuple(used), contexts)


def output(genome: Genome, graph: Graph, values: Sequence[Array]) -> Any:
    """The network's prediction `[..., batch, *features]`: state 1 of an output over the genome's
    temperature.

    Returns:
        An array, or a tuple of them if there are several outputs.
    """
    found = []
    for number in graph.outputs:
        states = values[number]
        axes = graph.axes[number]
        state = ops.squeeze(first_states(states, 1, axes), axis=len(states.shape) - 2 - axes)
        found.append(state / equations.per_state(_gene_of(genome, graph, number).temperature, state, 1 + axes))
    return found[0] if len(found) == 1 else tuple(found)


def step(
    genome: Genome,
    graph: Graph,
    state: NetworkState,
    x: Inputs,
    feedback: Callable[[Any], Any],
    *,
    sample_weight: Shaped[Array, "... batch"] | None = None,
    batch: equations.SharedBatch | None = None,
    training: bool = True,
) -> StepResult:
    """One learning step on one batch.

    Args:
        genome: the genome.
        graph: the network.
        state: synapses, step counter and kept neurons.
        x: inputs `[..., batch, *features]`; a tuple of them if there are several.
        feedback: a function from the output `[..., batch, *features]` to what state 2 of that layer
            receives, of the same shape; for several outputs, from a tuple to a tuple.
        sample_weight: weight of each example in the Hebbian term, `[..., batch]`, or `None`.
        batch: the batch, if x is the part of it that one of several devices holds. Statistics and
            Hebbian sums are added up over devices, before saturation and the other stabilisers, so
            every device computes the same synapses.
        training: whether dropout is active.

    Returns:
        A `StepResult`.

    Example:

    >>> from keras_blur.core.connections.dense import DenseConnection
    >>> from keras_blur.core.graph import chain
    >>> from keras_blur.core.rule import Rule
    >>> genome, graph = Genome.random(Rule(), seed=0), chain([DenseConnection(3)])
    >>> synapses = graph.holders[0].init(genome.rule, 4, lambda name, channel, shape: ops.ones(shape), feeds_back=False)
    >>> result = step(genome, graph, NetworkState((synapses,)), ops.ones((2, 4)), lambda output: -output)
    >>> tuple(result.output.shape), result.state.step
    ((2, 3), 1)
    """
    rule = genome.rule
    synapses = stored(genome, graph, state.synapses)
    sweep = forward(genome, graph, synapses, x, neurons=state.neurons, training=training, batch=batch)
    prediction = output(genome, graph, sweep.values)

    def learn(synapses: tuple[Synapses, ...], values: Sequence[Array], prefix: str) -> tuple[Synapses, ...]:
        below = sweep.values if rule.presynaptic == "forward" else values
        pre = _propagated(genome, graph, sweep, below, prefix, batch)
        sums: dict[int, Sums] = {}
        for one in graph.connects:
            if one.learns:
                terms = one.connection.hebbian(
                    graph.genome(genome, one.holder), synapses[one.holder], pre[one.source], values[one.target],
                    prefix=prefix, step=state.step, sample_weight=sample_weight, batch=batch,
                    alone=graph.uses[one.holder] == 1,
                )  # fmt: skip
                known = sums.get(one.holder)
                sums[one.holder] = terms if known is None else known.plus(terms)
        return tuple(
            connection.update(graph.genome(genome, holder), own, sums[holder], prefix=prefix, step=state.step)
            if holder in sums
            else own
            for holder, (connection, own) in enumerate(zip(graph.holders, synapses, strict=True))
        )

    if rule.forward_synapse_update:
        synapses = learn(synapses, sweep.values, "forward_" if rule.separate_forward_synapse else "")

    def supervised() -> tuple[tuple[Synapses, ...], tuple[Array, ...]]:
        signals = feedback(prediction)
        values = backward(genome, graph, synapses, sweep, signals if isinstance(signals, tuple) else (signals,), batch)
        return learn(synapses, values, ""), tuple(joined(values[node]) for node in graph.nodes)

    unchanged = tuple(joined(sweep.values[node]) for node in graph.nodes)
    if rule.supervised_every == 1:
        synapses, neurons = supervised()
    elif isinstance(state.step, int):
        synapses, neurons = (synapses, unchanged) if state.step % rule.supervised_every else supervised()
    else:
        synapses, neurons = ops.cond(
            ops.equal(state.step % rule.supervised_every, 0), supervised, lambda: (synapses, unchanged)
        )
    if rule.slow_synapses:
        synapses = tuple(
            averaged(graph.genome(genome, holder), own, state.step, learns=bool(graph.uses[holder]))
            for holder, own in enumerate(synapses)
        )
    kept = neurons if rule.keep_neurons else ()
    return StepResult(NetworkState(synapses, state.step + 1, kept), prediction, neurons, sweep)


def backward(
    genome: Genome,
    graph: Graph,
    synapses: Sequence[Synapses],
    sweep: Sweep,
    signals: Sequence[Array],
    batch: equations.SharedBatch | None = None,
) -> tuple[Array, ...]:
    """The backward pass.

    Args:
        genome: the genome.
        graph: the network.
        synapses: those that the forward pass used.
        sweep: the forward pass.
        signals: what state 2 of each output receives, `[..., batch, *features]`.
        batch: the batch, if devices share it.

    Returns:
        The states of each value: those of layers of neurons after equation 6, all others unchanged.
    """
    rule = genome.rule
    reached = graph.after_synapses if rule.keep_neurons else graph.after_learning
    values = list(sweep.values)
    received: dict[int, list[Array]] = {}
    senders: dict[int, int] = {}
    fed: dict[int, Array] = {}
    for number, signal in zip(graph.outputs, signals, strict=True):  # several outputs may be functions of one value
        fed[number] = fed[number] + signal if number in fed else signal

    def send(number: int, arrays: Array, holder: int) -> None:
        if number in reached:
            received.setdefault(number, []).append(arrays)
            senders[number] = holder

    for one in reversed(graph.operations):
        number = one.target
        came = received.pop(number, [])
        total = sum(came[1:], came[0]) if came else None
        if isinstance(one, Connect):
            gene = graph.genome(genome, one.holder)
            axes, source = graph.axes[number], one.connection.source(values[one.source])
            if number in fed and total is None:
                values[number] = _with_feedback(gene, values[number], fed[number], axes)
            elif total is not None:
                if number in fed:
                    total = total + _as_states(rule, _signal(gene, fed[number], total, axes), total, axes)
                sender = graph.genome(genome, senders.get(number, one.holder))
                values[number] = _backward_neurons(sender, one, source, total, values[number], batch)
            if one.source in reached:
                back = one.connection.backward(gene, synapses[one.holder], values[number], source)
                send(one.source, back, one.holder)
        elif number in reached and (total is not None or number in fed):
            axes = len(one.map.target)
            if number in fed:
                like = total if total is not None else _without_first(rule, _padded(values[number], rule.states, axes), axes)
                signal = _as_states(rule, _signal(_gene_of(genome, graph, number), fed[number], like, axes), like, axes)
                total = signal if total is None else total + signal
            ranks = map(len, one.map.sources)
            states = tuple(
                first_states(sweep.values[source], 1, rank) for source, rank in zip(one.sources, ranks, strict=True)
            )
            pulled = one.map.backward(states, total, sweep.contexts[number], batch)
            for below, back in zip(one.sources, pulled, strict=True):
                if below in reached:
                    send(below, back, senders.get(number, graph.holder_of(below)))
    return tuple(values)


def _gene_of(genome: Genome, graph: Graph, number: int) -> Genome:
    """The genome of the layer of neurons that a value is, or that it comes from."""
    return graph.genome(genome, graph.holder_of(number))


def _read_forward(genome: Genome) -> int:
    """How many states of the layers before it the forward pass of a layer reads."""
    nu = genome.nu
    return equations.sources(equations.select(genome.rule, nu, -1) if genome.rule.derivative_state else nu)


def _read_hebbian(genome: Genome, prefix: str) -> int:
    """How many states of the layer before it the Hebbian term of a layer reads."""
    rule = genome.rule
    few = slice(0, rule.update_channels)
    read = [genome.arrays[prefix + "nu_tilde"][..., :, few]]
    if rule.directions == "untied" or rule.oja == "activations":
        read.append(equations.swapped(genome.arrays[prefix + "mu_tilde"]))
    return equations.sources(*read)


def _entering(one: Pass, values: Sequence[Array], read: int) -> tuple[Array, ...]:
    """The states that enter a map: only those that are read, and equally many of each input."""
    axes = [len(shape) for shape in one.map.sources]
    states = [first_states(values[source], read, rank) for source, rank in zip(one.sources, axes, strict=True)]
    most = max(value.shape[len(value.shape) - 2 - rank] for value, rank in zip(states, axes, strict=True))
    return tuple(_padded(value, most, rank) for value, rank in zip(states, axes, strict=True))


def _padded(states: Array, count: int, features: int) -> Array:
    """States, with zeros for those that the array leaves out."""
    axis = len(states.shape) - 2 - features
    missing = count - states.shape[axis]
    if not missing:
        return states
    one = ops.zeros_like(first_states(states, 1, features))
    return ops.concatenate([states, *[one] * missing], axis=axis)


def _propagated(
    genome: Genome,
    graph: Graph,
    sweep: Sweep,
    below: Sequence[Array],
    prefix: str,
    batch: equations.SharedBatch | None,
) -> Sequence[Array]:
    """The values that connections read for the Hebbian term: the new states of the neurons, sent
    through the maps again."""
    read = _read_hebbian(genome, prefix)
    same = below is sweep.values
    if (same and read <= _read_forward(genome)) or (read == 1 and _keeps_first(genome)):
        return below
    values = list(below)
    for one in graph.operations:
        if isinstance(one, Pass):
            values[one.target] = one.map.forward(_entering(one, values, read), sweep.contexts[one.target], batch)
    return values


def _keeps_first(genome: Genome) -> bool:
    """Whether the backward pass is known to leave state 1 as it is."""
    rule, keep = genome.rule, genome.neuron_keep
    alone = rule.backward_update == "multiplicative_after_first" and rule.backward == "linear"
    return alone and isinstance(keep, np.ndarray) and bool(np.all(keep == 1.0))


def _signal(genome: Genome, signal: Array, like: Array, features: int) -> Array:
    """The feedback as an array of one state. An error is divided by the temperature, as the output
    is."""
    signal = ops.cast(ops.expand_dims(signal, -2 - features), like.dtype)
    if genome.rule.feedback == "error":  # dL/da_L: the prediction is state 1 over the temperature
        signal = signal / equations.per_state(genome.temperature, signal, 2 + features)
    return signal


def _with_feedback(genome: Genome, last: Array | Parts, signal: Array, features: int) -> Parts:
    """An output layer at the start of the backward pass (section 3.3): state 1 is kept, state 2 is
    the feedback, the others are zero."""
    signal = _signal(genome, signal, last, features)
    if genome.rule.feedback == "error" and genome.rule.derivative_state:  # with the pair, times s' as eq. 2 asks
        signal = signal * between(last, 1, 2, features)
    first = first_states(last, 1, features)
    signal = ops.broadcast_to(signal, ops.shape(first))
    rest = [ops.zeros_like(first)] * (genome.rule.states - 2)
    return Parts(features, [first, signal, *rest])


def _as_states(rule: Any, signal: Array, like: Array, features: int) -> Array:
    """Feedback in the form of what comes back: its state 2, with zeros for the others, and as many
    states as `like`."""
    axis = len(like.shape) - 2 - features
    signal = ops.broadcast_to(signal, ops.shape(first_states(like, 1, features)))
    zero = ops.zeros_like(signal)
    ahead = 0 if rule.backward_update == "multiplicative_after_first" else 1
    return ops.concatenate([*[zero] * ahead, signal, *[zero] * (rule.states - 2)], axis=axis)


def _without_first(rule: Any, states: Array, features: int) -> Array:
    """States without the first one, if the backward update leaves it alone, so that nothing comes
    back for it."""
    if rule.backward_update != "multiplicative_after_first":
        return states
    return later_states(states, features)


def _backward_neurons(
    genome: Genome, one: Connect, source: Shape, total: Array, old: Array | Parts, batch: equations.SharedBatch | None
) -> Array | Parts:
    """Equation 6 on the rows of a layer."""
    connection = one.connection
    if batch is not None:
        batch = batch._replace(examples=batch.examples * connection.positions_of(source))
    new = equations.backward_neurons(genome.rule, genome, connection.rows(total), connection.rows_of(old), batch)
    return mapped(lambda rows: connection.features(rows, source), new, len(connection.target(source)))
