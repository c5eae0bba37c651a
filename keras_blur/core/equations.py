"""How one connection behaves: equations 5, 6 and 7 and the stabilising options, as pure functions
of arrays.

Source: "Meta-Learning Bidirectional Update Rules" (Sandler et al., ICML 2021), sections 3.2 and
3.4, appendices B and C.6. Equation numbers are the paper's.

Neuron states are `[..., k, batch, units]`, synapse kernels `[..., k, in, out]`, and genome arrays
`[..., k, k]` or `[...]`. Leading axes (a population of genomes, replicas) broadcast. The state axis
comes before the batch, so a layer is one batched matrix product over k channels. That is as fast as
one product k times as wide, and needs no transposition.

The paper writes a transform with the source state as its second index, but backpropagation needs it
as the first. Here `nu` and `mu` are always `[source, target]`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from keras import ops

from keras_blur.backend import mixed
from keras_blur.core.derivatives import mean, tanh, vjp
from keras_blur.core.genome import Genome
from keras_blur.core.rule import Rule
from keras_blur.core.states import Parts, between, joined, later_states

if TYPE_CHECKING:
    from jaxtyping import Float, Int

Array = Any
Activation = str | Callable[[Any], Any]


class SharedBatch(NamedTuple):
    """A batch that several devices hold in parts.

    Attributes:
        examples: number of examples of the whole batch.
        total: a function that returns the sums over the devices of a list of arrays.
    """

    examples: Array
    total: Callable[[list[Array]], list[Array]]


# Inside the square root of synapse normalisation; the published constant.
SYNAPSE_EPSILON = 1e-9


def activate(activation: Activation, z: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The nonlinearity of the summed input z: one of `ACTIVATIONS` by name, or an elementwise
    function.

    Example:

    >>> ops.convert_to_numpy(activate("relu", ops.array([-1.0, 2.0]))).tolist()
    [0.0, 2.0]
    """
    if callable(activation):
        return ops.cast(activation(z), z.dtype)
    if activation == "tanh":
        return tanh(z)
    if activation == "relu":
        return ops.relu(z)
    if activation == "relu_tanh":
        return ops.relu(tanh(z))
    if activation == "sigmoid":
        return ops.sigmoid(z)
    return z


def value_and_derivative(
    activation: Activation, z: Float[Array, "*shape"]
) -> tuple[Float[Array, "*shape"], Callable[[], Float[Array, "*shape"]]]:
    """The nonlinearity of the summed input z, and a function that computes its derivative there.

    Example:

    >>> value, derivative = value_and_derivative("relu", ops.array([-1.0, 2.0]))
    >>> ops.convert_to_numpy(derivative()).tolist()
    [0.0, 1.0]
    """
    if callable(activation):
        value, pull = vjp(lambda one: activate(activation, one), z)
        return value, lambda: pull(ops.ones_like(value))[0]
    value = activate(activation, z)
    return value, lambda: _derivative(activation, value)


def _derivative(activation: str, value: Array) -> Array:
    """The derivative of a nonlinearity at the point where it takes `value`."""
    if activation == "tanh":
        return 1.0 - value * value
    if activation == "sigmoid":
        return value * (1.0 - value)
    if activation == "linear":
        return ops.ones_like(value)
    if activation == "relu":
        return ops.cast(value > 0, value.dtype)
    return ops.where(value > 0, 1.0 - value * value, ops.zeros_like(value))


def per_state(number: Array, like: Array, trailing: int) -> Array:
    """A genome number `[...]` or `[..., k]` as an array of the type of `like`, followed by
    `trailing` axes of size one."""
    if isinstance(number, np.ndarray):
        return ops.convert_to_tensor(number.reshape(number.shape + (1,) * trailing), dtype=like.dtype)
    number = ops.convert_to_tensor(number, dtype=like.dtype)
    return ops.reshape(number, tuple(number.shape) + (1,) * trailing)


