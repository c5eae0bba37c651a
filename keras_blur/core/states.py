"""Arrays of states `[..., k, batch, *features]`: slices of them, and states that are kept in parts.

States are sliced, not gathered. XLA merges equal slices, and sees through a concatenation, so what
two passes take from the same array is computed once. A backend without such a compiler builds each
concatenation. So the pair of a value and its derivative (eq. 1) is kept as `Parts`: what the
backward pass reads separately is never joined, and a derivative takes no memory until it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from keras import ops

if TYPE_CHECKING:
    from jaxtyping import Shaped

Array = Any


class Parts:
    """States in parts that follow one another along the state axis.

    Args:
        features: number of feature axes.
        parts: arrays, the first of which holds a single state; and functions that return an array
            of a single state.

    Example:

    >>> value = ops.ones((1, 4, 3))
    >>> pair = Parts(1, [value, lambda: 0.5 * value])
    >>> pair.shape
    (2, 4, 3)
    >>> float(ops.sum(between(pair, 1, 2, 1)))
    6.0
    """

    def __init__(self, features: int, parts: Sequence[Array | Callable[[], Array]]):
        self.features, self.parts = features, tuple(parts)

    def _count(self, part: Array | Callable[[], Array]) -> int:
        return 1 if callable(part) else part.shape[len(part.shape) - 2 - self.features]

    @property
    def _first(self) -> Array:
        return self.parts[0]

    @property
    def shape(self) -> tuple[Any, ...]:
        """Shape of the states as one array."""
        first = tuple(self._first.shape)
        axis = len(first) - 2 - self.features
        return (*first[:axis], sum(map(self._count, self.parts)), *first[axis + 1 :])

    @property
    def dtype(self) -> Any:
        """Type of the first part, and so of all parts."""
        return self._first.dtype

    def between(self, start: int, stop: int) -> Array:
        """The states from `start` to before `stop`, as an array."""
        found, place = [], 0
        for part in self.parts:
            count = self._count(part)
            low, high = max(start - place, 0), min(stop - place, count)
            if low < high:
                found.append(between(part() if callable(part) else part, low, high, self.features))
            place += count
        return found[0] if len(found) == 1 else ops.concatenate(found, axis=-2 - self.features)

    def mapped(self, function: Callable[[Array], Array], features: int) -> Parts:
        """The states after a function of arrays that treats all states alike.

        Args:
            function: a function of arrays.
            features: number of feature axes of its values.
        """

        def later(part: Callable[[], Array]) -> Callable[[], Array]:
            return lambda: function(part())

        return Parts(features, [later(part) if callable(part) else function(part) for part in self.parts])


def joined(states: Shaped[Array | Parts, "*shape"]) -> Shaped[Array, "*shape"]:
    """The states as one array."""
    return states.between(0, states.shape[-2 - states.features]) if isinstance(states, Parts) else states


def mapped(function: Callable[[Array], Array], states: Array | Parts, features: int) -> Array | Parts:
    """The states after a function of arrays that treats all states alike.

    Args:
        function: a function of arrays.
        states: `[..., k, batch, *features]`, as an array or in parts.
        features: number of feature axes of the function's values.
    """
    return states.mapped(function, features) if isinstance(states, Parts) else function(states)


def first_states(states: Array | Parts, count: int, features: int) -> Array:
    """The first `count` states of arrays with `features` feature axes; all of them, if there are no
    more."""
    return between(states, 0, count, features)


def later_states(states: Array | Parts, features: int) -> Array:
    """All states but the first."""
    return between(states, 1, states.shape[len(states.shape) - 2 - features], features)


def between(states: Array | Parts, start: int, stop: int, features: int) -> Array:
    """The states from `start` to before `stop`.

    Example:

    >>> import numpy as np
    >>> between(np.arange(6).reshape(3, 1, 2), 1, 2, 1).tolist()
    [[[2, 3]]]
    """
    if isinstance(states, Parts):
        return states.between(start, stop)
    axis = len(states.shape) - 2 - features
    if start == 0 and states.shape[axis] <= stop:
        return states
    return states[(slice(None),) * axis + (slice(start, stop),)]
