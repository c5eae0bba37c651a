"""What is learned: distributions of tasks, as functions of a seed.

An episode is one task: support batches, one a learning step, and a query batch that was in none of them. It is a pure
function of a seed, in TensorFlow operations, so that a stream of episodes can be started anywhere, sharded by number, and is
the same on every machine; `Tasks.dataset` wraps it as `tf.data`.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from keras_blur import random

Array = Any
Episode = dict[str, Array]

SPLITS = ("train", "validation", "test")


def check_split(split: str) -> None:
    """Raises a `ValueError` if there is no such split."""
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {', '.join(map(repr, SPLITS))}. Received: split={split!r}")


def stream(draw: Callable[[Array], Episode], start: int | tf.Variable, stride: int) -> tf.data.Dataset:
    """`draw` of the numbers start, start + stride, ...: endless, in order; of a variable, from its value when started."""
    numbers = tf.data.Dataset.from_tensors(0).flat_map(
        lambda _: tf.data.Dataset.counter(start=tf.cast(tf.convert_to_tensor(start), tf.int64), step=stride)
    )
    return numbers.map(draw, num_parallel_calls=1, deterministic=True).prefetch(4)


class Tasks(abc.ABC):
    """A distribution of tasks of one shape.

    Attributes:
        name: what the tasks are.
        features: number of input features.
        outputs: size of the output: classes, or 1 for a value.
        kind: what the output is: `"classes"`, `"values"`, or `"bits"`, each a label of its own, +1 or -1, 0 where unscored.
    """

    name: str
    features: int
    outputs: int
    kind: str = "classes"

    @abc.abstractmethod
    def available(self, split: str) -> int:
        """How many different examples one episode can have."""

    @abc.abstractmethod
    def examples(self, seed: Array, count: int, split: str) -> tuple[Array, Array]:
        """Examples of the task that the seed names, no two the same where examples are finite.

        Args:
            seed: a seed.
            count: how many.
            split: `"train"`, `"validation"` or `"test"`: meta-training, choosing, reporting; they share no example.

        Returns:
            x `[count, features]`, and y `[count, outputs]`: +1 for the true class and -1 for others, or values; any dtype of
            numbers. Whatever takes the tasks checks one episode with `checks.check_tasks` first.
        """

    def episode(self, seed: Array, *, steps: int, batch: int, query: int, split: str = "train") -> Episode:
        """One episode.

        Args:
            seed: a seed.
            steps: number of support batches.
            batch: examples in each.
            query: examples of the query.
            split: as in `examples`.

        Returns:
            `x` `[steps, batch, features]`, `y` `[steps, batch, outputs]`, `query_x` and `query_y`. A support that needs more
            examples than there are goes through them again in the same order; those of the query are never in it.

        Raises:
            ValueError: if the split is unknown, or has too few examples for one batch and the query.
        """
        check_split(split)
        limit = self.available(split)
        if query + batch > limit:
            raise ValueError(
                f"A batch of {batch} and a query of {query} need {query + batch} different examples; the split {split!r} "
                f"of {self.name} has {limit}."
            )
        different = min(steps * batch, limit - query)
        x, y = (tf.cast(one, tf.float32) for one in self.examples(seed, query + different, split))
        place = query + tf.range(steps * batch) % different
        return {
            "x": tf.reshape(tf.gather(x, place), (steps, batch, self.features)),
            "y": tf.reshape(tf.gather(y, place), (steps, batch, self.outputs)),
            "query_x": tf.ensure_shape(x[:query], (query, self.features)),
            "query_y": tf.ensure_shape(y[:query], (query, self.outputs)),
        }

    def dataset(
        self,
        seed: int,
        *,
        steps: int,
        batch: int,
        query: int,
        split: str = "train",
        start: int | tf.Variable = 0,
        stride: int = 1,
    ) -> tf.data.Dataset:
        """An endless stream of episodes; episode i depends on the seed and i alone.

        Args:
            seed: a number.
            steps: support batches of an episode.
            batch: examples in each.
            query: examples of the query.
            split: as in `examples`.
            start: number of the first episode; of a variable, its value when the stream is started.
            stride: distance to the next: shard j of n has start j and stride n.
        """
        check_split(split)
        root = random.fold_in(random.seed_of(seed), SPLITS.index(split))

        def draw(number: Array) -> Episode:
            return self.episode(random.fold_in(root, number), steps=steps, batch=batch, query=query, split=split)

        return stream(draw, start, stride)
