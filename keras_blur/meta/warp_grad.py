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
import functools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

from keras import ops

from keras_blur import arguments, backend
from keras_blur.core import random
from keras_blur.distribution import Shard
from keras_blur.learners.base import Learner, MetaLearner
from keras_blur.meta.estimator import Array, Carried, Episodes, Estimate, Estimator, Outer, at, over_tasks, start
from keras_blur.tasks.base import Tasks

ORDERS = ("exact", "first")
STARTS = ("none", "reptile", "leap", "maml")
"""How `WarpGrad` and `OfflineWarpGrad` learn initial weights: the values of `start`."""
SCORED = ("next", "query")
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
        return backend.tree_map(lambda leaf: at(leaf, place, axis=0 if len(leaf.shape) == 1 else 2), self.states)


@dataclasses.dataclass(frozen=True)
class WarpGrad(Estimator):
    """The trajectory-agnostic gradient, online: each step of the inner loop adds one term.

    Args:
        steps, loss, kind: as in `Estimator`. `trajectory_loss_weight` and `recompute` are not
            supported.
        order: `"exact"` (equation 11) or `"first"` (equation 12).
        start: how initial weights are learned: `"none"`, `"reptile"`, `"leap"` or `"maml"`.
        scored: the examples that score a step: `"next"`, the next batch of the support, or
            `"query"`. `MetaTrainer` uses `"query"`, whatever is given, if the support is smaller
            than two batches, because the next batch may then share examples with the step's own.
            Few-shot tasks whose batch is the whole support are such a case.

    Raises:
        ValueError: if an argument is out of range.

    Example:

    >>> WarpGrad(steps=50, start="leap").horizon
    51
    """

    order: str = "exact"
    start: str = "none"
    scored: str = "next"

    def __post_init__(self) -> None:
        super().__post_init__()
        arguments.choice("order", self.order, ORDERS)
        arguments.choice("start", self.start, STARTS)
        arguments.choice("scored", self.scored, SCORED)
        if self.trajectory_loss_weight or self.recompute:
            raise ValueError("`trajectory_loss_weight` must be 0 and `recompute` False: no gradient crosses a step.")

    @property
    def horizon(self) -> int:
        return self.steps + 1 if self.scored == "next" else self.steps

    def on(self, tasks: Sequence[Tasks], batch: int, query: int) -> Self:
        made = super().on(tasks, batch, query)
        apart = all(2 * batch <= of.support(query) for of in tasks)
        return made if apart else dataclasses.replace(made, scored="query")

    def local_estimate(
        self, learner: Learner, outer: Outer, episodes: Episodes, seed: Array, carried: Carried, first: Any, shard: Shard
    ) -> tuple[Any, Any]:
        learner = self._checked(learner, outer)
        state = self.begin(learner, outer, episodes, seed, carried, first, shard)
        begin, nothing = state, {name: ops.zeros_like(value) for name, value in outer.items()}

        def body(time: Array, state: Any, sums: Outer) -> tuple[Any, Outer]:
            gradients, _, new = self.at(learner, outer, episodes, state, time)
            if self.start == "leap":
                gradients = {**gradients, **_mean_over_tasks(_directions(learner.adapted(state), learner.adapted(new)))}
            return new, {name: sums[name] + gradients[name] / self.rate_of(name) for name in sums}

        state, sums = backend.loop(self.steps, body, state, nothing)
        sums = {**sums, **self._of_run(learner, outer, episodes, seed, shard, begin, state)}
        loss, correct = self.judged(learner, outer, episodes, state)
        return Estimate(sums, loss, correct), ()

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
        self, learner: MetaLearner, outer: Outer, episodes: Episodes, state: Any, time: Array
    ) -> tuple[Outer, Array, Any]:
        """Computes one term of equation 11 or 12.

        Args:
            learner, outer, episodes: as in `__call__`.
            state: theta, taken as a constant.
            time: index of the batch to learn from.

        Returns:
            Gradient and loss, `[members, ...]`, and the state after the step.
        """
        x, y = (at(episodes[name], time, axis=1)[None] for name in ("x", "y"))
        if self.scored == "next":
            other_x, other_y = (at(episodes[name], time + 1, axis=1)[None] for name in ("x", "y"))
        else:
            other_x, other_y = (episodes[name][None] for name in ("query_x", "query_y"))
        state = backend.tree_map(ops.stop_gradient, state)

        def score(outer: Outer) -> tuple[Array, Any]:
            new, _ = learner.step(over_tasks(outer), state, x, y)
            detached = backend.tree_map(ops.stop_gradient, new)
            # The prediction of a step, not `predict`, so that layers such as dropout are in
            # training mode.
            _, prediction = learner.step(over_tasks(outer), detached if self.order == "first" else new, other_x, other_y)
            loss = backend.mean(self.scores(prediction, other_y)[0], axis=1)
            return ops.sum(loss), (loss, detached)

        (loss, detached), gradients = backend.gradient(score, dict(outer))
        return gradients, loss, detached

    def judged(self, learner: Learner, outer: Outer, episodes: Episodes, state: Any) -> tuple[Array, Array]:
        """Loss and quality of the query, `[members]`."""
        prediction = learner.predict(over_tasks(outer), state, episodes["query_x"][None])
        losses, quality = self.scores(prediction, episodes["query_y"][None])
        return backend.mean(losses, axis=1), backend.mean(quality, axis=1)

    def _of_run(
        self, learner: MetaLearner, outer: Outer, episodes: Episodes, seed: Array, shard: Shard, begin: Any, end: Any
    ) -> Outer:
        """The gradient of the start, for methods that use the whole run (Reptile and MAML)."""
        if self.start == "reptile":
            return _mean_over_tasks(_differences(learner.adapted(begin), learner.adapted(end)))
        if self.start != "maml":
            return {}

        def score(starts: Outer) -> tuple[Array, Any]:
            every = {**outer, **starts}
            losses, _, _ = self.objective(learner, every, episodes, start(learner, every, episodes, seed, shard))
            return ops.sum(backend.mean(losses, axis=1)), ()

        return backend.gradient(score, {name: value for name, value in outer.items() if name.startswith("start_")})[1]


