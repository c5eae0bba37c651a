"""Convolutions as connections: a convolution is a dense connection on patches.

Source: eq. 5 to 7 of "Meta-Learning Bidirectional Update Rules" (2021), applied to patches. Each
position of the output is a row of the batch. Weight sharing is a sum over rows.

Patches take as many times the memory of the input as a kernel has positions. A single genome
therefore uses the backend's convolution, its transpose and its kernel gradient. In a population
each member has its own kernel, so patches and one batched matrix product are used. Where a program
runs operation by operation, a few members convolve in turn instead: TensorFlow's kernels are faster
than the patches, those of XLA slower on a CPU. All give the same numbers.

Internally arrays have channels last. Those of `channels_first` are transposed on the way in and
out.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from keras import ops

from keras_blur.core.connection import Connection
from keras_blur.core.derivatives import by_operation, stored
from keras_blur.core.maps import Shape
from keras_blur.core.patches import coarser, positions, thinned, unfold
from keras_blur.core.states import between

if TYPE_CHECKING:
    from jaxtyping import Float, Shaped

Array = Any

_FEW = 16  # members whose convolutions a program may hold one by one


@dataclasses.dataclass(frozen=True)
class Convolution(Connection):
    """The operations common to all convolutions: positions, layout, channels of kernels.

    Args:
        size: the kernel's size along each spatial axis.
        strides: the stride along each spatial axis.
        padding: `"valid"`, `"same"`, or, with one spatial axis, `"causal"`.
        dilation: the dilation rate along each spatial axis.
        groups: number of groups of channels.
        first: whether channels come before the spatial axes.
    """

    size: Shape = ()
    strides: Shape = ()
    padding: str = "valid"
    dilation: Shape = ()
    groups: int = 1
    first: bool = False

    def gathers(self, members: int) -> bool:
        return members > _FEW or not by_operation()

    @property
    def axes(self) -> int:
        return len(self.size) + 1

    # Layout: `_last` is channels last, `_stored` is the layer's own order.

    def _shape_last(self, shape: Shape) -> Shape:
        return (*shape[1:], shape[0]) if self.first else tuple(shape)

    def _shape_stored(self, shape: Shape) -> Shape:
        return (shape[-1], *shape[:-1]) if self.first else tuple(shape)

    def _last(self, states: Array) -> Array:
        return ops.moveaxis(states, -self.axes, -1) if self.first else states

    def _stored_order(self, states: Array) -> Array:
        return ops.moveaxis(states, -1, -self.axes) if self.first else states

    def kernel_shape(self, source: Shape) -> Shape:
        return (*self.size, self._shape_last(source)[-1] // self.groups, self.units)

    def target(self, source: Shape) -> Shape:
        spatial = [
            positions(length, size, stride, self.padding, rate)
            for length, size, stride, rate in zip(
                self._shape_last(source)[:-1], self.size, self.strides, self.dilation, strict=True
            )
        ]
        return self._shape_stored((*spatial, self.units))

    def rows(self, states: Array) -> Shaped[Array, "*population s rows units"]:
        states = self._last(states)
        shape = ops.shape(states)
        return ops.reshape(states, (*shape[: len(shape) - self.axes - 1], -1, self.units))

    def features(self, rows: Shaped[Array, "*population s rows units"], source: Shape) -> Array:
        target = self._shape_last(self.target(source))
        return self._stored_order(ops.reshape(rows, (*ops.shape(rows)[:-2], -1, *target)))

    def matrix(self, kernel: Array) -> Float[Array, "*population c in units"]:
        shape = ops.shape(kernel)
        return ops.reshape(kernel, (*shape[: len(shape) - self.axes - 1], -1, self.units))

    def kernel(self, matrix: Float[Array, "*population c in units"], like: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return ops.reshape(matrix, ops.shape(like))

    def over_readers(self, matrix: Float[Array, "*population c in units"]) -> Float[Array, "*population c in #units"]:
        if self.groups == 1:
            return super().over_readers(matrix)
        each = self.units // self.groups
        grouped = ops.reshape(matrix, (*ops.shape(matrix)[:-1], self.groups, each))
        return ops.repeat(ops.sum(grouped, axis=-1), each, axis=-1)

    def product(self, kernel: Array, x: Array) -> Array:
        if len(kernel.shape) > self.axes + 2:  # a population of kernels
            gathers = self.gathers(math.prod(kernel.shape[: -2 - self.axes]))
            return self.product_of_members(kernel, x) if gathers else self._in_turn(kernel, x)
        x = self._last(x)
        channels, states = kernel.shape[0], x.shape[-2 - self.axes]
        if channels == 1:
            return self._stored_order(self._folded(kernel[0], x))
        parts = []
        for channel in range(channels):
            one = between(x, channel, channel + 1, self.axes) if states > 1 else x
            parts.append(self._folded(kernel[channel], one))
        return self._stored_order(ops.concatenate(parts, axis=-2 - self.axes))

    def _folded(self, kernel: Array, x: Array) -> Array:
        """Applies one kernel to states. All leading axes are treated as examples."""
        shape = ops.shape(x)
        flat = ops.reshape(x, (-1, *shape[len(shape) - self.axes :]))
        y = stored(self._convolve, kernel, flat)
        return ops.reshape(y, (*shape[: len(shape) - self.axes], *y.shape[1:]))

    def _convolve(self, kernel: Array, x: Array) -> Array:
        """The backend's convolution of `[n, *spatial, in]`."""
        padding, x = self.padding, x
        if padding == "causal":
            (size,), (rate,) = self.size, self.dilation
            x = ops.pad(x, ((0, 0), ((size - 1) * rate, 0), (0, 0)))
            padding = "valid"
        return ops.conv(
            x, kernel, strides=self.strides, padding=padding, data_format="channels_last",
            dilation_rate=self.dilation,
        )  # fmt: skip

    def _in_turn(self, kernel: Array, x: Array) -> Array:
        """The map of a population of kernels, one member after another."""
        x = self._last(x)
        lead = tuple(kernel.shape[: len(kernel.shape) - self.axes - 2])
        members = ops.reshape(kernel, (-1, *kernel.shape[len(lead) :]))
        wide = ops.broadcast_to(x, (*lead, *ops.shape(x)[len(x.shape) - self.axes - 2 :]))
        states = ops.reshape(wide, (-1, *ops.shape(wide)[len(lead) :]))
        plain = dataclasses.replace(self, first=False)
        every = (ops.unstack(one, math.prod(lead)) for one in (members, states))
        found = [plain.product(*member) for member in zip(*every, strict=True)]
        stacked = ops.stack(found)
        return self._stored_order(ops.reshape(stacked, (*lead, *ops.shape(stacked)[1:])))

    def _grouped(self, x: Array, strides: Shape) -> Array:
        """Patches of `[..., s, batch, *spatial, channels]`, `[..., s, groups, rows, taps * in]`."""
        patches = unfold(x, self.size, strides, self.padding, self.dilation)  # [..., batch, *out, taps, channels]
        shape = ops.shape(patches)
        taps, channels = shape[-2], shape[-1]
        lead = shape[: len(shape) - self.axes - 2]
        patches = ops.reshape(patches, (*lead, -1, taps, self.groups, channels // self.groups))
        patches = ops.moveaxis(patches, -2, -4)  # [..., groups, rows, taps, in]
        return ops.reshape(patches, (*ops.shape(patches)[:-2], taps * (channels // self.groups)))

    def patches(self, states: Array, source: Shape, most: int) -> Float[Array, "*population s blocks rows in"]:
        counts = self._shape_last(self.target(source))[:-1]
        strides = [stride * by for stride, by in zip(self.strides, coarser(counts, most), strict=True)]
        return self._grouped(self._last(states), tuple(strides))

    def kept(self, source: Shape, most: int) -> int:
        counts = self._shape_last(self.target(source))[:-1]
        by = coarser(counts, most)
        return math.prod(-(-count // each) for count, each in zip(counts, by, strict=True))

    def split(self, matrix: Float[Array, "*leading in units"]) -> Float[Array, "*leading blocks in_block units_block"]:
        shape = ops.shape(matrix)
        return ops.moveaxis(ops.reshape(matrix, (*shape[:-1], self.groups, self.units // self.groups)), -2, -3)

    def joined(self, blocks: Float[Array, "*leading blocks in_block units_block"]) -> Float[Array, "*leading in units"]:
        together = ops.moveaxis(blocks, -3, -2)
        return ops.reshape(together, (*ops.shape(together)[:-2], self.units))


@dataclasses.dataclass(frozen=True)
class ConvConnection(Convolution):
    """The operations of Conv1D, Conv2D and Conv3D."""

    def gathers(self, members: int) -> bool:
        return self.groups > 1 or super().gathers(members)  # TensorFlow's own kernels have no groups


@dataclasses.dataclass(frozen=True)
class DepthwiseConnection(Convolution):
    """The operations of DepthwiseConv1D and DepthwiseConv2D: kernels for each input channel.

    Args:
        multiplier: number of kernels of each channel. `units` is this times the number of channels.
    """

    multiplier: int = 1

    def kernel_shape(self, source: Shape) -> Shape:
        return (*self.size, self._shape_last(source)[-1], self.multiplier)

    def _convolve(self, kernel: Array, x: Array) -> Array:
        return ops.depthwise_conv(
            x, kernel, strides=self.strides, padding=self.padding, data_format="channels_last",
            dilation_rate=self.dilation,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TransposedConnection(Convolution):
    """The operations of Conv2DTranspose: the transpose of a convolution, with kernels
    `[*size, out, in]`.

    Args:
        output_padding: as in Keras; `None` for the default size.
    """

    output_padding: Shape | None = None

    def kernel_shape(self, source: Shape) -> Shape:
        return (*self.size, self.units, self._shape_last(source)[-1])

    def target(self, source: Shape) -> Shape:
        lengths = []
        extra = self.output_padding or (None,) * len(self.size)
        for length, size, stride, rate, more in zip(
            self._shape_last(source)[:-1], self.size, self.strides, self.dilation, extra, strict=True
        ):
            reach = size + (size - 1) * (rate - 1)
            if more is None:
                lengths.append(length * stride if self.padding == "same" else length * stride + max(reach - stride, 0))
            else:
                cut = reach // 2 if self.padding == "same" else 0
                lengths.append((length - 1) * stride + reach - 2 * cut + more)
        return self._shape_stored((*lengths, self.units))

    def matrix(self, kernel: Array) -> Float[Array, "*population c in units"]:
        kernel = ops.swapaxes(kernel, -1, -2)
        shape = ops.shape(kernel)
        return ops.reshape(kernel, (*shape[: len(shape) - self.axes - 1], -1, self.units))

    def kernel(self, matrix: Float[Array, "*population c in units"], like: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        *lead, units, inputs = ops.shape(like)
        return ops.swapaxes(ops.reshape(matrix, (*lead, inputs, units)), -1, -2)

    def kept(self, source: Shape, most: int) -> int:
        return Connection.kept(self, source, most)

    def patches(self, states: Array, source: Shape, most: int) -> Float[Array, "*population s blocks rows in"]:
        """As in `Connection`. A transposed convolution has no patches to gather, so a one-hot
        kernel for each tap and channel copies the input to where it is read."""
        inputs = self._shape_last(source)[-1]
        count = math.prod(self.size) * inputs
        every = ops.reshape(ops.eye(count, dtype=states.dtype), (1, *self.size, inputs, count))
        each = dataclasses.replace(self, units=count, first=False)
        read = each.product(ops.swapaxes(every, -1, -2), self._last(states))
        rows = each.rows(read)
        return ops.expand_dims(thinned(rows, each.positions_of(self._shape_last(source)), most), -3)

    def _convolve(self, kernel: Array, x: Array) -> Array:
        return ops.conv_transpose(
            x, kernel, strides=self.strides, padding=self.padding, output_padding=self.output_padding,
            data_format="channels_last", dilation_rate=self.dilation,
        )  # fmt: skip

    def gathers(self, members: int) -> bool:
        return False
