"""The objective of the inner loop and the base class of outer-gradient estimators.

Source: "Meta-Learning Bidirectional Update Rules" (Sandler et al., ICML 2021), section 3.3. The
inner loop is unrolled and scored by the softmax cross-entropy of the first output state on unseen
inputs (the printed formula lacks its minus sign). An optional second term is the trajectory loss:
the mean loss of each step's prediction of its own batch before learning from it. It costs nothing
and gives early steps a direct gradient. The published code uses the squared error to labels of +1
and -1 instead, which is `loss="squared"`.

The loop is one loop of the program (`backend.loop`). Its compile time does not depend on its
length.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import keras
import numpy as np
from keras import ops

from keras_blur import arguments, backend
from keras_blur.core import random
from keras_blur.distribution import ALL, Shard
from keras_blur.learners.base import Learner
from keras_blur.tasks.base import Tasks

Array = Any
Outer = Mapping[str, Array]
Episodes = Mapping[str, Array]

KINDS = ("classes", "values", "bits")
LOSSES = ("auto", "cross_entropy", "binary", "squared")
"""Query losses: the values of `loss` of an estimator."""
_NETWORK = 1_000_000_009  # folded into a seed before the number of a network; no layer has this place


class Estimate(NamedTuple):
    """An estimate of the outer gradient of each member.

    Attributes:
        gradients: gradient of each outer parameter by name, `[members, ...]`.
        loss: mean objective over tasks, `[members]`.
        accuracy: query accuracy, `[members]`; R squared if the outputs are values.

    Example:

    >>> estimate = Estimate({"nu": ops.ones((1, 2, 2))}, loss=ops.zeros(1), accuracy=ops.ones(1))
    >>> tuple(estimate.gradients["nu"].shape), float(estimate.accuracy[0])
    ((1, 2, 2), 1.0)
    """

    gradients: Outer
    loss: Array
    accuracy: Array


def cross_entropy(prediction: Array, y: Array) -> Array:
    """Mean softmax cross-entropy of logits and +1/-1 labels: `[..., batch, classes]` to `[...]`.

    A single logit uses the logistic cross-entropy.
    """
    if prediction.shape[-1] == 1:
        return binary_cross_entropy(prediction, y)
    labels = ops.cast(0.5 * (y + 1.0), prediction.dtype)
    return backend.mean(-ops.sum(labels * ops.log_softmax(prediction, axis=-1), axis=-1), axis=-1)


def binary_cross_entropy(prediction: Array, y: Array) -> Array:
    """Mean logistic cross-entropy of logits and +1/-1 labels over outputs and examples.

    Labels of 0 are ignored.
    """
    y = ops.broadcast_to(ops.cast(y, prediction.dtype), ops.shape(prediction))
    scored = ops.abs(y)
    return ops.sum(scored * ops.softplus(-prediction * y), axis=(-2, -1)) / ops.sum(scored, axis=(-2, -1))


def squared_error(prediction: Array, y: Array) -> Array:
    """Mean squared difference over outputs and examples."""
    return backend.mean(ops.square(prediction - ops.cast(y, prediction.dtype)), axis=(-2, -1))


def accuracy(prediction: Array, y: Array) -> Array:
    """Classification accuracy: `[..., batch, classes]` to `[...]`.

    A prediction is correct if its largest output is the true class. A single output is correct if
    it has the sign of the label. Non-finite predictions are wrong.
    """
    correct = ops.equal(classes_of(prediction), classes_of(y)) & ops.all(ops.isfinite(prediction), axis=-1)
    return backend.mean(ops.cast(correct, prediction.dtype), axis=-1)


def classes_of(outputs: Array) -> Array:
    """Classes of logits or +1/-1 labels: `[..., outputs]` to integers `[...]`.

    The class is the index of the largest output. A single output means class 1 above 0 and class 0
    otherwise.

    Example:

    >>> [int(one) for one in classes_of(ops.array([[0.5], [-0.5]]))]
    [1, 0]
    """
    if outputs.shape[-1] == 1:
        return ops.cast(outputs[..., 0] > 0, "int32")
    # Keras's argmax ranks -0.0 below 0.0, on CPUs alone.
    outputs = ops.where(ops.equal(outputs, 0.0), ops.zeros_like(outputs), outputs)
    return ops.cast(ops.argmax(outputs, axis=-1), "int32")


def correct_bits(prediction: Array, y: Array) -> Array:
    """Accuracy of bits: the fraction of nonzero labels whose sign is predicted.

    Maps `[..., batch, bits]` to `[...]`. Non-finite predictions are wrong. Without a nonzero label
    the accuracy is NaN, as is the loss.
    """
    y = ops.broadcast_to(ops.cast(y, prediction.dtype), ops.shape(prediction))
    scored = ops.abs(y)
    correct = ops.cast(ops.equal(prediction > 0, y > 0) & ops.isfinite(prediction), prediction.dtype)
    return ops.sum(scored * correct, axis=(-2, -1)) / ops.sum(scored, axis=(-2, -1))


def explained(prediction: Array, y: Array) -> Array:
    """Coefficient of determination, R squared: `[..., batch, outputs]` to `[...]`.

    As in Keras and scikit-learn, constant targets give 0, or 1 if the prediction is exact.
    """
    y = ops.cast(y, prediction.dtype)
    spread = backend.mean(ops.square(y - backend.mean(y, axis=-2, keepdims=True)), axis=(-2, -1))
    flat = spread <= 1e-12 * backend.mean(ops.square(y), axis=(-2, -1))  # rounding of the mean
    error = squared_error(prediction, y)
    of_flat = ops.where(error > 0, 0.0, 1.0 - error)  # NaN stays NaN
    return ops.where(flat, of_flat, 1.0 - error / ops.where(flat, 1.0, spread))


_CACHED = 2**20  # numbers in the learner states of a group of members: 4 MB in float32
_FUNCTIONS = {"cross_entropy": cross_entropy, "binary": binary_cross_entropy, "squared": squared_error}


@dataclasses.dataclass(frozen=True)
class InnerLoop:
    """The length of the inner loop and its objective: the fields that `Estimator` documents.

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
        if self.kind == "bits" and self.loss not in ("auto", "binary"):
            raise ValueError(
                f"`loss` of bits, of which some are not scored, must be 'binary' or 'auto'. Received: loss={self.loss!r}"
            )

    def on(self, tasks: Sequence[Tasks], batch: int, query: int) -> Self:
        """The inner loop for tasks, as `MetaTrainer` runs it.

        Args:
            tasks: task distributions of one kind.
            batch: examples of a support batch.
            query: examples of the query.
        """
        del batch, query
        return dataclasses.replace(self, kind=tasks[0].kind)

    @property
    def horizon(self) -> int:
        """Number of support batches of an episode. Truncated estimators use more than `steps`."""
        return self.steps

    @property
    def windows(self) -> int:
        """Number of consecutive estimates on the same episodes."""
        return 1

    def objective(self, learner: Learner, outer: Outer, episodes: Episodes, state: Any) -> tuple[Array, Array, Any]:
        """Computes losses and query accuracies, and the final learner state.

        Args:
            learner: the learner.
            outer: outer parameters `[members, ...]`.
            episodes: as in `Estimator.__call__`.
            state: learner state with leading axes `[members, tasks]`.

        Returns:
            Two arrays `[members, tasks]` and the state.
        """
        x, y = episodes["x"][None], episodes["y"][None]
        loss_of = self._loss()
        outer = over_tasks(outer)
        leading = (next(iter(outer.values())).shape[0], int(x.shape[1]))

        def body(outer: Outer, time: Array, state: Any, total: Array) -> tuple[Any, Array]:
            # Data need no gradient. Without this, every step of the backward loop would compute
            # that of all batches.
            batch_x, batch_y = (ops.stop_gradient(at(data, time, axis=2)) for data in (x, y))
            state, prediction = learner.step(outer, state, batch_x, batch_y)
            if self.trajectory_loss_weight:
                total = total + loss_of(prediction, batch_y) * (self.trajectory_loss_weight / self.steps)
            return state, total

        state, total = self._loop(body, outer, state, ops.zeros(leading, state_dtype(state)))
        prediction = learner.predict(outer, state, episodes["query_x"][None])
        losses, quality = self.scores(prediction, episodes["query_y"][None])
        return total + losses, quality, state

    def scores(self, prediction: Array, y: Array) -> tuple[Array, Array]:
        """Loss and quality of predictions `[..., batch, outputs]`, each of shape `[...]`."""
        quality = {"classes": accuracy, "values": explained, "bits": correct_bits}[self.kind]
        return self._loss()(prediction, y), quality(prediction, y)

    def _loss(self) -> Any:
        if self.loss != "auto":
            return _FUNCTIONS[self.loss]
        if self.kind == "values":
            return squared_error
        return cross_entropy if self.kind == "classes" else binary_cross_entropy

    def _loop(self, body: Any, outer: Outer, state: Any, total: Array) -> tuple[Any, Array]:
        """Carries the state and the trajectory loss through all steps."""
        step = backend.recomputed(body, stores_costly=True)

        def run(count: int, outer: Outer, begin: int | Array, state: Any, total: Array) -> tuple[Any, Array]:
            return backend.loop(count, lambda number, *carried: step(outer, begin + number, *carried), state, total)

        if not self.recompute:
            return run(self.steps, outer, 0, state, total)
        width = max(1, math.isqrt(self.steps))
        whole, rest = divmod(self.steps, width)
        segment = backend.recomputed(functools.partial(run, width))
        state, total = backend.loop(whole, lambda number, *now: segment(outer, number * width, *now), state, total)
        return run(rest, outer, whole * width, state, total) if rest else (state, total)