def scalar(number: Float[Array, "*population"] | float, like: Array) -> Float[Array, "*population 1 1 1"]:
    """A genome number `[...]` shaped to multiply states or kernels `[..., k, rows, columns]`."""
    return per_state(number, like, 3)


def times(
    number: Float[Array, "*#population"], states: Float[Array, "*#population k rows columns"]
) -> Float[Array, "*population k rows columns"]:
    """Arrays `[..., k, rows, columns]` times a genome number; unchanged, if it is known to be 1."""
    if isinstance(number, (np.ndarray, np.generic)) and np.all(number == 1.0):
        return states
    return scalar(number, states) * states


def mix(
    states: Float[Array | Parts, "*#population s batch units"], transform: Float[Array, "*#population source target"]
) -> Float[Array, "*population target batch units"]:
    """The states `[..., s, batch, units]` mixed by a transform `[..., source, target]`.

    In an array of fewer states, such as the input layer, the other states are zero. If the numbers
    of a transform are known and few of them are not zero, only those cost anything.

    Example:

    >>> states = ops.array([[[1.0]], [[5.0]]])
    >>> ops.convert_to_numpy(mix(states, np.array([[1.0, 1.0], [0.0, 0.0]]))).tolist()  # both read state 1
    [[[1.0]], [[1.0]]]
    """
    count = states.shape[-3]
    if count == 1:
        return mix_one(joined(states), transform)
    transform = transform[..., :count, :]
    if isinstance(transform, np.ndarray) and transform.ndim == 2 and np.count_nonzero(transform) <= max(transform.shape):
        return _mix_sparse(states, transform)
    states = joined(states)
    return mixed(states, ops.convert_to_tensor(transform, dtype=states.dtype))


def mix_one(
    states: Float[Array, "*#population #target batch units"], transform: Float[Array, "*#population source target"]
) -> Float[Array, "*population target batch units"]:
    """Multiplies `[..., s, batch, units]` by the first row of a transform; s is 1, or one entry for
    each target."""
    row = transform[..., 0, :]
    if isinstance(row, np.ndarray) and row.shape == (1,) and row[0] == 1.0:
        return states
    return states * per_state(row, states, 2)


def _mix_sparse(states: Array | Parts, transform: np.ndarray) -> Array:
    """`mix` for a known transform with few non-zero numbers, written out."""
    if transform.shape[0] == transform.shape[1] and np.array_equal(transform, np.eye(transform.shape[0])):
        return joined(states)
    columns = []
    for target in range(transform.shape[1]):
        terms = [
            times(number, between(states, source, source + 1, 1))
            for source, number in enumerate(transform[:, target])
            if number != 0.0
        ]
        columns.append(sum(terms[1:], terms[0]) if terms else ops.zeros_like(between(states, 0, 1, 1)))
    return columns[0] if len(columns) == 1 else ops.concatenate(columns, axis=-3)


def swapped(transform: Float[Array, "*population source target"]) -> Float[Array, "*population target source"]:
    """A transform with its two axes exchanged. If its numbers are known, they stay known."""
    if isinstance(transform, np.ndarray):
        return np.swapaxes(transform, -1, -2)
    return ops.swapaxes(ops.convert_to_tensor(transform), -1, -2)


def sources(*transforms: Float[Array, "... source _"]) -> int:
    """How many states transforms `[..., source, target]` read: up to the last source with a number
    that is not zero.

    If the numbers are not known, because a transform is a tensor, it reads all of them.

    Example:

    >>> sources(np.array([[1.0, 1.0], [0.0, 0.0]]))
    1
    """
    last = 1
    for transform in transforms:
        if not isinstance(transform, np.ndarray):
            return int(transform.shape[-2])
        read = np.any(transform != 0, axis=(*range(transform.ndim - 2), transform.ndim - 1))
        last = max(last, *(int(state) + 1 for state in np.flatnonzero(read)), 1)
    return last


