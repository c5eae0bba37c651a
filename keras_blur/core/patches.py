"""The patches that a convolution or a pooling reads, by strided slices: without a gather, with
static shapes, for any number of axes."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

from keras import ops

if TYPE_CHECKING:
    from jaxtyping import Shaped

Array = Any
Shape = tuple[Any, ...]


def unfold(
    x: Shaped[Array, "... channels"], size: Shape, strides: Shape, padding: str, dilation: Shape
) -> Shaped[Array, "... taps channels"]:
    """The patches that a convolution reads, `[..., *positions, taps, channels]`, of
    `[..., *spatial, channels]`.

    A tap is one position of the kernel. Taps run in the order of the kernel's spatial axes, the
    last one fastest. Outside of x there are zeros.

    Example:

    >>> x = ops.reshape(ops.arange(5.0), (1, 5, 1))
    >>> ops.convert_to_numpy(unfold(x, (2,), (1,), "valid", (1,)))[0, :, :, 0].tolist()
    [[0.0, 1.0], [1.0, 2.0], [2.0, 3.0], [3.0, 4.0]]
    """
    return ops.stack(taps(x, size, strides, padding, dilation), axis=-2)


def taps(
    x: Shaped[Array, "... channels"], size: Shape, strides: Shape, padding: str, dilation: Shape, outside: float = 0.0
) -> list[Shaped[Array, "*positions channels"]]:
    """What each tap of a window reads, `[..., *positions, channels]`, of `[..., *spatial,
    channels]`.

    Outside of x, they read `outside`.
    """
    rank = len(size)
    lengths = x.shape[-1 - rank : -1]
    before, counts = [], []
    for length, width, stride, rate in zip(lengths, size, strides, dilation, strict=True):
        count = positions(length, width, stride, padding, rate)
        reach = (width - 1) * rate + 1
        if padding == "same":
            before.append(max((count - 1) * stride + reach - length, 0) // 2)
        else:
            before.append(reach - 1 if padding == "causal" else 0)
        counts.append(count)
    pads = []
    for axis, (length, width, stride, rate) in enumerate(zip(lengths, size, strides, dilation, strict=True)):
        needed = (counts[axis] - 1) * stride + (width - 1) * rate + 1
        pads.append((before[axis], max(needed - length - before[axis], 0)))
    x = ops.pad(x, (*((0, 0),) * (len(x.shape) - rank - 1), *pads, (0, 0)), constant_values=outside)
    found = []
    for offset in itertools.product(*map(range, size)):
        window = [slice(None)] * (len(x.shape) - rank - 1)
        for place, stride, rate, count in zip(offset, strides, dilation, counts, strict=True):
            start = place * rate
            window.append(slice(start, start + (count - 1) * stride + 1, stride))
        found.append(x[(*window, slice(None))])
    return found


def positions(length: int, size: int, stride: int, padding: str, rate: int) -> int:
    """Number of positions of a convolution along one axis.

    Example:

    >>> positions(5, 2, 1, "valid", 1)
    4
    """
    if padding in ("same", "causal"):
        return -(-length // stride)
    return (length - (size - 1) * rate - 1) // stride + 1


def thinned(
    rows: Shaped[Array, "*leading rows features"], positions: int, most: int
) -> Shaped[Array, "*leading kept features"]:
    """Keeps at most `most` positions of each example, evenly spaced, of rows
    `[..., batch * positions, features]`.

    Example:

    >>> rows = ops.reshape(ops.arange(12.0), (12, 1))
    >>> ops.convert_to_numpy(thinned(rows, 6, 2))[:, 0].tolist()
    [0.0, 3.0, 6.0, 9.0]
    """
    if not most or positions <= most:
        return rows
    shape = ops.shape(rows)
    apart = ops.reshape(rows, (*shape[:-2], -1, positions, shape[-1]))
    kept = ops.take(apart, [place * positions // most for place in range(most)], axis=-2)
    return ops.reshape(kept, (*shape[:-2], -1, shape[-1]))


def coarser(counts: Shape, most: int) -> Shape:
    """The factors of the strides that leave at most `most` positions of those along the axes.

    Example:

    >>> coarser((24, 24), 16)
    (6, 6)
    """
    if not most:
        return (1,) * len(counts)
    by = [1] * len(counts)
    while math.prod(-(-count // each) for count, each in zip(counts, by, strict=True)) > most:
        widest = max(range(len(counts)), key=lambda axis: -(-counts[axis] // by[axis]))
        by[widest] += 1
    return tuple(by)
