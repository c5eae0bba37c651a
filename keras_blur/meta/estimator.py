"""What estimators of the outer gradient share: the objective of the inner loop, and the loop.

Source: "Meta-Learning Bidirectional Update Rules" (Sandler et al., ICML 2021), section 3.3: unroll the inner loop, then
take the softmax cross-entropy of the output's first state on inputs not seen before (the printed formula lacks its minus
sign). An optional second term is the loss along the way: each step's prediction of its own batch, before it learns from it,
which costs nothing and gives early steps a gradient of their own. The paper's published code scores by the squared error to
labels of +1 and -1; that is `loss="squared"`.

The loop is one `tf.while_loop` with a static bound, so that it compiles in a time that does not grow with its length,
under XLA too.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import tensorflow as tf

from keras_blur import arguments
from keras_blur.distribution import ALL, Shard
from keras_blur.learners.base import Learner

Array = Any
Outer = Mapping[str, Array]
Episodes = Mapping[str, Array]

KINDS = ("classes", "values", "bits")
LOSSES = ("auto", "cross_entropy", "binary", "squared")


class Estimate(NamedTuple):
    """An estimate of the outer gradient of each member.

    Attributes:
        gradients: by name, as the outer parameters, `[members, ...]`.
        loss: the objective of each member, the mean over tasks, `[members]`.
        accuracy: query accuracy of each member, `[members]`; of values, the share of their variance that is predicted.
    """

    gradients: Outer
    loss: Array
    accuracy: Array


def cross_entropy(prediction: Array, y: Array) -> Array:
    """Mean softmax cross-entropy of logits against +1/-1 labels: `[..., batch, classes]` to `[...]`.

    Of a single logit it is the logistic one.
    """
    if prediction.shape[-1] == 1:
        return binary_cross_entropy(prediction, y)
    labels = tf.broadcast_to(tf.cast(0.5 * (y + 1.0), prediction.dtype), tf.shape(prediction))
    return tf.reduce_mean(tf.nn.softmax_cross_entropy_with_logits(labels=labels, logits=prediction), axis=-1)


def binary_cross_entropy(prediction: Array, y: Array) -> Array:
    """Mean over outputs and examples of the cross-entropy of each logit against its +1/-1 label; one of 0 is left out."""
    y = tf.broadcast_to(tf.cast(y, prediction.dtype), tf.shape(prediction))
    scored = tf.abs(y)
    return tf.reduce_sum(scored * tf.math.softplus(-prediction * y), axis=(-2, -1)) / tf.reduce_sum(scored, axis=(-2, -1))


def squared_error(prediction: Array, y: Array) -> Array:
    """Mean over outputs and examples of the squared difference."""
    return tf.reduce_mean(tf.square(prediction - tf.cast(y, prediction.dtype)), axis=(-2, -1))


def accuracy(prediction: Array, y: Array) -> Array:
    """Fraction of examples whose largest output is the true class: `[..., batch, classes]` to `[...]`.

    Of a single output, the share whose sign is that of the label. A prediction that is not finite is wrong.
    """
    right = tf.equal(classes_of(prediction), classes_of(y))
    right &= tf.reduce_all(tf.math.is_finite(prediction), axis=-1)
    return tf.reduce_mean(tf.cast(right, prediction.dtype), axis=-1)


def classes_of(outputs: Array) -> Array:
    """The classes that logits or labels of +1 and -1 tell: `[..., outputs]` to integers `[...]`.

    The largest of several outputs is the class; a single one tells class 1 where it is above 0, else class 0.

    Example:

    >>> classes_of(tf.constant([[0.5], [-0.5]])).numpy().tolist()
    [1, 0]
    """
    if outputs.shape[-1] == 1:
        return tf.cast(outputs[..., 0] > 0, tf.int32)
    return tf.argmax(outputs, axis=-1, output_type=tf.int32)


def correct_bits(prediction: Array, y: Array) -> Array:
    """Fraction of outputs whose sign is that of their label, of those whose label is not 0: `[..., batch, bits]` to `[...]`.

    A prediction that is not finite is wrong. Where no label is scored, the share is NaN, as is the loss.
    """
    y = tf.broadcast_to(tf.cast(y, prediction.dtype), tf.shape(prediction))
    scored = tf.abs(y)
    right = tf.cast(tf.equal(prediction > 0, y > 0) & tf.math.is_finite(prediction), prediction.dtype)
    return tf.reduce_sum(scored * right, axis=(-2, -1)) / tf.reduce_sum(scored, axis=(-2, -1))


def explained(prediction: Array, y: Array) -> Array:
    """Fraction of the variance of values that the prediction explains, R squared: `[..., batch, outputs]` to `[...]`.

    Values that do not vary have nothing to explain: as in Keras and scikit-learn it is then 0, or 1 of an exact prediction.
    """
    y = tf.cast(y, prediction.dtype)
    spread = tf.reduce_mean(tf.square(y - tf.reduce_mean(y, axis=-2, keepdims=True)), axis=(-2, -1))
    flat = spread <= 1e-12 * tf.reduce_mean(tf.square(y), axis=(-2, -1))  # rounding of the mean
    error = squared_error(prediction, y)
    of_flat = tf.where(error > 0, tf.zeros_like(error), 1.0 - error)  # NaN stays NaN
    return tf.where(flat, of_flat, 1.0 - error / tf.where(flat, tf.ones_like(spread), spread))


_FUNCTIONS = {"cross_entropy": cross_entropy, "binary": binary_cross_entropy, "squared": squared_error}


@dataclasses.dataclass(frozen=True)
class InnerLoop:
    """What is asked of a learner: how long it learns, and how that is scored.

    Args:
        steps: number of learning steps of one estimate.
        trajectory_loss_weight: weight of the mean loss along the way beside that of the query, 0 for the query alone.
        loss: `"cross_entropy"` (softmax; logistic of a single output), `"binary"` (each output on its own), `"squared"`,
            or `"auto"`: the cross-entropy for classes, binary for bits, squared for values.
        kind: `"classes"`, `"values"` or `"bits"`: what the tasks' outputs are.
        recompute: whether to trade time for memory: only the state at the start of each segment of about the square root
            of `steps` is kept, and a segment is computed again when its gradient is wanted.

    Raises:
        ValueError: if an argument is out of range.
    """

    steps: int = 10
    trajectory_loss_weight: float = 0.0
    loss: str = "auto"
    kind: str = "classes"
    recompute: bool = False

    def __post_init__(self) -> None:
        arguments.count("steps", self.steps)
        arguments.real("trajectory_loss_weight", self.trajectory_loss_weight, low=0.0)
        arguments.choice("loss", self.loss, LOSSES)
        arguments.choice("kind", self.kind, KINDS)
        arguments.flag("recompute", self.recompute)
        if self.kind == "values" and self.loss not in ("auto", "squared"):
            raise ValueError(f"`loss` of values must be 'squared' or 'auto'. Received: loss={self.loss!r}")

    @property
    def horizon(self) -> int:
        """Support batches of an episode: more than `steps` where a learner is carried from piece to piece."""
        return self.steps

    @property
    def windows(self) -> int:
        """Estimates that are made on the same episodes, one after the other."""
        return 1

    def objective(self, learner: Learner, outer: Outer, episodes: Episodes, state: Any) -> tuple[Array, Array, Any]:
        """Loss and query accuracy of each member on each task, and the learner's state afterwards.

        Args:
            learner: the learner.
            outer: outer parameters `[members, ...]`.
            episodes: as in a call.
            state: of the learner, with leading axes `[members, tasks]`.

        Returns:
            Two arrays `[members, tasks]`, and the state.
        """
        x, y = episodes["x"][None], episodes["y"][None]
        loss_of = self._loss()
        outer = over_tasks(outer)
        leading = (next(iter(outer.values())).shape[0], int(x.shape[1]))

        def body(outer: Outer, time: Array, state: Any, total: Array) -> tuple[Array, Any, Array]:
            # Data have no gradient: without this the loop back would form that of all batches, in every step.
            batch_x, batch_y = (tf.stop_gradient(tf.gather(data, time, axis=2)) for data in (x, y))
            state, prediction = learner.step(outer, state, batch_x, batch_y)
            if self.trajectory_loss_weight:
                total = total + loss_of(prediction, batch_y) * (self.trajectory_loss_weight / self.steps)
            return time + 1, state, total

        state, total = self._loop(body, outer, state, tf.zeros(leading, state_dtype(state)))
        prediction = learner.predict(outer, state, episodes["query_x"][None])
        losses, quality = self.scores(prediction, episodes["query_y"][None])
        return total + losses, quality, state

    def scores(self, prediction: Array, y: Array) -> tuple[Array, Array]:
        """Loss and quality of predictions `[..., batch, outputs]`: `[...]` each."""
        right = {"classes": accuracy, "values": explained, "bits": correct_bits}[self.kind]
        return self._loss()(prediction, y), right(prediction, y)

    def _loss(self) -> Any:
        if self.loss != "auto":
            return _FUNCTIONS[self.loss]
        if self.kind == "values":
            return squared_error
        return cross_entropy if self.kind == "classes" else binary_cross_entropy

    def _loop(self, body: Any, outer: Outer, state: Any, total: Array) -> tuple[Any, Array]:
        def run(outer: Outer, start: Array, count: int, state: Any, total: Array) -> tuple[Any, Array]:
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

        dtype = total.dtype

        # Only floating-point tensors cross the border of a segment, as its arguments and results: others have no gradient,
        # and what it merely captured would get none.
        def run_flat(start: Array, flat: list[Array]) -> list[Array]:
            given, state, total = tf.nest.pack_sequence_as((outer, state_before, total_before), flat)
            state = tf.nest.map_structure(lambda leaf, like: tf.cast(leaf, like.dtype), state, state_before)
            state, total = run(given, tf.cast(start, tf.int32), width, state, total)
            return [_as_float(leaf, dtype) for leaf in tf.nest.flatten((state, total))]

        state_before, total_before = state, total

        @tf.custom_gradient
        def segment(start: Array, *flat: Array) -> Any:
            def backward(*upstream: Array) -> list[Array]:
                with tf.GradientTape() as tape:
                    tape.watch(flat)
                    results = run_flat(start, list(flat))
                found = tape.gradient(results, flat, output_gradients=upstream, unconnected_gradients="zero")
                return [tf.zeros_like(start), *found]

            return run_flat(start, list(flat)), backward

        def outer_body(index: Array, state: Any, total: Array) -> tuple[Array, Any, Array]:
            flat = [_as_float(leaf, dtype) for leaf in tf.nest.flatten((outer, state, total))]
            results = segment(tf.cast(index * width, dtype), *flat)
            like = (state, total)
            results = tf.nest.pack_sequence_as(like, results)
            return index + 1, *tf.nest.map_structure(lambda leaf, old: tf.cast(leaf, old.dtype), results, like)

        _, state, total = tf.while_loop(
            lambda index, *_: index < whole, outer_body, (tf.constant(0), state, total), maximum_iterations=whole
        )
        if rest:
            state, total = run(outer, tf.constant(whole * width), rest, state, total)
        return state, total


class Carried(NamedTuple):
    """What an estimate leaves to the next one of the same episodes.

    Attributes:
        learners: their states, `[members or particles, tasks, ...]` but for what all share.
        directions: what belongs to the members and not to a task.
    """

    learners: Any = ()
    directions: Any = ()


NOTHING = Carried()


@dataclasses.dataclass(frozen=True)
class Estimator(InnerLoop, abc.ABC):
    """An inner loop, and the way to the gradient of its score; arguments as `InnerLoop`.

    An estimate has two halves, so that tasks can be split over several devices. `local_estimate` computes statistics on one
    shard of the tasks. `combine` turns their mean over shards into the estimate.
    """

    @abc.abstractmethod
    def local_estimate(
        self, learner: Learner, outer: Outer, episodes: Episodes, seed: Array, carried: Carried, first: Any, shard: Shard
    ) -> tuple[Any, Any]:
        """What some tasks say of the outer parameters.

        Args:
            learner, outer, seed, carried, first: as in a call.
            episodes: those of the share.
            shard: which of the tasks they are.

        Returns:
            A nest whose mean over shares goes to `combine`, and the learners' states to carry on.
        """

    @abc.abstractmethod
    def combine(self, outer: Outer, measured: Any, seed: Array, carried: Carried, first: Any) -> tuple[Estimate, Any]:
        """The estimate from the means of what was measured, and the directions to carry on."""

    def __call__(
        self, learner: Learner, outer: Outer, episodes: Episodes, seed: Array, carried: Carried = NOTHING, first: Any = True
    ) -> tuple[Estimate, Carried]:
        """The gradient of each member's mean loss over the tasks.

        Args:
            learner: the learner.
            outer: outer parameters `[members, ...]`.
            episodes: `x` `[tasks, steps, batch, features]`, `y`, `query_x` `[tasks, batch, features]`, `query_y`.
            seed: of the initial networks (equal for members, different for tasks) and of noise.
            carried: what the estimate before returned; not read where `first`.
            first: whether the episodes begin here.

        Returns:
            The estimate, and what to carry to the next one.
        """
        measured, learners = self.local_estimate(learner, outer, episodes, seed, carried, first, ALL)
        estimate, directions = self.combine(outer, measured, seed, carried, first)
        return estimate, Carried(learners, directions)

    def begin(
        self, learner: Learner, outer: Outer, episodes: Episodes, seed: Array, carried: Carried, first: Any, shard: Shard
    ) -> Any:
        """The learners' states before the first of the batches."""
        del carried, first
        return start(learner, outer, episodes, seed, shard)

    def part(self, episodes: Episodes, window: Array) -> Episodes:
        """What an estimate sees of the support batches, by the number of its piece."""
        del window
        return episodes

    def kept(self, learners: Any) -> Any:
        """What of the learners' states is carried on: nothing, where an estimate is a whole episode."""
        del learners
        return ()

    def nothing_carried(self, learner: Learner, outer: Outer, episodes: Episodes) -> Carried:
        """What stands for `carried` before the first estimate: zeros of the right shapes."""
        del learner, outer, episodes
        return NOTHING