def moments(
    rule: Rule, z: Float[Array, "*population s batch units"], batch: SharedBatch | None = None
) -> tuple[Float[Array, "*population s #batch #units"], Float[Array, "*population s #batch #units"]]:
    """Mean and variance of the summed input over the normalisation axis; over the whole batch, if
    devices share it."""
    axis = -2 if rule.normalization_axis == "batch" else -1
    if axis == -2 and batch is not None:
        count = ops.cast(batch.examples, z.dtype)
        centre = batch.total([ops.sum(z, axis=axis, keepdims=True)])[0] / count
        return centre, batch.total([ops.sum(ops.square(z - centre), axis=axis, keepdims=True)])[0] / count
    centre = mean(z, axis, keepdims=True)
    return centre, mean(ops.square(z - centre), axis, keepdims=True)


def normalize(
    rule: Rule,
    z: Float[Array, "*#population s batch units"],
    scale: Float[Array, "*#population s"],
    shift: Float[Array, "*#population s"],
    statistics: tuple[Float[Array, "*#population s #batch #units"], Float[Array, "*#population s #batch #units"]],
) -> Float[Array, "*population s batch units"]:
    """Section 3.4: the summed input scaled to a learned mean and standard deviation, before the
    nonlinearity."""
    mean, variance = statistics
    deviation = ops.sqrt(variance + rule.normalization_epsilon)
    return per_state(scale, z, 2) * ((z - mean) / deviation) + per_state(shift, z, 2)


def select(rule: Rule, values: Array, axis: int) -> Array:
    """Drops state 2 from an axis of size k: the value-and-derivative pair does not need its
    argument.

    Example:

    >>> select(Rule(), np.array([1, 2]), 0).tolist()
    [1]
    """
    if isinstance(values, np.ndarray):
        return np.delete(values, 1, axis)
    ahead = (slice(None),) * (axis % len(values.shape))
    first = values[(*ahead, slice(0, 1))]
    return first if rule.states == 2 else ops.concatenate([first, values[(*ahead, slice(2, None))]], axis=axis)


def forward_neurons(
    rule: Rule,
    genome: Genome,
    activation: Activation,
    z: Float[Array, "*#population s batch units"],
    old: Float[Array, "*#population k batch units"] | None,
    statistics: tuple[Float[Array, "*#population s #batch #units"], Float[Array, "*#population s #batch #units"]] | None,
    batch: SharedBatch | None = None,
) -> tuple[
    Float[Array | Parts, "*population k batch units"],
    tuple[Float[Array, "*#population s #batch #units"], Float[Array, "*#population s #batch #units"]] | None,
]:
    """Equation 5: new neuron states of a layer from their summed input.

    Args:
        rule: the options.
        genome: the layer's genome.
        activation: the layer's nonlinearity.
        z: summed input, `[..., s, batch, units]`, of all k states; without state 2 if
            `rule.derivative_state`.
        old: the states before, `[..., k, batch, units]`, or `None` for zeros.
        statistics: mean and variance to normalise with, each `[..., s, 1, units]`, or
            `[..., s, batch, 1]` over units; `None` uses those of z.
        batch: the batch, if z belongs to a part of it.

    Returns:
        The states `[..., k, batch, units]`, in parts if `rule.derivative_state`, and the statistics
        that were used (`None` if this pass does not normalise).
    """
    if rule.normalize_activations in ("forward", "both"):
        statistics = moments(rule, z, batch) if statistics is None else statistics
        scale, shift = genome.forward_scale, genome.forward_shift
        if rule.derivative_state:
            scale, shift = (select(rule, ops.convert_to_tensor(value), -1) for value in (scale, shift))
        z = normalize(rule, z, scale, shift, statistics)
    else:
        statistics = None
    argument = times(genome.neuron_update, z)
    if old is not None:
        kept = select(rule, old, -3) if rule.derivative_state else old
        argument = scalar(genome.neuron_keep, z) * kept + argument  # eq. 5
    if not rule.derivative_state:
        return activate(activation, argument), statistics
    # eq. 1: (s(z), s'(z)) of the same argument
    pair = value_and_derivative(activation, between(argument, 0, 1, 1))
    rest = [activate(activation, later_states(argument, 1))] if rule.states > 2 else []
    return Parts(1, [*pair, *rest]), statistics


