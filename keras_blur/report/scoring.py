"""Accuracy and cross-entropy of a Keras model on test examples."""

from __future__ import annotations

import math

import keras
import numpy as np

_CHUNK = 2000  # maximum number of examples predicted at once


def score(model: keras.Model, x: np.ndarray, y: np.ndarray, probabilities: bool = False) -> tuple[float, float | None]:
    """Scores the predictions of a Keras model.

    Args:
        model: a model with outputs `[examples, classes]`, or `[examples, 1]` whose sign tells two
            classes apart.
        x: inputs `[examples, *shape]`.
        y: integer labels `[examples]`.
        probabilities: whether the outputs are probabilities rather than logits.

    Returns:
        Accuracy and cross-entropy in nats. A non-finite output counts as wrong; the cross-entropy
        is then `None`.
    """
    chunks = np.array_split(np.arange(len(x)), -(-len(x) // _CHUNK))
    found = np.concatenate([model.predict_on_batch(x[chunk]) for chunk in chunks]).astype(np.float64)
    finite = np.isfinite(found).all(axis=-1)
    with np.errstate(over="ignore", invalid="ignore"):
        losses = _cross_entropies(found, y, probabilities)
    middle = 0.5 if probabilities else 0.0
    chosen = found[:, 0] > middle if found.shape[-1] == 1 else np.argmax(found, axis=-1)
    loss = float(np.mean(losses))
    return float(np.mean((chosen == y) & finite)), loss if math.isfinite(loss) else None


def _cross_entropies(found: np.ndarray, y: np.ndarray, probabilities: bool) -> np.ndarray:
    """Cross-entropy of each example `[examples]`, from logits or probabilities
    `[examples, outputs]`."""
    if probabilities:  # clipped as Keras does
        found = np.clip(found, 1e-7, 1.0 - 1e-7)
        found = np.log(found) if found.shape[-1] > 1 else np.log(found / (1.0 - found))
    if found.shape[-1] == 1:
        return np.logaddexp(0.0, np.where(y == 1, -found[:, 0], found[:, 0]))
    return np.logaddexp.reduce(found, axis=-1) - found[np.arange(len(y)), y]
