"""Parts of an array of states `[..., k, batch, *features]`, by slices.

A slice and not a gather: XLA merges equal slices and looks through a concatenation at them, so that what two passes take
of the same array is formed once.
"""

from __future__ import annotations

from typing import Any

Array = Any


def first_states(states: Array, count: int, features: int) -> Array:
    """The first `count` states of an array with that many feature axes; all, if it has no more."""
    return between(states, 0, count, features)


def later_states(states: Array, features: int) -> Array:
    """All states but the first."""
    return between(states, 1, states.shape[len(states.shape) - 2 - features], features)


def between(states: Array, start: int, stop: int, features: int) -> Array:
    """The states from `start` to before `stop`.

    Example:

    >>> import numpy as np
    >>> between(np.arange(6).reshape(3, 1, 2), 1, 2, 1).tolist()
    [[[2, 3]]]
    """
    axis = len(states.shape) - 2 - features
    if start == 0 and states.shape[axis] <= stop:
        return states
    return states[(slice(None),) * axis + (slice(start, stop),)]