class Carried(NamedTuple):
    """State passed from an estimate to the next one on the same episodes.

    Attributes:
        learners: learner states `[members or particles, tasks, ...]`; leaves common to all have no
            such axes.
        directions: state of the members that does not depend on a task.
    """

    learners: Any = ()
    directions: Any = ()


NOTHING = Carried()


@dataclasses.dataclass(frozen=True)
class Estimator(InnerLoop, abc.ABC):
    """An inner loop with an estimator of its outer gradient: the base class of your own.

    An estimate has two halves, so that tasks or members can be split over several devices.
    `local_estimate` computes statistics on one shard of the tasks or of the members. `combine`
    turns their mean over shards of the tasks, for all members, into the estimate.

    Args:
        steps: learning steps of one estimate.
        trajectory_loss_weight: weight of the trajectory loss, added to the query loss. The
            trajectory loss is the mean loss of the predictions made during learning. 0 uses the
            query loss alone.
        loss: `"cross_entropy"` (softmax, or logistic for a single output), `"binary"` (each output
            on its own), `"squared"`, or `"auto"`: cross-entropy for classes, binary for bits,
            squared for values.
        kind: output kind of the tasks: `"classes"`, `"values"` or `"bits"`. `MetaTrainer` sets it.
        recompute: whether to save memory by recomputing the unrolled steps. If so, only the state
            at the start of each segment of about `sqrt(steps)` steps is stored, and the backward
            pass recomputes the segment.

    Raises:
        ValueError: if an argument is out of range.

    Example:

    >>> from keras_blur import meta
    >>> class SignUnroll(meta.Unroll):  # the sign of the exact gradient
    ...     def combine(self, outer, measured, seed, carried, first):
    ...         gradients = {name: ops.sign(value) for name, value in measured.gradients.items()}
    ...         return measured._replace(gradients=gradients), ()
    >>> SignUnroll(steps=5).horizon
    5
    """

    carries_learners: ClassVar[bool] = False  # whether an estimate passes its learners to the next one

    @abc.abstractmethod
    def local_estimate(
        self, learner: Learner, outer: Outer, episodes: Episodes, seed: Array, carried: Carried, first: Any, shard: Shard
    ) -> tuple[Any, Any]:
        """Computes statistics on one shard of the tasks or of the members.

        Args:
            learner: the learner.
            outer: outer parameters by name, `[members, ...]`, those of the shard.
            episodes: the episodes of the shard: `x` `[tasks, steps, batch, features]`, `y`
                `[tasks, steps, batch, outputs]`, `query_x` `[tasks, query, features]` and `query_y`
                `[tasks, query, outputs]`.
            seed: seed of the initial networks and of noise, `[2]` int32.
            carried: state returned by the previous estimate; ignored if `first`. The learners are
                those of the shard, the directions those of all members.
            first: whether this is the first estimate on these episodes; a scalar array or `bool`.
            shard: the shard. What is drawn at random for each member is that of
                `shard.members.places`. Members with other numbers in `shard.networks` have other
                initial networks.

        Returns:
            A tree of arrays `[members, ...]`, whose mean over shards of the tasks is passed to
            `combine`, and the learner states to carry on.
        """

    @abc.abstractmethod
    def combine(self, outer: Outer, measured: Any, seed: Array, carried: Carried, first: Any) -> tuple[Estimate, Any]:
        """Turns the mean statistics into the estimate.

        Args:
            outer: as in `local_estimate`.
            measured: mean over shards of the first result of `local_estimate`.
            seed: as in `local_estimate`.
            carried: as in `local_estimate`.
            first: as in `local_estimate`.

        Returns:
            The `Estimate`, and the directions to carry on; `()` for none.
        """

    def __call__(
        self, learner: Learner, outer: Outer, episodes: Episodes, seed: Array, carried: Carried = NOTHING, first: Any = True
    ) -> tuple[Estimate, Carried]:
        """Estimates the gradient of each member's mean loss over the tasks.

        Args:
            learner: the learner.
            outer: outer parameters `[members, ...]`.
            episodes: all episodes, as in `local_estimate`.
            seed: seed of the initial networks (equal for members, different for tasks) and of
                noise, `[2]` int32. Only `MetaTrainer` gives members that are copies different
                networks.
            carried: state returned by the previous estimate; ignored if `first`.
            first: whether this is the first estimate on these episodes.

        Returns:
            The estimate, and the state to pass to the next one.
        """
        measured, learners = self.local_estimate(learner, outer, episodes, seed, carried, first, ALL)
        estimate, directions = self.combine(outer, measured, seed, carried, first)
        return estimate, Carried(learners, directions)

    def begin(
        self, learner: Learner, outer: Outer, episodes: Episodes, seed: Array, carried: Carried, first: Any, shard: Shard
    ) -> Any:
        """The learner states before the first batch of this estimate; arguments as in
        `local_estimate`."""
        del carried, first
        return start(learner, outer, episodes, seed, shard)

    def by_member(
        self,
        function: Callable[[Outer, Shard], tuple[Any, Any]],
        like: Callable[[int, str], Any],
        learner: Learner,
        outer: Outer,
        episodes: Episodes,
        seed: Array,
        shard: Shard,
    ) -> tuple[Any, Any]:
        """Statistics of each member, and the learner states to carry on.

        If nothing is carried on, members are computed by `in_groups`.

        Args:
            function: maps outer parameters `[members, ...]` and their shard to a tree of arrays
                `[members, ...]`, and to the learner states after the last step.
            like: as in `in_groups`, for the first result of `function`.
            learner: the learner.
            outer: outer parameters of all members.
            episodes: as in `local_estimate`.
            seed: as in `local_estimate`.
            shard: as in `local_estimate`.
        """
        if self.carries_learners:
            return function(outer, shard)
        return in_groups(lambda *group: function(*group)[0], like, learner, outer, episodes, seed, shard), ()

    @property
    def carries(self) -> bool:
        """Whether an estimate passes anything to the next one."""
        return type(self).nothing_carried is not Estimator.nothing_carried

    def part(self, episodes: Episodes, window: Array) -> Episodes:
        """Selects the support batches of a truncation window.

        Args:
            episodes: whole episodes, as in `local_estimate`.
            window: number of the window, a scalar int32 array.
        """
        del window
        return episodes

    def nothing_carried(self, learner: Learner, outer: Outer, episodes: Episodes) -> Carried:
        """A placeholder for `carried` before the first estimate: zeros of the correct shapes.

        Args:
            learner: the learner.
            outer: as in `local_estimate`.
            episodes: as in `local_estimate`.
        """
        del learner, outer, episodes
        return NOTHING


