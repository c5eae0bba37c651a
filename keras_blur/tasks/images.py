"""Classification tasks on image sets: resized, cropped, projected, relabelled.

Source of the first task family: "Meta-Learning Bidirectional Update Rules" (2021), section 4.2 (all
of MNIST and halves of its classes, cropped and resized). Relabelling and random projections turn
one image set into many tasks. A rule needs this variety to generalise beyond the set.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from keras import ops

from keras_blur import arguments
from keras_blur.backend import constant
from keras_blur.core import random
from keras_blur.tasks.base import Tasks, check_split
from keras_blur.tasks.datasets import Images, load_images

Array = Any

_VALIDATION = 10  # every tenth training image is for meta-validation


class ArrayTasks(Tasks):
    """Tasks on arrays; `images` and `arrays` make them."""

    def __init__(self, splits: dict[str, tuple[np.ndarray, np.ndarray]], outputs: int, name: str, *, kind: str = "classes",
                 relabel: bool = False, permute: bool = False, project: int | None = None,
                 rotated: bool = False):  # fmt: skip
        self.name, self.outputs, self.kind = name, outputs, kind
        shape = splits["train"][0].shape[1:]
        self.pixels = math.prod(shape)
        self.shape = (project,) if project else (self.pixels,) if permute else tuple(shape)
        self.relabel, self.permute, self.project = relabel, permute, project
        self._rotated = rotated  # whether an episode begins anywhere in its split and so may have any example
        self._arrays = {split: (x.reshape(len(x), -1), y) for split, (x, y) in splits.items()}
        self._primes = {split: _prime_up_to(len(y)) for split, (_, y) in splits.items()}

    def available(self, split: str) -> int:
        check_split(split)
        return self._primes[split]

    def examples(self, seed: Array, count: int, split: str) -> tuple[Array, Array]:
        inputs, labels = self._arrays[split]
        prime = self._primes[split]
        # An order without repeats for the price of a product: i -> a i + b modulo a prime.
        factor = random.integers(random.fold_in(seed, 0), (), prime - 1) + 1
        offset = random.integers(random.fold_in(seed, 1), (), prime)
        chosen = _multiplied_and_added(factor, count, offset, prime)
        if self._rotated:
            start = random.integers(random.fold_in(seed, 5), (), len(labels))
            chosen = (chosen + start) % len(labels)
        x, label = (ops.take(constant(values), chosen, axis=0) for values in (inputs, labels))
        if self.permute:
            x = ops.take(x, random.permutation(random.fold_in(seed, 2), self.pixels), axis=1)
        if self.project:
            matrix = random.normal(random.fold_in(seed, 3), (self.pixels, self.project))
            x = ops.matmul(x, matrix) / float(self.pixels) ** 0.5
        x = ops.reshape(x, (count, *self.shape))
        if self.kind == "values":
            return x, label
        if self.relabel:
            label = ops.take(random.permutation(random.fold_in(seed, 4), self.outputs), label, axis=0)
        return x, 2.0 * ops.one_hot(label, self.outputs) - 1.0


def images(
    name: str = "digits",
    *,
    size: int | None = None,
    crop: int | None = None,
    classes: Sequence[int] | None = None,
    standardize: bool = True,
    relabel: bool = False,
    permute: bool = False,
    project: int | None = None,
    data_dir: str | os.PathLike[str] | None = None,
) -> ArrayTasks:
    """Tasks on an image set.

    Meta-training uses nine in ten of the training images and meta-validation the rest. Meta-test
    uses the test images. Of each split, the first images are used, as many as the largest prime up
    to their number: the last few are in no episode.

    Args:
        name: `"digits"` or a prepared `tensorflow_datasets` image set.
        size: target size of images, resized by area interpolation; `None` leaves them unchanged.
        crop: size of a central crop, taken first; `None` for no crop.
        classes: classes to use, in the order of the outputs; `None` uses all.
        standardize: whether to standardise pixels with the mean and standard deviation of the
            training images (one number each for all pixels). Otherwise pixels are in [0, 1].
        relabel: whether to permute the classes in each episode.
        permute: whether to permute the pixels in each episode.
        project: output size of a random projection, different in each episode; `None` for no
            projection.
        data_dir: folder of prepared sets; `None` uses the environment variable `TFDS_DATA_DIR`,
            then the default of `tensorflow_datasets`.

    Returns:
        `ArrayTasks`, whose examples have the shape of the images, or are rows where pixels are
        permuted or projected.

    Raises:
        ImportError: if the extra `data` is not installed.
        ValueError: if data are missing or an option does not fit them.

    Example:

    >>> tasks = images("digits", classes=range(5), relabel=True)
    >>> tasks.shape, tasks.outputs
    ((8, 8, 1), 5)
    """
    for option, value in (("size", size), ("crop", crop), ("project", project)):
        if value is not None:
            arguments.count(option, value)
    for option, value in (("standardize", standardize), ("relabel", relabel), ("permute", permute)):
        arguments.flag(option, value)
    loaded = load_images(name, data_dir)
    kept = list(range(loaded.classes) if classes is None else _labels(classes))
    if any(c not in range(loaded.classes) for c in kept) or len(set(kept)) != len(kept) or len(kept) < 2:
        raise ValueError(
            f"`classes` must be at least two different classes of {name}, from 0 to {loaded.classes - 1}. "
            f"{arguments.received('classes', classes)}"
        )
    train, test = (
        _scaled(loaded, x, y, kept, size, crop)
        for x, y in ((loaded.x_train, loaded.y_train), (loaded.x_test, loaded.y_test))
    )
    if standardize:
        mean, deviation = train[0].mean(), train[0].std() + 1e-6
        train, test = (((x - mean) / deviation, y) for x, y in (train, test))
    held = np.arange(len(train[1])) % _VALIDATION == _VALIDATION - 1
    arrays = {
        "train": (train[0][~held], train[1][~held]),
        "validation": (train[0][held], train[1][held]),
        "test": test,
    }
    shape = f"{size}x{size}" if size else f"{crop}x{crop}" if crop else "x".join(map(str, loaded.x_train.shape[1:3]))
    label = f"{name} {shape}, {len(kept)} classes"
    return ArrayTasks(arrays, len(kept), label, relabel=relabel, permute=permute, project=project)


def _labels(classes: Any) -> Sequence[int]:
    """The given class numbers, or none if they are not a sequence of integers."""
    try:
        return [operator.index(one) for one in classes if not isinstance(one, (bool, np.bool_))]
    except TypeError:
        return ()


def _scaled(
    loaded: Images, x: np.ndarray, y: np.ndarray, kept: Sequence[int], size: int | None, crop: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Images of the kept classes with pixels in [0, 1], and their labels from 0 on."""
    position = np.full(loaded.classes, -1)
    position[list(kept)] = np.arange(len(kept))
    chosen = position[y] >= 0
    x, y = x[chosen], position[y[chosen]].astype(np.int32)
    if crop is not None:
        if crop > min(x.shape[1:3]):
            raise ValueError(f"`crop` must be at most {min(x.shape[1:3])}, the images' size. Received: crop={crop}")
        top, left = (x.shape[1] - crop) // 2, (x.shape[2] - crop) // 2
        x = x[:, top : top + crop, left : left + crop]
    if size is None:
        return (x / loaded.scale).astype(np.float32), y
    return resized(x, size, loaded.scale), y


