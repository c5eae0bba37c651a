"""The connection of an `EinsumDense`: a dense connection with several axes of inputs and units.

Source: eq. 5 to 7 of "Meta-Learning Bidirectional Update Rules" (2021). If a letter occurs in
input, kernel and output, each index along that axis has its own synapses.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import string
from typing import TYPE_CHECKING, Any

from keras import ops

from keras_blur.core.connection import Connection
from keras_blur.core.derivatives import einsum
from keras_blur.core.maps import Shape
from keras_blur.core.patches import thinned
from keras_blur.core.states import between

if TYPE_CHECKING:
    from jaxtyping import Float, Shaped

Array = Any


@dataclasses.dataclass(frozen=True)
class EinsumConnection(Connection):
    """The operations of an EinsumDense.

    Args:
        inputs: letters of the input, the batch first.
        weights: letters of the kernel.
        outputs: letters of the output, the batch first.
        sizes: size of each letter except the batch: first those of the input in order, then those
            that only the output has.
    """

    inputs: str = ""
    weights: str = ""
    outputs: str = ""
    sizes: Shape = ()

    @property
    def _size(self) -> dict[str, int]:
        letters = [*self.inputs[1:], *(letter for letter in self.outputs if letter not in self.inputs)]
        return dict(zip(letters, self.sizes, strict=True))

    def gathers(self, members: int) -> bool:
        return True

    @property
    def axes(self) -> int:
        return len(self.inputs) - 1

    @property
    def target_axes(self) -> int:
        return len(self.outputs) - 1

    @property
    def own(self) -> str:
        """Letters of the units."""
        return "".join(letter for letter in self.outputs[1:] if letter in self.weights)

    @property
    def bias_shape(self) -> Shape:
        """Shape of Keras's bias: the axes of the output from the first one of the units."""
        first = min(self.outputs.index(letter) for letter in self.own) if self.own else len(self.outputs)
        return tuple(self._size[letter] if letter in self.own else 1 for letter in self.outputs[first:])

    @property
    def unit_axes(self) -> tuple[list[int], list[int]]:
        """The axes of the kernel that it sums over, and those of the output."""
        places: tuple[list[int], list[int]] = ([], [])
        for place, letter in enumerate(self.weights):
            places[letter in self.outputs].append(place)
        return places

    @property
    def _order(self) -> str:
        """Letters of the output without the batch: positions, then units."""
        return "".join(letter for letter in self.outputs[1:] if letter not in self.weights) + self.own

    @property
    def _matrix_order(self) -> str:
        """Letters of the kernel: those summed over, then units."""
        return "".join(letter for letter in self.weights if letter not in self.outputs) + self.own

    def kernel_shape(self, source: Shape) -> Shape:
        return tuple(self._size[letter] for letter in self.weights)

    def target(self, source: Shape) -> Shape:
        return tuple(self._size[letter] for letter in self.outputs[1:])

    def _permuted(self, array: Array, known: str, order: str) -> Array:
        if known == order:
            return array
        ahead = len(array.shape) - len(known)
        return ops.transpose(array, [*range(ahead), *(ahead + known.index(letter) for letter in order)])

    def rows(self, states: Array) -> Shaped[Array, "*population s rows units"]:
        states = self._permuted(states, self.outputs[1:], self._order)
        shape = ops.shape(states)
        return ops.reshape(states, (*shape[: len(shape) - self.target_axes - 1], -1, self.units))

    def features(self, rows: Shaped[Array, "*population s rows units"], source: Shape) -> Array:
        states = ops.reshape(rows, (*ops.shape(rows)[:-2], -1, *(self._size[letter] for letter in self._order)))
        return self._permuted(states, self._order, self.outputs[1:])

    def matrix(self, kernel: Array) -> Float[Array, "*population c in units"]:
        kernel = self._permuted(kernel, self.weights, self._matrix_order)
        shape = ops.shape(kernel)
        return ops.reshape(kernel, (*shape[: len(shape) - len(self.weights)], -1, self.units))

    def kernel(self, matrix: Float[Array, "*population c in units"], like: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        lead = ops.shape(like)[: len(like.shape) - len(self.weights)]
        kernel = ops.reshape(matrix, (*lead, *(self._size[letter] for letter in self._matrix_order)))
        return self._permuted(kernel, self._matrix_order, self.weights)

    def over_readers(self, matrix: Float[Array, "*population c in units"]) -> Float[Array, "*population c in #units"]:
        order, shape = self._matrix_order, ops.shape(matrix)
        whole = ops.reshape(matrix, (*shape[:-2], *(self._size[letter] for letter in order)))
        summed = [place - len(order) for place, letter in enumerate(order) if letter not in self.inputs]
        added = ops.sum(whole, axis=summed, keepdims=True)
        return ops.reshape(ops.broadcast_to(added, ops.shape(whole)), shape)

    @property
    def _blocks(self) -> str:
        """Letters of the axes along which each index has its own synapses."""
        return "".join(letter for letter in self.own if letter in self.inputs)

    def _count(self, letters: str) -> int:
        return math.prod(self._size[letter] for letter in letters)

    def patches(self, states: Array, source: Shape, most: int) -> Float[Array, "*population s blocks rows in"]:
        read = "".join(letter for letter in self.weights if letter not in self.outputs)
        shared = "".join(letter for letter in self.inputs[1:] if letter in self.outputs and letter not in self.weights)
        summed = [
            place - self.axes for place, letter in enumerate(self.inputs[1:]) if letter not in self.weights + self.outputs
        ]
        known = "".join(letter for letter in self.inputs[1:] if letter in self.weights + self.outputs)
        states = ops.sum(states, axis=summed) if summed else states
        states = self._permuted(states, known, self._blocks + shared + read)
        shape = ops.shape(states)
        lead = shape[: len(shape) - len(known) - 1]
        blocks, positions, inputs = self._count(self._blocks), self._count(shared), self._count(read)
        apart = ops.moveaxis(ops.reshape(states, (*lead, -1, blocks, positions, inputs)), -3, -4)
        return thinned(ops.reshape(apart, (*lead, blocks, -1, inputs)), positions, most)

    def split(self, matrix: Float[Array, "*leading in units"]) -> Float[Array, "*leading blocks in_block units_block"]:
        lead, rows = ops.shape(matrix)[:-2], matrix.shape[-2]
        apart = ops.reshape(matrix, (*lead, rows, *(self._size[letter] for letter in self.own)))
        rest = "".join(letter for letter in self.own if letter not in self._blocks)
        apart = self._permuted(apart, self.own, self._blocks + rest)
        apart = ops.reshape(apart, (*lead, rows, self._count(self._blocks), self._count(rest)))
        return ops.moveaxis(apart, -2, -3)

    def joined(self, blocks: Float[Array, "*leading blocks in_block units_block"]) -> Float[Array, "*leading in units"]:
        together = ops.moveaxis(blocks, -3, -2)
        lead, rows = ops.shape(together)[:-3], together.shape[-3]
        rest = "".join(letter for letter in self.own if letter not in self._blocks)
        apart = ops.reshape(together, (*lead, rows, *(self._size[letter] for letter in self._blocks + rest)))
        return ops.reshape(self._permuted(apart, self._blocks + rest, self.own), (*lead, rows, self.units))

    def product(self, kernel: Array, x: Array) -> Array:
        rank = len(self.weights) + 1
        if len(kernel.shape) > rank:
            return self.product_of_members(kernel, x)
        channels = kernel.shape[0]
        if channels == 1:
            return self._folded(kernel[0], x)
        many = x.shape[-2 - self.axes] > 1
        entering = [between(x, channel, channel + 1, self.axes) if many else x for channel in range(channels)]
        parts = [self._folded(kernel[channel], one) for channel, one in enumerate(entering)]
        return ops.concatenate(parts, axis=-2 - self.target_axes)

    def _folded(self, kernel: Array, x: Array) -> Array:
        shape = ops.shape(x)
        flat = ops.reshape(x, (-1, *shape[len(shape) - self.axes :]))
        y = einsum(f"{self.inputs},{self.weights}->{self.outputs}", flat, kernel)
        return ops.reshape(y, (*shape[: len(shape) - self.axes], *ops.shape(y)[1:]))

    def linear_transpose(self, kernel: Array, y: Array, source: Shape) -> Array:
        added = set(self.inputs) - set(self.weights + self.outputs)  # letters of the input that the product sums out
        if added or len(kernel.shape) > len(self.weights) + 1 or kernel.shape[0] > 1:
            return super().linear_transpose(kernel, y, source)
        kernel, y = self.rounded(kernel), self.rounded(y)
        shape = ops.shape(y)
        lead = shape[: len(shape) - self.target_axes]
        flat = ops.reshape(y, (-1, *shape[len(lead) :]))
        x = einsum(f"{self.outputs},{self.weights}->{self.inputs}", flat, kernel[0])
        return ops.reshape(x, (*lead, *source))

    def outer(self, pre: Array, post: Array, source: Shape) -> Array:
        single = len(post.shape) == self.target_axes + 2 and pre.shape[-2 - self.axes] == post.shape[0] == 1
        if not single:
            return super().outer(pre, post, source)
        x, y = self.rounded(pre)[0], self.rounded(post)[0]
        return ops.expand_dims(einsum(f"{self.inputs},{self.outputs}->{self.weights}", x, y), 0)


def einsum_connection(
    equation: str, source: Shape, output_shape: tuple[int | None, ...], bias_axes: str | None, activation: Any
) -> EinsumConnection:
    """The connection of a Keras EinsumDense.

    Args:
        equation: as in Keras. An ellipsis stands for axes that input and output share.
        source: shape of the input features.
        output_shape: as in Keras, without the batch; `None` for an axis of the input.
        bias_axes: letters of the output axes along which the bias varies, as in Keras; `None` for
            no bias.
        activation: nonlinearity.

    Raises:
        ValueError: if the equation has another form, or a letter of the kernel alone; if input and
            output do not begin with the same letter, which the kernel must not
            have; if the letters do not fit `source` or `output_shape`; or if `bias_axes` are not
            the letters of the units.
    """
    parts = re.fullmatch(r"([a-zA-Z.]+),([a-zA-Z]+)->([a-zA-Z.]+)", equation.replace(" ", ""))
    if parts is None:
        raise ValueError(f"`equation` must have the form 'input,kernel->output'. Received: equation={equation!r}")
    inputs, weights, outputs = parts.groups()
    alone = set(weights) - set(inputs + outputs)
    if alone:
        raise ValueError(
            f"`equation` must have each letter of the kernel in its input or output, but {min(alone)!r} is in neither. "
            f"Received: equation={equation!r}"
        )
    letters = ""
    if "..." in inputs:
        unused = (letter for letter in string.ascii_letters if letter not in equation)
        letters = "".join(itertools.islice(unused, len(source) + 1 - len(inputs.replace("...", ""))))
        inputs, outputs = inputs.replace("...", letters), outputs.replace("...", letters)
    if not inputs or inputs[0] != outputs[0] or inputs[0] in weights:
        raise ValueError(
            f"`equation` must begin input and output with the letter of the batch. Received: equation={equation!r}"
        )
    if len(inputs) != len(source) + 1:
        raise ValueError(
            f"`equation` must have a letter for each axis of the input, of shape (batch, {str(source)[1:-1]}). "
            f"Received: equation={equation!r}"
        )
    known: dict[str, Any] = dict(zip(inputs[1:], source, strict=True))
    told = [
        letter for letter in outputs[1:] if letter not in letters
    ]  # Keras's `output_shape` omits the axes of the ellipsis
    if len(told) != len(output_shape):
        raise ValueError(
            f"`output_shape` must have a size, or None, for each of the {len(told)} axes that `equation` names after the "
            f"batch. Received: output_shape={output_shape} with equation={equation!r}"
        )
    for letter, size in zip(told, output_shape, strict=True):
        if size is None and letter not in known:
            raise ValueError(
                f"`output_shape` must have a size for the axis {letter!r}, which the input does not have. "
                f"Received: output_shape={output_shape} with equation={equation!r}"
            )
        if known.setdefault(letter, size) not in (size, None) and size is not None:
            raise ValueError(
                f"`output_shape` must have size {known[letter]} for the axis {letter!r}, as the input does. "
                f"Received: output_shape={output_shape} with equation={equation!r}"
            )
    new = [letter for letter in outputs if letter not in inputs]
    made = EinsumConnection(
        1, bias_axes is not None, activation, inputs=inputs, weights=weights, outputs=outputs,
        sizes=tuple(known[letter] for letter in (*inputs[1:], *new)),
    )  # fmt: skip
    if bias_axes is not None and sorted(bias_axes) != sorted(made.own):
        raise ValueError(
            f"`bias_axes` must be the axes of the units, {made.own!r}, so that each unit has one bias. "
            f"Received: bias_axes={bias_axes!r}"
        )
    return dataclasses.replace(made, units=math.prod(known[letter] for letter in made.own))
