"""The dense connection: a matrix product, its transpose, and `x^T y`.

Source: "Meta-Learning Bidirectional Update Rules" (2021), equations 5 to 7.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from keras import ops

from keras_blur.core.connection import Connection
from keras_blur.core.derivatives import matmul
from keras_blur.core.maps import Shape
from keras_blur.core.patches import thinned

if TYPE_CHECKING:
    from jaxtyping import Float, Shaped

Array = Any

_NARROW = 8  # a layer has this many times fewer units than inputs


@dataclasses.dataclass(frozen=True)
class DenseConnection(Connection):
    """The operations of a dense layer: kernels `[..., c, in, units]`.

    Args:
        positions: shape of the axes before the features. All positions share the synapses and count
            as rows of the batch.
    """

    positions: Shape = ()

    @property
    def axes(self) -> int:
        return 1 + len(self.positions)

    def kernel_shape(self, source: Shape) -> Shape:
        return (source[-1], self.units)

    def target(self, source: Shape) -> Shape:
        return (*self.positions, self.units)

    def rows(self, states: Array) -> Shaped[Array, "*population s rows units"]:
        if not self.positions:
            return states
        shape = ops.shape(states)
        return ops.reshape(states, (*shape[: len(shape) - self.axes - 1], -1, shape[-1]))

    def features(self, rows: Shaped[Array, "*population s rows units"], source: Shape) -> Array:
        return self._placed(rows, self.units)

    def _placed(self, rows: Array, units: int) -> Array:
        if not self.positions:
            return rows
        return ops.reshape(rows, (*ops.shape(rows)[:-2], -1, *self.positions, units))

    def product(self, kernel: Array, x: Array) -> Array:
        return self._placed(_product(self.rows(x), kernel), self.units)

    def linear_transpose(self, kernel: Array, y: Array, source: Shape) -> Array:
        kernel, y = self.rounded(kernel), self.rounded(self.rows(y))
        return self._placed(_product(y, ops.swapaxes(kernel, -1, -2)), source[-1])

    def outer(self, pre: Array, post: Array, source: Shape) -> Array:
        left, right = self.rounded(self.rows(pre)), self.rounded(self.rows(post))
        if _NARROW * self.units <= left.shape[-1]:  # XLA copies what it transposes: better the small one
            return ops.swapaxes(matmul(ops.swapaxes(right, -1, -2), left), -1, -2)
        return matmul(ops.swapaxes(left, -1, -2), right)

    @property
    def few_rows(self) -> bool:
        return True

    def rows_read(self, states: Array) -> Float[Array, "*population s rows in"]:
        return self.rows(states)

    def patches(self, states: Array, source: Shape, most: int) -> Float[Array, "*population s blocks rows in"]:
        return ops.expand_dims(thinned(self.rows(states), math.prod(self.positions), most), -3)

    def _read(self, states: Array, source: Shape) -> Array:
        return ops.swapaxes(ops.sum(self.rows(states), axis=-2, keepdims=True), -1, -2)


def _product(x: Array, kernel: Array) -> Array:
    if kernel.shape[-3] == 1 and x.shape[-3] != 1:
        # All states share one channel, so they are stacked into a taller batch for one matrix
        # product.
        shape = ops.shape(x)
        tall = ops.reshape(x, (*shape[:-3], 1, shape[-3] * shape[-2], shape[-1]))
        product = matmul(tall, kernel)
        return ops.reshape(product, (*ops.shape(product)[:-3], shape[-3], shape[-2], kernel.shape[-1]))
    return matmul(x, kernel)
