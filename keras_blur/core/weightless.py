"""Keras layers without weights between layers of synapses: neuron states go forward through them and back through
their transpose.

Each is a linear map (once a dropout mask is drawn, or once the winners of a max pooling are known), so it has a
transpose, which is what a backward sweep needs and what automatic differentiation would compute. Pooling is written as
a gather of each window's entries by a table made once, a weighting of them (equal for an average, the winner of state 1
for a maximum), and for the transpose a gather by the inverse table: no scatter, no data-dependent shape, any number of
axes. All k states of a neuron stay together: one mask, one winner.
"""

from __future__ import annotations

import abc
import itertools
import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_blur import distribution, random

Array = Any
Shape = tuple[Any, ...]


class StructuralMap(abc.ABC):
    """A linear map on states `[..., k, batch, *features]`.

    Args:
        layer: the Keras layer.
        shape: shape of the features that enter it.
    """

    def __init__(self, layer: keras.Layer, shape: Shape):
        self.layer = layer
        self.source = tuple(shape)
        self.target = tuple(layer.compute_output_shape((None, *shape))[1:])

    def context(self, states: Array, training: bool) -> Any:
        """What the map depends on besides its input: a dropout mask, the winners of a pooling."""
        return None

    @abc.abstractmethod
    def forward(self, states: Array, context: Any) -> Array:
        """States through the layer."""

    @abc.abstractmethod
    def transpose(self, states: Array, context: Any) -> Array:
        """States back through its transpose."""


def _features(states: Array, known: int, features: Shape) -> Array:
    """The array with its last `known` axes reshaped to `features`."""
    return ops.reshape(states, (*ops.shape(states)[: len(states.shape) - known], *features))


class _Reshape(StructuralMap):
    def forward(self, states: Array, context: Any) -> Array:
        return _features(states, len(self.source), self.target)

    def transpose(self, states: Array, context: Any) -> Array:
        return _features(states, len(self.target), self.source)


class _Identity(StructuralMap):
    def forward(self, states: Array, context: Any) -> Array:
        return states

    def transpose(self, states: Array, context: Any) -> Array:
        return states


class _Permute(StructuralMap):
    def __init__(self, layer: keras.Layer, shape: Shape):
        super().__init__(layer, shape)
        self.order = [dimension - 1 for dimension in layer.dims]

    def _by(self, states: Array, order: list[int]) -> Array:
        leading = len(states.shape) - len(order)
        return ops.transpose(states, [*range(leading), *(leading + axis for axis in order)])

    def forward(self, states: Array, context: Any) -> Array:
        return self._by(states, self.order)

    def transpose(self, states: Array, context: Any) -> Array:
        return self._by(states, [self.order.index(axis) for axis in range(len(self.order))])


class _Rescaling(StructuralMap):
    def forward(self, states: Array, context: Any) -> Array:
        return states * ops.cast(self.layer.scale, states.dtype) + ops.cast(self.layer.offset, states.dtype)

    def transpose(self, states: Array, context: Any) -> Array:
        return states * ops.cast(self.layer.scale, states.dtype)


class _Dropout(StructuralMap):
    def context(self, states: Array, training: bool) -> Any:
        axis = -2 - len(self.source)
        ones = ops.ones_like(ops.take(states, [0], axis=axis))
        if not training or not self.layer.rate:
            return ones
        # The layer's own seed, but not its random numbers, which are others in a step that XLA compiles.
        seed = ops.cast(self.layer.seed_generator.next(), "int32")
        rows = ops.shape(ops.reshape(ones, (-1, *self.source)))
        mine = distribution.shard()  # every replica draws the mask of the whole batch, and takes its own rows
        whole = (rows[0] * mine.count, *self.source)
        stays = random.uniform(seed, self._noise_shape(whole)) >= self.layer.rate
        mask = ops.broadcast_to(ops.cast(stays, states.dtype) / (1.0 - self.layer.rate), whole)
        if mine.count > 1:
            mask = ops.take(mask, mine.index * rows[0] + ops.arange(rows[0]), axis=0)
        return ops.reshape(mask, ops.shape(ones))

    def _noise_shape(self, whole: Shape) -> Shape:
        """The axes on which what is dropped differs, of a batch of this shape; 1 where it is dropped as one."""
        if "Spatial" in type(self.layer).__name__:
            return (whole[0], *(1 for _ in self.source[:-1]), whole[-1])
        given = self.layer.noise_shape or (None,) * len(whole)
        return tuple(size if wanted is None else wanted for size, wanted in zip(whole, given, strict=True))

    def forward(self, states: Array, context: Any) -> Array:
        return states * context

    def transpose(self, states: Array, context: Any) -> Array:
        return states * context


