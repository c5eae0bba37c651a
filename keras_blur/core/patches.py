"""The patches that a convolution or a pooling reads, by strided slices: no gather, static shapes, any number of axes."""

from __future__ import annotations

import itertools
from typing import Any

from keras import ops

Array = Any
Shape = tuple[Any, ...]


def unfold(x: Array, size: Shape, strides: Shape, padding: str, dilation: Shape, outside: float = 0.0) -> Array:
    """The patches that a convolution reads, `[..., *positions, taps, channels]`, of `[..., *spatial, channels]`.

    Taps run in the order of the kernel's spatial axes, the last one fastest. Outside of x stands `outside`.

    Example:

    >>> x = ops.reshape(ops.arange(5.0), (1, 5, 1))
    >>> ops.convert_to_numpy(unfold(x, (2,), (1,), "valid", (1,)))[0, :, :, 0].tolist()
    [[0.0, 1.0], [1.0, 2.0], [2.0, 3.0], [3.0, 4.0]]
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
    taps = []
    for offset in itertools.product(*map(range, size)):
        window = [slice(None)] * (len(x.shape) - rank - 1)
        for place, stride, rate, count in zip(offset, strides, dilation, counts, strict=True):
            start = place * rate
            window.append(slice(start, start + (count - 1) * stride + 1, stride))
        taps.append(x[(*window, slice(None))])
    return ops.stack(taps, axis=-2)


def positions(length: int, size: int, stride: int, padding: str, rate: int) -> int:
    """Number of positions of a convolution along one axis."""
    if padding in ("same", "causal"):
        return -(-length // stride)
    return (length - (size - 1) * rate - 1) // stride + 1
