"""Weighted mixtures of task distributions.

Source: "Meta-Learning Bidirectional Update Rules" (2021), section 4.2, meta-trains on three tasks
made from one image set. A rule that generalises needs more variety, in adjustable proportions.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from keras_blur.backend import stream
from keras_blur.core import random
from keras_blur.tasks.base import SPLITS, Episode, Tasks, check_split

Array = Any


class Mixture:
    """A weighted mixture of task distributions; `mixture` makes and checks one.

    Attributes:
        parts: the task distributions.
        weights: probabilities of the parts, with sum 1.

    Example:

    >>> from keras_blur.tasks import functions
    >>> both = mixture({functions("xor"): 3, functions("circle"): 1})
    >>> [part.name for part in both.parts]
    ['xor', 'circle']
    """

    def __init__(self, parts: Sequence[Tasks], weights: Sequence[float]):
        self.parts, self.weights = tuple(parts), tuple(weights)

    def part_of(self, seed: int, number: int) -> int:
        """Index of the part used in a draw. It depends only on the seed and the number of the draw.

        Args:
            seed: a 32-bit integer.
            number: number of the draw, from 0.

        Example:

        >>> from keras_blur.tasks import functions
        >>> both = mixture({functions("xor"): 3, functions("circle"): 1})
        >>> [both.part_of(0, number) for number in range(8)]
        [0, 1, 0, 1, 1, 0, 0, 0]
        """
        rng = np.random.default_rng([seed % 2**32, number])  # numpy takes no negative seed
        return int(rng.choice(len(self.parts), p=self.weights))

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
        """An endless stream of episodes of all parts, which must have one shape and kind.

        Episode i is episode i of the stream of part `part_of(seed, i)` with the same seed. The part
        is drawn by numpy, so the stream runs in the current process and cannot be sent to a
        `tf.data` service.

        Args:
            seed: random seed.
            steps: number of support batches.
            batch: examples per support batch.
            query: number of query examples.
            split: `"train"`, `"validation"` or `"test"`.
            start: number of the first episode. A variable is read when iteration starts.
            stride: step between episode numbers. Shard j of n has start j and stride n.

        Returns:
            A dataset of episodes, as in `Tasks.dataset`.

        Raises:
            ValueError: if the parts differ in shape, outputs or kind, the split is unknown, or a
                part has too few examples.

        Example:

        >>> from keras_blur.tasks import functions
        >>> both = mixture({functions("xor"): 3, functions("circle"): 1})
        >>> tuple(next(iter(both.dataset(0, steps=3, batch=4, query=5)))["x"].shape)
        (3, 4, 2)
        """
        if len({(part.shape, part.outputs, part.kind) for part in self.parts}) > 1:
            shapes = "; ".join(f"{one.name}: examples {one.shape}, {one.outputs} {one.kind}" for one in self.parts)
            raise ValueError(
                "The parts of a mixture must have one shape and kind to be one stream; otherwise use `parts` and "
                f"`part_of`. Received: {shapes}"
            )
        check_split(split)
        root = random.fold_in(random.seed_of(seed), SPLITS.index(split))

        def drawing(part: Tasks) -> Callable[[Array], Episode]:
            return lambda number: part.episode(
                random.fold_in(root, number), steps=steps, batch=batch, query=query, split=split
            )

        return stream([drawing(part) for part in self.parts], lambda number: self.part_of(seed, number), start, stride)


def mixture(weights: Mapping[Tasks, float] | Sequence[tuple[Tasks, float]]) -> Mixture:
    """Mixes task distributions with weights, for `meta.MetaTrainer`.

    All parts must have one kind, but their shapes may differ. For different shapes, `MetaTrainer`
    keeps a stream of each part. For equal shapes, `Mixture.dataset` mixes them in one stream.

    Args:
        weights: a positive weight for each task distribution. Only ratios matter.

    Returns:
        A `Mixture`.

    Raises:
        ValueError: if there is no part, a weight is not positive and finite, a part is not a task
            distribution, or kinds differ.

    Example:

    >>> from keras_blur.tasks import functions
    >>> mixture({functions("xor"): 3, functions("blobs5"): 1}).weights
    (0.75, 0.25)
    """
    given = weights.items() if isinstance(weights, Mapping) else weights
    pairs: list[Any] = [tuple(pair) if isinstance(pair, (tuple, list)) else (pair,) for pair in given]
    if not pairs or any(len(pair) != 2 or not isinstance(pair[0], Tasks) for pair in pairs):
        raise ValueError(f"`weights` must give a weight for each of one or more task distributions. Received: {weights!r}")
    for tasks, weight in pairs:
        if isinstance(weight, bool) or not isinstance(weight, numbers.Real) or not 0.0 < float(weight) < math.inf:
            raise ValueError(f"`weights` must be positive, finite numbers. Received: {weight!r} for {tasks.name}")
    if len({tasks.kind for tasks, _ in pairs}) > 1:
        found = ", ".join(f"{tasks.name} has {tasks.kind}" for tasks, _ in pairs)
        raise ValueError(f"`weights` must be for tasks of one kind, classes or values. Received: {found}")
    total = sum(float(weight) for _, weight in pairs)
    return Mixture([tasks for tasks, _ in pairs], [float(weight) / total for _, weight in pairs])