@dataclasses.dataclass(frozen=True)
class Truncated(Estimator):
    """Cuts episodes of `episode_steps` steps into truncation windows of `steps` and carries learners across."""

    episode_steps: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        arguments.count("episode_steps", self.episode_steps)
        if self.episode_steps % self.steps:
            raise ValueError(
                f"`episode_steps` must be a multiple of steps={self.steps}. Received: episode_steps={self.episode_steps!r}"
            )

    @property
    def horizon(self) -> int:
        return self.episode_steps

    @property
    def windows(self) -> int:
        return self.episode_steps // self.steps

    def part(self, episodes: Episodes, window: Array) -> Episodes:
        def cut(batches: Array) -> Array:  # of `[tasks, steps, ...]`, by a slice of static size, as a TPU needs it
            axes = batches.shape.rank - 2
            return tf.slice(batches, [0, window * self.steps, *[0] * axes], [-1, self.steps, *[-1] * axes])

        return {**episodes, **{name: cut(episodes[name]) for name in ("x", "y")}}

    def begin(
        self, learner: Learner, outer: Outer, episodes: Episodes, seed: Array, carried: Carried, first: Any, shard: Shard
    ) -> Any:
        return choose(first, start(learner, outer, episodes, seed, shard), carried.learners)

    def kept(self, learners: Any) -> Any:
        return learners


