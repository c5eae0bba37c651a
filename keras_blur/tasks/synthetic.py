"""Synthetic tasks that can be memorised: objects in poses, separate sines, Gaussian classes.

Source: "Meta-Learning Requires Meta-Augmentation" (Rajendran, Irpan and Jang, NeurIPS 2020). The
non-mutually-exclusive sinusoids follow its published code, except that its random numbers are
reseeded in each batch. Its pose regression on rendered objects and its few-shot image
classification are replaced by small stand-ins of our own that need no data.

In each set, x alone identifies the task in meta-training. New tasks look different, so memorised
knowledge does not help.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from keras import ops

from keras_blur import arguments
from keras_blur.core import random
from keras_blur.tasks.base import SPLITS, Tasks, check_split
from keras_blur.tasks.episodes import EpisodeTasks

Array = Any

_GRID = 2**24  # different values of a random float32 of `keras_blur.random`
_STREAM = 0x7A5C5  # of the random numbers of tasks, so that learners of the same seed draw others
_STARTS = (4.0, -1.0, -2.0, 1.0, 3.0, -3.0, -5.0, 2.0, 0.0, -4.0)  # of the half units that the ten sines live on
_SINES = {"train": range(6), "validation": range(6, 8), "test": range(8, 10)}


class PoseTasks(Tasks):
    """Poses of objects; `pose` makes them."""

    kind = "values"

    def __init__(self, objects: dict[str, int], code: int, seed: int):
        self.name = f"pose of {objects['train']} objects"
        self.shape, self.outputs = (code + 2,), 2
        self._objects = {}
        for number, split in enumerate(SPLITS):
            rng = np.random.default_rng([_STREAM, seed, number])
            codes = rng.standard_normal((objects[split], code)).astype(np.float32)
            self._objects[split] = codes, rng.uniform(0.0, 2.0 * math.pi, objects[split]).astype(np.float32)

    def available(self, split: str) -> int:
        check_split(split)
        return _GRID

    def examples(self, seed: Array, count: int, split: str) -> tuple[Array, Array]:
        codes, canonical = self._objects[split]
        thing = random.integers(random.fold_in(seed, 0), (), len(codes))
        view = random.uniform(random.fold_in(seed, 1), (count, 1), 0.0, 2.0 * math.pi)
        code = ops.broadcast_to(ops.take(ops.convert_to_tensor(codes), thing, axis=0), (count, codes.shape[1]))
        pose = view + ops.take(ops.convert_to_tensor(canonical), thing, axis=0)
        x = ops.concatenate([code, ops.cos(view), ops.sin(view)], axis=1)
        return ops.reshape(x, (count, self.features)), ops.concatenate([ops.cos(pose), ops.sin(pose)], axis=1)


class SineSet(Tasks):
    """Ten sines; `sines` makes them."""

    kind, name, shape, outputs = "values", "ten sines", (1,), 1

    def __init__(self, seed: int):
        rng = np.random.default_rng(seed)
        self.amplitudes = rng.uniform(0.1, 5.0, len(_STARTS)).astype(np.float32)
        self.phases = rng.uniform(0.0, math.pi, len(_STARTS)).astype(np.float32)

    def available(self, split: str) -> int:
        check_split(split)
        return _GRID

    def examples(self, seed: Array, count: int, split: str) -> tuple[Array, Array]:
        own = ops.convert_to_tensor(list(_SINES[split]))
        which = ops.take(own, random.integers(random.fold_in(seed, 0), (), len(_SINES[split])), axis=0)
        start, amplitude, phase = (
            ops.take(ops.convert_to_tensor(v), which, axis=0) for v in (_STARTS, self.amplitudes, self.phases)
        )
        x = start + random.uniform(random.fold_in(seed, 1), (count, 1), 0.0, 0.5)
        return x, amplitude * ops.sin(x - phase)


def pose(objects: int = 80, *, held: int = 200, code: int = 8, seed: int = 0) -> PoseTasks:
    """The pose of an object: x is its code and a view (cos, sin), y the view plus its own angle.

    An episode is one object. The code determines the angle of a known object. The angle of a new
    object is only in the support.

    Args:
        objects: number of meta-training objects.
        held: number of meta-validation objects, and of meta-test objects.
        code: size of a code.
        seed: random seed of codes and angles, from 0.

    Returns:
        `PoseTasks`, of the kind `"values"`: x `[n, code + 2]`, y `[n, 2]`.

    Raises:
        ValueError: if a number is not positive, or the seed is negative.

    Example:

    >>> tasks = pose()
    >>> tasks.features, tasks.outputs, tasks.kind
    (10, 2, 'values')
    """
    for name, value in (("objects", objects), ("held", held), ("code", code)):
        arguments.count(name, value)
    arguments.integer("seed", seed, 0)
    return PoseTasks({"train": objects, "validation": held, "test": held}, code, seed)


def sines(*, seed: int = 1) -> SineSet:
    """Ten fixed sines, each on its own half unit of x, which identifies the task.

    Six are for meta-training, two for meta-validation and two for meta-test. Amplitudes are from
    0.1 to 5, phases from 0 to pi. Four held-out tasks, all outside the training range, are few, so
    scores vary a lot between seeds.

    Args:
        seed: random seed of amplitudes and phases, from 0.

    Returns:
        `SineSet`, of the kind `"values"`: x `[n, 1]`, y `[n, 1]`.

    Raises:
        ValueError: if the seed is negative.

    Example:

    >>> tasks = sines()
    >>> tasks.features, tasks.outputs, tasks.kind
    (1, 1, 'values')
    """
    arguments.integer("seed", seed, 0)
    return SineSet(seed)


def classes(
    ways: int = 5, shots: int = 1, *, pool: int = 50, features: int = 64, noise: float = 0.5, exclusive: bool = True,
    seed: int = 0,
) -> EpisodeTasks:  # fmt: skip
    """Few-shot episodes on Gaussian classes, seen through a fixed random projection and tanh.

    Args:
        ways: number of classes of an episode.
        shots: support examples per class.
        pool: number of classes of each split, with 100 points per class.
        features: number of visible features; the points have a quarter of that.
        noise: standard deviation of points around their class mean. Class means have standard
            deviation 1.
        exclusive: as in `tasks.episodes`.
        seed: random seed of the classes and their points, from 0.

    Returns:
        `EpisodeTasks`.

    Raises:
        ValueError: if a number is out of range.

    Example:

    >>> classes(exclusive=False).classes("test")[:3]
    (0, 1, 2)
    """
    for name, value in (("ways", ways), ("shots", shots), ("pool", pool), ("features", features)):
        arguments.count(name, value)
    arguments.real("noise", noise, low=0.0)
    arguments.flag("exclusive", exclusive)
    arguments.integer("seed", seed, 0)
    if not 2 <= ways <= pool:
        raise ValueError(f"`ways` must be from 2 to pool={pool}. Received: ways={ways}")
    hidden, each = max(1, features // 4), 100
    rng = np.random.default_rng([_STREAM, seed])
    projection = rng.standard_normal((hidden, features)) / math.sqrt(hidden)
    splits = {}
    for split in SPLITS:
        means = np.repeat(rng.standard_normal((pool, hidden)), each, axis=0)
        points = np.tanh((means + noise * rng.standard_normal(means.shape)) @ projection)
        splits[split] = points.astype(np.float32), np.repeat(np.arange(pool), each)
    return EpisodeTasks(splits, ways, shots, f"{pool} Gaussian classes, {ways} ways, {shots} shots", exclusive)