class _Pooling(StructuralMap):
    def __init__(self, layer: keras.Layer, shape: Shape):
        super().__init__(layer, shape)
        spatial = self.source[:-1]
        window = getattr(layer, "pool_size", spatial)
        strides = getattr(layer, "strides", spatial)
        window, strides = (
            (value,) * len(spatial) if isinstance(value, int) else tuple(value) for value in (window, strides)
        )
        entries = _window_entries(spatial, window, strides, getattr(layer, "padding", "valid"))
        outside = math.prod(spatial)
        owners: list[list[int]] = [[] for _ in range(outside)]
        for place, position in enumerate(entries.ravel()):
            if position != outside:
                owners[position].append(place)
        width = max(map(len, owners))
        self.entries = entries
        self.owners = np.array([own + [entries.size] * (width - len(own)) for own in owners])
        self.inside = (entries != outside)[..., None]  # [windows, entries of a window, 1]
        self.largest = "Max" in type(layer).__name__

    def _windows(self, states: Array) -> Array:
        """`[..., *spatial, c]` to `[..., windows, entries, c]`, zero outside the image."""
        flat = _features(states, len(self.source), (math.prod(self.source[:-1]), self.source[-1]))
        return ops.take(_zero_row(flat), self.entries, axis=-2)

    def context(self, states: Array, training: bool) -> Any:
        if not self.largest:
            return ops.convert_to_tensor(self.inside / self.inside.sum(axis=1, keepdims=True), dtype=states.dtype)
        values = self._windows(ops.take(states, [0], axis=-2 - len(self.source)))
        values = ops.where(self.inside, values, -np.inf)
        winner = ops.one_hot(ops.argmax(values, axis=-2), self.entries.shape[1], dtype=states.dtype)
        return ops.swapaxes(winner, -1, -2)

    def forward(self, states: Array, context: Any) -> Array:
        return _features(ops.sum(self._windows(states) * context, axis=-2), 2, self.target)

    def transpose(self, states: Array, context: Any) -> Array:
        windows = _features(states, len(self.target), (self.entries.shape[0], 1, self.source[-1]))
        flat = _features(windows * context, 3, (self.entries.size, self.source[-1]))
        return _features(ops.sum(ops.take(_zero_row(flat), self.owners, axis=-2), axis=-2), 2, self.source)


def _zero_row(flat: Array) -> Array:
    """A row of zeros after the last: where an index points that has no place."""
    return ops.concatenate([flat, ops.zeros_like(flat[..., :1, :])], axis=-2)


def _window_entries(spatial: Shape, window: Shape, strides: Shape, padding: str) -> np.ndarray:
    """For each window the flat positions of its entries; the number of positions where an entry is outside."""
    starts = []
    for size, width, stride in zip(spatial, window, strides, strict=True):
        if padding == "same":
            count = -(-size // stride)
            before = max((count - 1) * stride + width - size, 0) // 2
        else:
            count, before = (size - width) // stride + 1, 0
        starts.append([index * stride - before for index in range(count)])
    rows = []
    for corner in itertools.product(*starts):
        row = []
        for offset in itertools.product(*map(range, window)):
            place = [start + step for start, step in zip(corner, offset, strict=True)]
            inside = all(0 <= index < size for index, size in zip(place, spatial, strict=True))
            row.append(int(np.ravel_multi_index(place, spatial)) if inside else math.prod(spatial))
        rows.append(row)
    return np.array(rows)


_POOLING = [
    getattr(keras.layers, kind + "Pooling" + rank)
    for kind in ("Average", "Max", "GlobalAverage", "GlobalMax")
    for rank in ("1D", "2D", "3D")
]
_MAPS: dict[type, Callable[[keras.Layer, Shape], StructuralMap]] = {
    keras.layers.Flatten: _Reshape,
    keras.layers.Reshape: _Reshape,
    keras.layers.Identity: _Identity,
    keras.layers.Permute: _Permute,
    keras.layers.Rescaling: _Rescaling,
    keras.layers.Dropout: _Dropout,
    keras.layers.SpatialDropout1D: _Dropout,
    keras.layers.SpatialDropout2D: _Dropout,
    keras.layers.SpatialDropout3D: _Dropout,
    **dict.fromkeys(_POOLING, _Pooling),
}


def structural_map(layer: keras.Layer, shape: Shape) -> StructuralMap:
    """The map of a Keras layer without weights.

    Args:
        layer: the layer.
        shape: shape of the features that enter it, without the batch.

    Raises:
        ValueError: if it has no known transpose.
    """
    maker = _MAPS.get(type(layer))
    if maker is None:
        known = ", ".join(sorted(kind.__name__ for kind in _MAPS))
        raise ValueError(
            f"Layer {layer.name!r} ({type(layer).__name__}) stands between layers of synapses, where states must also go "
            f"back through it, and its transpose is not known. Use one of: {known}; or put it before the first layer of "
            "synapses. A nonlinearity belongs to the rule, or to `activation` of a keras_blur layer."
        )
    data_format = getattr(layer, "data_format", "channels_last")
    if data_format != "channels_last":
        raise ValueError(f"Layer {layer.name!r} must have data_format='channels_last'. Received: {data_format!r}")
    return maker(layer, shape)
