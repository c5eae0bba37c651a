"""Common code of tests of task distributions: episodes as arrays, and ways to compare them."""

import itertools

import keras
import numpy as np


def arrays(episode):
    """An episode, or examples, as numpy arrays."""
    if isinstance(episode, dict):
        return {name: keras.ops.convert_to_numpy(value) for name, value in episode.items()}
    return tuple(map(keras.ops.convert_to_numpy, episode))


def take(stream, count):
    """The first episodes of a stream, which is a `tf.data.Dataset` or, on JAX, an iterable of
    arrays."""
    return [arrays(episode) for episode in itertools.islice(stream, count)]


def specs(stream):
    """Shape and dtype of each array of a stream's episodes."""
    parts = getattr(stream, "element_spec", None) or next(iter(stream))
    return {name: (tuple(part.shape), keras.backend.standardize_dtype(part.dtype)) for name, part in parts.items()}


def same(first, second):
    return all(np.array_equal(first[name], second[name]) for name in first)


def rows(arrays):
    return {row.tobytes() for row in arrays}
