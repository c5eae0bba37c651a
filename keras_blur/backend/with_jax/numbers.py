"""Products, systems of equations and random integers on JAX."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = Any


def matmul(a: Array, b: Array) -> Array:
    """The product of matrices in the precision of their type; that of `keras.ops` rounds float32 to
    bfloat16 on a TPU, and to 10 bits on a GPU."""
    return jnp.matmul(a, b, precision="highest")


@jax.custom_jvp
def mixed(states: Array, transform: Array) -> Array:
    """The states `[..., s, batch, units]` mixed by a transform `[..., source, target]`.

    The values are sums of states. With a matrix product of flattened states, XLA would compute what
    is before it in a loop over the flattened axis, which it cannot vectorise on a CPU. The
    derivative is a matrix product: that of a slice would be an array of zeros for each state.
    """
    count = states.shape[-3]
    terms = [states[..., s : s + 1, :, :] * transform[..., s, :, None, None] for s in range(count)]
    return sum(terms[1:], terms[0])


@mixed.defjvp
def _change_of_mixed(arrays: tuple[Array, Array], changes: tuple[Array, Array]) -> tuple[Array, Array]:
    (states, transform), (of_states, of_transform) = arrays, changes
    return mixed(states, transform), _mixed_flat(of_states, transform) + _mixed_flat(states, of_transform)


def _mixed_flat(states: Array, transform: Array) -> Array:
    *lead, rows, units = states.shape
    product = jnp.matmul(jnp.swapaxes(transform, -1, -2), jnp.reshape(states, (*lead, rows * units)))
    return jnp.reshape(product, (*product.shape[:-1], rows, units))


def tanh(x: Array) -> Array:
    """The hyperbolic tangent in the type of x; that of `keras.ops` rounds float64 to float32 on
    JAX."""
    return jnp.tanh(x)


def mean(x: Array, axis: Any = None, keepdims: bool = False) -> Array:
    """The mean in the type of x; that of `keras.ops` rounds float64 to float32 on JAX."""
    return jnp.mean(x, axis=axis if axis is None or isinstance(axis, int) else tuple(axis), keepdims=keepdims)


def solve_positive(matrix: Array, right: Array) -> Array:
    """`matrix^-1 right` for symmetric positive definite matrices; NaN for others, which do not
    affect the matrices beside them.

    On a CPU, matrices are solved one at a time. Programs that solved several batches of matrices
    side by side hung (JAX 0.10, two cores).
    """
    lead = jnp.broadcast_shapes(matrix.shape[:-2], right.shape[:-2])

    def in_turn(matrix: Array, right: Array) -> Array:
        flat = tuple(jnp.reshape(one, (-1, *one.shape[-2:])) for one in (matrix, right))
        return jnp.reshape(jax.lax.map(lambda pair: _solved(*pair), flat), right.shape)

    matrix, right = (jnp.broadcast_to(one, (*lead, *one.shape[-2:])) for one in (matrix, right))
    if math.prod(lead) == 1:
        return _solved(matrix, right)
    return jax.lax.platform_dependent(matrix, right, cpu=in_turn, default=_solved)


@jax.custom_jvp
def _solved(matrix: Array, right: Array) -> Array:
    return _solver(matrix)(right)


@_solved.defjvp
def _change_of_solved(arrays: tuple[Array, Array], changes: tuple[Array, Array]) -> tuple[Array, Array]:
    """That of the solution itself, one more solution with the same factor. Through the steps of the
    factorisation it would take several, and a gradient as many again."""
    (matrix, right), (of_matrix, of_right) = arrays, changes
    solve = _solver(matrix)
    solution = solve(right)
    return solution, solve(of_right - matmul(of_matrix, solution))


def _solver(matrix: Array) -> Callable[[Array], Array]:
    sound = jnp.all(jnp.isfinite(matrix), axis=(-2, -1), keepdims=True)
    factor = jnp.where(sound, jax.lax.linalg.cholesky(matrix, symmetrize_input=False), jnp.nan)
    return lambda right: jax.scipy.linalg.cho_solve((factor, True), right)


# Philox 4x32-10 ("Parallel random numbers: as easy as 1, 2, 3", Salmon et al., 2011), with the key
# and counter that TensorFlow's stateless generators make of a seed, so both backends draw the same
# integers.
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)


_WEYL = (0x9E3779B9, 0xBB67AE85)


_SCRAMBLE = (0x3EC8F720, 0x02461E29)


_ROUNDS = 10


_BLOCK = 4  # integers that Philox makes of one value of its counter


def _multiply(a: Array, b: int) -> tuple[Array, Array]:
    """Upper and lower 32 bits of a product, from 16-bit halves: JAX has no 64-bit integers by
    default."""
    mask = jnp.uint32(0xFFFF)
    low, high = a & mask, a >> 16
    b_low, b_high = jnp.uint32(b & 0xFFFF), jnp.uint32(b >> 16)
    middle = high * b_low + ((low * b_low) >> 16)
    cross = low * b_high + (middle & mask)
    return high * b_high + (middle >> 16) + (cross >> 16), a * jnp.uint32(b)


@jax.jit  # outside of a program, a loop would be traced at each call
def philox(counter: Sequence[Array], key: Sequence[Array]) -> tuple[Array, ...]:
    """Four random 32-bit integers for each value of a counter of four integers.

    Example:

    >>> [hex(int(x)) for x in philox([jnp.uint32(0)] * 4, [jnp.uint32(0)] * 2)]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """

    def one(_: Any, state: Any) -> Any:
        (a, b, c, d), (first, second) = state
        high, low = _multiply(a, _MULTIPLIERS[0])
        high_2, low_2 = _multiply(c, _MULTIPLIERS[1])
        mixed = (high_2 ^ b ^ first, low_2, high ^ d ^ second, low)
        return mixed, (first + jnp.uint32(_WEYL[0]), second + jnp.uint32(_WEYL[1]))

    # A loop, as XLA computes the rounds of a straight program again and again where it fuses them.
    return jax.lax.fori_loop(0, _ROUNDS, one, (tuple(counter), tuple(key)))[0]


def _words(value: Array) -> tuple[Array, Array]:
    """A signed 32-bit integer as the lower and upper word of a 64-bit one."""
    value = jnp.asarray(value).astype(jnp.int32)
    return value.astype(jnp.uint32), (value >> 31).astype(jnp.uint32)


def _blocks(seed: Array, numbers: Array) -> Array:
    """The blocks of these numbers of a seed's integers: `[*numbers.shape, 4]`."""
    low, high = _words(seed[0])
    low_2, high_2 = _words(seed[1])
    mixed = philox((low, high, low_2, high_2), tuple(jnp.uint32(word) for word in _SCRAMBLE))
    zeros = jnp.zeros_like(numbers)
    return jnp.stack(philox((numbers, zeros, mixed[2] + zeros, mixed[3] + zeros), (mixed[0], mixed[1])), axis=-1)


