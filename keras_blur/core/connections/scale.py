"""The elementwise connection: the scale and offset of each unit of a normalisation layer.

Source: eq. 5 to 7 of "Meta-Learning Bidirectional Update Rules" (2021), for a unit with one input.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from keras import ops

from keras_blur.core.connection import Connection
from keras_blur.core.maps import Shape
from keras_blur.core.patches import thinned
from keras_blur.core.rule import Rule

if TYPE_CHECKING:
    from jaxtyping import Float, Shaped

Array = Any


@dataclasses.dataclass(frozen=True)
class ScaleConnection(Connection):
    """The operations of a scale and an offset.

    Args:
        shape: shape of the features.
        own: the feature axes along which each unit has its own synapses. The others are positions.
        scales: whether there is a scale. `use_bias` tells whether there is an offset.
    """

    shape: Shape = ()
    own: Shape = ()
    scales: bool = True

    @property
    def axes(self) -> int:
        return len(self.shape)

    @property
    def _shared(self) -> Shape:
        return tuple(axis for axis in range(len(self.shape)) if axis not in self.own)

    def kernel_shape(self, source: Shape) -> Shape:
        return tuple(self.shape[axis] for axis in self.own)

    def target(self, source: Shape) -> Shape:
        return self.shape

    def shapes(self, rule: Rule, source: int | Shape, *, feeds_back: bool) -> dict[str, tuple[int, ...]]:
        shapes = super().shapes(rule, source, feeds_back=feeds_back)
        return shapes if self.scales else {name: shape for name, shape in shapes.items() if "kernel" not in name}

    def _ordered(self, states: Array) -> Array:
        """States with position axes before unit axes."""
        ahead = len(states.shape) - self.axes
        order = [*self._shared, *self.own]
        if order == sorted(order):
            return states
        return ops.transpose(states, [*range(ahead), *(ahead + axis for axis in order)])

    def rows(self, states: Array) -> Shaped[Array, "*population s rows units"]:
        states = self._ordered(states)
        shape = ops.shape(states)
        return ops.reshape(states, (*shape[: len(shape) - self.axes - 1], -1, self.units))

    def features(self, rows: Shaped[Array, "*population s rows units"], source: Shape) -> Array:
        order = [*self._shared, *self.own]
        states = ops.reshape(rows, (*ops.shape(rows)[:-2], -1, *(self.shape[axis] for axis in order)))
        if order == sorted(order):
            return states
        ahead = len(states.shape) - self.axes
        return ops.transpose(states, [*range(ahead), *(ahead + order.index(axis) for axis in range(self.axes))])

    def matrix(self, kernel: Array) -> Float[Array, "*population c in units"]:
        shape = ops.shape(kernel)
        return ops.reshape(kernel, (*shape[: len(shape) - len(self.own)], 1, self.units))

    def kernel(self, matrix: Float[Array, "*population c in units"], like: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return ops.reshape(matrix, ops.shape(like))

    def over_readers(self, matrix: Float[Array, "*population c in units"]) -> Float[Array, "*population c in #units"]:
        return matrix

    def patches(self, states: Array, source: Shape, most: int) -> Float[Array, "*population s blocks rows in"]:
        rows = thinned(self.rows(states), self.positions_of(source), most)
        return ops.expand_dims(ops.swapaxes(rows, -1, -2), -1)

    def split(self, matrix: Float[Array, "*leading in units"]) -> Float[Array, "*leading blocks in_block units_block"]:
        return ops.expand_dims(ops.swapaxes(matrix, -1, -2), -1)

    def joined(self, blocks: Float[Array, "*leading blocks in_block units_block"]) -> Float[Array, "*leading in units"]:
        return ops.swapaxes(ops.squeeze(blocks, -1), -1, -2)

    def product(self, kernel: Array, x: Array) -> Array:
        shape = ops.shape(kernel)
        lead = shape[: len(shape) - len(self.own)]
        spread = [size if axis in self.own else 1 for axis, size in enumerate(self.shape)]
        return x * ops.reshape(kernel, (*lead, 1, *spread))

    def linear_transpose(self, kernel: Array, y: Array, source: Shape) -> Array:
        return self.product(self.rounded(kernel), self.rounded(y))

    def outer(self, pre: Array, post: Array, source: Shape) -> Array:
        summed = ops.sum(self.rows(self.rounded(pre) * self.rounded(post)), axis=-2)
        return ops.reshape(summed, (*ops.shape(summed)[:-1], *self.kernel_shape(source)))


def scale_connection(shape: Shape, own: Shape, *, scales: bool, offsets: bool) -> ScaleConnection:
    """Makes the connection of a scale, an offset, or both.

    Args:
        shape: shape of the features.
        own: the feature axes along which each unit has its own synapses.
        scales: whether there is a scale.
        offsets: whether there is an offset.
    """
    units = math.prod(shape[axis] for axis in own)
    return ScaleConnection(units, offsets, "linear", None, shape=tuple(shape), own=tuple(sorted(own)), scales=scales)
