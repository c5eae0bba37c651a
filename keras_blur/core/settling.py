"""Whitening and orthogonalising a Hebbian term while its rows are at hand, before they are added
up.

Whitening by groups of rows, and orthogonal terms (eq. W2, W3, N2 and N3 of `terms`), can each be
computed from two systems: that of the rows of a group, and that of the features. The rows are at
hand if a single layer learns from them and, with several devices, if each device holds whole
groups. Then the smaller system is chosen here, and solved. Otherwise `Connection.update` solves the
system of the features for the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from keras import ops

from keras_blur.core import equations, terms
from keras_blur.core.derivatives import matmul
from keras_blur.core.genome import Genome

if TYPE_CHECKING:
    from jaxtyping import Float

    from keras_blur.core.connection import Connection

Array = Any
Shape = tuple[int, ...]

_LEAST = 1e-30  # stands for zero in a divisor


class TermContext(NamedTuple):
    """What the terms of a connection share.

    Attributes:
        genome: the layer's genome.
        source: shape of the features that enter.
        weight: weights of the examples, `[..., batch]`, or `None`.
        dtype: type of the states.
        groups: the groups of rows in which terms are whitened while their rows are at hand, or
            `None`.
        orthogonal: whether terms are made orthogonal while their rows are at hand.
    """

    genome: Genome
    source: Shape
    weight: Array | None
    dtype: Any
    groups: terms.Groups | None
    orthogonal: bool

    @property
    def settles(self) -> bool:
        """Whether anything is done to terms while their rows are at hand."""
        return self.groups is not None or self.orthogonal

    def damping(self, like: Array) -> Float[Array, "*population 1 1 1 1"]:
        """The damping of the inputs' correlations, `[..., 1, 1, 1, 1]`."""
        return ops.exp(equations.per_state(self.genome.log_damping, like, 4))

    def root(self, connection: Connection) -> Float[Array, "*population 1 rows 1"] | None:
        """Square roots of the weights of rows, `[..., 1, rows, 1]`."""
        return None if self.weight is None else ops.sqrt(ops.abs(connection.of_rows(self.weight, self.source)))

    def examples(self, connection: Connection, post: Float[Array, "... rows units"]) -> Float[Array, "*population 1 1 1"]:
        """The number of examples, `[..., 1, 1, 1]`; the sum of their weights, if they have
        weights."""
        if self.weight is None:
            count = ops.shape(post)[-2] / connection.positions_of(self.source)
            return ops.reshape(ops.cast(count, self.dtype), (1, 1, 1))
        size = ops.sum(ops.abs(ops.cast(self.weight, self.dtype)), axis=-1)
        return ops.reshape(size, (*size.shape, 1, 1, 1))

    def examples_of(self, groups: terms.Groups, connection: Connection) -> Float[Array, "*blocks 1 1"]:
        """The number of examples of each group, `[..., 1, groups, 1, 1]`, or `[1, 1, 1]` if all
        groups are equally large."""
        positions = connection.positions_of(self.source)
        if self.weight is None and groups.full:
            return ops.reshape(ops.cast(groups.size / positions, self.dtype), (1, 1, 1))
        each = groups.present(self.dtype)
        if self.weight is not None:
            each = groups.apart(ops.abs(ops.cast(connection.of_rows(self.weight, self.source), self.dtype)))
        return ops.sum(each, axis=-2, keepdims=True) / positions