def bits(seed: Array, shape: tuple[int, ...], dtype: str = "uint32") -> Array:
    """Uniform 32-bit integers of the Philox generator.

    Args:
        seed: two integers.
        shape: shape of the array.
        dtype: `"uint32"`, or `"int32"` for the same bits.
    """
    size = int(np.prod(shape, dtype=np.int64))
    drawn = _blocks(seed, jnp.arange(-(-size // _BLOCK), dtype=jnp.uint32))
    return drawn.reshape(-1)[:size].reshape(shape).astype(dtype)


def bits_of_rows(seed: Array, rows: Array, size: int) -> Array:
    """Rows `[rows, size]` of `bits(seed, [n, size])`.

    Args:
        seed: two integers.
        rows: indices `[rows]`.
        size: size of a row.
    """
    begin = jnp.asarray(rows).astype(jnp.uint32)[:, None] * jnp.uint32(size)
    numbers = begin // _BLOCK + jnp.arange(-(-size // _BLOCK) + 1, dtype=jnp.uint32)
    drawn = _blocks(seed, numbers).reshape(begin.shape[0], -1)
    return jnp.take_along_axis(drawn, begin % _BLOCK + jnp.arange(size, dtype=jnp.uint32), axis=1)


def upper_product(a: Array, b: int) -> Array:
    """The upper 32 of the 64 bits of products.

    Args:
        a: uint32 numbers.
        b: a number from 0 to `2**32 - 1`.
    """
    return _multiply(a, b)[0]
