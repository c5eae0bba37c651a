"""Meta-augmentation: a random key changes the labels of each training episode.

Source: "Meta-Learning Requires Meta-Augmentation" (Rajendran, Irpan and Jang, NeurIPS 2020). If x
alone predicts y in all meta-training tasks, a learner can memorise the tasks, ignore the support,
and fail on new tasks. Noise on x does not help, because H(Y|X) is unchanged. A key e, drawn once
per episode and used for support and query, with y' = g(e, y), raises it to H(Y'|X) = H(Y|X) + H(e)
if (e, x, y) to (x, y') is one-to-one. The learner has to read these bits of e from the support.

A key per point instead of per episode is label noise, which cannot be learned. It is available as a
control (`shared=False`). Keys have their own random stream and are never used in meta-validation or
meta-test.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from keras import ops

from keras_blur.core import random
from keras_blur.tasks.base import SPLITS, Episode, Tasks
from keras_blur.tasks.mixture import Mixture

Array = Any

_KEYS = 0x6B657973  # folded into an episode's seed for its keys
_TRAIN = SPLITS[0]


class Augmentation(abc.ABC):
    """A change of labels by a key: the base class of an augmentation of your own.

    A subclass says how keys are drawn (`draw`), what they do (`apply`, `undo`) and how many bits
    they hold (`entropy_bits`). `prepared` refuses tasks that it cannot augment.

    Example:

    >>> class Negation(Augmentation):
    ...     def entropy_bits(self, tasks):
    ...         return 1.0
    ...
    ...     def draw(self, seed, count, tasks):
    ...         return 2.0 * ops.cast(random.integers(seed, (count, 1), 2), "float32") - 1.0
    ...
    ...     def apply(self, keys, y):
    ...         return keys * y
    ...
    ...     def undo(self, keys, y):
    ...         return keys * y
    >>> from keras_blur.tasks import sines
    >>> augment(sines(), Negation()).entropy_bits
    1.0

    Source: "Meta-Learning Requires Meta-Augmentation" (Rajendran, Irpan and Jang, NeurIPS 2020).
    """

    def prepared(self, tasks: Tasks) -> Tasks:
        """The tasks whose training episodes get keys.

        Args:
            tasks: the tasks to augment.

        Returns:
            The same tasks, unless the augmentation replaces them.

        Raises:
            ValueError: if the tasks cannot be augmented.
        """
        return tasks

    @abc.abstractmethod
    def entropy_bits(self, tasks: Tasks) -> float:
        """H(e) in bits; the differential entropy if keys are continuous.

        Args:
            tasks: the tasks to augment.
        """

    @abc.abstractmethod
    def draw(self, seed: Array, count: int, tasks: Tasks) -> Any:
        """Draws keys.

        Args:
            seed: a seed, `[2]` int32.
            count: number of keys.
            tasks: the tasks to augment.

        Returns:
            Keys `[count, ...]`, or a tree of such arrays.
        """

    @abc.abstractmethod
    def apply(self, keys: Any, y: Array) -> Array:
        """Changes labels.

        Args:
            keys: one key or `n` keys, from `draw`.
            y: labels or values `[n, outputs]`, as in `Tasks.examples`.

        Returns:
            The changed labels `[n, outputs]`.
        """

    @abc.abstractmethod
    def undo(self, keys: Any, y: Array) -> Array:
        """The inverse of `apply`. Arguments and result are as there."""


class LabelPermutation(Augmentation):
    """Permutes the classes. The paper calls this intra-shuffle if an episode's classes are fixed.

    Raises:
        ValueError: from `augment`, if the tasks have no classes.

    Example:

    >>> keys = ops.array([[2, 0, 1]])
    >>> ops.convert_to_numpy(LabelPermutation().apply(keys, ops.array([[1.0, -1.0, -1.0]]))).tolist()
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
        return ops.take_along_axis(y, _for_each(keys, y), axis=1)

    def undo(self, keys: Array, y: Array) -> Array:
        return self.apply(ops.argsort(keys), y)


class LabelOffset(Augmentation):
    """Adds a random number to values.

    Args:
        low, high: bounds of the uniform random number.
        modulo: modulus of the sum; `None` for none.
        values: number of equally spaced values from `low` to below `high` to choose from; `None`
            for a continuous number.

    Raises:
        ValueError: if an argument is out of range; from `augment`, if the tasks have no values.

    Example:

    >>> moved = LabelOffset(0.0, 1.0, modulo=1.0).apply(ops.array([[0.75]]), ops.array([[0.5]]))
    >>> ops.convert_to_numpy(moved).tolist()
    [[0.25]]
    """

    def __init__(self, low: float, high: float, modulo: float | None = None, *, values: int | None = None):
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"`low` must be less than `high`, both finite. Received: low={low!r}, high={high!r}")
        if modulo is not None and not 0.0 < modulo < math.inf:
            raise ValueError(f"`modulo` must be a positive number or None. Received: modulo={modulo!r}")
        if values is not None and (isinstance(values, bool) or not isinstance(values, int) or values < 2):
            raise ValueError(f"`values` must be an integer of at least 2 or None. Received: values={values!r}")
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
        place = ops.cast(random.integers(seed, (count, 1), self.values), "float32")
        return self.low + (self.high - self.low) * place / self.values

    def apply(self, keys: Array, y: Array) -> Array:
        return self._wrapped(y + keys)

    def undo(self, keys: Array, y: Array) -> Array:
        return self._wrapped(y - keys)

    def _wrapped(self, y: Array) -> Array:
        return y if self.modulo is None else ops.mod(y, self.modulo)


