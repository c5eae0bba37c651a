"""Meta-augmentation: the labels of each training episode are changed by a key, so that only its support tells them.

Source: "Meta-Learning Requires Meta-Augmentation" (Rajendran, Irpan and Jang, NeurIPS 2020). Where x alone predicts y in all
tasks of meta-training, a learner can know the tasks and never look at its support: it memorises, and fails on new tasks.
Noise on x does not help, since H(Y|X) stays. A key e, drawn once an episode and used for support and query alike, y' = g(e,
y), raises it to H(Y'|X) = H(Y|X) + H(e) if (e, x, y) to (x, y') is one-to-one: so many bits of e have to be read from the
support.

A key for each point instead of each episode is noise on the labels, which nothing can read; it is here as a control
(`shared=False`). Keys have a random stream of their own and are never used in meta-validation or meta-test.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from keras_blur import random
from keras_blur.tasks.base import SPLITS, Episode, Tasks
from keras_blur.tasks.mixture import Mixture

Array = Any

_KEYS = 0x6B657973  # folded into an episode's seed for its keys
_TRAIN = SPLITS[0]


class Augmentation(abc.ABC):
    """What a key does to labels."""

    def prepared(self, tasks: Tasks) -> Tasks:
        """The tasks whose training episodes get keys.

        Raises:
            ValueError: if they cannot.
        """
        return tasks

    @abc.abstractmethod
    def entropy_bits(self, tasks: Tasks) -> float:
        """H(e) in bits; of a key from a continuum, its differential entropy."""

    @abc.abstractmethod
    def draw(self, seed: Array, count: int, tasks: Tasks) -> Any:
        """`count` keys: arrays `[count, ...]`."""

    @abc.abstractmethod
    def apply(self, keys: Any, y: Array) -> Array:
        """Labels `[n, outputs]` under one key or `n`."""

    @abc.abstractmethod
    def undo(self, keys: Any, y: Array) -> Array:
        """The inverse of `apply`."""


class LabelPermutation(Augmentation):
    """The classes change places: what the paper calls intra-shuffle, where an episode's classes are fixed.

    Example:

    >>> keys = tf.constant([[2, 0, 1]])
    >>> LabelPermutation().apply(keys, tf.constant([[1.0, -1.0, -1.0]])).numpy().tolist()
    [[-1.0, 1.0, -1.0]]
    """

    def prepared(self, tasks: Tasks) -> Tasks:
        if tasks.kind != "classes" or tasks.outputs < 2:
            raise ValueError(f"`augmentation` LabelPermutation needs tasks of classes. Received: {tasks.name}")
        return tasks

    def entropy_bits(self, tasks: Tasks) -> float:
        return math.log2(math.factorial(tasks.outputs))

    def draw(self, seed: Array, count: int, tasks: Tasks) -> Array:
        return random.permutation(seed, tasks.outputs, (count,))

    def apply(self, keys: Array, y: Array) -> Array:
        return tf.gather(y, _for_each(keys, y), axis=1, batch_dims=1)

    def undo(self, keys: Array, y: Array) -> Array:
        return self.apply(tf.argsort(keys), y)


class LabelOffset(Augmentation):
    """A number is added to values.

    Args:
        low, high: the number is uniform between them.
        modulo: the sum is taken modulo this; `None` leaves it.
        values: the number is one of this many, equally spaced from `low` on, `high` excluded; `None` for any.

    Raises:
        ValueError: if an argument is out of range.

    Example:

    >>> LabelOffset(0.0, 1.0, modulo=1.0).apply(tf.constant([[0.75]]), tf.constant([[0.5]])).numpy().tolist()
    [[0.25]]
    """

    def __init__(self, low: float, high: float, modulo: float | None = None, *, values: int | None = None):
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"`low` must be less than `high`, both finite. Received: low={low!r}, high={high!r}")
        if modulo is not None and not 0.0 < modulo < math.inf:
            raise ValueError(f"`modulo` must be a positive number or None. Received: modulo={modulo!r}")
        if values is not None and (isinstance(values, bool) or not isinstance(values, int) or values < 2):
            raise ValueError(f"`values` must be an integer from 2 or None. Received: values={values!r}")
        self.low, self.high, self.modulo, self.values = float(low), float(high), modulo, values

    def prepared(self, tasks: Tasks) -> Tasks:
        if tasks.kind != "values":
            raise ValueError(f"`augmentation` LabelOffset needs tasks of values. Received: {tasks.name}, of {tasks.kind}")
        return tasks

    def entropy_bits(self, tasks: Tasks) -> float:
        span = self.high - self.low
        if self.values is not None:
            offsets = self.low + span * np.arange(self.values) / self.values
            apart = offsets if self.modulo is None else np.round(np.mod(offsets, self.modulo), 9) % self.modulo
            share = np.unique(apart, return_counts=True)[1] / self.values
            return float(-np.sum(share * np.log2(share)))
        if self.modulo is None:
            return math.log2(span)
        turns, rest = divmod(span, self.modulo)  # a part of the circle is met once more often than the other
        parts = [(rest, (turns + 1) / span), (self.modulo - rest, turns / span)]
        return -sum(width * density * math.log2(density) for width, density in parts if width * density > 0)

    def draw(self, seed: Array, count: int, tasks: Tasks) -> Array:
        if self.values is None:
            return random.uniform(seed, (count, 1), self.low, self.high)
        place = tf.cast(random.integers(seed, (count, 1), self.values), tf.float32)
        return self.low + (self.high - self.low) * place / self.values

    def apply(self, keys: Array, y: Array) -> Array:
        return self._wrapped(y + keys)

    def undo(self, keys: Array, y: Array) -> Array:
        return self._wrapped(y - keys)

    def _wrapped(self, y: Array) -> Array:
        return y if self.modulo is None else tf.math.floormod(y, self.modulo)


class LabelRotation(Augmentation):
    """Points of the plane, such as (cos, sin) of a pose, are turned by any angle.

    Over the full circle y' says nothing of the task, which an offset over a part of the range leaves to be guessed.
    """

    def prepared(self, tasks: Tasks) -> Tasks:
        if tasks.kind != "values" or tasks.outputs != 2:
            raise ValueError(
                "`augmentation` LabelRotation needs tasks of two values. Received: "
                f"{tasks.name}, {tasks.outputs} {tasks.kind}"
            )
        return tasks

    def entropy_bits(self, tasks: Tasks) -> float:
        return math.log2(2.0 * math.pi)

    def draw(self, seed: Array, count: int, tasks: Tasks) -> Array:
        return random.uniform(seed, (count, 1), 0.0, 2.0 * math.pi)

    def apply(self, keys: Array, y: Array) -> Array:
        cosine, sine = tf.cos(keys), tf.sin(keys)
        return tf.concat([cosine * y[:, :1] - sine * y[:, 1:], sine * y[:, :1] + cosine * y[:, 1:]], axis=1)

    def undo(self, keys: Array, y: Array) -> Array:
        return self.apply(-keys, y)


class ClassResample(Augmentation):
    """Each episode has any of the classes as its outputs, in any order: what the paper calls inter-shuffle.

    For tasks of fixed groups of classes (`tasks.episodes(..., exclusive=False)`). The labels are changed by drawing other
    classes, so there is no key to apply or undo.
    """

    def prepared(self, tasks: Tasks) -> Tasks:
        if not hasattr(tasks, "resampled"):
            raise ValueError(
                "`augmentation` ClassResample needs tasks that have a pool of classes, such as tasks.episodes. Received: "
                f"{tasks.name}"
            )
        return tasks.resampled()

    def entropy_bits(self, tasks: Tasks) -> float:
        return math.log2(math.perm(len(tasks.classes(_TRAIN)), tasks.outputs))  # type: ignore[attr-defined]

    def draw(self, seed: Array, count: int, tasks: Tasks) -> Any:
        return ()

    def apply(self, keys: Any, y: Array) -> Array:
        return y

    def undo(self, keys: Any, y: Array) -> Array:
        return y


class Compose(Augmentation):
    """Several, one after the other, each with a key of its own; of none, labels stay what they are.

    Args:
        parts: augmentations.
    """

    def __init__(self, parts: Sequence[Augmentation]):
        self.parts = tuple(parts)

    def prepared(self, tasks: Tasks) -> Tasks:
        for part in self.parts:
            tasks = part.prepared(tasks)
        return tasks

    def entropy_bits(self, tasks: Tasks) -> float:
        return sum(part.entropy_bits(tasks) for part in self.parts)

    def draw(self, seed: Array, count: int, tasks: Tasks) -> tuple[Any, ...]:
        return tuple(part.draw(random.fold_in(seed, number), count, tasks) for number, part in enumerate(self.parts))

    def apply(self, keys: tuple[Any, ...], y: Array) -> Array:
        for part, own in zip(self.parts, keys, strict=True):
            y = part.apply(own, y)
        return y

    def undo(self, keys: tuple[Any, ...], y: Array) -> Array:
        for part, own in zip(reversed(self.parts), reversed(keys), strict=True):
            y = part.undo(own, y)
        return y


class AugmentedTasks(Tasks):
    """See `augment`.

    Attributes:
        tasks: what they are made of, with which meta-validation and meta-test go on as they are.
        augmentation: what their keys do.
        shared: whether an episode has one key.
    """

    def __init__(self, tasks: Tasks, augmentation: Augmentation, shared: bool):
        self.tasks, self.augmentation, self.shared = tasks, augmentation, shared
        self._prepared = augmentation.prepared(tasks)
        self.name = f"{tasks.name}, augmented"
        self.features, self.outputs, self.kind = tasks.features, tasks.outputs, tasks.kind
        self._depth: int = tasks._depth + 1 if isinstance(tasks, AugmentedTasks) else 0

    @property
    def entropy_bits(self) -> float:
        """H(e): how many bits of the key a learner has to read from the support (of a composition, the sum of its parts)."""
        return self.augmentation.entropy_bits(self.tasks)

    def available(self, split: str) -> int:
        return self._of(split).available(split)

    def examples(self, seed: Array, count: int, split: str) -> tuple[Array, Array]:
        x, y = self._of(split).examples(seed, count, split)
        return x, self.augmentation.apply(self.keys(seed, count), y) if split == _TRAIN else y

    def episode(self, seed: Array, *, steps: int, batch: int, query: int, split: str = "train") -> Episode:
        """As of the tasks it is made of; in meta-training, labels of support and query are changed by the key."""
        episode = self._of(split).episode(seed, steps=steps, batch=batch, query=query, split=split)
        if split != _TRAIN:
            return episode
        support = steps * batch
        every = tf.concat([tf.reshape(episode["y"], (support, self.outputs)), episode["query_y"]], axis=0)
        every = self.augmentation.apply(self.keys(seed, support + query), every)
        y = tf.reshape(every[:support], (steps, batch, self.outputs))
        return {**episode, "y": y, "query_y": tf.ensure_shape(every[support:], (query, self.outputs))}

    def keys(self, seed: Array, count: int) -> Any:
        """The keys of the episode of a seed: one, or `count` if each point has its own."""
        return self.augmentation.draw(random.fold_in(seed, _KEYS, self._depth), 1 if self.shared else count, self.tasks)

    def _of(self, split: str) -> Tasks:
        return self._prepared if split == _TRAIN else self.tasks


def augment(tasks: Any, augmentation: Augmentation, *, shared: bool = True) -> Any:
    """Tasks whose training episodes have their labels changed by a key.

    Args:
        tasks: a task distribution, or a `tasks.mixture`, whose parts are then augmented.
        augmentation: `LabelPermutation`, `LabelOffset`, `LabelRotation`, `ClassResample`, or several in a `Compose`.
        shared: whether the points of an episode share its key; otherwise each has its own, which is noise: a control.

    Returns:
        `AugmentedTasks`, or a `Mixture` of them. x stays; meta-validation and meta-test are untouched.

    Raises:
        ValueError: if the tasks have no such labels.

    Example:

    >>> from keras_blur.tasks import functions
    >>> tasks = augment(functions("blobs5"), LabelPermutation())
    >>> round(tasks.entropy_bits, 2)
    6.91
    """
    if isinstance(tasks, Mixture):
        return Mixture([augment(part, augmentation, shared=shared) for part in tasks.parts], tasks.weights)
    if not isinstance(tasks, Tasks) or not isinstance(augmentation, Augmentation):
        raise ValueError(
            "`tasks` must be a task distribution or a mixture, and `augmentation` an Augmentation. Received: "
            f"{tasks!r}, {augmentation!r}"
        )
    return AugmentedTasks(tasks, augmentation, shared)


def _for_each(keys: Array, y: Array) -> Array:
    """One key, or as many as labels, for each of the labels."""
    return tf.broadcast_to(keys, (y.shape[0], *keys.shape[1:]))
