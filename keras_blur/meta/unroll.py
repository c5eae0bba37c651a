"""The gradient of the outer parameters by differentiating through the whole of a learner's learning.

Source: "Meta-Learning Bidirectional Update Rules" (Sandler et al., ICML 2021), section 3.3: unroll the inner loop, then
take the softmax cross-entropy of the output's first state on inputs not seen before (the printed formula lacks its minus
sign), and descend it by backpropagation through the unroll. An optional second term is the loss along the way: each step's
prediction of its own batch, before it learns from it, which costs nothing and gives early steps a gradient of their own.

The loop is one `tf.while_loop` with a static bound, so that it compiles in a time that does not grow with its length,
under XLA too. Its gradient keeps what each step computed; with `recompute` only the state at each segment's start is kept
and a segment is computed again when its gradient is wanted, so that memory grows with the square root of the steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import tensorflow as tf

from keras_blur.learners.base import Learner

Array = Any


class Estimate(NamedTuple):
    """An estimate of the outer gradient of each member.

    Attributes:
        gradients: by name, as the outer parameters, `[members, ...]`.
        loss: the objective of each member, the mean over tasks, `[members]`.
        accuracy: query accuracy of each member, `[members]`.
    """

    gradients: Mapping[str, Array]
    loss: Array
    accuracy: Array


def cross_entropy(prediction: Array, y: Array) -> Array:
    """Mean softmax cross-entropy of logits against +1/-1 labels: `[..., batch, classes]` to `[...]`."""
    labels = tf.broadcast_to(tf.cast(0.5 * (y + 1.0), prediction.dtype), tf.shape(prediction))
    return tf.reduce_mean(tf.nn.softmax_cross_entropy_with_logits(labels=labels, logits=prediction), axis=-1)


def accuracy(prediction: Array, y: Array) -> Array:
    """Share of examples whose largest output is the true class: `[..., batch, classes]` to `[...]`."""
    right = tf.equal(tf.argmax(prediction, axis=-1), tf.argmax(y, axis=-1))
    return tf.reduce_mean(tf.cast(right, prediction.dtype), axis=-1)


class Unroll:
    """The exact outer gradient through a full unroll.

    Args:
        steps: number of learning steps.
        along: weight of the mean loss along the way beside that of the query, 0 for the query alone.
        recompute: whether to trade time for memory.

    Raises:
        ValueError: if an argument is out of range.

    Example:

    >>> Unroll(steps=10, along=0.5).steps
    10
    """

    def __init__(self, steps: int = 10, *, along: float = 0.0, recompute: bool = False):
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"`steps` must be a positive integer. Received: steps={steps!r}")
        if not along >= 0.0 or not math.isfinite(along):
            raise ValueError(f"`along` must be a finite number of at least 0. Received: along={along!r}")
        self.steps, self.along, self.recompute = steps, float(along), bool(recompute)

    def objective(
        self, learner: Learner, outer: Mapping[str, Array], episodes: Mapping[str, Array], seed: Array
    ) -> tuple[Array, Array]:
        """Loss and query accuracy of each member on each task.

        Args:
            learner: the learner.
            outer: outer parameters `[members, ...]`.
            episodes: `x` `[tasks, steps, batch, features]`, `y`, `query_x` `[tasks, batch, features]`, `query_y`.
            seed: of the initial networks: equal for members, different for tasks.

        Returns:
            Two arrays `[members, tasks]`.
        """
        x, y = episodes["x"][None], episodes["y"][None]
        members = next(iter(outer.values())).shape[0]
        leading = (members, int(x.shape[1]))
        outer = {name: value[:, None] for name, value in outer.items()}
        state = learner.init(seed, int(x.shape[-1]), int(y.shape[-1]), leading)

        def body(outer: Mapping[str, Array], time: Array, state: Any, total: Array) -> tuple[Array, Any, Array]:
            batch_y = tf.gather(y, time, axis=2)
            state, prediction = learner.step(outer, state, tf.gather(x, time, axis=2), batch_y)
            if self.along:
                total = total + cross_entropy(prediction, batch_y) * (self.along / self.steps)
            return time + 1, state, total

        total = tf.zeros(leading, state_dtype(state))
        state, total = self._loop(body, outer, state, total)
        prediction = learner.predict(outer, state, episodes["query_x"][None])
        query_y = episodes["query_y"][None]
        return total + cross_entropy(prediction, query_y), accuracy(prediction, query_y)

    def _loop(self, body: Any, outer: Mapping[str, Array], state: Any, total: Array) -> tuple[Any, Array]:
        def run(outer: Mapping[str, Array], start: Array, count: int, state: Any, total: Array) -> tuple[Any, Array]:
            _, state, total = tf.while_loop(
                lambda time, *_: time < start + count,
                lambda *carried: body(outer, *carried),
                (start, state, total),
                maximum_iterations=count,
            )
            return state, total

        if not self.recompute:
            return run(outer, tf.constant(0), self.steps, state, total)
        width = max(1, math.isqrt(self.steps))
        whole, rest = divmod(self.steps, width)
        # Everything with a gradient is an argument: what a recomputed function only captures would get none.
        segment = tf.recompute_grad(lambda outer, start, state, total: run(outer, start, width, state, total))

        def outer_body(index: Array, state: Any, total: Array) -> tuple[Array, Any, Array]:
            state, total = segment(outer, index * width, state, total)
            return index + 1, state, total

        _, state, total = tf.while_loop(
            lambda index, *_: index < whole, outer_body, (tf.constant(0), state, total), maximum_iterations=whole
        )
        if rest:
            state, total = run(outer, tf.constant(whole * width), rest, state, total)
        return state, total

    def __call__(self, learner: Learner, outer: Mapping[str, Array], episodes: Mapping[str, Array], seed: Array) -> Estimate:
        """The gradient of each member's mean loss over the tasks; arguments as `objective`."""
        with tf.GradientTape() as tape:
            watched = {name: tf.convert_to_tensor(value) for name, value in outer.items()}
            tape.watch(watched)
            losses, accuracies = self.objective(learner, watched, episodes, seed)
            # Members do not touch each other, so the gradient of the sum holds each one's own.
            loss = tf.reduce_mean(losses, axis=1)
            total = tf.reduce_sum(loss)
        gradients = tape.gradient(total, watched, unconnected_gradients="zero")
        return Estimate(gradients, loss, tf.reduce_mean(accuracies, axis=1))


def state_dtype(state: Any) -> tf.DType:
    """The floating-point type of a learner's state."""
    return next(leaf.dtype for leaf in tf.nest.flatten(state) if leaf.dtype.is_floating)
