"""Few-shot episodes: learn unseen classes from a few examples of each.

Source: "Matching Networks for One Shot Learning" (2016), section 4. An episode consists of some
classes, a support of a few examples of each, and a query of other examples of the same classes.
Meta-training, meta-validation and meta-test use different classes, not only different images.
Scores therefore measure learning rather than knowledge of the classes.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from typing import Any

import numpy as np
from keras import ops

from keras_blur import arguments
from keras_blur.backend import constant
from keras_blur.core import random
from keras_blur.tasks.base import SPLITS, Episode, Tasks, check_split
from keras_blur.tasks.datasets import Images, load_images
from keras_blur.tasks.images import resized

Array = Any

_SIZE = 28  # the side to which the literature shrinks omniglot


@dataclasses.dataclass(frozen=True)
class _Classes:
    """The images of some classes, grouped by class."""

    images: Array  # [n, *shape]
    labels: np.ndarray  # the classes' labels in the set, ascending
    starts: np.ndarray  # where each class begins
    counts: np.ndarray  # how many images it has
    groups: np.ndarray  # which group it belongs to; all to one where there are none


class EpisodeTasks(Tasks):
    """Few-shot episodes; `episodes` and `classes` make them."""

    def __init__(
        self,
        splits: dict[str, tuple[np.ndarray, np.ndarray]],
        ways: int,
        shots: int,
        name: str,
        exclusive: bool = True,
        groups: np.ndarray | None = None,
    ):
        self.name, self.outputs, self.shots, self.exclusive = name, ways, shots, exclusive
        self.shape = tuple(splits["train"][0].shape[1:])
        self._splits = {split: _by_class(*splits[split], groups) for split in SPLITS}

    def classes(self, split: str) -> tuple[int, ...]:
        """The labels, in the image set, of the classes of a split.

        Args:
            split: `"train"`, `"validation"` or `"test"`. Splits have no class in common.

        Raises:
            ValueError: if the split is unknown.
        """
        return tuple(int(label) for label in self._classes(split).labels)

    def resampled(self) -> EpisodeTasks:
        """The same tasks, with any classes in any order as the outputs of an episode."""
        made = copy.copy(self)
        made.exclusive = True
        made._splits = {
            split: dataclasses.replace(known, groups=np.zeros_like(known.groups)) for split, known in self._splits.items()
        }
        return made

    def available(self, split: str) -> int:
        return self.outputs * int(self._drawable(split).counts.min())

    def support(self, query: int, split: str = "train") -> int:
        return self.outputs * self.shots

    def examples(self, seed: Array, count: int, split: str) -> tuple[Array, Array]:
        """As in `Tasks`. Classes alternate, so any stretch of examples is balanced."""
        known = self._drawable(split)
        each = -(-count // self.outputs)
        if each > known.counts.min():
            raise ValueError(
                f"`count` must be at most {self.available(split)} in the split {split!r} of {self.name}, as its smallest "
                f"class has {known.counts.min()} images. Received: count={count}"
            )
        if split == "train" and not self.exclusive:
            group = random.integers(random.fold_in(seed, 0), (), len(known.labels) // self.outputs)
            chosen = group * self.outputs + ops.arange(self.outputs)
        else:
            chosen = self._drawn(random.fold_in(seed, 0), known)
        # The images of a class in random order; the places that only larger classes fill are
        # missing.
        most = int(known.counts.max())
        missing = ops.arange(most) >= ops.take(ops.convert_to_tensor(known.counts, "int32"), chosen, axis=0)[:, None]
        order = _first_of_random_order(random.fold_in(seed, 1), missing, each)
        place = ops.take(ops.convert_to_tensor(known.starts, "int32"), chosen, axis=0)[:, None] + order
        place = ops.reshape(ops.transpose(place), (-1,))[:count]
        label = ops.arange(count) % self.outputs
        x = ops.reshape(ops.take(known.images, place, axis=0), (count, *self.shape))
        return x, 2.0 * ops.one_hot(label, self.outputs) - 1.0

    def _drawn(self, seed: Array, known: _Classes) -> Array:
        """Indices of the classes of an episode, `[ways]`: any classes of one large enough group."""
        groups, sizes = np.unique(known.groups, return_counts=True)
        large = groups[sizes >= self.outputs]
        if len(groups) == 1:
            return random.permutation(seed, len(known.labels))[: self.outputs]
        group = ops.take(ops.convert_to_tensor(large), random.integers(random.fold_in(seed, 0), (), len(large)), axis=0)
        return _first_of_random_order(random.fold_in(seed, 1), ops.convert_to_tensor(known.groups) != group, self.outputs)

    def episode(self, seed: Array, *, steps: int, batch: int, query: int, split: str = "train") -> Episode:
        """Draws one episode.

        Args:
            seed: a seed.
            steps: number of support batches.
            batch: examples per support batch.
            query: number of query examples, disjoint from the support and balanced up to one
                example.
            split: as in `examples`.

        Returns:
            As `Tasks.episode`. The support has `shots` examples of each class, with alternating
            classes. Batches cycle through it, even within a batch larger than the support. Fewer
            batches see only its beginning.

        Raises:
            ValueError: if the split is unknown, has fewer classes than an episode, or a class has
                too few examples.
        """
        least = int(self._drawable(split).counts.min())
        each = -(-query // self.outputs)
        if self.shots + each > least:
            raise ValueError(
                f"`shots` must be at most {least - each} where `query` is {query}: that is {each} of each of the "
                f"{self.outputs} classes, and the smallest class of the split {split!r} of {self.name} has {least} images. "
                f"Received: shots={self.shots}, query={query}"
            )
        support = self.outputs * self.shots
        x, y = self.examples(seed, support + query, split)
        place = ops.arange(steps * batch) % support
        return {
            "x": ops.reshape(ops.take(x, place, axis=0), (steps, batch, self.features)),
            "y": ops.reshape(ops.take(y, place, axis=0), (steps, batch, self.outputs)),
            "query_x": ops.reshape(x[support:], (query, self.features)),
            "query_y": ops.reshape(y[support:], (query, self.outputs)),
        }

    def _classes(self, split: str) -> _Classes:
        check_split(split)
        return self._splits[split]

    def _drawable(self, split: str) -> _Classes:
        known = self._classes(split)
        _, sizes = np.unique(known.groups, return_counts=True)
        if self.outputs > sizes.max():
            what = "the number of classes" if len(sizes) == 1 else "the largest number of classes of a group"
            raise ValueError(
                f"`ways` must be at most {sizes.max()}, {what} in the split {split!r} of {self.name}. "
                f"Received: ways={self.outputs}"
            )
        return known


def _first_of_random_order(seed: Array, missing: Array, count: int) -> Array:
    """The first indices of a random order of the last axis, with missing entries at the end."""
    size = missing.shape[-1]
    order = random.permutation(seed, size, tuple(missing.shape[:-1]))
    last = ops.take_along_axis(ops.cast(missing, "int32"), order, axis=-1)
    kept = ops.argsort(last * size + ops.arange(size, dtype="int32"), axis=-1)
    return ops.take_along_axis(order, kept, axis=-1)[..., :count]


def episodes(
    name: str = "omniglot",
    ways: int = 5,
    shots: int = 1,
    *,
    size: int | None = None,
    standardize: bool = True,
    exclusive: bool = True,
    group: str | None = None,
    data_dir: str | os.PathLike[str] | None = None,
) -> EpisodeTasks:
    """Few-shot episodes on an image set, each with `ways` random classes of the split.

    Splits have different classes. If the training and test images of the set have no class in
    common, as in omniglot, meta-test uses the test classes and meta-validation a quarter of the
    others. Otherwise the images are pooled, and meta-training gets 60 % of the classes,
    meta-validation and meta-test 20 % each. The assignment depends on the set only, not on `ways`
    or `shots`, so a genome trained with one setting meets unseen classes under any other.

    Args:
        name: `"digits"` or a prepared `tensorflow_datasets` image set.
        ways: number of classes of an episode.
        shots: support examples per class.
        size: target size of images, resized by area interpolation; `None` is 28, or the shorter
            side of the images if smaller. Colours are averaged.
        standardize: whether to standardise pixels with the mean and standard deviation of the
            meta-training images (one number each for all pixels). Otherwise pixels are in [0, 1].
        exclusive: whether meta-training draws any classes in any order. Otherwise an episode uses
            one of several fixed groups of neighbouring classes in a fixed order, which a learner
            can memorise ("non-mutually-exclusive" tasks). `tasks.augment` is for this case.
            Meta-validation and meta-test always draw any classes.
        group: name of an integer feature that groups classes, such as `"alphabet"` in omniglot. All
            classes of an episode are then from one group, groups with fewer than `ways` classes are
            not used, and splits have no group in common. `None` draws from all classes.
        data_dir: folder of prepared sets; `None` uses the environment variable `TFDS_DATA_DIR`,
            then the default of `tensorflow_datasets`.

    Returns:
        `EpisodeTasks`, of the kind `"classes"`.

    Raises:
        ImportError: if the extra `data` is not installed.
        ValueError: if data are missing, an argument does not fit them, or the group does not exist.
            Too few classes in a split other than `"train"` raise when the split is used.

    Example:

    >>> tasks = episodes("digits", ways=3, shots=5)
    >>> tasks.shape, tasks.outputs
    ((8, 8, 1), 3)
    >>> len(tasks.classes("train")), len(tasks.classes("test"))
    (6, 2)
    """
    arguments.integer("ways", ways, 2)
    arguments.count("shots", shots)
    if size is not None:
        arguments.count("size", size)
    arguments.flag("standardize", standardize)
    arguments.flag("exclusive", exclusive)

    def shrink(x: np.ndarray) -> np.ndarray:
        return resized(x, size or min(_SIZE, *x.shape[1:3])).mean(-1, keepdims=True)

    if group is not None and not exclusive:
        raise ValueError(f"`exclusive` must be True with `group`, of whose classes any are drawn. Received: group={group!r}")
    loaded = load_images(name, data_dir, group=group, convert=shrink)
    side, scale, groups = loaded.x_train.shape[1], loaded.scale, loaded.groups
    splits = _split_by_class(loaded)
    del loaded  # a large set exists only once, and is changed in place from now on
    most = len(np.unique(splits["train"][1]))
    if ways > most:
        raise ValueError(
            f"`ways` must be at most {most}, the number of classes that {name} has for meta-training. Received: ways={ways}"
        )
    for x, _ in splits.values():
        x /= scale
    if standardize:
        mean, deviation = splits["train"][0].mean(), splits["train"][0].std() + 1e-6
        for x, _ in splits.values():
            x -= mean
            x /= deviation
    of_a_group = "" if group is None else f" of one {group}"
    title = f"{name} {side}x{side}, {ways} ways{of_a_group}, {shots} shots"
    made = EpisodeTasks(splits, ways, shots, title, exclusive, groups)
    made.available("train")  # raises where no group has enough classes
    return made


def _split_by_class(loaded: Images) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images and labels of the three splits, which have no class and no group in common."""
    of_train, of_test = loaded.y_train, loaded.y_test
    if loaded.groups is not None:
        of_train, of_test = loaded.groups[of_train], loaded.groups[of_test]
    own = not np.intersect1d(of_train, of_test).size
    pooled = of_train if own else np.concatenate([of_train, of_test])
    units = np.random.default_rng(0).permutation(np.unique(pooled))  # classes, or groups of them
    held = round(len(units) * (0.25 if own else 0.2))
    chosen = {
        "train": units[held:] if own else units[2 * held :],
        "validation": units[:held],
        "test": np.unique(of_test) if own else units[held : 2 * held],
    }

    def taken(some: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        first, second = np.isin(of_train, some), np.isin(of_test, some)
        x = np.concatenate([loaded.x_train[first], loaded.x_test[second]])
        return x, np.concatenate([loaded.y_train[first], loaded.y_test[second]])

    return {split: taken(some) for split, some in chosen.items()}


def _by_class(x: np.ndarray, y: np.ndarray, groups: np.ndarray | None) -> _Classes:
    order = np.argsort(y, kind="stable")
    labels, starts, counts = np.unique(y[order], return_index=True, return_counts=True)
    own = np.zeros_like(labels) if groups is None else groups[labels]
    return _Classes(constant(x[order]), labels, starts, counts, own)