@dataclasses.dataclass(frozen=True)
class Truncated(Estimator):
    """Cuts episodes of `episode_steps` steps into truncation windows of `steps` steps.

    `episode_steps` must be a multiple of `steps`. Learners are carried from window to window.
    """

    carries_learners = True
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
        support = {name: section(episodes[name], window * self.steps, self.steps, axis=1) for name in ("x", "y")}
        return {**episodes, **support}

    def begin(
        self, learner: Learner, outer: Outer, episodes: Episodes, seed: Array, carried: Carried, first: Any, shard: Shard
    ) -> Any:
        return choose(first, start(learner, outer, episodes, seed, shard), carried.learners)


def start(learner: Learner, outer: Outer, episodes: Episodes, seed: Array, shard: Shard = ALL) -> Any:
    """The learner state before the first batch, with leading axes `[members, tasks]`.

    Initialisation is independent of sharding. Members have equal networks, unless `shard.networks`
    has different numbers. Networks of number 0 are those without numbers.
    """
    members = next(iter(outer.values())).shape[0]
    (tasks, *_, features), outputs = episodes["x"].shape, episodes["y"].shape[-1]

    def init(outer: Outer, seed: Array, members: int) -> Any:
        return learner.init(over_tasks(outer), seed, int(features), int(outputs), (members, int(tasks)), shard)

    if shard.networks is None:
        return init(outer, seed, members)
    each = []
    for member, number in enumerate(ops.unstack(shard.networks, members)):
        own = ops.where(ops.equal(number, 0), seed, random.fold_in(seed, _NETWORK, number))
        each.append(init({name: value[member : member + 1] for name, value in outer.items()}, own, 1))
    # Leaves without the axes of members and tasks are common to all.
    return backend.tree_map(lambda *own: own[0] if len(own[0].shape) < 2 else ops.concatenate(own, axis=0), *each)


