"""Sets of tasks that a learner can memorise, made of random numbers: objects in poses, sines each in its place, classes.

Source: "Meta-Learning Requires Meta-Augmentation" (Rajendran, Irpan and Jang, NeurIPS 2020): its non-mutually-exclusive
sinusoids as its published code has them, but for that code's random numbers, which are seeded anew for each batch; its pose
regression on rendered objects, and few-shot classification of images, as small stand-ins of our own that need no data.

In each, x alone tells the task in meta-training, and new tasks look otherwise: what was memorised is of no use there.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import tensorflow as tf

from keras_blur import arguments, random
from keras_blur.tasks.base import SPLITS, Tasks, check_split
from keras_blur.tasks.episodes import EpisodeTasks

Array = Any

_GRID = 2**24  # different values of a random float32 of `keras_blur.random`
_STARTS = (4.0, -1.0, -2.0, 1.0, 3.0, -3.0, -5.0, 2.0, 0.0, -4.0)  # of the half units that the ten sines live on
_SINES = {"train": range(6), "validation": range(6, 8), "test": range(8, 10)}


class PoseTasks(Tasks):
    """See `pose`."""

    kind = "values"

    def __init__(self, objects: dict[str, int], code: int, seed: int):
        self.name = f"pose of {objects['train']} objects"
        self.features, self.outputs = code + 2, 2
        self._objects = {}
        for number, split in enumerate(SPLITS):
            rng = np.random.default_rng([seed, number])
            codes = rng.standard_normal((objects[split], code)).astype(np.float32)
            self._objects[split] = codes, rng.uniform(0.0, 2.0 * math.pi, objects[split]).astype(np.float32)

    def available(self, split: str) -> int:
        check_split(split)
        return _GRID

    def examples(self, seed: Array, count: int, split: str) -> tuple[Array, Array]:
        codes, canonical = self._objects[split]
        thing = random.integers(random.fold_in(seed, 0), (), len(codes))
        view = random.uniform(random.fold_in(seed, 1), (count, 1), 0.0, 2.0 * math.pi)
        code = tf.broadcast_to(tf.gather(tf.constant(codes), thing), (count, codes.shape[1]))
        pose = view + tf.gather(tf.constant(canonical), thing)
        x = tf.concat([code, tf.cos(view), tf.sin(view)], axis=1)
        return tf.ensure_shape(x, (count, self.features)), tf.concat([tf.cos(pose), tf.sin(pose)], axis=1)


class SineSet(Tasks):
    """See `sines`."""

    kind, name, features, outputs = "values", "ten sines", 1, 1

    def __init__(self, seed: int):
        rng = np.random.default_rng(seed)
        self.amplitudes = rng.uniform(0.1, 5.0, len(_STARTS)).astype(np.float32)
        self.phases = rng.uniform(0.0, math.pi, len(_STARTS)).astype(np.float32)

    def available(self, split: str) -> int:
        check_split(split)
        return _GRID

    def examples(self, seed: Array, count: int, split: str) -> tuple[Array, Array]:
        own = tf.constant(list(_SINES[split]))
        which = tf.gather(own, random.integers(random.fold_in(seed, 0), (), len(_SINES[split])))
        start, amplitude, phase = (tf.gather(tf.constant(v), which) for v in (_STARTS, self.amplitudes, self.phases))
        x = start + random.uniform(random.fold_in(seed, 1), (count, 1), 0.0, 0.5)
        return x, amplitude * tf.sin(x - phase)


def pose(objects: int = 80, *, held: int = 200, code: int = 8, seed: int = 0) -> PoseTasks:
    """The pose of an object: x is its code and the view (cos, sin), y the view turned by the object's own angle.

    An episode is one object. Of a known one, the code tells the angle; of a new one, only the support does.

    Args:
        objects: objects of meta-training.
        held: objects of meta-validation, and of meta-test.
        code: numbers of a code.
        seed: of codes and angles.

    Raises:
        ValueError: if a number is not positive.

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
    """Ten fixed sines, each on its own half unit of x, which so tells the task: six to train on, two and two held back.

    Amplitudes are from 0.1 to 5, phases from 0 to pi. Four held-back tasks, all beyond what was seen, are few: scores differ
    much from seed to seed.

    Args:
        seed: of amplitudes and phases.
    """
    arguments.integer("seed", seed, 0)
    return SineSet(seed)


def classes(
    ways: int = 5, shots: int = 1, *, pool: int = 50, features: int = 64, noise: float = 0.5, exclusive: bool = True,
    seed: int = 0,
) -> EpisodeTasks:  # fmt: skip
    """Few-shot episodes on classes of Gaussian points, seen through a fixed random projection and tanh.

    Args:
        ways: classes of an episode.
        shots: support examples of each class.
        pool: classes of meta-training, of meta-validation and of meta-test, 100 points of each.
        features: number of features that are seen; the points have a quarter of that.
        noise: deviation of points from their class's mean, whose own deviation is 1.
        exclusive: as of `tasks.episodes`.
        seed: of everything.

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
    rng = np.random.default_rng(seed)
    projection = rng.standard_normal((hidden, features)) / math.sqrt(hidden)
    splits = {}
    for split in SPLITS:
        means = np.repeat(rng.standard_normal((pool, hidden)), each, axis=0)
        points = np.tanh((means + noise * rng.standard_normal(means.shape)) @ projection)
        splits[split] = points.astype(np.float32), np.repeat(np.arange(pool), each)
    return EpisodeTasks(splits, ways, shots, f"{pool} Gaussian classes, {ways} ways, {shots} shots", exclusive)
