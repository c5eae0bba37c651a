"""What happens to a Hebbian term before the gate: presynaptic whitening and normalisation.

A term is `H = X^T D`. X, `[rows, in]`, holds what comes in, with a column for the bias. D,
`[rows, units]`, holds what the units send.

Whitening decorrelates the inputs over the batch, `H <- (X^T X / s + damping I)^-1 H` (eq. W1),
where `s = trace(X^T X) / examples` makes it independent of the inputs' scale. It is the input half
of the Fisher information that K-FAC factorises, and local: a connection needs nothing but its own
inputs. By the push-through identity it equals `X^T (X X^T / s + damping I)^-1 D` (eq. W2), so the
smaller of the two systems is solved. The rows may be whitened in groups g, each by its own second
moments and `s_g = trace(X_g^T X_g) / examples_g`:
`H <- sum_g (X_g^T X_g / s_g + damping I)^-1 X_g^T D_g` (eq. W3). The systems of the rows are then
only as large as a group, so the cost grows with the size of the batch, not with its cube.

Normalisation keeps only the direction of a term, so the gate alone sets the size of the change:
`"frobenius"` gives it the norm of a matrix Q with singular values of one (eq. N1). Q has full rank,
or `term_rank` at most. `"orthogonal"` first brings its singular values closer together (eq. N2):
two iterations lift the small ones, five make them nearly equal. Where the rows are whitened in
groups, this is done to the term of each group (eq. N3):
`H <- sum_g N2((X_g^T X_g / s_g + damping I)^-1 X_g^T D_g)`. So no system is larger than a group, a
device can do its own groups, and no group outweighs the others.

Sources: "Optimizing Neural Networks with Kronecker-factored Approximate Curvature" (Martens and
Grosse, 2015), section 3; "Muon: An optimizer for hidden layers in neural networks" (Jordan et al.,
2024), after "Old Optimizer, New Norm: An Anthology" (Bernstein and Newhouse, 2024), for N2.

Arrays are `[..., blocks, rows or in, units]`, since a convolution with groups is several matrices.
Everything is computed in the type of the synapses, float32 or float64, whatever the type of the
products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from keras import ops

from keras_blur.backend import solve_positive
from keras_blur.core.derivatives import matmul

if TYPE_CHECKING:
    from jaxtyping import Float

Array = Any

# Coefficients of the iterations x <- a x + b x^3 + c x^5 on singular values, the first one and the
# others: steep at zero, so that all values from 0.002 to 1 end between 0.68 and 1.21 after five. N1
# takes out their common size. The first one meets mostly small values, so it does without c and its
# product.
_FIRST, _OTHERS = (2.8, -2.2, 0.0), (3.4445, -4.7750, 2.0315)
_TINY = 1e-30  # stands for zero in a divisor


def whitened(
    gram: Float[Array, "*#blocks in in"],
    term: Float[Array, "*#blocks in units"],
    damping: Float[Array, "*#blocks 1 1"],
    examples: Float[Array, "*#blocks 1 1"] | float | int,
) -> Float[Array, "*blocks in units"]:
    """Eq. W1: the term with decorrelated inputs, by the system of the features.

    Args:
        gram: `X^T X`, `[..., in, in]`.
        term: `X^T D`, `[..., in, units]`.
        damping: `[..., 1, 1]`, positive.
        examples: number of examples of the batch.

    Example:

    >>> term = whitened(ops.eye(2), ops.ones((2, 1)), ops.full((1, 1), 0.5), 1.0)
    >>> ops.convert_to_numpy(term).round(4).tolist()
    [[1.0], [1.0]]
    """
    return solve_positive(_damped(gram, damping, examples), term)


def whitened_senders(
    inner: Float[Array, "*#blocks rows rows"],
    senders: Float[Array, "*#blocks rows units"],
    damping: Float[Array, "*#blocks 1 1"],
    examples: Float[Array, "*#blocks 1 1"] | float | int,
) -> Float[Array, "*blocks rows units"]:
    """Eq. W2: an array in place of D, `[..., rows, units]`, such that `X^T` times it is the
    whitened term.

    Args:
        inner: `X X^T`, `[..., rows, rows]`.
        senders: D, `[..., rows, units]`.
        damping: `[..., 1, 1]`, positive.
        examples: number of examples of the batch.
    """
    return solve_positive(_damped(inner, damping, examples), senders)


def responses(
    inner: Float[Array, "*#blocks rows rows"],
    senders: Float[Array, "*#blocks rows units"],
    whitened: Float[Array, "*#blocks rows units"],
    damping: Float[Array, "*#blocks 1 1"],
    examples: Float[Array, "*#blocks 1 1"] | float | int,
) -> Float[Array, "*blocks rows units"]:
    """`X X^T W` for whitened senders W, without the product: by eq. W2 it is `s (D - damping W)`.

    Args:
        inner: `X X^T`, `[..., rows, rows]`.
        senders: D, `[..., rows, units]`.
        whitened: W, `[..., rows, units]`: `whitened_senders` of D.
        damping: `[..., 1, 1]`, positive.
        examples: number of examples of the batch.
    """
    return (senders - damping * whitened) / _to_unit(inner, examples)


def _damped(gram: Array, damping: Array, examples: Array) -> Array:
    one = ops.eye(ops.shape(gram)[-1], dtype=gram.dtype)
    return gram * _to_unit(gram, examples) + damping * one


def _to_unit(gram: Array, examples: Array) -> Array:
    """1 / s; 1 if all inputs are zero, since they then have no direction to favour."""
    trace = _trace(gram)
    none = trace <= _TINY
    return ops.where(none, ops.ones_like(trace), examples / ops.where(none, ops.ones_like(trace), trace))


class Groups(NamedTuple):
    """The rows of a batch in groups of consecutive ones (eq. W3).

    Attributes:
        rows: number of rows, an integer or a scalar array.
        most: number of rows of a group; `None` for all rows. Rows of zeros fill up the last group.
    """

    rows: Any
    most: int | None = None

    @property
    def single(self) -> bool:
        """Whether all rows are known to be one group."""
        return self.most is None or (isinstance(self.rows, int) and self.rows <= self.most)

    @property
    def full(self) -> bool:
        """Whether the rows are known to fill every group."""
        return self.most is None or (isinstance(self.rows, int) and (self.single or self.rows % self.most == 0))

    @property
    def size(self) -> Any:
        """Number of rows of a group, an integer or a scalar array."""
        return self.rows if self.single else self.most

    @property
    def _count(self) -> Any:
        return -(-self.rows // self.size)

    def apart(self, x: Float[Array, "*leading rows n"]) -> Float[Array, "*leading groups size n"]:
        """`[..., rows, n]` as `[..., groups, size, n]`."""
        if self.single:
            return ops.expand_dims(x, -3)
        if not self.full:
            more = self._count * self.size - self.rows
            x = ops.pad(x, (*((0, 0),) * (len(x.shape) - 2), (0, more), (0, 0)))
        return ops.reshape(x, (*ops.shape(x)[:-2], self._count, self.size, x.shape[-1]))

    def together(self, x: Float[Array, "*leading groups size n"]) -> Float[Array, "*leading rows n"]:
        """The inverse of `apart`."""
        if self.single:
            return ops.squeeze(x, -3)
        shape = ops.shape(x)
        x = ops.reshape(x, (*shape[:-3], shape[-3] * shape[-2], x.shape[-1]))
        return x if self.full else x[..., : self.rows, :]

    def present(self, dtype: Any) -> Float[Array, "groups size 1"]:
        """1 for each row, and 0 where a group is filled up: `[groups, size, 1]`."""
        return self.apart(ops.ones((self.rows, 1), dtype=dtype))


def frobenius(
    parts: Sequence[Float[Array, "*#leading _ columns"]],
    shape: tuple[int, int, int],
    *,
    rank: int | None = None,
    times: Float[Array, "*#leading 1 1"] | float = 1.0,
    moderate: bool = False,
) -> list[Float[Array, "*leading _ columns"]]:
    """Eq. N1: a term at the Frobenius norm of one whose singular values are all one, or
    `sqrt(columns / rows)` if it has more columns than rows. A term of zeros stays zero.

    Args:
        parts: the rows of the term in parts, such as those of kernel and bias:
            `[..., rows, columns]`.
        shape: the number of blocks of a term, and the rows and columns of a block. The norm is that
            of all blocks together.
        rank: the maximum number of singular values of a block; `None` for as many as it can have.
        times: a factor of the result, a number or `[..., 1, 1]`, applied in the same pass.
        moderate: whether the square of an entry cannot overflow, as after eq. N2.

    Example:

    >>> (term,) = frobenius([ops.ones((1, 2, 2))], (1, 2, 2))
    >>> round(float(ops.sum(ops.square(term))), 4)  # as of an orthogonal matrix
    2.0
    """
    blocks, rows, columns = shape
    values = min(rows, columns) if rank is None else min(rows, columns, rank)
    norm = (blocks * values) ** 0.5 * max(1.0, (columns / rows) ** 0.5)
    if not moderate:
        parts, _ = _scaled(parts, (-2, -1))
    factor = times * norm * ops.rsqrt(_energy(parts, (-2, -1)))
    return [part * factor for part in parts]


def orthogonal(term: Float[Array, "*blocks in units"], iterations: int) -> Float[Array, "*blocks in units"]:
    """Eq. N2: a term at Frobenius norm 1 whose singular values went through the iterations.

    It uses products only, so it compiles everywhere and has a gradient. A term of zeros has no
    direction: it stays zero, and so does its gradient.

    Args:
        term: `[..., blocks, in, units]`.
        iterations: number of Newton-Schulz iterations.
    """
    rows, columns = term.shape[-2:]
    x = ops.swapaxes(term, -1, -2) if rows < columns else term
    (x,), _ = _scaled([x], (-2, -1))
    x = x * ops.rsqrt(_energy([x], (-2, -1)))
    if 2 * min(rows, columns) <= max(rows, columns):  # all iterates on the small side
        gram = matmul(ops.swapaxes(x, -1, -2), x)
        x = matmul(x, _polynomial(gram, iterations))
    else:
        for done in range(iterations):
            gram = matmul(ops.swapaxes(x, -1, -2), x)
            x = matmul(x, _factor(gram, first=not done))
    return ops.swapaxes(x, -1, -2) if rows < columns else x


def orthogonal_senders(
    senders: Float[Array, "*#blocks rows units"], responses: Float[Array, "*#blocks rows units"], iterations: int
) -> Float[Array, "*blocks rows units"]:
    """Eq. N2 by the system of the rows: an array in place of D, `[..., rows, units]`.

    All iterates are `X^T M D` with M a polynomial in `P = D (X X^T D)^T`.

    Args:
        senders: D, `[..., rows, units]`.
        responses: `X X^T D`, `[..., rows, units]`.
        iterations: number of Newton-Schulz iterations.
    """
    (senders,), size = _scaled([senders], (-2, -1))
    (responses,), response = _scaled([responses], (-2, -1))
    product = matmul(senders, ops.swapaxes(responses, -1, -2))
    energy = _trace(product)
    energy = ops.where(energy <= _TINY, ops.ones_like(energy), energy)
    return matmul(_polynomial(product / energy, iterations), senders) * ops.sqrt(size / response / energy)


def _polynomial(gram: Array, iterations: int) -> Array:
    """The matrix M such that `x M` is the result of the iterations on x, from `x^T x`, with which
    all iterates commute."""
    whole = factor = _factor(gram, first=True)
    for _ in range(iterations - 1):
        gram = matmul(matmul(factor, gram), factor)
        factor = _factor(gram, first=False)
        whole = matmul(whole, factor)
    return whole


def _factor(gram: Array, *, first: bool) -> Array:
    """The factor by which an iteration multiplies x, from `x^T x`."""
    a, b, c = _FIRST if first else _OTHERS
    factor = a * ops.eye(ops.shape(gram)[-1], dtype=gram.dtype) + b * gram
    return factor + c * matmul(gram, gram) if c else factor


def rows_are_cheaper(rows: Any, inputs: int, units: int, iterations: int, *, whitened: bool) -> Any:
    """Whether N2 by the system of the rows costs less than that of the matrix.

    The cost of whitening is the same for both. If a group has at least as many rows as there are
    inputs, whitening does not use the system of the rows, but then the matrix is cheaper anyway.

    Args:
        rows: number of rows of a group, an integer or a scalar array.
        inputs: size of a row of X, including the bias.
        units: number of units of the target.
        iterations: number of Newton-Schulz iterations.
        whitened: whether whitening computes the system of the rows in any case.
    """
    if not isinstance(rows, int):
        rows = ops.cast(rows, "float32")  # its third power does not fit in a 32-bit integer
    small, large = min(inputs, units), max(inputs, units)
    polynomial = 8 * (iterations - 1)  # of `_polynomial`
    if 2 * small <= large:
        matrix = 4 * large * small**2 + polynomial * small**3
    else:
        matrix = iterations * 4 * large * small**2 + (iterations - 1) * 2 * small**3
    inner = 4 * units if whitened else 4 * units + 2 * inputs
    return (polynomial + 2) * rows * rows * rows + inner * rows * rows < matrix


def _trace(matrix: Array) -> Array:
    """`[..., n, n]` to `[..., 1, 1]`."""
    return ops.sum(ops.diagonal(matrix, axis1=-2, axis2=-1), axis=-1)[..., None, None]


def _scaled(parts: Sequence[Array], axes: tuple[int, ...]) -> tuple[list[Array], Array]:
    """Parts over their largest entry, so that no square overflows, and that entry; zeros stay zero.

    The final result does not depend on that entry, so no derivative goes through it.
    """
    largest = None
    for part in parts:
        own = ops.maximum(ops.max(part, axis=axes, keepdims=True), -ops.min(part, axis=axes, keepdims=True))
        largest = own if largest is None else ops.maximum(largest, own)
    largest = ops.stop_gradient(largest)
    zero = largest <= _TINY
    divisor = ops.where(zero, ops.full_like(largest, float("inf")), largest)
    return [part / divisor for part in parts], ops.where(zero, ops.ones_like(largest), largest)


def _energy(parts: Sequence[Array], axes: tuple[int, ...]) -> Array:
    """The sum of squares; 1 if all entries are zero."""
    energy = sum(ops.sum(ops.square(part), axis=axes, keepdims=True) for part in parts)
    return ops.where(energy <= _TINY, ops.ones_like(energy), energy)
