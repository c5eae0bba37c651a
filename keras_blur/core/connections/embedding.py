"""The embedding: a dense connection on one-hot inputs that are never materialised.

Source: eq. 5 to 7 of "Meta-Learning Bidirectional Update Rules" (2021), for one-hot inputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from keras import ops

from keras_blur.core import equations
from keras_blur.core.connection import Connection
from keras_blur.core.derivatives import matmul, stored, transpose
from keras_blur.core.genome import Genome
from keras_blur.core.maps import Shape
from keras_blur.core.settling import TermContext
from keras_blur.core.states import between

if TYPE_CHECKING:
    from jaxtyping import Shaped

Array = Any


@dataclasses.dataclass(frozen=True)
class EmbeddingConnection(Connection):
    """The operations of an embedding; `units` is the size of a vector.

    Args:
        entries: number of vectors.
        positions: shape of the integers of one example.
    """

    entries: int = 0
    positions: Shape = ()

    @property
    def reads_integers(self) -> bool:
        return True

    @property
    def axes(self) -> int:
        return len(self.positions)

    @property
    def target_axes(self) -> int:
        return len(self.positions) + 1

    def kernel_shape(self, source: Shape) -> Shape:
        return (self.entries, self.units)

    def target(self, source: Shape) -> Shape:
        return (*source, self.units)

    def rows(self, states: Array) -> Shaped[Array, "*population s rows units"]:
        shape = ops.shape(states)
        return ops.reshape(states, (*shape[: len(shape) - self.target_axes - 1], -1, self.units))

    def features(self, rows: Shaped[Array, "*population s rows units"], source: Shape) -> Array:
        return ops.reshape(rows, (*ops.shape(rows)[:-2], -1, *source, self.units))

    def gram(self, context: TermContext, read: Array, ones: Array | None) -> Array:
        """The count of each entry, `[..., s, 1, entries, 1]`. It is the diagonal of the Gram
        matrix, which has no other elements for one-hot rows."""
        shape = (*ops.shape(read), 1)
        weight = ops.ones(shape, dtype=context.dtype)
        if context.weight is not None:
            weight = weight * ops.reshape(ops.abs(context.weight), _behind(context.weight, self.axes + 1))
        counts = dataclasses.replace(self, units=1).outer(read, weight, context.source)
        return ops.expand_dims(counts, -3)

    def whitened(
        self, genome: Genome, sums: Mapping[str, Array], gram: Array, names: Mapping[str, str], examples: Array
    ) -> dict[str, Array]:
        """Eq. W1 for a diagonal Gram matrix."""
        total = ops.sum(gram, axis=-2, keepdims=True)
        share = gram * (examples / ops.where(total <= 0, ops.ones_like(total), total))
        damping = ops.exp(equations.per_state(genome.log_damping, gram, 4))
        return self.as_whole(sums, names, lambda term: term / (share + damping))

    def product(self, kernel: Array, x: Array) -> Array:
        numbers = ops.cast(x, "int32")
        if len(kernel.shape) == 3 and kernel.shape[0] == 1:
            return ops.take(kernel[0], numbers, axis=0)
        if len(kernel.shape) == 3:
            parts = []
            for channel in range(kernel.shape[0]):
                one = between(numbers, channel, channel + 1, self.axes) if numbers.shape[-2 - self.axes] > 1 else numbers
                parts.append(ops.take(kernel[channel], one, axis=0))
            return ops.concatenate(parts, axis=-2 - self.target_axes)
        hot = ops.one_hot(numbers, self.entries, dtype=kernel.dtype)  # a population of tables
        shape = ops.shape(hot)
        flat = ops.reshape(hot, (*shape[: len(shape) - self.axes - 2], -1, self.entries))
        return self.features(matmul(flat, kernel), tuple(x.shape[len(x.shape) - self.axes :]))

    def linear(self, kernel: Array, x: Array) -> Array:
        return self.product(self.rounded(kernel), x)

    def outer(self, pre: Array, post: Array, source: Shape) -> Array:
        post = self.rounded(post)
        leading = post.shape[: len(post.shape) - self.target_axes - 1]
        shape = (*leading, self.entries, self.units)
        return stored(lambda post: transpose(lambda kernel: self.product(kernel, pre), shape, post), post)


def _behind(weight: Array, axes: int) -> tuple[int, ...]:
    """The shape of weights `[..., batch]` with a state axis before the batch and `axes` axes of
    size 1 after it."""
    shape = ops.shape(weight)
    return (*shape[:-1], 1, shape[-1], *(1,) * axes)