def start(learner: Learner, outer: Outer, episodes: Episodes, seed: Array, shard: Shard = ALL) -> Any:
    """The learner's state before the first batch of the episodes, with leading axes `[members, tasks]`.

    A share of the tasks starts as it does among all of them.
    """
    members = next(iter(outer.values())).shape[0]
    x, y = episodes["x"], episodes["y"]
    return learner.init(over_tasks(outer), seed, int(x.shape[-1]), int(y.shape[-1]), (members, int(x.shape[0])), shard)


def over_tasks(outer: Outer) -> Outer:
    """Outer parameters `[members, ...]` with an axis for tasks, `[members, 1, ...]`."""
    return {name: value[:, None] for name, value in outer.items()}


def choose(first: Any, fresh: Any, old: Any) -> Any:
    """`fresh` where `first`, else `old`: nests of tensors."""
    return tf.nest.map_structure(lambda one, other: tf.where(first, one, other), fresh, old)


def state_dtype(state: Any) -> tf.DType:
    """The floating-point type of a learner's state."""
    return next(leaf.dtype for leaf in tf.nest.flatten(state) if leaf.dtype.is_floating)


def _as_float(leaf: Array, dtype: tf.DType) -> Array:
    """A tensor that can have a gradient: integers as numbers of the given type."""
    return leaf if leaf.dtype.is_floating else tf.cast(leaf, dtype)
