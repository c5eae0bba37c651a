"""A connection between two layers of neurons: the rule around one bilinear map, as pure functions
of arrays.

Source: "Meta-Learning Bidirectional Update Rules" (Sandler et al., ICML 2021), equations 5 to 8.

What the rule does is written here once, for every kind of map, on *rows*: states
`[..., k, rows, units]` and kernels `[..., c, in, units]` (see `keras_blur.core.maps`). Sharing
weights is a sum over rows, so bias sums, statistics and stabilisers keep their meaning. The mean
over the batch and sample weights count examples, not rows.

Work that no later result depends on is not done. The input layer has one non-zero state, so its
sums are computed once per channel and mixed afterwards. Nothing flows back into the input, so the
first connection has no backward kernel. The bias has none either, since nothing would read it. If a
backward array is given anyway, as in a replay of published numbers, it is updated like the others.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from keras import ops

from keras_blur.core import equations, terms
from keras_blur.core.companions import AVERAGE, TRACE, companions
from keras_blur.core.derivatives import matmul, vjp
from keras_blur.core.genome import Genome
from keras_blur.core.maps import Map, Shape
from keras_blur.core.rule import Rule
from keras_blur.core.settling import TermContext, choose, settle
from keras_blur.core.states import Parts, first_states, later_states, mapped

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped

Array = Any
Synapses = Mapping[str, Array]
Draw = Callable[[str, int, tuple[int, ...]], Array]


class Sums(NamedTuple):
    """The sums over a batch that a connection learns from.

    Attributes:
        arrays: sums over the batch, by the names of the synapses, and those that whitening and
            Oja's term need.
        whitened: whether the terms are already whitened.
        orthogonal: whether eq. N2 has already been applied to them.
    """

    arrays: Mapping[str, Array]
    whitened: bool = False
    orthogonal: bool = False

    def plus(self, other: Sums) -> Sums:
        """The sums of two layers that share their synapses: one batch, so examples count once."""
        added = {name: value if name == "examples" else value + other.arrays[name] for name, value in self.arrays.items()}
        return Sums(added)


@dataclasses.dataclass(frozen=True)
class Connection(Map):
    """The synapses between a layer and the one before it.

    Synapses are a mapping of arrays with the channel axis first: `kernel`
    `[..., c, *kernel_shape]`, `bias` `[..., c, 1, units]`, and for the feedback path
    `backward_kernel` `[..., c, *kernel_shape]`; c is k, or 1 if the rule ties channels.

    Args:
        units: number of units of a row, the targets of the synapses.
        use_bias: whether the inputs have a constant 1 beside them, in every state.
        activation: nonlinearity of the layer, a name of `ACTIVATIONS` or an elementwise function;
            `None` uses the rule's.
        compute_dtype: type of the factors of the map and of the outer product. Their sums stay
            float32. `None` uses the type of the states.
        penalties: for `"kernel"` and `"bias"`, functions of a channel whose gradient is added to
            the Hebbian term.
        limits: for `"kernel"` and `"bias"`, functions that each channel goes through after a
            change.
    """

    units: int
    use_bias: bool = True
    activation: equations.Activation | None = None
    compute_dtype: str | None = None
    penalties: Mapping[str, Callable[[Array], Array]] = dataclasses.field(default_factory=dict, compare=False)
    limits: Mapping[str, Callable[[Array], Array]] = dataclasses.field(default_factory=dict, compare=False)

    def shapes(self, rule: Rule, source: int | Shape, *, feeds_back: bool) -> dict[str, tuple[int, ...]]:
        """Shapes of the synapse arrays for features of shape `source`; with a backward kernel if
        `feeds_back`."""
        channels = rule.synapse_channels
        kernel = (channels, *self.kernel_shape(_shape(source)))
        shapes: dict[str, tuple[int, ...]] = {"kernel": kernel}
        if self.use_bias:
            shapes["bias"] = (channels, 1, self.units)
        if feeds_back and rule.stores_backward:
            shapes["backward_kernel"] = kernel
        return shapes

    def statistics_shape(self, rule: Rule) -> tuple[int, ...]:
        """Shape of the running statistics of a rule that normalises over the batch."""
        return (rule.states - 1 if rule.derivative_state else rule.states, 1, self.units)

    def init(self, rule: Rule, source: int | Shape, draw: Draw, *, feeds_back: bool = True) -> dict[str, Array]:
        """Initial synapses.

        Args:
            rule: the options.
            source: shape of the features that enter, or their number.
            draw: a function of the name of an array, the channel, and the shape of one channel;
                returns the values of that channel.
            feeds_back: whether something before this connection learns, so that it needs a feedback
                path.

        Returns:
            The synapses.
        """
        made = {
            name: ops.stack([draw(name, channel, shape[1:]) for channel in range(shape[0])], axis=-len(shape))
            for name, shape in self.shapes(rule, source, feeds_back=feeds_back).items()
        }
        beside = {}
        for name, like in companions(rule, tuple(made)).items():
            beside[name] = made[like] if name.endswith(AVERAGE) else ops.zeros_like(made[like])
        return {**made, **beside}

    def normalized(self, genome: Genome, synapses: Synapses) -> dict[str, Array]:
        """The stored synapses at unit norm over their input axis (section C.6)."""
        matrices = self._matrices(synapses)
        energies = self._energies(matrices)
        return {
            name: self._stored(name, matrices[name] * equations.inverse_norm(genome, energies[name]), value)
            if name in energies
            else value
            for name, value in synapses.items()
        }

    def _matrices(self, synapses: Synapses) -> dict[str, Array]:
        """The synapses with kernels as matrices."""
        return {name: self.matrix(value) if "kernel" in name else value for name, value in synapses.items()}

    def _stored(self, name: str, matrix: Array, like: Array) -> Array:
        """A kernel's matrix, or a bias, in the shape in which it is stored."""
        return self.kernel(matrix, like) if "kernel" in name else matrix

    def forward(
        self,
        genome: Genome,
        synapses: Synapses,
        pre: Array | Parts,
        old: Array | None,
        *,
        last: bool,
        statistics: tuple[Array, Array] | None = None,
        batch: equations.SharedBatch | None = None,
    ) -> tuple[Array | Parts, tuple[Array, Array] | None]:
        """Equation 5: this layer's neurons from those before it.

        Args:
            genome: the layer's genome.
            synapses: the layer's synapses.
            pre: states before the connection, `[..., s, batch, *source]`. States that are left out
                are zero, as for an input layer.
            old: this layer's states before the step, or `None` for zeros.
            last: whether this is an output layer.
            statistics: mean and variance to normalise with; `None` uses those of the batch.
            batch: the batch, if devices share it.

        Returns:
            States `[..., k, batch, *target]`, and the statistics that normalised them (or `None`).
        """
        rule, source = genome.rule, self.source(pre)
        nu, kernel, bias = genome.nu, synapses.get("kernel"), synapses.get("bias")
        add = np.sum if isinstance(nu, np.ndarray) else ops.sum
        ones = add(nu, axis=-2)  # a constant 1 in every source state
        energy = None
        if kernel is not None and rule.normalize_synapses in ("effective", "both"):
            energy = self._energies(self._matrices(synapses))["kernel"]
        if rule.derivative_state:
            nu, ones = equations.select(rule, nu, -1), equations.select(rule, ones, -1)
            if rule.channels != "tied":
                channels = -1 - len(self.kernel_shape(source))
                kernel = None if kernel is None else equations.select(rule, kernel, channels)
                bias = None if bias is None else equations.select(rule, bias, -3)
                energy = None if energy is None else equations.select(rule, energy, -3)
        pre = first_states(pre, equations.sources(nu), self.axes)
        if pre.shape[-2 - self.axes] == 1:  # the map is linear, so one state alone is mixed where it is smaller
            z = self.rows(self._through(kernel, pre))
            z = equations.mix_one(z, nu)
        else:
            z = self.rows(self._through(kernel, self.mixed(pre, nu)))
        if bias is not None:
            z = z + equations.per_state(ones, z, 2) * bias
        if energy is not None:
            z = z * equations.inverse_norm(genome, energy)
        activation = self.activation or (rule.last_activation if last else rule.forward_activation)
        if batch is not None:
            batch = batch._replace(examples=batch.examples * self.positions_of(source))
        old = None if old is None else self.rows(old)
        states, statistics = equations.forward_neurons(rule, genome, activation, z, old, statistics, batch)
        return mapped(lambda rows: self.features(rows, source), states, len(self.target(source))), statistics

    def _through(self, kernel: Array | None, x: Array) -> Array:
        """The map, or nothing at all if the connection has no kernel."""
        return x if kernel is None else self.linear(kernel, x)

    def backward(self, genome: Genome, synapses: Synapses, post: Array | Parts, source: Shape) -> Array:
        """The sums of equation 6: what the neurons before the connection receive from this layer.

        Returns:
            `[..., k, batch, *source]`; without state 1 if the rule's backward update does not read
            it.
        """
        rule, mu = genome.rule, genome.mu
        skip_first = rule.backward_update == "multiplicative_after_first"
        name = "backward_kernel" if rule.stores_backward else "kernel"
        kernel, inverse = synapses.get(name), None
        if kernel is not None and rule.directions == "signs":
            kernel = ops.abs(kernel) * ops.sign(synapses["kernel"])
        if kernel is not None and rule.normalize_synapses in ("effective", "both"):
            energies = self._energies(self._matrices({**synapses, name: kernel}))
            inverse = equations.inverse_norm(genome, energies[name])
            if rule.stores_backward:
                kernel, inverse = self.kernel(self.matrix(kernel) * inverse, kernel), None
        if skip_first:
            mu = mu[..., 1:]
            if rule.channels != "tied" and kernel is not None:
                kernel = later_states(kernel, len(self.kernel_shape(source)) - 1)
                inverse = None if inverse is None else inverse[..., 1:, :, :]
        y = equations.mix(self.rows_of(post), mu)
        if inverse is not None:
            y = y * inverse
        y = self.features(y, source)
        return y if kernel is None else self.linear_transpose(kernel, y, source)

    def hebbian(
        self,
        genome: Genome,
        synapses: Synapses,
        pre: Array | Parts,
        post: Array | Parts,
        *,
        prefix: str,
        step: Int[Array, ""] | int,
        sample_weight: Shaped[Array, "... batch"] | None,
        batch: equations.SharedBatch | None = None,
        alone: bool = True,
    ) -> Sums:
        """The sums over the batch in equation 7 and in Oja's term. Those of equation 7 are
        multiplied by the update gate, unless `Rule.gates_last`.

        Args:
            genome: the layer's genome.
            synapses: the layer's synapses. Only their names are used.
            pre: states before the connection.
            post: states of this layer `[..., k, batch, *target]`.
            prefix: `""` or `"forward_"`: which synapse arrays of the genome are used.
            step: the learning step, from 0.
            sample_weight: `[..., batch]` or `None`.
            batch: the batch, if devices share it; the sums are then over all of it.
            alone: whether the synapses learn from these rows alone, so that no other layer shares
                them.

        Returns:
            `Sums`: by the names of the synapses, and whatever else `update` needs of the batch.
        """
        rule, source = genome.rule, self.source(pre)
        nu_tilde = genome.arrays[prefix + "nu_tilde"]
        mu_tilde = equations.swapped(genome.arrays[prefix + "mu_tilde"])  # [source, channel]
        share = 1.0
        if rule.batch_reduction == "mean":
            axes = len(self.target(source))
            examples = ops.shape(first_states(post, 1, axes))[-1 - axes] if batch is None else batch.examples
            share = 1.0 / ops.cast(examples, post.dtype)
        post = self.rows_of(post)
        weight = None if sample_weight is None else self.of_rows(sample_weight, source)
        synapses = {name: value for name, value in synapses.items() if rule.changes(name)}
        groups = self._groups(rule, source, ops.shape(first_states(post, 1, 1))[-2], alone=alone, shared=batch is not None)
        at_hand = groups is not None or (not rule.whitening and alone and batch is None and self.few_rows)
        orthogonal = rule.orthogonal_first and at_hand and not self.penalties
        context = TermContext(genome, source, sample_weight, post.dtype, groups, orthogonal)
        gate = 1.0 if rule.gates_last else self._gate(genome, prefix, step)
        gate = share * ops.convert_to_tensor(gate, dtype=post.dtype)
        # The gate multiplies what is smaller: rows, or the sums of shared synapses.
        by_row = self.positions_of(source) == 1 or context.settles

        def weighed(rows: Array) -> Array:
            rows = equations.scalar(gate, rows) * rows if by_row else rows
            return rows if weight is None else weight * rows

        few = slice(0, rule.update_channels)
        from_below, from_above = nu_tilde[..., :, few], mu_tilde[..., :, few]
        received = weighed(equations.mix(post, from_above))
        names: dict[str, str] = {name: name for name in ("kernel", "bias") if name in synapses}
        sums = self._term(context, pre, from_below, received, names)
        back = {name: "backward_" + name for name in ("kernel", "bias") if "backward_" + name in synapses}
        if back and rule.directions == "tied_updates":
            sums |= {stored: sums[name] for name, stored in back.items()}
        elif back:  # the same rule with pre and post exchanged
            sums |= self._term(context, pre, from_above, weighed(equations.mix(post, from_below)), back)

        if not by_row:
            axes = 1 + len(self.kernel_shape(source))
            for name in [name for name in sums if name in synapses]:
                sums[name] = equations.per_state(gate, sums[name], axes if "kernel" in name else 3) * sums[name]
        if rule.whitening and groups is None:
            sums["examples"] = context.examples(self, received)
        if rule.oja == "activations":
            channels = mu_tilde[..., :, slice(0, rule.synapse_channels)]
            squares = ops.square(equations.mix(post, channels))
            sums["oja"] = ops.sum(squares * (share if weight is None else share * weight), axis=-2, keepdims=True)
            if "backward_kernel" in synapses:
                squares = share * ops.square(self.mixed(pre, channels))
                if sample_weight is not None:
                    squares = squares * ops.reshape(sample_weight, _inserted(sample_weight, self.axes))
                sums["backward_oja"] = self._read(squares, source)
        if batch is not None:
            sums = dict(zip(sums, batch.total(list(sums.values())), strict=True))
        return Sums(sums, groups is not None, context.orthogonal)

    def _term(
        self, context: TermContext, pre: Array | Parts, transform: Array, senders: Array, names: Mapping[str, str]
    ) -> dict[str, Array]:
        """The sum in equation 7 over rows, with the bias's; and the Gram matrix of the inputs, if
        they are whitened.

        Args:
            context: what all terms of a connection share.
            pre: states before the connection.
            transform: the transform that mixes them, `[..., source, channel]`.
            senders: what the units send, `[..., channel, rows, units]`, already multiplied by
                weights and factors.
            names: the names under which the sums of `kernel` and `bias` are returned.
        """
        rule, source = context.genome.rule, context.source
        read = first_states(pre, equations.sources(transform), self.axes)
        ones = equations.per_state(ops.sum(ops.convert_to_tensor(transform), axis=-2), senders, 2)
        if "kernel" not in names:
            return {names["bias"]: ones * ops.sum(senders, axis=-2, keepdims=True)}
        needs_inputs = rule.whitening or context.settles
        bias_sum = None
        single = read.shape[-2 - self.axes] == 1
        if single and (not needs_inputs or "bias" not in names or _reads_first_alone(transform)):
            # The map is linear, so one state alone is mixed where it is smaller.
            bias_sum = None if needs_inputs else ones * ops.sum(senders, axis=-2, keepdims=True)
            senders, ones = equations.mix_one(senders, transform), ops.ones((1, 1, 1), dtype=context.dtype)
        else:
            read = self.mixed(read, transform)
        ones = ones if "bias" in names else None

        def whole(senders: Array) -> dict[str, Array]:
            found = {names["kernel"]: self.outer(read, self.features(senders, source), source)}
            if ones is not None:
                known = ones * ops.sum(senders, axis=-2, keepdims=True) if bias_sum is None else bias_sum
                found[names["bias"]] = known
            return found

        if context.settles:

            def settled(groups: terms.Groups | None) -> dict[str, Array]:
                return settle(self, context._replace(groups=groups), read, ones, senders, whole, names)

            groups = context.groups
            if groups is None or groups.single:
                return settled(groups)
            one = terms.Groups(groups.rows)
            return choose(groups.rows <= groups.size, lambda: settled(one), lambda: settled(groups))
        sums = whole(senders)
        if rule.whitening:
            sums[_gram_of(names["kernel"])] = self.gram(context, read, ones)
        return sums

    def _groups(self, rule: Rule, source: Shape, rows: Any, *, alone: bool, shared: bool) -> terms.Groups | None:
        """The groups in which a term is whitened with its rows at hand; `None` if the whole batch's
        Gram matrix does it.

        The Gram matrix is used if there are many rows; if several layers, or devices that are not
        known to hold whole groups, first add up their sums; and if only some positions are used for
        the correlations.
        """
        most, positions = rule.whitening_rows, self.positions_of(source)
        if not (rule.whitening and alone and self.few_rows and self.kept(source, rule.whitening_positions) == positions):
            return None
        if shared and (most is None or not isinstance(rows, int) or rows % most):
            return None
        return terms.Groups(rows, most)

    def gram(
        self, context: TermContext, read: Array, ones: Float[Array, "... 1 1"] | None
    ) -> Float[Array, "*population c blocks in in"]:
        """The Gram matrices of inputs and bias, `[..., c, blocks, in, in]`."""
        x = self.patches(read, context.source, context.genome.rule.whitening_positions)
        if ones is not None:
            column = ops.broadcast_to(ops.expand_dims(ones, -3), (*ops.shape(x)[:-1], 1))
            x = ops.concatenate([x, column], axis=-1)
        if context.weight is not None:
            each = self.kept(context.source, context.genome.rule.whitening_positions)
            x = x * ops.sqrt(ops.abs(ops.repeat(context.weight, each, axis=-1)))[..., None, None, :, None]
        return matmul(ops.swapaxes(x, -1, -2), x)

    def whitened(
        self,
        genome: Genome,
        sums: Mapping[str, Array],
        gram: Float[Array, "*population c blocks in in"],
        names: Mapping[str, str],
        examples: Float[Array, "... 1 1 1"],
    ) -> dict[str, Array]:
        """Eq. W1 on the term of a kernel, with the bias as its last row."""
        damping = equations.per_state(genome.log_damping, gram, 4)
        return self.as_whole(sums, names, lambda term: terms.whitened(gram, term, ops.exp(damping), examples))

    def orthogonal_term(self, rule: Rule, sums: Mapping[str, Array], names: Mapping[str, str]) -> dict[str, Array]:
        """Eq. N2 on the term of a kernel, with the bias as its last row."""
        return self.as_whole(sums, names, lambda term: terms.orthogonal(term, rule.orthogonal_iterations))

    def sized_term(
        self, rule: Rule, sums: Mapping[str, Array], names: Mapping[str, str], gate: Array | None = None
    ) -> dict[str, Array]:
        """Eq. N1 on the term of a kernel, with the bias as its last row; times the gate, if
        given."""
        blocks = [self.split(sums[name]).shape[-3:] for name in names.values()]
        shape = (blocks[0][0], sum(block[1] for block in blocks), blocks[0][2])
        orthogonal = rule.normalize_term == "orthogonal"
        found = [sums[name] for name in names.values()]
        times = 1.0 if gate is None else equations.scalar(gate, found[0])
        parts = terms.frobenius(found, shape, rank=rule.term_rank, times=times, moderate=orthogonal)
        return dict(zip(names.values(), parts, strict=True))

    def as_whole(
        self, sums: Mapping[str, Array], names: Mapping[str, str], function: Callable[[Array], Array]
    ) -> dict[str, Array]:
        """Applies a function of `[..., c, blocks, in, units]` to the sum of a kernel as a matrix,
        with the sum of the bias as its last row."""
        parts = [self.split(sums[name]) for name in names.values()]
        whole = function(parts[0] if len(parts) == 1 else ops.concatenate(parts, axis=-2))
        found, start = {}, 0
        for name, part in zip(names.values(), parts, strict=True):
            found[name] = self.joined(whole[..., start : start + part.shape[-2], :])
            start += part.shape[-2]
        return found

    def _read(self, states: Array, source: Shape) -> Array:
        """States `[..., s, batch, *source]` added up over the rows in which each entry of a kernel
        reads them.

        Returns:
            `[..., s, in, units]`, or one column where all units read the same inputs.
        """
        shape = ops.shape(states)
        ones = ops.ones((*shape[: len(shape) - self.axes], *self.target(source)), dtype=states.dtype)
        return self.matrix(self.outer(states, ones, source))

    def update(
        self, genome: Genome, synapses: Synapses, totals: Sums, *, prefix: str, step: Int[Array, ""] | int
    ) -> dict[str, Array]:
        """Equation 7 with the stabilising options: the new synapses, from the sums of `hebbian`."""
        rule = genome.rule
        arrays = genome.arrays
        gate = self._gate(genome, prefix, step)
        stored = synapses
        matrices = self._matrices({name: value for name, value in synapses.items() if rule.changes(name)})
        traces = {name: value for name, value in matrices.items() if name.endswith(TRACE)}
        synapses = {name: value for name, value in matrices.items() if not name.endswith((TRACE, AVERAGE))}
        sums = self._matrices(totals.arrays)
        tied = rule.directions == "tied_updates"  # the same to the last bit, bias or not
        pairs = [names for names in _pairs(synapses) if not (tied and "backward_kernel" in names.values())]

        def copy() -> None:
            sums.update({name: sums[name.removeprefix("backward_")] for name in synapses if tied and "backward" in name})

        if rule.whitening and not totals.whitened:
            count = sums["examples"]
            for names in pairs:
                if "kernel" in names:
                    sums |= self.whitened(genome, sums, sums[_gram_of(names["kernel"])], names, count[..., None])
                else:  # a bias alone reads ones, whose Gram matrix is the number of rows
                    own = sums[names["bias"]]
                    damping = ops.exp(equations.scalar(genome.log_damping, own))
                    sums[names["bias"]] = own / (count + damping)
            copy()
        sums = self._penalised(stored, sums, 1.0 if rule.gates_last else gate)
        if rule.momentum == "before":
            _follow(arrays["momentum"], traces, sums)
        gated = not rule.gates_last
        if rule.normalize_term != "none":
            gated = rule.momentum != "after"  # one factor with the norm, unless a trace comes between
            for names in pairs:
                if rule.normalize_term == "orthogonal" and not totals.orthogonal:
                    sums |= self.orthogonal_term(rule, sums, names)
                sums |= self.sized_term(rule, sums, names, gate if gated else None)
            copy()
        if rule.momentum == "after":
            _follow(arrays["momentum"], traces, sums)
        if not gated:
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
        changed = {name: self._stored(name, value, stored[name]) for name, value in {**new, **traces}.items()}
        for name in new:
            limit = self.limits.get(name.removeprefix("backward_"))
            if limit is not None:
                changed[name] = _by_channel(limit, changed[name], self._leading(name, changed[name]))
        return {**stored, **changed}

    def _penalised(self, synapses: Synapses, sums: Mapping[str, Array], gate: Array | float) -> dict[str, Array]:
        """The sums, as matrices, with the gradients of the penalties added. These are multiplied by
        the gate if the sums are."""
        sums = dict(sums)
        for name in synapses:
            if name not in sums:
                continue
            penalty = self.penalties.get(name.removeprefix("backward_"))
            if penalty is not None:
                leading = self._leading(name, synapses[name])
                _, pull = vjp(lambda value, of=penalty, axes=leading: ops.sum(_by_channel(of, value, axes)), synapses[name])
                slope = pull(ops.ones((), dtype=sums[name].dtype))[0]
                slope = self.matrix(slope) if "kernel" in name else slope
                sums[name] = sums[name] + equations.scalar(gate, slope) * slope
        return sums

    def _leading(self, name: str, synapse: Array) -> int:
        """The number of axes of a population before the channels of stored synapses."""
        return ops.ndim(self.matrix(synapse) if "kernel" in name else synapse) - 3

    @staticmethod
    def _gate(genome: Genome, prefix: str, step: Array) -> Array:
        """The synapse update gate at a learning step."""
        number = ops.convert_to_tensor(genome.arrays[prefix + "synapse_update"])
        return equations.update_gate(genome.rule, genome, number, step)

    def _energies(self, synapses: Synapses) -> dict[str, Array]:
        """Sum of squares over the input axis of each matrix. For a forward kernel it runs over
        inputs and bias. The inputs of a backward kernel are this layer's units, so there it runs
        over the units that send to the same neuron."""
        squares = [ops.square(synapses["bias"])] if "bias" in synapses else []
        if "kernel" in synapses:
            squares.insert(0, ops.sum(ops.square(synapses["kernel"]), axis=-2, keepdims=True))
        forward = sum(squares[1:], squares[0])
        energies = {"kernel": forward, "bias": forward}
        if "backward_kernel" in synapses:
            energies["backward_kernel"] = self.over_readers(ops.square(synapses["backward_kernel"]))
        if "backward_bias" in synapses:
            energies["backward_bias"] = ops.sum(ops.square(synapses["backward_bias"]), axis=-1, keepdims=True)
        return {name: energy for name, energy in energies.items() if name in synapses}

    def _squares(self, synapses: Synapses, sums: Mapping[str, Array]) -> dict[str, Array]:
        """The same for Oja's term on activations. The bias unit has no activation, so its backward
        synapses do not shrink."""
        squares = {"kernel": sums["oja"], "bias": sums["oja"]}
        if "backward_kernel" in synapses:
            squares["backward_kernel"] = sums["backward_oja"]
        return {name: squares[name] for name in synapses if name in squares}