@dataclasses.dataclass(frozen=True)
class OfflineWarpGrad(WarpGrad):
    """The trajectory-agnostic gradient, offline: outer steps read a buffer in random order.

    Each meta-step is one outer step. The first one on some episodes runs the inner loop, fills the
    buffer and includes the gradient of the start. Every outer step uses `thetas` visited points of
    each task until all are used. All report the loss and the quality of the query at the end of the
    inner loop. If that loss is not finite, all are skipped, as with `WarpGrad`.

    Args:
        steps, loss, kind, order, start, scored: as in `WarpGrad`.
        thetas: visited points of each task per outer step; a divisor of `steps`.

    Raises:
        ValueError: if an argument is out of range, or `thetas` does not divide `steps`.

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
        state = start(learner, outer, episodes, ops.zeros(2, "int32"))

        def storage(leaf: Array) -> Array:
            shape = (self.steps,) if len(leaf.shape) == 0 else (*leaf.shape[:2], self.steps, *leaf.shape[2:])
            return ops.zeros(shape, leaf.dtype)

        buffer = TrajectoryBuffer(backend.tree_map(storage, state))
        return Carried(buffer, (ops.zeros(2, "int32"), ops.zeros((), "int32"), _unjudged(outer)))

    def local_estimate(
        self, learner: Learner, outer: Outer, episodes: Episodes, seed: Array, carried: Carried, first: Any, shard: Shard
    ) -> tuple[Any, Any]:
        learner = self._checked(learner, outer)
        nothing = {name: ops.zeros_like(value) for name, value in outer.items()}
        buffer, starts, judged = ops.cond(
            first,
            lambda: self.collect(learner, outer, episodes, seed, shard, nothing),
            lambda: (carried.learners, nothing, _unjudged(outer)),
        )
        root, window = self._turn(seed, carried, first)
        order = random.permutation(random.fold_in(root, _SHUFFLE), self.steps)

        def body(number: Array, sums: Outer) -> tuple[Outer]:
            place = at(order, window * self.thetas + number, axis=0)
            gradients, _, _ = self.at(learner, outer, episodes, buffer.take(place), place)
            return ({name: sums[name] + gradients[name] / self.thetas for name in sums},)

        (sums,) = backend.loop(self.thetas, body, nothing)
        return Estimate({name: sums[name] + starts[name] for name in sums}, judged[0], judged[1]), buffer

    def combine(self, outer: Outer, measured: Any, seed: Array, carried: Carried, first: Any) -> tuple[Estimate, Any]:
        root, window = self._turn(seed, carried, first)
        judged = ops.where(first, ops.stack([measured.loss, measured.accuracy]), carried.directions[-1])
        return measured._replace(loss=judged[0], accuracy=judged[1]), (root, window + 1, judged)

    def _turn(self, seed: Array, carried: Carried, first: Any) -> tuple[Array, Array]:
        """The seed of the order, from the first step on these episodes, and the index of this
        step.
        """
        root, window, _ = carried.directions
        return ops.where(first, seed, root), ops.where(first, ops.zeros_like(window), window)

    def collect(
        self, learner: MetaLearner, outer: Outer, episodes: Episodes, seed: Array, shard: Shard, nothing: Outer
    ) -> tuple[TrajectoryBuffer, Outer, Array]:
        """Runs inner descent.

        Returns:
            The visited points, the gradient of the start, and loss and quality of the query,
            `[2, members]`.
        """
        begin = start(learner, outer, episodes, seed, shard)
        buffers = [ops.zeros((self.steps, *leaf.shape), leaf.dtype) for leaf in backend.leaves(begin)]

        def body(time: Array, state: Any, buffers: list[Array], sums: Outer) -> tuple[Any, list[Array], Outer]:
            row = ops.reshape(time, (1, 1))
            visited = zip(buffers, backend.leaves(state), strict=True)
            buffers = [ops.scatter_update(buffer, row, leaf[None]) for buffer, leaf in visited]
            x, y = (at(episodes[name], time, axis=1)[None] for name in ("x", "y"))
            new, _ = learner.step(over_tasks(outer), state, x, y)
            if self.start == "leap":
                path = _mean_over_tasks(_directions(learner.adapted(state), learner.adapted(new)))
                sums = {name: value + path.get(name, 0.0) for name, value in sums.items()}
            return new, buffers, sums

        state, buffers, sums = backend.loop(self.steps, body, begin, buffers, nothing)
        sums = {**sums, **self._of_run(learner, outer, episodes, seed, shard, begin, state)}

        def whole(buffer: Array) -> Array:  # [K, members, tasks, ...]
            return buffer if len(buffer.shape) == 1 else ops.transpose(buffer, [1, 2, 0, *range(3, len(buffer.shape))])

        visited = TrajectoryBuffer(backend.pack(begin, [whole(buffer) for buffer in buffers]))
        judged = ops.stack(self.judged(learner, outer, episodes, state))
        return visited, sums, ops.cast(judged, _unjudged(outer).dtype)


def _unjudged(outer: Outer) -> Array:
    """A placeholder for loss and quality of the query, `[2, members]`."""
    some = next(iter(outer.values()))
    return ops.zeros((2, some.shape[0]), some.dtype)


def _differences(before: Outer, after: Outer) -> Outer:
    """Weights before minus weights after, `[members, tasks, ...]`: descent as a gradient."""
    return {name: before[name] - after[name] for name in before}


def _directions(before: Outer, after: Outer) -> Outer:
    """Differences normalised to length one over all weights of a network; zero without movement."""
    moved = _differences(before, after)
    squares = [ops.sum(ops.square(one), axis=tuple(range(2, len(one.shape)))) for one in moved.values()]
    length = ops.sqrt(functools.reduce(operator.add, squares))
    still = length == 0.0
    scale = ops.where(still, 0.0, 1.0 / ops.where(still, 1.0, length))
    return {name: one * ops.reshape(scale, (*scale.shape, *[1] * (len(one.shape) - 2))) for name, one in moved.items()}


def _mean_over_tasks(values: Outer) -> Outer:
    return {name: backend.mean(value, axis=1) for name, value in values.items()}
