"""A connection between two layers of neurons: one linear map and the rule around it, as pure functions of arrays.

Source: "Meta-Learning Bidirectional Update Rules" (Sandler et al., ICML 2021), equations 5 to 7 and 8.

A kind of layer supplies three operations only (the map, its transpose and its outer product); what the rule does with
them stands here once, for every kind. Work that no later result depends on is not done: the input layer has one non-zero
state, so its sums are formed once a channel and mixed afterwards; nothing flows back into the input, so the first
connection has no backward kernel; the bias has none either, since nothing would read it. A backward array that is given all
the same (a replay of published numbers does) is updated like the others.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from keras import ops

from keras_blur.core import equations
from keras_blur.core.genome import Genome
from keras_blur.core.rule import Rule

Array = Any
Synapses = Mapping[str, Array]
Draw = Callable[[str, int, tuple[int, ...]], Array]

TRACE = "_trace"  # behind the name of a synapse array: that of its trace, if the rule has momentum


@dataclasses.dataclass(frozen=True)
class Connection(abc.ABC):
    """The synapses between a layer and the one before it.

    Synapses are a mapping of arrays with the channel axis before the kernel axes: `kernel` `[..., c, in, out]`, `bias`
    `[..., c, 1, out]`, and for the way back `backward_kernel` `[..., c, in, out]`; c is k, or 1 if the rule ties channels.

    Args:
        units: number of neurons of the layer.
        use_bias: whether a constant 1 in every state stands beside the inputs.
        activation: nonlinearity of the layer; `None` takes the rule's.
        compute_dtype: type of the factors of the linear map and of the outer product, whose sums stay float32; `None`
            takes the type of the states.
    """

    units: int
    use_bias: bool = True
    activation: str | None = None
    compute_dtype: str | None = None

    @abc.abstractmethod
    def shapes(self, rule: Rule, inputs: int, *, feeds_back: bool) -> dict[str, tuple[int, ...]]:
        """Shapes of the synapse arrays for `inputs` input units; with a backward kernel if `feeds_back`."""

    @abc.abstractmethod
    def linear(self, kernel: Array, x: Array) -> Array:
        """The map: `[..., k, batch, in]` to `[..., k, batch, out]`; a kernel of one channel serves all states."""

    @abc.abstractmethod
    def linear_transpose(self, kernel: Array, y: Array) -> Array:
        """Its transpose: `[..., k, batch, out]` to `[..., k, batch, in]`."""

    @abc.abstractmethod
    def outer(self, pre: Array, post: Array) -> Array:
        """Its outer product, summed over the batch: `[..., c, batch, in]` and `[..., c, batch, out]` to a kernel."""

    def init(self, rule: Rule, inputs: int, draw: Draw, *, feeds_back: bool = True) -> dict[str, Array]:
        """Initial synapses.

        Args:
            rule: the options.
            inputs: number of input units.
            draw: called with the name of an array, the channel and the shape of one channel; returns its values.
            feeds_back: whether something before this connection learns, so that it needs a way back.

        Returns:
            The synapses.
        """
        made = {
            name: ops.stack([draw(name, channel, shape[1:]) for channel in range(shape[0])], axis=-3)
            for name, shape in self.shapes(rule, inputs, feeds_back=feeds_back).items()
        }
        return {**made, **{name + TRACE: ops.zeros_like(made[name]) for name in made if rule.momentum}}

    def normalized(self, genome: Genome, synapses: Synapses) -> dict[str, Array]:
        """The stored synapses at unit norm over their input axis (section C.6)."""
        energies = self._energies(synapses)
        return {
            name: value * equations.inverse_norm(genome, energies[name]) if name in energies else value
            for name, value in synapses.items()
        }

    def forward(
        self,
        genome: Genome,
        synapses: Synapses,
        pre: Array,
        old: Array | None,
        *,
        last: bool,
        statistics: tuple[Array, Array] | None = None,
        batch: equations.SharedBatch | None = None,
    ) -> tuple[Array, tuple[Array, Array] | None]:
        """Equation 5: this layer's neurons from those before it.

        Args:
            genome: the layer's genome.
            synapses: the layer's synapses.
            pre: states before the connection `[..., k, batch, in]`, or `[..., 1, batch, in]` of an input layer.
            old: this layer's states before the step, or `None` for zeros.
            last: whether this is the output layer.
            statistics: mean and variance to normalise with; `None` takes those of the batch.
            batch: the batch, if devices share it.

        Returns:
            States `[..., k, batch, out]`, and the statistics that normalised them (or `None`).
        """
        rule = genome.rule
        nu, kernel, bias = ops.convert_to_tensor(genome.nu), synapses["kernel"], synapses.get("bias")
        energy = None
        if rule.normalize_synapses in ("effective", "both"):
            energy = self._energies(synapses)["kernel"]
        if rule.derivative_state:
            nu = equations.select(rule, nu, -1)
            if rule.channels != "tied":
                kernel = equations.select(rule, kernel, -3)
                bias = None if bias is None else equations.select(rule, bias, -3)
                energy = None if energy is None else equations.select(rule, energy, -3)
        if pre.shape[-3] == 1:  # the map is linear, so the one state of an input is mixed where it is smaller
            z = self.linear(kernel, pre)
            z = z * equations.per_state(nu[..., 0, :], z, 2)
        else:
            z = self.linear(kernel, equations.mix(pre, nu))
        if bias is not None:
            z = z + equations.per_state(ops.sum(nu, axis=-2), z, 2) * bias  # a constant 1 in every source state
        if energy is not None:
            z = z * equations.inverse_norm(genome, energy)
        activation = self.activation or (rule.last_activation if last else rule.forward_activation)
        return equations.forward_neurons(rule, genome, activation, z, old, statistics, batch)

    def backward(self, genome: Genome, synapses: Synapses, post: Array) -> Array:
        """The sums of equation 6: what the neurons before the connection receive from this layer's states.

        Returns:
            `[..., k, batch, in]`; without state 1 if the rule's backward update does not read it.
        """
        rule = genome.rule
        mu = ops.convert_to_tensor(genome.mu)
        skip_first = rule.backward_update == "multiplicative_after_first"
        name = "backward_kernel" if rule.stores_backward else "kernel"
        kernel, inverse = synapses[name], None
        if rule.normalize_synapses in ("effective", "both"):
            inverse = equations.inverse_norm(genome, self._energies(synapses)[name])
        if skip_first:
            mu = mu[..., 1:]
            if rule.channels != "tied":
                kernel = kernel[..., 1:, :, :]
                inverse = None if inverse is None else inverse[..., 1:, :, :]
        y = equations.mix(post, mu)
        if inverse is not None and not rule.stores_backward:
            y = y * inverse
        z = self.linear_transpose(kernel, y)
        if inverse is not None and rule.stores_backward:
            z = z * ops.swapaxes(inverse, -1, -2)
        return z

    def hebbian(
        self,
        genome: Genome,
        synapses: Synapses,
        pre: Array,
        post: Array,
        *,
        prefix: str,
        step: Array,
        sample_weight: Array | None,
        batch: equations.SharedBatch | None = None,
    ) -> dict[str, Array]:
        """The sums over the batch in equation 7, times the update gate unless `Rule.gates_last`; and those of Oja's term.

        Args:
            genome: the layer's genome.
            synapses: the layer's synapses, of which only the names are used.
            pre: states before the connection.
            post: states of this layer `[..., k, batch, out]`.
            prefix: `""` or `"forward_"`: which synapse arrays of the genome act.
            step: the learning step, from 0.
            sample_weight: `[..., batch]` or `None`.
            batch: the batch, if devices share it; the sums are then over all of it.

        Returns:
            A mapping with the names of the synapses, and `oja` and `backward_oja` if the rule needs them.
        """
        rule = genome.rule
        nu_tilde = ops.convert_to_tensor(genome.arrays[prefix + "nu_tilde"])
        mu_tilde = ops.swapaxes(ops.convert_to_tensor(genome.arrays[prefix + "mu_tilde"]), -1, -2)  # [source, channel]
        weight = None if sample_weight is None else sample_weight[..., None, :, None]
        share = 1.0
        if rule.batch_reduction == "mean":
            share = 1.0 / ops.cast(ops.shape(post)[-2] if batch is None else batch.examples, post.dtype)
        factor = share
        if not rule.gates_last:  # on the smaller arrays
            factor = factor * equations.scalar(self._gate(genome, prefix, step), post)
        if weight is not None:
            factor = factor * weight
        few = slice(0, rule.update_channels)
        source, target = nu_tilde[..., :, few], mu_tilde[..., :, few]
        sums: dict[str, Array] = {}

        received = factor * equations.mix(post, target)
        if "bias" in synapses:
            ones = equations.per_state(ops.sum(source, axis=-2), received, 2)
            sums["bias"] = ones * ops.sum(received, axis=-2, keepdims=True)
        if pre.shape[-3] == 1:
            sums["kernel"] = self.outer(pre, received * equations.per_state(source[..., 0, :], received, 2))
        else:
            sums["kernel"] = self.outer(equations.mix(pre, source), received)

        if "backward_kernel" in synapses:
            if rule.directions == "tied_updates":
                sums["backward_kernel"] = sums["kernel"]
                if "backward_bias" in synapses:
                    sums["backward_bias"] = sums["bias"]
            else:  # the same rule with pre and post exchanged
                sent = factor * equations.mix(post, source)
                sums["backward_kernel"] = self.outer(equations.mix(pre, target), sent)
                if "backward_bias" in synapses:
                    ones = equations.per_state(ops.sum(target, axis=-2), sent, 2)
                    sums["backward_bias"] = ones * ops.sum(sent, axis=-2, keepdims=True)

        if rule.oja == "activations":
            channels = slice(0, rule.synapse_channels)
            weigh = share if weight is None else share * weight
            for name, states in (("oja", post), ("backward_oja", pre)):
                if name == "oja" or "backward_kernel" in synapses:
                    squares = weigh * ops.square(equations.mix(states, mu_tilde[..., :, channels]))
                    sums[name] = ops.sum(squares, axis=-2, keepdims=True)
        if batch is not None:
            sums = dict(zip(sums, batch.total(list(sums.values())), strict=True))
        return sums

    def update(
        self, genome: Genome, synapses: Synapses, sums: Mapping[str, Array], *, prefix: str, step: Array
    ) -> dict[str, Array]:
        """Equation 7 with the stabilising options: the new synapses from the sums of `hebbian`."""
        rule = genome.rule
        arrays = genome.arrays
        gate = self._gate(genome, prefix, step)
        traces = {name: value for name, value in synapses.items() if name.endswith(TRACE)}
        synapses = {name: value for name, value in synapses.items() if name not in traces}
        sums = dict(sums)
        for name in traces:  # Nesterov's form: the term itself counts at once
            own = name.removesuffix(TRACE)
            beta = equations.scalar(arrays["momentum"], sums[own])
            traces[name] = beta * traces[name] + sums[own]
            sums[own] = beta * traces[name] + sums[own]
        if rule.orthogonalize:
            sums |= self._orthogonal(rule, {name: sums[name] for name in synapses})
        if rule.gates_last:
            sums |= {name: equations.scalar(gate, sums[name]) * sums[name] for name in synapses}
        shrinks: dict[str, Array | None] = dict.fromkeys(synapses)
        if rule.oja != "none":
            multiplier = arrays.get(prefix + "oja_multiplier")
            energies = self._energies(synapses) if rule.oja == "weights" else self._squares(synapses, sums)
            for name, energy in energies.items():
                shrinks[name] = energy * equations.oja_strength(rule, multiplier, energy)
        new = {
            name: equations.new_synapse(
                rule,
                value,
                sums[name],
                shrinks[name],
                keep=arrays[prefix + "synapse_keep"],
                gate=gate,
                saturation=arrays.get(prefix + "saturation"),
            )
            for name, value in synapses.items()
        }
        return {**new, **traces}

    @staticmethod
    def _gate(genome: Genome, prefix: str, step: Array) -> Array:
        """The synapse update gate at a learning step."""
        number = ops.convert_to_tensor(genome.arrays[prefix + "synapse_update"])
        return equations.update_gate(genome.rule, genome, number, step)

    @staticmethod
    def _orthogonal(rule: Rule, sums: Mapping[str, Array]) -> dict[str, Array]:
        """Each kernel's Hebbian term, with the bias's as its last row if there is one, at singular values near 1."""
        found: dict[str, Array] = {}
        for kernel, bias in (("kernel", "bias"), ("backward_kernel", "backward_bias")):
            if kernel in sums:
                whole = ops.concatenate([sums[kernel], sums[bias]], axis=-2) if bias in sums else sums[kernel]
                whole = equations.orthogonal(whole, rule.orthogonalize)
                rows = sums[kernel].shape[-2]
                found[kernel] = whole[..., :rows, :]
                if bias in sums:
                    found[bias] = whole[..., rows:, :]
        if rule.directions == "tied_updates" and "backward_kernel" in sums:  # the same to the last bit, bias or not
            found["backward_kernel"] = found["kernel"]
        return found

    def _energies(self, synapses: Synapses) -> dict[str, Array]:
        """Sum of squares over the input axis of each array: that of a forward kernel runs over its inputs and bias, that
        of a backward kernel, whose inputs are this layer's units, over those."""
        forward = ops.sum(ops.square(synapses["kernel"]), axis=-2, keepdims=True)
        if "bias" in synapses:
            forward = forward + ops.square(synapses["bias"])
        energies = {"kernel": forward, "bias": forward}
        for name in ("backward_kernel", "backward_bias"):
            if name in synapses:
                energies[name] = ops.sum(ops.square(synapses[name]), axis=-1, keepdims=True)
        return {name: energy for name, energy in energies.items() if name in synapses}

    def _squares(self, synapses: Synapses, sums: Mapping[str, Array]) -> dict[str, Array]:
        """The same for Oja's term on activations; the bias unit has none, so its backward synapses do not shrink."""
        squares = {"kernel": sums["oja"], "bias": sums["oja"]}
        if "backward_kernel" in synapses:
            squares["backward_kernel"] = ops.swapaxes(sums["backward_oja"], -1, -2)
        return {name: squares[name] for name in synapses if name in squares}
