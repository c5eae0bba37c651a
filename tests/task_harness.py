"""Common code of tests of task distributions: episodes as arrays, and ways to compare them."""

import numpy as np


def take(stream, count):
    return [{name: value.numpy() for name, value in episode.items()} for episode in stream.take(count)]


def same(first, second):
    return all(np.array_equal(first[name], second[name]) for name in first)


def rows(arrays):
    return {row.tobytes() for row in arrays}