class LabelRotation(Augmentation):
    """Rotates points of the plane, such as (cos, sin) of a pose, by a random angle.

    Over the full circle y' alone contains no information about the task, unlike an offset over a
    part of the range.

    Raises:
        ValueError: from `augment`, if the tasks do not have two values.

    Example:

    >>> turned = LabelRotation().apply(ops.array([[math.pi / 2]]), ops.array([[1.0, 0.0]]))
    >>> [round(float(one), 3) for one in turned[0]]
    [-0.0, 1.0]
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
        cosine, sine = ops.cos(keys), ops.sin(keys)
        return ops.concatenate([cosine * y[:, :1] - sine * y[:, 1:], sine * y[:, :1] + cosine * y[:, 1:]], axis=1)

    def undo(self, keys: Array, y: Array) -> Array:
        return self.apply(-keys, y)


class ClassResample(Augmentation):
    """Draws any classes in any order as the outputs of an episode; inter-shuffle in the paper.

    For tasks with fixed groups of classes (`tasks.episodes(..., exclusive=False)`). Labels change
    because other classes are drawn, so there is no key to apply or undo.

    Raises:
        ValueError: from `augment`, if the tasks have no pool of classes.

    Example:

    >>> from keras_blur.tasks import classes
    >>> augment(classes(ways=2, pool=4, exclusive=False), ClassResample()).entropy_bits == math.log2(4 * 3)
    True
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
    """Applies several augmentations in turn, each with its own key.

    Without parts, labels stay the same.

    Args:
        parts: augmentations.

    Raises:
        ValueError: from `augment`, if one of the augmentations does not fit the tasks.

    Example:

    >>> from keras_blur.tasks import pose
    >>> both = Compose([LabelOffset(0.0, 1.0, values=4), LabelOffset(0.0, 1.0, values=2)])
    >>> augment(pose(), both).entropy_bits
    3.0
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
    """Augmented tasks; `augment` makes them.

    Attributes:
        tasks: the original tasks, used unchanged in meta-validation and meta-test.
        augmentation: the augmentation.
        shared: whether all points of an episode have the same key.
    """

    def __init__(self, tasks: Tasks, augmentation: Augmentation, shared: bool):
        self.tasks, self.augmentation, self.shared = tasks, augmentation, shared
        self._prepared = augmentation.prepared(tasks)
        self.name = f"{tasks.name}, augmented"
        self.shape, self.outputs, self.kind = tasks.shape, tasks.outputs, tasks.kind
        self._depth: int = tasks._depth + 1 if isinstance(tasks, AugmentedTasks) else 0

    @property
    def entropy_bits(self) -> float:
        """H(e), the entropy of a key in bits: how much a learner has to read from the support.

        For a composition, the sum over its parts. It is an upper bound where different keys change
        labels alike, such as two offsets with equal sums.
        """
        return self.augmentation.entropy_bits(self.tasks)

    def available(self, split: str) -> int:
        return self._of(split).available(split)

    def support(self, query: int, split: str = "train") -> int:
        return self._of(split).support(query, split)

    def examples(self, seed: Array, count: int, split: str) -> tuple[Array, Array]:
        x, y = self._of(split).examples(seed, count, split)
        return x, self.augmentation.apply(self.keys(seed, count), y) if split == _TRAIN else y

    def episode(self, seed: Array, *, steps: int, batch: int, query: int, split: str = "train") -> Episode:
        """As for the original tasks; in meta-training, the key changes all labels."""
        episode = self._of(split).episode(seed, steps=steps, batch=batch, query=query, split=split)
        if split != _TRAIN:
            return episode
        support = steps * batch
        every = ops.concatenate([ops.reshape(episode["y"], (support, self.outputs)), episode["query_y"]], axis=0)
        every = self.augmentation.apply(self.keys(seed, support + query), every)
        y = ops.reshape(every[:support], (steps, batch, self.outputs))
        return {**episode, "y": y, "query_y": ops.reshape(every[support:], (query, self.outputs))}

    def keys(self, seed: Array, count: int) -> Any:
        """The keys of an episode: one, or `count` if each point has its own.

        Args:
            seed: seed of the episode, `[2]` int32.
            count: number of points of the episode.
        """
        return self.augmentation.draw(random.fold_in(seed, _KEYS, self._depth), 1 if self.shared else count, self.tasks)

    def _of(self, split: str) -> Tasks:
        return self._prepared if split == _TRAIN else self.tasks


def augment(tasks: Any, augmentation: Augmentation, *, shared: bool = True) -> Any:
    """Tasks whose training episodes have labels changed by a key.

    Args:
        tasks: a task distribution, or a `tasks.mixture`, whose parts are augmented.
        augmentation: `LabelPermutation`, `LabelOffset`, `LabelRotation`, `ClassResample`, or
            several in a `Compose`.
        shared: whether all points of an episode have the same key. Otherwise each has its own,
            which is noise: a control.

    Returns:
        `AugmentedTasks`, or a `Mixture` of them. Inputs, meta-validation and meta-test are
        unchanged.

    Raises:
        ValueError: if the augmentation does not fit the labels of the tasks.

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
    """Broadcasts one key to all labels."""
    return ops.broadcast_to(keys, (y.shape[0], *keys.shape[1:]))
