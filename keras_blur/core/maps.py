"""One bilinear map of states between two layers of neurons, as pure functions of arrays.

A kind of layer supplies `product`, of a kernel and an array of states, and says how it looks as a
matrix product. The transpose and the outer product follow by automatic differentiation, unless a
kind has faster ones. The rule sees *rows*: states `[..., k, rows, units]` and kernels
`[..., c, in, units]`. A convolution is a dense connection on patches. Its positions join the batch
as rows.
"""

from __future__ import annotations

import abc
import math
from typing import TYPE_CHECKING, Any

import keras
from keras import ops

from keras_blur.core import equations
from keras_blur.core.derivatives import matmul, stored, transpose
from keras_blur.core.states import Parts, between, joined, mapped

if TYPE_CHECKING:
    from jaxtyping import Float, Shaped

Array = Any
Shape = tuple[int, ...]

_LEAST = 1e-30  # stands for zero in a divisor


class Map(abc.ABC):
    """A map that is linear in its kernel and in the states that enter.

    Attributes:
        units: number of units of a row, the targets of the synapses.
        compute_dtype: type of the factors of the map and of the outer product. Their sums stay
            float32. `None` uses the type of the states.
    """

    units: int
    compute_dtype: str | None

    # What a kind of connection defines.

    @property
    def reads_integers(self) -> bool:
        """Whether the inputs are indices of entries instead of features."""
        return False

    def gathers(self, members: int) -> bool:
        """Whether the map of this many members is a matrix product with what `patches` gathers."""
        return False

    @property
    def axes(self) -> int:
        """Number of feature axes that enter."""
        return 1

    @property
    def target_axes(self) -> int:
        """Number of feature axes that leave."""
        return self.axes

    @abc.abstractmethod
    def kernel_shape(self, source: Shape) -> Shape:
        """Shape of the kernel for features of shape `source`: that of the Keras layer."""

    @abc.abstractmethod
    def target(self, source: Shape) -> Shape:
        """Shape of the features that leave, for those that enter."""

    @abc.abstractmethod
    def product(self, kernel: Array, x: Array) -> Array:
        """The map: `[..., s, batch, *source]` to `[..., s, batch, *target]`.

        The kernel `[..., c, *kernel_shape]` has one channel for each state, or one for all; x may
        have one state for all channels.
        """

    def rows(self, states: Array) -> Shaped[Array, "*population s rows units"]:
        """States `[..., s, batch, *target]` as `[..., s, rows, units]`: positions join the
        batch."""
        return states

    def features(self, rows: Shaped[Array, "*population s rows units"], source: Shape) -> Array:
        """The inverse of `rows`."""
        return rows

    def matrix(self, kernel: Array) -> Float[Array, "*population c in units"]:
        """A kernel `[..., c, *kernel_shape]` as `[..., c, in, units]`: a column is what one unit
        reads."""
        return kernel

    def kernel(self, matrix: Float[Array, "*population c in units"], like: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """The inverse of `matrix`: a kernel of the shape of `like`."""
        return matrix

    def over_readers(self, matrix: Float[Array, "*population c in units"]) -> Float[Array, "*population c in #units"]:
        """A matrix `[..., c, in, units]`, each entry added up over the units that read the same
        input.

        The last axis of the result has size 1, or the number of units. Every unit of a row reads
        every input, unless the kind of connection says otherwise, as one with groups does.
        """
        return ops.sum(matrix, axis=-1, keepdims=True)

    @property
    def few_rows(self) -> bool:
        """Whether the rows of a batch may be fewer than the inputs of a unit."""
        return False

    def rows_read(self, states: Array) -> Float[Array, "*population s rows in"]:
        """States that enter `[..., s, batch, *source]` as `[..., s, rows, in]`, if `few_rows`."""
        return states

    def patches(self, states: Array, source: Shape, most: int) -> Float[Array, "*population s blocks rows in"]:
        """What the units of each block read, `[..., s, blocks, rows, in]`.

        Args:
            states: states that enter, `[..., s, batch, *source]`.
            source: shape of the features that enter.
            most: the maximum number of positions of an example, evenly spaced; 0 for all.
        """
        return ops.expand_dims(states, -3)

    def kept(self, source: Shape, most: int) -> int:
        """Number of positions of an example that `patches` gives."""
        positions = self.positions_of(source)
        return min(positions, most) if most else positions

    def split(self, matrix: Float[Array, "*leading in units"]) -> Float[Array, "*leading blocks in_block units_block"]:
        """A matrix or bias `[..., in, units]` as those of the blocks,
        `[..., blocks, in_block, units_block]`."""
        return ops.expand_dims(matrix, -3)

    def joined(self, blocks: Float[Array, "*leading blocks in_block units_block"]) -> Float[Array, "*leading in units"]:
        """The inverse of `split`."""
        return ops.squeeze(blocks, -3)

    # What follows from that.

    def rows_of(self, states: Array | Parts) -> Shaped[Array | Parts, "*population s rows units"]:
        """The rows of states that may be in parts."""
        return mapped(self.rows, states, 1)

    def source(self, pre: Array | Parts) -> Shape:
        """Shape of the features of states that enter."""
        return tuple(pre.shape[len(pre.shape) - self.axes :])

    def mixed(self, states: Array | Parts, transform: Float[Array, "... source target"]) -> Array:
        """States that enter, mixed by a transform `[..., source, target]`."""
        if self.axes == 1:
            return equations.mix(states, transform)
        states = joined(states)  # positions join the batch, so each unit keeps a column of its own
        shape = ops.shape(states)
        rows = ops.reshape(states, (*shape[: len(shape) - self.axes - 1], -1, shape[-1]))
        mixed = equations.mix(rows, transform)
        return ops.reshape(mixed, (*ops.shape(mixed)[:-2], -1, *self.source(states)))

    def linear(self, kernel: Array, x: Array) -> Array:
        """The map, with factors of the compute type."""
        return self.product(self.rounded(kernel), self.rounded(x))

    def linear_transpose(self, kernel: Array, y: Array, source: Shape) -> Array:
        """The transpose of the map: `[..., s, batch, *target]` to `[..., s, batch, *source]`."""
        members = math.prod(kernel.shape[: -1 - len(self.kernel_shape(source))])
        if self.is_population(kernel, source) and self.gathers(members):
            kernel, y = self.rounded(kernel), self.rounded(y)
            sent = matmul(self.split(self.rows(y)), ops.swapaxes(self.split(self.matrix(kernel)), -1, -2))
            shape = (*ops.shape(y)[: len(y.shape) - len(self.target(source))], *source)
            return transpose(lambda x: self.patches(x, source, 0), shape, sent)
        channels = kernel.shape[0] if len(kernel.shape) == 1 + len(self.kernel_shape(source)) else 1
        if channels > 1:  # one by one and side by side: the transpose of a slice would be an array of zeros for each
            axes = len(self.target(source))
            every = [(kernel[c : c + 1], between(y, c, c + 1, axes)) for c in range(channels)]
            parts = [self.linear_transpose(one, states, source) for one, states in every]
            return ops.concatenate(parts, axis=-2 - len(source))
        kernel, y = self.rounded(kernel), self.rounded(y)
        shape = ops.shape(y)
        shape = (*shape[: len(shape) - len(self.target(source))], *source)
        return stored(lambda kernel, y: transpose(lambda x: self.product(kernel, x), shape, y), kernel, y)

    def outer(self, pre: Array, post: Array, source: Shape) -> Array:
        """The outer product, summed over the batch: of `[..., s, batch, *source]` and
        `[..., c, batch, *target]`."""
        pre, post = self.rounded(pre), self.rounded(post)
        leading = post.shape[: len(post.shape) - len(self.target(source)) - 1]
        shape = (*leading, *self.kernel_shape(source))
        if len(leading) > 1 and self.gathers(math.prod(leading[:-1])):
            blocks = matmul(
                ops.swapaxes(stored(lambda x: self.patches(x, source, 0), pre), -1, -2), self.split(self.rows(post))
            )
            return self.kernel(self.joined(blocks), ops.zeros(shape, dtype=blocks.dtype))
        return stored(lambda pre, post: transpose(lambda kernel: self.product(kernel, pre), shape, post), pre, post)

    def is_population(self, kernel: Array, source: Shape) -> bool:
        """Whether kernels `[..., c, *kernel_shape]` have leading axes."""
        return len(kernel.shape) > 1 + len(self.kernel_shape(source))

    def product_of_members(self, kernel: Array, x: Array) -> Array:
        """The map of a population of kernels: one matrix product with what `patches` gathers.

        The map, its transpose and its outer product are written by hand. An outer gradient needs
        second derivatives, and TensorFlow has none under XLA for a product that broadcasts.
        """
        source = tuple(x.shape[len(x.shape) - self.axes :])
        blocks = matmul(stored(lambda x: self.patches(x, source, 0), x), self.split(self.matrix(kernel)))
        return self.features(self.joined(blocks), source)

    def positions_of(self, source: Shape) -> int:
        """Number of rows of an example."""
        return math.prod(self.target(source)) // self.units

    def of_rows(self, weight: Shaped[Array, "*population batch"], source: Shape) -> Shaped[Array, "*population 1 rows 1"]:
        """Weights of examples, `[..., batch]`, repeated for rows, `[..., 1, rows, 1]`."""
        positions = self.positions_of(source)
        return (weight if positions == 1 else ops.repeat(weight, positions, axis=-1))[..., None, :, None]

    def rounded(self, factor: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """A factor rounded to the compute type. Its sums are still computed in the type of the
        states."""
        if self.compute_dtype is None or self.compute_dtype == keras.backend.standardize_dtype(factor.dtype):
            return factor
        if self.compute_dtype != "float16":
            return ops.cast(ops.cast(factor, self.compute_dtype), factor.dtype)
        # float16 covers only 6e-8 to 65504: the factor is first scaled to a largest entry near 1,
        # by a power of 2.
        largest = ops.max(ops.abs(factor), axis=(-2, -1), keepdims=True)
        scale = ops.stop_gradient(ops.exp2(ops.floor(ops.log2(ops.maximum(largest, _LEAST)))))
        return ops.cast(ops.cast(factor / scale, self.compute_dtype), factor.dtype) * scale