def backward_neurons(
    rule: Rule,
    genome: Genome,
    z: Float[Array, "*#population s batch units"],
    old: Float[Array | Parts, "*#population k batch units"],
    batch: SharedBatch | None = None,
) -> Float[Array | Parts, "*population k batch units"]:
    """Equation 6: new neuron states from what came back, z, and from the states of the forward
    pass, old.

    z lacks state 1 if `rule.backward_update` is `"multiplicative_after_first"`, which does not read
    it.
    """
    skip_first = rule.backward_update == "multiplicative_after_first"
    if rule.normalize_activations in ("backward", "both"):
        scale, shift = (ops.convert_to_tensor(v) for v in (genome.backward_scale, genome.backward_shift))
        if skip_first:
            scale, shift = scale[..., 1:], shift[..., 1:]
        z = normalize(rule, z, scale, shift, moments(rule, z, batch))
    keep = genome.neuron_keep
    if skip_first:
        parts = [between(old, 0, 1, 1), later_states(old, 1) * z]
        return Parts(1, [activate(rule.backward, times(keep, part)) for part in parts])
    old = joined(old)
    new = (
        times(keep, old * z)
        if rule.backward_update == "multiplicative"
        else times(keep, old) + times(genome.neuron_update, z)
    )
    return activate(rule.backward, new)


def inverse_norm(
    genome: Genome, energy: Float[Array, "*#population c rows columns"]
) -> Float[Array, "*population c rows columns"]:
    """The factor that scales synapses of this energy (sum of squares) to unit norm, times the
    learned rescaling.

    A kernel that is normalised where it is used is never computed. The sums over it are multiplied
    by this factor instead.
    """
    inverse = ops.rsqrt(energy + SYNAPSE_EPSILON)
    if genome.rule.rescale_synapses:
        inverse = inverse * scalar(genome.rescale, inverse)
    return inverse


def update_gate(
    rule: Rule, genome: Genome, gate: Float[Array, "*#population"] | float, step: Int[Array, ""] | int
) -> Float[Array, "*population"] | float:
    """The synapse update gate eta~ at a learning step, with its decay.

    Example:

    >>> rule = Rule(update_decay="power")
    >>> genome = Genome.random(rule, seed=0).replace(decay_power=1.0, log_decay_steps=0.0)
    >>> round(float(update_gate(rule, genome, 1.0, 3)), 4)
    0.25
    """
    if rule.update_decay == "none":
        return gate
    power = ops.convert_to_tensor(genome.decay_power)
    time = ops.cast(step, power.dtype) * ops.exp(-ops.convert_to_tensor(genome.log_decay_steps, dtype=power.dtype))
    return gate * ops.exp(-power * ops.log1p(time))  # (1 + t / steps)^-p


def averaging_share(genome: Genome, step: Int[Array, ""] | int) -> Float[Array, "*population"]:
    """The weight of the new value in an average with polynomial decay, at a learning step; 1 at
    step 0.

    Source: "Stochastic Gradient Descent for Non-smooth Optimization" (Shamir and Zhang, 2013),
    section 4.
    """
    breadth = ops.exp(ops.convert_to_tensor(genome.log_averaging))  # e in (e + 1) / (t + 1 + e)
    time = ops.cast(step, breadth.dtype)
    return (breadth + 1.0) / (time + 1.0 + breadth)


