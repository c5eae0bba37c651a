"""Tasks on user-provided arrays, split for meta-training, meta-validation and meta-test.

Source of relabelled and projected tasks, as in `tasks.images`: "Meta-Learning Bidirectional Update
Rules" (2021), section 4.2.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_blur import arguments
from keras_blur.checks import Expected, checked_arrays
from keras_blur.tasks.base import SPLITS
from keras_blur.tasks.images import ArrayTasks, resized

KINDS = ("classes", "values")

_STREAM = 0x5B117  # of the random numbers of splits
_LARGEST = 2**31 - 1  # int32


def arrays(
    x: Any,
    y: Any,
    *,
    kind: str = "classes",
    classes: int | None = None,
    shares: Sequence[float] = (0.6, 0.2, 0.2),
    size: int | None = None,
    standardize: bool = True,
    relabel: bool = False,
    permute: bool = False,
    project: int | None = None,
    name: str = "arrays",
    seed: int = 0,
) -> ArrayTasks:
    """Tasks on arrays. An episode draws support and query from one split.

    The splits have no example in common: equal inputs are in the same split. An episode has at most
    as many examples as the largest prime up to the size of its split. Each example is in some
    episodes.

    Args:
        x: inputs `[n, ...]` of any numeric dtype.
        y: for `kind="classes"`, integer labels `[n]` or `[n, 1]` from 0 on, of any dtype; for
            `kind="values"`, targets `[n]` or `[n, outputs]`.
        kind: `"classes"` or `"values"`.
        classes: number of classes; `None` is the largest label plus 1, at least 2.
        shares: proportions of the splits for meta-training, meta-validation and meta-test.
        size: target size of images `[n, height, width]` or `[n, height, width, channels]`, resized
            by area interpolation; `None` leaves inputs unchanged.
        standardize: whether to standardise inputs with the mean and standard deviation of the
            training split (one number each for all features).
        relabel: whether to permute the classes in each episode.
        permute: whether to permute the features in each episode.
        project: number of columns of a random matrix that multiplies the inputs of each episode;
            `None` for no projection.
        name: name of the tasks in messages and reports.
        seed: random seed of the split.

    Returns:
        `ArrayTasks`, whose examples have the shape of the inputs, or are rows where features are
        permuted or projected.

    Raises:
        ValueError: if arrays differ in length, are not finite in float32 or have a wrong shape or
            dtype; if a label is fractional or out of range; if an option is invalid; or if a split
            would have fewer than 2 examples.

    Example:

    >>> x = np.random.default_rng(0).normal(size=(100, 5))
    >>> tasks = arrays(x, x[:, 0] > 0)
    >>> tasks.features, tasks.outputs, tasks.kind
    (5, 2, 'classes')
    >>> arrays(x, x[:, :1] ** 2, kind="values").outputs
    1
    """
    if kind not in KINDS:
        raise ValueError(f"`kind` must be one of {', '.join(map(repr, KINDS))}. Received: kind={kind!r}")
    arguments.integer("seed", seed, 0)
    for option, switch in (("standardize", standardize), ("relabel", relabel), ("permute", permute)):
        arguments.flag(option, switch)
    for option, value, least in (("classes", classes, 2), ("size", size, 1), ("project", project, 1)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least):
            raise ValueError(f"`{option}` must be an integer of at least {least} or None. Received: {option}={value!r}")
    if kind == "values" and (relabel or classes is not None):
        raise ValueError("`relabel` and `classes` must be left out for kind='values'. Received: one of them")
    try:
        portions = np.asarray(shares, float)
    except (TypeError, ValueError):
        portions = np.zeros(0)
    if portions.shape != (3,) or not (np.isfinite(portions).all() and (portions > 0).all()):
        raise ValueError(f"`shares` must be 3 positive, finite numbers. Received: shares={shares!r}")
    expected = Expected(outputs=(classes,), labels="classes", classes=classes) if kind == "classes" else Expected()
    x, y = (np.asarray(one) for one in checked_arrays(x, y, None, expected)[:2])
    if kind == "values" and y.ndim > 2:
        raise ValueError(f"`y` must have shape (batch,) or (batch, outputs). Received: an array of shape {y.shape}")
    if x.ndim < 2 or not math.prod(x.shape[1:]):
        raise ValueError(f"`x` must have a batch axis and features. Received: an array of shape {x.shape}")
    x = _float32("x", x)
    if size is not None:
        if x.ndim not in (3, 4):
            raise ValueError(
                f"`x` must be images of 3 or 4 axes where `size` is given. Received: an array of shape {x.shape}"
            )
        x = resized(x[..., None], size)[..., 0] if x.ndim == 3 else resized(x, size)
    shape = x.shape[1:]
    x = x.reshape(len(x), -1)
    places = _split(x, portions, seed)
    if standardize:
        of_train = x[places["train"]]
        with np.errstate(over="ignore"):
            deviation = of_train.std() + 1e-6
        if not np.isfinite(deviation):
            raise ValueError("`x` must have a standard deviation in the range of float32. Received: larger numbers")
        x = (x - of_train.mean()) / deviation
    if kind == "classes":
        if int(y.max()) >= _LARGEST:
            raise ValueError(f"`y` must hold integers from 0 to {_LARGEST - 1}. Received: {int(y.max())}")
        y = y.reshape(-1).astype(np.int32)
        outputs = classes or max(2, int(y.max()) + 1)
    else:
        y = _float32("y", y.reshape(len(y), -1))
        outputs = y.shape[1]
    splits = {split: (x[place].reshape(-1, *shape), y[place]) for split, place in places.items()}
    return ArrayTasks(splits, outputs, name, kind=kind, relabel=relabel, permute=permute, project=project, rotated=True)


def _float32(name: str, values: np.ndarray) -> np.ndarray:
    """The numbers as float32. Raises a `ValueError` if one is out of its range."""
    with np.errstate(over="ignore"):
        found = values.astype(np.float32)
    if not np.isfinite(found).all():
        raise ValueError(f"`{name}` must be in the range of float32. Received: larger numbers")
    return found


def _split(x: np.ndarray, shares: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Indices of the examples of each split, in proportion to `shares` and in random order.

    Equal rows are in the same split. The random numbers are another stream than that of
    `np.random.default_rng(seed)`: by that, a user may have shuffled, and the split would undo it.
    """
    known: dict[bytes, int] = {}
    group = np.array([known.setdefault(row.tobytes(), len(known)) for row in x + np.float32(0)])  # -0 as 0
    rank = np.random.default_rng([_STREAM, seed]).permutation(len(known))[group]
    ends = np.round(np.cumsum(shares / shares.sum()) * len(known))
    which = np.searchsorted(ends, rank, side="right")
    order = np.argsort(rank, kind="stable")
    places = {split: order[which[order] == number] for number, split in enumerate(SPLITS)}
    if min(map(len, places.values())) < 2:
        sizes = ", ".join(f"{split} {len(place)}" for split, place in places.items())
        raise ValueError(
            f"`shares` must leave each split 2 or more examples. Received: {sizes} from {len(known)} different inputs"
        )
    return places
