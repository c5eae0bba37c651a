"""Label noise.

Source: the noise models of "Meta-Weight-Net" (Shu et al., NeurIPS 2019), section 4. Uniform
(symmetric) noise redraws a label from all classes, including the true one. Flips replace it with
the next class.
"""

from __future__ import annotations

import numpy as np

from keras_blur import arguments

KINDS = ("uniform", "flip")


def noisy_labels(y: np.ndarray, classes: int, share: float, kind: str = "uniform", seed: int = 0) -> np.ndarray:
    """Corrupts a fraction of labels.

    Args:
        y: integer labels `[n]` from 0 to `classes - 1`, of any dtype.
        classes: number of classes, at most as many as the dtype of `y` has labels for.
        share: probability that a label is corrupted: redrawn from all classes (`"uniform"`; with
            ten classes a tenth of these stay correct) or replaced by the next class (`"flip"`).
        kind: `"uniform"` or `"flip"`.
        seed: random seed.

    Returns:
        Labels `[n]` with the dtype of `y`.

    Raises:
        ValueError: if a label or an argument is out of range.

    Example:

    >>> noisy_labels(np.zeros(5, int), 3, 1.0, "flip").tolist()
    [1, 1, 1, 1, 1]
    """
    arguments.count("classes", classes)
    arguments.real("share", share, low=0.0, high=1.0)
    arguments.choice("kind", kind, KINDS)
    arguments.integer("seed", seed, 0)
    y = np.asarray(y)
    sound = y.dtype.kind in "biuf" and y.ndim == 1 and not (y.dtype.kind == "f" and (y % 1 != 0).any())
    if not sound or (y.size and (y.min() < 0 or y.max() >= classes)):
        raise ValueError(f"`y` must be integer labels [n] from 0 to {classes - 1}. {arguments.received('y', y)}")
    most = _largest(y.dtype) + 1
    if classes > most:
        raise ValueError(f"`classes` must be at most {most} for labels of dtype {y.dtype}. Received: classes={classes}")
    rng = np.random.default_rng(seed)
    chosen = rng.random(len(y)) < share
    drawn = rng.integers(0, classes, len(y))
    return np.where(chosen, drawn if kind == "uniform" else (y.astype("int64") + 1) % classes, y).astype(y.dtype)


def _largest(dtype: np.dtype) -> int:
    """The largest integer up to which a dtype holds all of them."""
    if dtype.kind == "f":
        return 2 ** (np.finfo(dtype).nmant + 1)
    return 1 if dtype.kind == "b" else int(np.iinfo(dtype).max)
