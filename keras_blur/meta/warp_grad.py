"""WarpGrad: gradients of warps and initial weights at the points visited by inner descent.

Source: "Meta-Learning with Warped Gradient Descent" (Flennerhag et al., ICLR 2020). Equation 11
takes each visited theta as a constant. It differentiates, with respect to phi, the loss on other
examples after one more step, L_meta(theta - alpha grad L_task(theta; phi); phi). Equation 12 is the
first-order version, in which the step itself is a constant too. No gradient crosses a step, so
memory does not grow with the number of steps and there is no truncation bias. Algorithm 1 sums over
the run (`WarpGrad`). Algorithm 2 stores the visited points in a buffer and takes outer steps on
random parts of it (`OfflineWarpGrad`).

Initial weights can be learned at the same time: by Reptile ("On First-Order Meta-Learning
Algorithms", Nichol, Achiam and Schulman, 2018), which moves them towards the adapted weights; by
Leap ("Transferring Knowledge across Learning Processes", Flennerhag et al., ICLR 2019), in the
simplified form of WarpGrad's published code, where each step of the path counts by its direction
only; or by MAML, which differentiates through all steps.

Both estimators only need the learner's step. They apply to any rule whose numbers are outer
parameters.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import tensorflow as tf

from keras_blur import arguments
from keras_blur.core import random
from keras_blur.distribution import Shard
from keras_blur.learners.base import Learner, MetaLearner
from keras_blur.meta.estimator import Array, Carried, Episodes, Estimate, Estimator, Outer, over_tasks, start

ORDERS = ("exact", "first")
STARTS = ("none", "reptile", "leap", "maml")
_SHUFFLE = 2  # folded into a seed for the order of a buffer


class TrajectoryBuffer(NamedTuple):
    """The visited points theta_0 to theta_{K-1} with their optimizer states, detached.

    Attributes:
        states: learner states `[members, tasks, K, ...]`; leaves common to all networks have shape
            `[K]`.
    """

    states: Any

    def take(self, place: Array) -> Any:
        """The states at one position of the trajectories, a scalar integer."""
        return tf.nest.map_structure(lambda leaf: tf.gather(leaf, place, axis=0 if leaf.shape.rank == 1 else 2), self.states)


@dataclasses.dataclass(frozen=True)
class WarpGrad(Estimator):
    """The trajectory-agnostic gradient, online: each step of the inner loop adds one term.

    Args:
        steps, loss, kind: as in `Estimator`. `trajectory_loss_weight` and `recompute` are not
            supported.
        order: `"exact"` (equation 11) or `"first"` (equation 12).
        start: how initial weights are learned: `"none"`, `"reptile"`, `"leap"` or `"maml"`.

    Raises:
        ValueError: if an argument is out of range.

    Example:

    >>> WarpGrad(steps=50, start="leap").horizon
    51
    """

    order: str = "exact"
    start: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        arguments.choice("order", self.order, ORDERS)
        arguments.choice("start", self.start, STARTS)
        if self.trajectory_loss_weight or self.recompute:
            raise ValueError("`trajectory_loss_weight` must be 0 and `recompute` False: no gradient crosses a step.")

    @property
    def horizon(self) -> int:
        return self.steps + 1  # each step is scored on the next batch

    def local_estimate(
        self, learner: Learner, outer: Outer, episodes: Episodes, seed: Array, carried: Carried, first: Any, shard: Shard
    ) -> tuple[Any, Any]:
        learner = self._checked(learner, outer)
        state = self.begin(learner, outer, episodes, seed, carried, first, shard)
        begin, nothing = state, {name: tf.zeros_like(value) for name, value in outer.items()}

        def body(time: Array, state: Any, sums: Outer) -> tuple[Array, Any, Outer]:
            gradients, _, _, new = self.at(learner, outer, episodes, state, time, time + 1)
            if self.start == "leap":
                gradients = {**gradients, **_mean_over_tasks(_directions(learner.adapted(state), learner.adapted(new)))}
            return time + 1, new, {name: sums[name] + gradients[name] / self.rate_of(name) for name in sums}

        _, state, sums = tf.while_loop(
            lambda time, *_: time < self.steps, body, (tf.constant(0), state, nothing), maximum_iterations=self.steps
        )
        sums = {**sums, **self._of_run(learner, outer, episodes, seed, shard, begin, state)}
        loss, correct = self.judged(learner, outer, episodes, state)
        return Estimate(sums, loss, correct), self.kept(state)

    def combine(self, outer: Outer, measured: Any, seed: Array, carried: Carried, first: Any) -> tuple[Estimate, Any]:
        return measured, ()

    def _checked(self, learner: Learner, outer: Outer) -> MetaLearner:
        """Checks that the learner has a learned start if `start` asks for one."""
        if not isinstance(learner, MetaLearner) or (self.start != "none" and not any(n.startswith("start_") for n in outer)):
            raise ValueError(
                f"`start` must be 'none' for a learner without learned initial weights. Received: {self.start!r}"
            )
        return learner

    def rate_of(self, name: str) -> float:
        """The divisor of a term: the number of steps for warps, 1 for the start.

        Warps average over the visited points. The start sums over the path.
        """
        return 1.0 if name.startswith("start_") else float(self.steps)

    def at(
        self, learner: MetaLearner, outer: Outer, episodes: Episodes, state: Any, task: Array, other: Array
    ) -> tuple[Outer, Array, Array, Any]:
        """Computes one term of equation 11 or 12.

        Args:
            learner, outer, episodes: as in `__call__`.
            state: theta, taken as a constant.
            task, other: indices of the batch to learn from and of the batch to score.

        Returns:
            Gradient, loss and quality, `[members, ...]`, and the state after the step.
        """
        x, y = (tf.gather(episodes[name], task, axis=1)[None] for name in ("x", "y"))
        other_x, other_y = (tf.gather(episodes[name], other, axis=1)[None] for name in ("x", "y"))
        state = tf.nest.map_structure(tf.stop_gradient, state)
        with tf.GradientTape() as tape:
            watched = {name: tf.convert_to_tensor(value) for name, value in outer.items()}
            tape.watch(watched)
            new, _ = learner.step(over_tasks(watched), state, x, y)
            detached = tf.nest.map_structure(tf.stop_gradient, new)
            # The prediction of a step, not `predict`, so that layers such as dropout are in
            # training mode.
            _, prediction = learner.step(over_tasks(watched), detached if self.order == "first" else new, other_x, other_y)
            loss, correct = (tf.reduce_mean(value, axis=1) for value in self.scores(prediction, other_y))
            total = tf.reduce_sum(loss)
        return tape.gradient(total, watched, unconnected_gradients="zero"), loss, correct, detached

    def judged(self, learner: Learner, outer: Outer, episodes: Episodes, state: Any) -> tuple[Array, Array]:
        """Loss and quality of the query, `[members]`."""
        prediction = learner.predict(over_tasks(outer), state, episodes["query_x"][None])
        losses, quality = self.scores(prediction, episodes["query_y"][None])
        return tf.reduce_mean(losses, axis=1), tf.reduce_mean(quality, axis=1)

    def _of_run(
        self, learner: MetaLearner, outer: Outer, episodes: Episodes, seed: Array, shard: Shard, begin: Any, end: Any
    ) -> Outer:
        """The gradient of the start, for methods that use the whole run (Reptile and MAML)."""
        if self.start == "reptile":
            return _mean_over_tasks(_differences(learner.adapted(begin), learner.adapted(end)))
        if self.start != "maml":
            return {}
        with tf.GradientTape() as tape:
            starts = {name: tf.convert_to_tensor(v) for name, v in outer.items() if name.startswith("start_")}
            tape.watch(starts)
            every = {**outer, **starts}
            losses, _, _ = self.objective(learner, every, episodes, start(learner, every, episodes, seed, shard))
            total = tf.reduce_sum(tf.reduce_mean(losses, axis=1))
        return tape.gradient(total, starts, unconnected_gradients="zero")


@dataclasses.dataclass(frozen=True)
class OfflineWarpGrad(WarpGrad):
    """The trajectory-agnostic gradient, offline: outer steps read a buffer in random order.

    Each meta-step is one outer step. The first one on some episodes runs the inner loop, fills the
    buffer and includes the gradient of the start. Every outer step uses `thetas` visited points of
    each task until all are used.

    Args:
        steps, loss, kind, order, start: as in `WarpGrad`.
        thetas: visited points of each task per outer step; a divisor of `steps`.

    Example:

    >>> OfflineWarpGrad(steps=100, thetas=5).windows
    20
    """

    thetas: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        arguments.count("thetas", self.thetas)
        if self.steps % self.thetas:
            raise ValueError(f"`thetas` must divide steps={self.steps}. Received: thetas={self.thetas!r}")

    @property
    def windows(self) -> int:
        return self.steps // self.thetas

    def nothing_carried(self, learner: Learner, outer: Outer, episodes: Episodes) -> Carried:
        state = start(learner, outer, episodes, tf.zeros(2, tf.int32))

        def storage(leaf: Array) -> Array:
            shape = (self.steps,) if leaf.shape.rank == 0 else (*leaf.shape[:2], self.steps, *leaf.shape[2:])
            return tf.zeros(shape, leaf.dtype)

        return Carried(
            TrajectoryBuffer(tf.nest.map_structure(storage, state)), (tf.zeros(2, tf.int32), tf.zeros((), tf.int32))
        )

    def local_estimate(
        self, learner: Learner, outer: Outer, episodes: Episodes, seed: Array, carried: Carried, first: Any, shard: Shard
    ) -> tuple[Any, Any]:
        learner = self._checked(learner, outer)
        nothing = {name: tf.zeros_like(value) for name, value in outer.items()}
        buffer, starts = tf.cond(
            first,
            lambda: self.collect(learner, outer, episodes, seed, shard, nothing),
            lambda: (carried.learners, nothing),
        )
        root, window = self._turn(seed, carried, first)
        order = random.permutation(random.fold_in(root, _SHUFFLE), self.steps)

        def body(number: Array, sums: Outer, loss: Array, correct: Array) -> tuple[Array, Outer, Array, Array]:
            place = tf.gather(order, window * self.thetas + number)
            found = self.at(learner, outer, episodes, buffer.take(place), place, place + 1)
            sums = {name: sums[name] + found[0][name] / self.thetas for name in sums}
            return number + 1, sums, loss + found[1] / self.thetas, correct + found[2] / self.thetas

        some = next(iter(outer.values()))
        zero = tf.zeros(some.shape[0], some.dtype)
        _, sums, loss, correct = tf.while_loop(
            lambda number, *_: number < self.thetas, body, (tf.constant(0), nothing, zero, zero),
            maximum_iterations=self.thetas,
        )  # fmt: skip
        return Estimate({name: sums[name] + starts[name] for name in sums}, loss, correct), buffer

    def combine(self, outer: Outer, measured: Any, seed: Array, carried: Carried, first: Any) -> tuple[Estimate, Any]:
        root, window = self._turn(seed, carried, first)
        return measured, (root, window + 1)

    def _turn(self, seed: Array, carried: Carried, first: Any) -> tuple[Array, Array]:
        """The seed of the order, from the first step on these episodes, and the index of this
        step.
        """
        root, window = carried.directions
        return tf.where(first, seed, root), tf.where(first, tf.zeros_like(window), window)

    def collect(
        self, learner: MetaLearner, outer: Outer, episodes: Episodes, seed: Array, shard: Shard, nothing: Outer
    ) -> tuple[TrajectoryBuffer, Outer]:
        """Runs inner descent. Returns the visited points and the gradient of the start."""
        state = begin = start(learner, outer, episodes, seed, shard)
        leaves = tf.nest.flatten(state)
        buffers = [tf.TensorArray(leaf.dtype, self.steps, element_shape=leaf.shape) for leaf in leaves]

        def body(time: Array, state: Any, buffers: list[Any], sums: Outer) -> tuple[Array, Any, list[Any], Outer]:
            buffers = [one.write(time, leaf) for one, leaf in zip(buffers, tf.nest.flatten(state), strict=True)]
            x, y = (tf.gather(episodes[name], time, axis=1)[None] for name in ("x", "y"))
            new, _ = learner.step(over_tasks(outer), state, x, y)
            if self.start == "leap":
                path = _mean_over_tasks(_directions(learner.adapted(state), learner.adapted(new)))
                sums = {name: value + path.get(name, 0.0) for name, value in sums.items()}
            return time + 1, new, buffers, sums

        _, state, buffers, sums = tf.while_loop(
            lambda time, *_: time < self.steps,
            body,
            (tf.constant(0), state, buffers, nothing),
            maximum_iterations=self.steps,
        )
        sums = {**sums, **self._of_run(learner, outer, episodes, seed, shard, begin, state)}

        def whole(buffer: Any, leaf: Array) -> Array:
            value = buffer.stack()  # [K, members, tasks, ...]
            return value if leaf.shape.rank == 0 else tf.transpose(value, [1, 2, 0, *range(3, value.shape.rank)])

        stacked = [whole(one, leaf) for one, leaf in zip(buffers, leaves, strict=True)]
        return TrajectoryBuffer(tf.nest.pack_sequence_as(begin, stacked)), sums


def _differences(before: Outer, after: Outer) -> Outer:
    """Weights before minus weights after, `[members, tasks, ...]`: descent as a gradient."""
    return {name: before[name] - after[name] for name in before}


def _directions(before: Outer, after: Outer) -> Outer:
    """Differences normalised to length one over all weights of a network; zero without movement."""
    moved = _differences(before, after)
    squares = [tf.reduce_sum(tf.square(one), axis=list(range(2, one.shape.rank))) for one in moved.values()]
    scale = tf.math.divide_no_nan(1.0, tf.sqrt(tf.add_n(squares)))
    return {name: one * tf.reshape(scale, (*scale.shape, *[1] * (one.shape.rank - 2))) for name, one in moved.items()}


def _mean_over_tasks(values: Outer) -> Outer:
    return {name: tf.reduce_mean(value, axis=1) for name, value in values.items()}
