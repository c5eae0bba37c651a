"""What becomes of a Hebbian term before the gate: presynaptic whitening, and normalisation.

A term is `H = X^T D`: X, `[rows, in]`, holds what comes in, with a column for the bias, and D,
`[rows, units]`, what the units send.

Whitening decorrelates the inputs over the batch, `H <- (X^T X / s + damping I)^-1 H` (eq. W1), where
`s = trace(X^T X) / examples` makes it independent of the inputs' scale. It is the input half of the
Fisher information that K-FAC factorises, and local: a connection needs nothing but its own inputs.
By the push-through identity it equals `X^T (X X^T / s + damping I)^-1 D` (eq. W2), so the smaller of
the two systems is solved.

Normalisation keeps only the direction of a term, so that the gate alone is its size: `"frobenius"`
scales it (eq. N1), `"orthogonal"` brings its singular values near to 1 (eq. N2). Either way the
result has the size that an orthogonal matrix has.

Sources: "Optimizing Neural Networks with Kronecker-factored Approximate Curvature" (Martens and
Grosse, 2015), section 3; "Muon: An optimizer for hidden layers in neural networks" (Jordan et al.,
2024), after "Old Optimizer, New Norm: An Anthology" (Bernstein and Newhouse, 2024), for N2.

Arrays are `[..., blocks, rows or in, units]`: a convolution with groups is several matrices. All is
computed in the type of the synapses, float32 or float64, whatever the type of the products.
"""

from __future__ import annotations

from typing import Any

from keras import ops

Array = Any

# Coefficients of the iteration x <- a x + b x^3 + c x^5 on singular values: steep at zero, so that
# all values from 0.002 to 1 end between 0.68 and 1.21 after five.
_QUINTIC = (3.4445, -4.7750, 2.0315)
_TINY = 1e-30  # stands for zero in a divisor


def solve(matrix: Array, right: Array) -> Array:
    """`matrix^-1 right` for symmetric positive definite matrices, by Cholesky's factorisation.

    A matrix with numbers that are not finite gives NaN, and harms no other matrix beside it.

    Args:
        matrix: `[..., n, n]`.
        right: `[..., n, m]`, with the same leading axes or ones that broadcast.
    """
    sound = ops.all(ops.isfinite(matrix), axis=(-2, -1), keepdims=True)
    one = ops.eye(ops.shape(matrix)[-1], dtype=matrix.dtype)
    factor = ops.cholesky(ops.where(sound, matrix, one))
    lead = _broadcast(factor.shape[:-2], right.shape[:-2])
    factor = _spread(factor, lead)
    half = ops.solve_triangular(factor, _spread(right, lead), lower=True)
    found = ops.solve_triangular(ops.swapaxes(factor, -1, -2), half, lower=False)
    return ops.where(sound, found, float("nan"))


def whitened(gram: Array, term: Array, damping: Array, examples: Array) -> Array:
    """Eq. W1: the term with its inputs decorrelated, by the system of the features.

    Args:
        gram: `X^T X`, `[..., in, in]`.
        term: `X^T D`, `[..., in, units]`.
        damping: `[..., 1, 1]`, positive.
        examples: number of examples of the batch.
    """
    return solve(_damped(gram, damping, examples), term)


def whitened_senders(inner: Array, senders: Array, damping: Array, examples: Array) -> Array:
    """Eq. W2: what takes the place of D, so that `X^T` times it is the whitened term.

    Args:
        inner: `X X^T`, `[..., rows, rows]`.
        senders: D, `[..., rows, units]`.
        damping: `[..., 1, 1]`, positive.
        examples: number of examples of the batch.
    """
    return solve(_damped(inner, damping, examples), senders)


def _damped(gram: Array, damping: Array, examples: Array) -> Array:
    size = ops.shape(gram)[-1]
    one = ops.eye(size, dtype=gram.dtype)
    trace = ops.sum(gram * one, axis=(-2, -1), keepdims=True)
    none = trace <= _TINY  # inputs that are all zero have no direction to favour
    scale = examples / ops.where(none, ops.ones_like(trace), trace)
    return gram * ops.where(none, ops.ones_like(trace), scale) + damping * one


def frobenius(term: Array) -> Array:
    """Eq. N1: a term at the Frobenius norm of an orthogonal one. A term of zeros stays zero.

    Args:
        term: `[..., blocks, in, units]`; the norm is that of all blocks.
    """
    blocks, rows, columns = term.shape[-3:]
    term, _ = _scaled(term, (-3, -2, -1))
    norm = (blocks * min(rows, columns)) ** 0.5 * _wide(rows, columns)
    return term * (norm * ops.rsqrt(_energy(term, (-3, -2, -1))))