def _gram_of(kernel: str) -> str:
    """Name of the Gram matrix of what a kernel reads."""
    return kernel.replace("kernel", "gram")


def _pairs(synapses: Synapses) -> list[dict[str, str]]:
    """The names of each kernel and the bias that is a row of it."""
    found = []
    for prefix in ("", "backward_"):
        names = {name: prefix + name for name in ("kernel", "bias") if prefix + name in synapses}
        if names:
            found.append(names)
    return found


def _reads_first_alone(transform: Array) -> bool:
    """Whether the numbers of a transform `[..., source, target]` are known, and only those of state
    1 are not zero."""
    return isinstance(transform, np.ndarray) and not np.any(transform[..., 1:, :])


def _follow(momentum: Array, traces: dict[str, Array], sums: dict[str, Array]) -> None:
    """Moves the traces by the terms, and replaces the terms with Nesterov's form, in which a term
    counts at once."""
    for name in traces:
        own = name.removesuffix(TRACE)
        beta = equations.scalar(momentum, sums[own])
        traces[name] = beta * traces[name] + sums[own]
        sums[own] = beta * traces[name] + sums[own]


def _by_channel(function: Callable[[Array], Array], synapse: Array, leading: int) -> Array:
    """A function of each channel of synapses `[..., c, *shape]`, which have `leading` axes before
    the channels."""
    return over_leading(lambda own: ops.stack([function(own[channel]) for channel in range(own.shape[0])]), synapse, leading)


def over_leading(function: Callable[[Array], Array], array: Array, leading: int) -> Array:
    """A function of each part of an array that is left without its `leading` first axes."""
    if leading:
        return ops.vectorized_map(functools.partial(over_leading, function, leading=leading - 1), array)
    return function(array)


def _inserted(weight: Array, features: int) -> Shape:
    """The shape of weights `[..., batch]` for states `[..., k, batch, *features]`."""
    shape = ops.shape(weight)
    return (*shape[:-1], 1, shape[-1], *(1,) * features)


def _shape(source: int | Shape) -> Shape:
    return (source,) if isinstance(source, int) else tuple(source)
