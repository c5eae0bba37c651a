"""The optimizers that a genome is compared with, and the grids of their learning rates."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import keras
import numpy as np

from keras_blur.backend import numbers_of


def _half_decades(low: int, high: int) -> tuple[float, ...]:
    """Rates from 10^(low/2) to 10^(high/2) in half decades, factors of about three."""
    return tuple(float(f"{10.0 ** (exponent / 2):.3g}") for exponent in range(low, high + 1))


_BASELINES: dict[str, tuple[Callable[[], keras.optimizers.Optimizer] | None, tuple[float, ...]]] = {
    "SGD": (keras.optimizers.SGD, _half_decades(-5, 1)),
    "momentum": (lambda: keras.optimizers.SGD(momentum=0.9), _half_decades(-6, 0)),
    "Nesterov": (lambda: keras.optimizers.SGD(momentum=0.9, nesterov=True), _half_decades(-6, 0)),
    "Adam": (keras.optimizers.Adam, _half_decades(-7, -2)),
    "AdamW": (keras.optimizers.AdamW, _half_decades(-7, -2)),
    "Nadam": (keras.optimizers.Nadam, _half_decades(-7, -2)),
    "RMSprop": (keras.optimizers.RMSprop, _half_decades(-8, -2)),
    "Lion": (keras.optimizers.Lion, _half_decades(-9, -4)),
    "Muon": (getattr(keras.optimizers, "Muon", None), _half_decades(-6, 0)),
    "Schedule-Free": (getattr(keras.optimizers, "ScheduleFreeAdamW", None), _half_decades(-6, -1)),
}
_OPTIMIZERS = {name: make for name, (make, _) in _BASELINES.items() if make is not None}  # those of this Keras
GRIDS = {name: _BASELINES[name][1] for name in _OPTIMIZERS}
OPTIMIZERS = tuple(_OPTIMIZERS)
"""Names of the optimizers in `grids` of `compare`. Muon and Schedule-Free are there if this version
of Keras has them."""


def optimizer_of(name: str) -> keras.optimizers.Optimizer:
    """A new optimizer, one of `OPTIMIZERS`."""
    return _OPTIMIZERS[name]()


def slots_of(name: str, variables: Sequence[keras.Variable]) -> list[np.ndarray]:
    """The numbers of a new optimizer's variables, built on weights as they are now.

    Some optimizers, such as Schedule-Free, start with a copy of the weights.
    """
    optimizer = optimizer_of(name)
    optimizer.build(variables)
    return [numbers_of(one) for one in optimizer.variables]