def orthogonal(term: Array, iterations: int) -> Array:
    """Eq. N2: a term with its singular values near to 1, times `max(1, sqrt(units / in))`.

    So the synapses of one unit have root mean square norm 1, whatever the sizes. Products only, so
    that it compiles everywhere and has a gradient. A term of zeros has no direction: it stays zero,
    and so does its gradient.

    Args:
        term: `[..., blocks, in, units]`.
        iterations: number of Newton-Schulz iterations.
    """
    rows, columns = term.shape[-2:]
    x = ops.swapaxes(term, -1, -2) if rows < columns else term
    x, _ = _scaled(x, (-2, -1))
    x = x * ops.rsqrt(_energy(x, (-2, -1)))
    a, b, c = _QUINTIC
    if 2 * min(rows, columns) <= max(rows, columns):  # all iterates on the small side
        gram = ops.matmul(ops.swapaxes(x, -1, -2), x)
        x = ops.matmul(x, _polynomial(gram, iterations))
    else:
        for _ in range(iterations):
            gram = ops.matmul(ops.swapaxes(x, -1, -2), x)
            x = a * x + ops.matmul(x, b * gram + c * ops.matmul(gram, gram))
    return (ops.swapaxes(x, -1, -2) if rows < columns else x) * _wide(rows, columns)


def orthogonal_senders(inner: Array, senders: Array, inputs: int, iterations: int) -> Array:
    """Eq. N2 by the system of the rows: what takes the place of D.

    All iterates are `X^T M D` with M a polynomial in `P = (D D^T) (X X^T)`.

    Args:
        inner: `X X^T`, `[..., rows, rows]`.
        senders: D, `[..., rows, units]`.
        inputs: size of X's rows, the bias counted.
        iterations: number of Newton-Schulz iterations.
    """
    senders, _ = _scaled(senders, (-2, -1))
    inner, size = _scaled(inner, (-2, -1))
    product = ops.matmul(ops.matmul(senders, ops.swapaxes(senders, -1, -2)), inner)
    one = ops.eye(ops.shape(product)[-1], dtype=product.dtype)
    energy = ops.sum(product * one, axis=(-2, -1), keepdims=True)
    energy = ops.where(energy <= _TINY, ops.ones_like(energy), energy)
    found = ops.matmul(_polynomial(product / energy, iterations), senders)
    return found * (ops.rsqrt(energy * size) * _wide(inputs, senders.shape[-1]))


def _polynomial(gram: Array, iterations: int) -> Array:
    """M, of which `x M` is what the iterations make of x, from `x^T x`: all its iterates commute."""
    a, b, c = _QUINTIC
    one = ops.eye(ops.shape(gram)[-1], dtype=gram.dtype)
    whole = None
    for left in reversed(range(iterations)):
        factor = a * one + b * gram + c * ops.matmul(gram, gram)
        whole = factor if whole is None else ops.matmul(whole, factor)
        if left:
            gram = ops.matmul(ops.matmul(factor, gram), factor)
    return one if whole is None else whole


def rows_are_cheaper(rows: Any, inputs: int, units: int, rule: Any) -> Any:
    """Whether the system of the rows costs less than that of the matrix.

    Args:
        rows: number of rows, an integer or a scalar array.
        inputs: size of X's rows, the bias counted.
        units: of the target.
        rule: the options.
    """
    if not rule.orthogonal_first:
        return rows < inputs
    if not isinstance(rows, int):
        rows = ops.cast(rows, "float32")  # its third power is no 32-bit integer
    small, large, count = min(inputs, units), max(inputs, units), rule.orthogonal_iterations
    if 2 * small <= large:
        matrix = 4 * large * small**2 + 8 * count * small**3
    else:
        matrix = count * (4 * large * small**2 + 2 * small**3)
    if rule.whitening:
        matrix += 2 * rows * inputs**2 + 2 * inputs**2 * units
    return (8 * count + 2) * rows * rows * rows + rows * rows * (2 * inputs + 6 * units) < matrix


def _wide(rows: int, columns: int) -> float:
    return max(1.0, (columns / rows) ** 0.5)


def _scaled(x: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """x over its largest entry, so that no square overflows, and that entry; zeros have a gradient of zero."""
    largest = ops.max(ops.abs(x), axis=axes, keepdims=True)
    zero = largest <= _TINY
    largest = ops.where(zero, ops.ones_like(largest), largest)
    return ops.where(zero, ops.zeros_like(x), x) / largest, largest


def _energy(x: Array, axes: tuple[int, ...]) -> Array:
    """The sum of squares, or 1 of zeros."""
    energy = ops.sum(ops.square(x), axis=axes, keepdims=True)
    return ops.where(energy <= _TINY, ops.ones_like(energy), energy)


def _broadcast(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    rank = max(len(one), len(other))
    pairs = zip((1,) * (rank - len(one)) + tuple(one), (1,) * (rank - len(other)) + tuple(other), strict=True)
    return tuple(max(pair) for pair in pairs)


def _spread(x: Array, lead: tuple[int, ...]) -> Array:
    if tuple(x.shape[:-2]) == lead:
        return x
    return ops.broadcast_to(x, (*lead, *ops.shape(x)[-2:]))