def remembered_share(
    rule: Rule,
    step: Int[Array, ""],
    running: Float[Array, "s 1 units"],
    fresh: tuple[Float[Array, "s 1 units"], Float[Array, "s 1 units"]],
    examples: Float[Array, ""],
) -> Float[Array, ""]:
    """The weight of the old value in running statistics of the summed input; a scalar.

    While the synapses do not change, all batches have the same weight until the old value reaches
    its largest weight. Let r be the squared distance of the batch mean from the running mean, times
    the number of examples, over the variance, averaged over units. Sampling alone gives r near 1.
    Above r = 2 the synapses have changed, and the running statistics describe another network, so
    the weight is at most (2 / r)^2.

    Source: none; the threshold and the power were chosen by experiment.

    Args:
        rule: the options; `normalization_momentum` is the largest weight.
        step: number of batches before this one; an integer.
        running: the running mean, `[k, 1, units]`.
        fresh: mean and variance of the batch, each `[k, 1, units]`.
        examples: number of examples of the batch.

    Example:

    >>> fresh = ops.ones((1, 1, 3)), ops.ones((1, 1, 3))
    >>> round(float(remembered_share(Rule(), ops.array(9), ops.zeros((1, 1, 3)), fresh, ops.array(8.0))), 4)
    0.0625
    """
    centre, variance = fresh
    time = ops.cast(step, centre.dtype)
    ratio = mean(ops.square(centre - running) / (variance + rule.normalization_epsilon)) * examples
    limit = ops.minimum(rule.normalization_momentum, time / (time + 1.0))
    return ops.minimum(limit, ops.square(2.0 / ops.maximum(ratio, 2.0)))


_TINY = 1e-30  # stands for zero in a divisor


def oja_strength(
    rule: Rule, multiplier: Float[Array, "*population"] | None, like: Array
) -> Float[Array, "*population 1 1 1"] | float:
    """The factors of Oja's term that do not depend on the synapse, shaped to multiply arrays like
    `like`."""
    if multiplier is None:
        return rule.oja_factor
    return rule.oja_factor * ops.abs(scalar(multiplier, like))


def new_synapse(
    rule: Rule,
    old: Float[Array, "*#population c in units"],
    change: Float[Array, "*#population #c in units"],
    shrink: Float[Array, "*#population c #in #units"] | None,
    *,
    keep: Float[Array, "*#population"],
    gate: Float[Array, "*#population"],
    saturation: Float[Array, "*#population"] | None,
) -> Float[Array, "*population c in units"]:
    """Equation 7 with its stabilisers: a kernel (or bias) after one learning step.

    Args:
        rule: the options.
        old: the kernel as a matrix, `[..., c, in, units]`, or the bias, `[..., c, 1, units]`.
        change: the Hebbian term times the update gate, eta~ H.
        shrink: Oja's factor, `sum_r w_rj^2` or `(mu~ a_j)^2` with its multipliers, or `None`.
        keep: the gate f~.
        gate: the gate eta~.
        saturation: the learned saturation, or `None`.

    Returns:
        The new kernel.
    """
    if shrink is not None:
        # eq. 8: the published term carries the sign of eta~, so that it shrinks a synapse whatever
        # that sign is.
        change = change - ops.abs(scalar(gate, old)) * shrink * old
    if rule.saturation == "exp_update":
        delta = (scalar(keep, old) - 1.0) * old + change
        damping = ops.exp(-ops.abs(old) * (rule.saturation_epsilon + ops.abs(scalar(saturation, old))))
        return old + delta * damping
    new = times(keep, old) + change  # eq. 7
    if rule.saturation == "tanh":
        alpha = scalar(saturation, old)
        zero = ops.abs(alpha) <= _TINY**0.5
        saturated = alpha * tanh(new / ops.where(zero, ops.ones_like(alpha), alpha))
        return ops.where(zero, ops.zeros_like(new), saturated)  # the limit: synapses that saturate at once
    return new