def resized(x: np.ndarray, size: int, scale: float = 1.0) -> np.ndarray:
    """Divides images `[n, height, width, channels]` by `scale` and resizes them.

    The result is `size` x `size`, by area interpolation.
    """
    rows, columns = (_means_of_area(side, size) for side in x.shape[1:3])
    parts = [
        np.einsum("yh,nhwc,xw->nyxc", rows, part.astype(np.float32) / scale, columns, optimize=True)
        for part in np.array_split(x, max(1, len(x) // 4096))
    ]
    return np.concatenate(parts)


def _means_of_area(before: int, after: int) -> np.ndarray:
    """The share that each old pixel of a line has in each new one, `[after, before]` float32."""
    ends = np.linspace(0.0, before, after + 1)
    overlap = np.minimum(ends[1:, None], np.arange(1, before + 1)) - np.maximum(ends[:-1, None], np.arange(before))
    return (np.maximum(overlap, 0.0) * (after / before)).astype(np.float32)


def _multiplied_and_added(factor: Array, count: int, offset: Array, prime: int) -> Array:
    """`(factor * i + offset) % prime` for each `i < count`, `[count]` int32.

    The factor is taken in digits, whose products fit in 32 bits.
    """
    size = prime.bit_length()
    digit = 31 - size
    i = ops.cast(ops.arange(count), "uint32")
    modulus, found = ops.cast(prime, "uint32"), ops.zeros((count,), "uint32")
    for place in reversed(range(0, size, digit)):
        part = ops.cast(ops.right_shift(factor, place) % 2**digit, "uint32")
        found = ops.mod(found * ops.cast(2**digit, "uint32") + part * i, modulus)
    return ops.cast(ops.mod(found + ops.cast(offset, "uint32"), modulus), "int32")


def _prime_up_to(limit: int) -> int:
    """The largest prime up to `limit`."""
    for number in range(limit, 1, -1):
        if all(number % divisor for divisor in range(2, int(number**0.5) + 1)):
            return number
    raise ValueError(f"A split must have at least 2 examples. Received: {limit}")