def settle(
    connection: Connection,
    context: TermContext,
    read: Array,
    ones: Float[Array, "*#population #c 1 1"] | None,
    senders: Float[Array, "*#population c rows units"],
    whole: Callable[[Array], dict[str, Array]],
    names: Mapping[str, str],
) -> dict[str, Array]:
    """Whitens a term and makes it orthogonal, as the context says, each by the smaller of two
    systems."""
    rule = context.genome.rule
    x = connection.rows_read(read)
    groups = context.groups or terms.Groups(ops.shape(x)[-2])
    inputs = x.shape[-1] + (ones is not None)
    root = context.root(connection)

    def by_rows(*, orthogonal: bool) -> Array:
        """What takes the place of the senders: `[..., groups, size, units]`."""
        inner = _inner(groups, x, ones, root)
        own = found = groups.apart(senders if root is None else _over(senders, root))
        if rule.whitening:
            numbers = context.damping(inner), context.examples_of(groups, connection)
            found = terms.whitened_senders(inner, own, *numbers)
        if orthogonal:
            responses = terms.responses(inner, own, found, *numbers) if rule.whitening else matmul(inner, found)
            found = terms.orthogonal_senders(found, responses, rule.orthogonal_iterations)
        return found if root is None else found * groups.apart(root)

    def term_of(own: Array) -> Array:
        """The groups' terms, `[..., groups, in, units]`, of their senders."""
        rows = groups.apart(x)
        term = matmul(ops.swapaxes(connection.rounded(rows), -1, -2), connection.rounded(own))
        if ones is None:
            return term
        bias = ops.expand_dims(ones, -3) * ops.sum(own, axis=-2, keepdims=True)
        return ops.concatenate([term, bias], axis=-2)

    def by_features() -> Array:
        """The groups' terms, whitened by the systems of the features."""
        rows = groups.apart(x)
        if ones is not None:
            bias = ops.broadcast_to(ops.expand_dims(ones, -3), (*ops.shape(rows)[:-1], 1))
            rows = ops.concatenate([rows, bias], axis=-1)
        if root is not None:
            rows = rows * groups.apart(root)
        elif not groups.full:  # the bias of rows that fill up a group counts as nothing
            rows = rows * groups.present(context.dtype)
        gram = matmul(ops.swapaxes(rows, -1, -2), rows)
        term = term_of(groups.apart(senders))
        return terms.whitened(gram, term, context.damping(gram), context.examples_of(groups, connection))

    def added(term: Array) -> dict[str, Array]:
        """The groups' terms as the sums of the kernel and the bias."""
        term = ops.squeeze(term, -3) if groups.single else ops.sum(term, axis=-3)
        found = {names["kernel"]: term[..., : x.shape[-1], :]}
        return found if ones is None else {**found, names["bias"]: term[..., x.shape[-1] :, :]}

    def sent(*, orthogonal: bool) -> dict[str, Array]:
        return whole(groups.together(by_rows(orthogonal=orthogonal)))

    few = groups.size < inputs
    if not context.orthogonal:
        return choose(few, lambda: sent(orthogonal=False), lambda: added(by_features()))

    def by_matrix() -> dict[str, Array]:
        if not rule.whitening:
            term = term_of(groups.apart(senders))
        else:
            term = choose(few, lambda: term_of(by_rows(orthogonal=False)), by_features)
        return added(terms.orthogonal(term, rule.orthogonal_iterations))

    iterations = rule.orthogonal_iterations
    fewer = terms.rows_are_cheaper(groups.size, inputs, connection.units, iterations, whitened=rule.whitening)
    return choose(fewer, lambda: sent(orthogonal=True), by_matrix)


def choose(first: Any, one: Callable[[], Any], other: Callable[[], Any]) -> Any:
    """Calls one of two functions: at once if the condition is known, else when the program runs."""
    if isinstance(first, bool):
        return one() if first else other()
    return ops.cond(first, one, other)


def _inner(groups: terms.Groups, x: Array, ones: Array | None, root: Array | None) -> Array:
    """The Gram matrices of the rows of each group, with bias and weights:
    `[..., c, groups, size, size]`."""
    x = groups.apart(x)
    inner = matmul(x, ops.swapaxes(x, -1, -2))
    if ones is not None:
        bias = ops.expand_dims(ones, -3)
        if not groups.full and root is None:
            bias = bias * groups.present(x.dtype)
        inner = inner + bias * ops.swapaxes(bias, -1, -2)
    if root is not None:
        root = groups.apart(root)
        inner = inner * root * ops.swapaxes(root, -1, -2)
    return inner


def _over(senders: Array, root: Array) -> Array:
    """Senders divided by the square roots of their weights; zero where the weight is zero."""
    none = root <= _LEAST
    return ops.where(none, ops.zeros_like(senders), senders / ops.where(none, ops.ones_like(root), root))
