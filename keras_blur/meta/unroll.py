"""The outer gradient by differentiation through the inner loop.

Source: "Meta-Learning Bidirectional Update Rules" (Sandler et al., ICML 2021), section 3.3.

`Unroll` differentiates through the whole episode. `TruncatedUnroll` differentiates through one
truncation window at a time and carries the learner to the next one, as in truncated backpropagation
through time ("An efficient gradient-based algorithm for on-line training of recurrent network
trajectories", Williams and Peng, 1990). Memory depends on the window and not on the episode, but
the gradient ignores effects beyond the window.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import keras
from keras import ops

from keras_blur import backend
from keras_blur.distribution import Shard
from keras_blur.learners.base import Learner
from keras_blur.meta.estimator import Array, Carried, Episodes, Estimate, Estimator, Outer, Truncated, start


@dataclasses.dataclass(frozen=True)
class Unroll(Estimator):
    """The exact outer gradient through the full inner loop.

    Args:
        steps: learning steps of an episode.
        trajectory_loss_weight: weight of the mean loss of the predictions made during learning,
            added to the query loss.
        loss: `"auto"`, `"cross_entropy"`, `"binary"` or `"squared"`, as in `Estimator`.
        kind: output kind of the tasks; `MetaTrainer` sets it.
        recompute: whether to save memory by recomputing the unrolled steps, as in `Estimator`.

    Raises:
        ValueError: if an argument is out of range.

    Example:

    >>> Unroll(steps=10, trajectory_loss_weight=0.5).steps
    10

    Source: "Meta-Learning Bidirectional Update Rules" (Sandler et al., ICML 2021), section 3.3.
    """

    def local_estimate(
        self, learner: Learner, outer: Outer, episodes: Episodes, seed: Array, carried: Carried, first: Any, shard: Shard
    ) -> tuple[Any, Any]:
        def estimate(outer: Outer, shard: Shard) -> tuple[Estimate, Any]:
            def score(outer: Outer) -> tuple[Array, Any]:
                state = self.begin(learner, outer, episodes, seed, carried, first, shard)
                losses, accuracies, state = self.objective(learner, outer, episodes, state)
                loss = backend.mean(losses, axis=1)
                # Members are independent, so the gradient of the sum contains each member's own.
                return ops.sum(loss), (loss, backend.mean(accuracies, axis=1), state)

            (loss, accuracy, state), gradients = backend.gradient(score, dict(outer))
            return Estimate(gradients, loss, accuracy), state

        def like(members: int, dtype: str) -> Estimate:
            gradients = {name: keras.KerasTensor((members, *value.shape[1:]), value.dtype) for name, value in outer.items()}
            return Estimate(gradients, keras.KerasTensor((members,), dtype), keras.KerasTensor((members,), dtype))

        return self.by_member(estimate, like, learner, outer, episodes, seed, shard)

    def combine(self, outer: Outer, measured: Any, seed: Array, carried: Carried, first: Any) -> tuple[Estimate, Any]:
        return measured, ()


@dataclasses.dataclass(frozen=True)
class TruncatedUnroll(Truncated, Unroll):
    """The outer gradient through truncation windows of a long unroll.

    The learner is carried from window to window.

    Args:
        steps: learning steps of a truncation window. Each window ends with the query.
        trajectory_loss_weight: weight of the mean loss of the predictions made during learning,
            added to the query loss.
        loss: `"auto"`, `"cross_entropy"`, `"binary"` or `"squared"`, as in `Estimator`.
        kind: output kind of the tasks; `MetaTrainer` sets it.
        recompute: whether to save memory by recomputing the unrolled steps, as in `Estimator`.
        episode_steps: learning steps of an episode, a multiple of `steps`.

    Raises:
        ValueError: if an argument is out of range, or `episode_steps` is not a multiple of `steps`.

    Example:

    >>> TruncatedUnroll(steps=10, episode_steps=100).horizon
    100

    Source: truncated backpropagation through time, "An efficient gradient-based algorithm for
    on-line training of recurrent network trajectories" (Williams and Peng, 1990).
    """

    def nothing_carried(self, learner: Learner, outer: Outer, episodes: Episodes) -> Carried:
        return Carried(backend.tree_map(ops.zeros_like, start(learner, outer, episodes, ops.zeros(2, "int32"))))
