"""Task distributions as functions of a seed.

An episode is one task: support batches, one per learning step, and a query batch of other examples.
It is a pure function of a seed in `keras.ops`. A stream of episodes can therefore start anywhere,
can be sharded by number, and is identical on every machine. `Tasks.dataset` wraps it as `tf.data`,
or on JAX as an iterable of arrays.
"""

from __future__ import annotations

import abc
import math
from typing import Any

from keras import ops

from keras_blur.backend import stream
from keras_blur.core import random

Array = Any
Episode = dict[str, Array]

SPLITS = ("train", "validation", "test")


def check_split(split: str) -> None:
    """Raises a `ValueError` for an unknown split."""
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {', '.join(map(repr, SPLITS))}. Received: split={split!r}")


class Tasks(abc.ABC):
    """A distribution of tasks of one shape: the base class of tasks of your own.

    A subclass sets the attributes, and says which examples a task has (`examples`) and how many
    (`available`).

    Attributes:
        name: description of the tasks.
        shape: shape of an example, such as `(height, width, channels)` of an image.
        outputs: number of outputs: classes, or dimensions of a value.
        kind: output kind: `"classes"`, `"values"`, or `"bits"` (independent labels of +1 or -1, or
            0 if not scored).

    Example:

    >>> class Lines(Tasks):
    ...     name, shape, outputs = "lines", (2,), 2
    ...
    ...     def available(self, split):
    ...         return 2**24
    ...
    ...     def examples(self, seed, count, split):
    ...         normal = random.normal(random.fold_in(seed, 0), (2, 1))
    ...         x = random.normal(random.fold_in(seed, 1, SPLITS.index(split)), (count, 2))
    ...         side = ops.where(ops.matmul(x, normal) > 0.0, 1.0, -1.0)
    ...         return x, ops.concatenate([-side, side], axis=1)
    >>> Lines().features, Lines().kind
    (2, 'classes')
    """

    name: str
    shape: tuple[int, ...]
    outputs: int
    kind: str = "classes"

    @property
    def features(self) -> int:
        """Number of features of an example: the product of `shape`."""
        return math.prod(self.shape)

    @abc.abstractmethod
    def available(self, split: str) -> int:
        """The largest number of different examples in an episode.

        Args:
            split: as in `examples`.

        Raises:
            ValueError: if the split is unknown.
        """

    def support(self, query: int, split: str = "train") -> int:
        """The largest number of different examples in the support of an episode.

        Override it if the support repeats a smaller set of examples, as in few-shot tasks.

        Args:
            query: number of query examples.
            split: as in `examples`.
        """
        return self.available(split) - query

    @abc.abstractmethod
    def examples(self, seed: Array, count: int, split: str) -> tuple[Array, Array]:
        """Draws examples of the task given by the seed. Finite sets are drawn without replacement.

        Args:
            seed: a seed, `[2]` int32, such as `keras_blur.random.seed_of(0)`.
            count: number of examples.
            split: `"train"` for meta-training, `"validation"` for model selection or `"test"` for
                reporting. Splits have no example in common.

        Returns:
            x `[count, *shape]`, and y `[count, outputs]`: +1 for the true class and -1 for the
            others, or values. Any numeric dtype will do. `MetaTrainer` and the reports first check
            one episode.
        """

    def episode(self, seed: Array, *, steps: int, batch: int, query: int, split: str = "train") -> Episode:
        """Draws one episode.

        Args:
            seed: a seed, `[2]` int32.
            steps: number of support batches.
            batch: examples per support batch.
            query: number of query examples.
            split: as in `examples`.

        Returns:
            A dict of float32 arrays: `x` `[steps, batch, features]`, `y` `[steps, batch, outputs]`,
            `query_x` `[query, features]` and `query_y` `[query, outputs]`. Examples are rows,
            whatever their `shape`. If the support needs more examples than exist, they are repeated
            in the same order. It never contains query examples.

        Raises:
            ValueError: if the split is unknown or has too few examples for one batch and the query.

        Example:

        >>> from keras_blur.tasks import functions
        >>> episode = functions("xor").episode(random.seed_of(0), steps=3, batch=4, query=5)
        >>> {name: tuple(value.shape) for name, value in episode.items()}
        {'x': (3, 4, 2), 'y': (3, 4, 2), 'query_x': (5, 2), 'query_y': (5, 2)}
        """
        check_split(split)
        limit = self.available(split)
        if query + batch > limit:
            raise ValueError(
                f"`batch` and `query` (a trainer's `batch_size` and `query_size`) must add up to at most {limit}, the "
                f"number of different examples that an episode has in the split {split!r} of {self.name}. Received: "
                f"batch={batch}, query={query}"
            )
        different = min(steps * batch, limit - query)
        x, y = (ops.cast(one, "float32") for one in self.examples(seed, query + different, split))
        place = query + ops.arange(steps * batch) % different
        return {
            "x": ops.reshape(ops.take(x, place, axis=0), (steps, batch, self.features)),
            "y": ops.reshape(ops.take(y, place, axis=0), (steps, batch, self.outputs)),
            "query_x": ops.reshape(x[:query], (query, self.features)),
            "query_y": ops.reshape(y[:query], (query, self.outputs)),
        }

    def dataset(
        self,
        seed: int,
        *,
        steps: int,
        batch: int,
        query: int,
        split: str = "train",
        start: Any = 0,
        stride: int = 1,
    ) -> Any:
        """An endless stream of episodes. Episode i depends only on i and the seed.

        Args:
            seed: random seed.
            steps: number of support batches.
            batch: examples per support batch.
            query: number of query examples.
            split: as in `examples`.
            start: number of the first episode. A variable is read when iteration starts.
            stride: step between episode numbers. Shard j of n has start j and stride n.

        Returns:
            An endless `tf.data.Dataset` of episodes; on JAX an iterable of dicts of numpy arrays.

        Raises:
            ValueError: if the split is unknown or has too few examples; the latter on JAX when
                iteration starts.

        Example:

        >>> from keras_blur.tasks import functions
        >>> first = next(iter(functions("xor").dataset(0, steps=3, batch=4, query=5)))
        >>> tuple(first["x"].shape)
        (3, 4, 2)
        """
        check_split(split)
        root = random.fold_in(random.seed_of(seed), SPLITS.index(split))

        def draw(number: Array) -> Episode:
            return self.episode(random.fold_in(root, number), steps=steps, batch=batch, query=query, split=split)

        return stream([draw], None, start, stride)
