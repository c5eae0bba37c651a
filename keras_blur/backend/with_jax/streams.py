"""Endless data on JAX."""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

Array = Any


def is_dataset(value: Any) -> bool:
    """Whether a value is a `tf.data.Dataset`, which JAX's trainer takes where TensorFlow is
    installed."""
    tensorflow = sys.modules.get("tensorflow")
    return tensorflow is not None and isinstance(value, tensorflow.data.Dataset)


def constant(value: np.ndarray) -> np.ndarray:
    """The array itself."""
    return value


class stream:
    """An endless iterable of draws of the numbers `start`, `start + stride`, ... as numpy arrays.

    They are drawn on the CPU, one program for each function.

    Args:
        draws: functions from a number to a tree of arrays.
        which: the index of the function to call, for a number; `None` for the only one.
        start: the first number. The value of a variable is read when iteration starts.
        stride: step between numbers.
    """

    def __init__(self, draws: Sequence[Callable[[Array], Any]], which: Callable[[int], int] | None, start: Any, stride: int):
        self._draws, self._which, self._start, self._stride = [jax.jit(one) for one in draws], which, start, stride
        self._size: int | None = None
        for draw in self._draws:  # what cannot be drawn raises now
            with on_cpu():
                draw.eval_shape(np.int32(0))

    def batch(self, size: int, drop_remainder: bool = True) -> stream:
        """The same stream, with `size` consecutive draws along a new first axis of each array."""
        del drop_remainder  # it has no end
        made = copy.copy(self)
        made._size = size
        return made

    def __iter__(self) -> Iterator[Any]:
        numbers = itertools.count(int(self._start), self._stride)
        if self._size is None:
            yield from map(self._drawn, numbers)
        while self._size:
            several = [self._drawn(next(numbers)) for _ in range(self._size)]
            yield jax.tree.map(lambda *arrays: np.stack(arrays), *several)

    def _drawn(self, number: int) -> Any:
        draw = self._draws[self._which(number) if self._which else 0]
        with on_cpu():
            return jax.tree.map(np.asarray, draw(np.int32(number)))


def on_cpu() -> Any:
    """A scope whose arrays are on this process's CPU."""
    return jax.default_device(jax.local_devices(backend="cpu")[0])


class passes:
    """An endless iterable of batches of arrays; their indices are drawn on the CPU."""

    def __init__(self, arrays: Sequence[np.ndarray], rows: Callable[[Array], Array], first: int, skipped: int):
        self._arrays, self._rows, self._first, self._skipped = arrays, jax.jit(rows), first, skipped

    def __iter__(self) -> Iterator[Any]:
        skipped = self._skipped
        for number in itertools.count(self._first):
            with on_cpu():
                chosen = np.asarray(self._rows(np.int32(number)))
            for row in chosen[skipped:]:
                yield tuple(array[row] for array in self._arrays)
            skipped = 0


class repeated:
    """An endless iterable of the batches of passes over data."""

    def __init__(self, data: Any, skipped: int, index: int, count: int):
        del index, count  # there is one replica
        self._data, self._skipped = data, skipped

    def __iter__(self) -> Iterator[Any]:
        seen, before = 0, -1
        while seen > before:  # a pass without batches ends it
            before = seen
            for seen, batch in enumerate(self._data, before + 1):
                if seen > self._skipped:
                    yield tuple(np.asarray(part) for part in batch)
