"""A learner learns one task from batches. Pure: what it reads is given, what it writes is returned.

Meta-learning, comparisons and benchmarks see every way to learn through these three functions, so that all of them get the
same batches and the same initial networks.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from keras_blur import random
from keras_blur.distribution import ALL, Share

Array = Any
Outer = Mapping[str, Array]


class Learner(abc.ABC):
    """How something learns inside a task.

    Arrays may carry leading axes `[members, tasks]`: members differ in their outer parameters, tasks in their data.
    """

    @abc.abstractmethod
    def init(self, seed: Array, features: int, outputs: int, leading: tuple[int, ...] = (), share: Share = ALL) -> Any:
        """The state before the first batch.

        Args:
            seed: a seed; equal seeds give equal initial networks, to every learner and every member.
            features: number of input features.
            outputs: size of the output.
            leading: sizes of the leading axes; members get the same network, tasks their own.
            share: which of the tasks of all replicas these are; a task's network is the same whatever its replica.

        Returns:
            A nest of tensors.
        """

    @abc.abstractmethod
    def step(self, outer: Outer, state: Any, x: Array, y: Array) -> tuple[Any, Array]:
        """Learns from a batch.

        Args:
            outer: the outer parameters.
            state: from `init` or `step`.
            x: `[..., batch, features]`.
            y: `[..., batch, outputs]`: +1 for the true class and -1 for others, or values.

        Returns:
            The new state, and the prediction for x before it learned.
        """

    @abc.abstractmethod
    def predict(self, outer: Outer, state: Any, x: Array) -> Array:
        """Outputs `[..., batch, outputs]`: logits of the classes, or values."""


def draw_kernel(
    seed: Array, place: tuple[int, ...], shape: tuple[int, int], leading: tuple[int, ...], share: Share = ALL
) -> Array:
    """An initial kernel: normal, of deviation `1 / sqrt(in)`; equal for members (the first axis), not for tasks."""
    tasks, rows = leading[1:], None
    if share.count > 1:
        rows = share.index + share.count * tf.range(leading[1])
        tasks = (leading[1] * share.count, *leading[2:])
    kernel = random.normal(random.fold_in(seed, *place), (*tasks, *shape), rows) / float(shape[0]) ** 0.5
    return tf.broadcast_to(kernel, (*leading, *shape))