def in_groups(
    function: Callable[[Outer, Shard], Any],
    like: Callable[[int, str], Any],
    learner: Learner,
    outer: Outer,
    episodes: Episodes,
    seed: Array,
    shard: Shard = ALL,
) -> Any:
    """The values of a function of outer parameters, computed on a CPU for a few members at a time.

    The states of many members do not fit in the caches of a CPU, which then waits for its memory.
    Groups that fit take turns, and only one group's unroll is stored. Other devices take all
    members at once.

    Args:
        function: maps outer parameters `[members, ...]` and their shard to a tree of arrays
            `[members, ...]`. No member's values may depend on another member.
        like: maps a number of members and a dtype to a tree like a value of `function`, with
            shapes and dtypes.
        learner: the learner.
        outer: outer parameters of all members.
        episodes: as in `Estimator.__call__`.
        seed: seed of the initial networks.
        shard: the shard of all members.

    Returns:
        The value of `function`, for all members.
    """
    members = next(iter(outer.values())).shape[0]
    one = start(learner, {name: value[:1] for name, value in outer.items()}, episodes, seed)
    size = min(members, max(1, _CACHED // sum(math.prod(leaf.shape) for leaf in backend.leaves(one))))
    while members % size:
        size -= 1
    if size == members:
        return function(outer, shard)
    given = {"outer": dict(outer), **({} if shard.networks is None else {"networks": shard.networks})}

    def of_group(group: dict[str, Any]) -> Any:
        return function(group["outer"], dataclasses.replace(shard, networks=group.get("networks")))

    def grouped(value: Array) -> Array:
        return ops.reshape(value, (members // size, size, *value.shape[1:]))

    def whole(value: Array) -> Array:
        return ops.reshape(value, (members, *value.shape[2:]))

    def in_turn(given: dict[str, Any]) -> Any:
        found = backend.one_by_one(of_group, backend.tree_map(grouped, given), like(size, state_dtype(one)))
        return backend.tree_map(whole, found)

    return backend.on_platform(given, cpu=in_turn, other=of_group)


def over_tasks(outer: Outer) -> Outer:
    """Adds a task axis to outer parameters: `[members, ...]` to `[members, 1, ...]`."""
    return {name: value[:, None] for name, value in outer.items()}


def section(values: Array, begin: Array, size: int, axis: int) -> Array:
    """A number of consecutive places of an axis, from a given one on.

    It is a slice of static size, as a TPU needs it.
    """
    starts, sizes = [np.int32(0)] * len(values.shape), list(values.shape)
    starts[axis], sizes[axis] = ops.cast(begin, "int32"), size
    return ops.slice(values, starts, sizes)


def at(values: Array, place: Array, axis: int) -> Array:
    """One place of an axis, without that axis."""
    return ops.squeeze(section(values, place, 1, axis), axis)


def choose(first: Any, fresh: Any, old: Any) -> Any:
    """Selects `fresh` if `first`, else `old`, for trees of arrays."""
    return backend.tree_map(lambda one, other: ops.where(first, one, other), fresh, old)


def state_dtype(state: Any) -> str:
    """The floating-point dtype of a learner state."""
    dtypes = (keras.backend.standardize_dtype(leaf.dtype) for leaf in backend.leaves(state))
    return next(dtype for dtype in dtypes if keras.backend.is_float_dtype(dtype))
