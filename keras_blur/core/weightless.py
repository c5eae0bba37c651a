"""Maps without synapses between layers of neurons: how states pass through them, forward and back.

One definition serves all maps. State 1 goes through the map f, every other state through the
Jacobian of f at state 1, and what comes back goes through the transposed Jacobian. So the feedback
path is the transpose of the forward pass, and the genome that is backpropagation stays
backpropagation through any map. The Jacobian of a linear f is f itself, so every state goes through
f.

Source: the chain rule; eq. 5 and 6 of "Meta-Learning Bidirectional Update Rules" (2021) need no
more.

The Jacobians come from automatic differentiation of the map. Those of dropout, normalisation and
max pooling are written by hand: dropout draws one mask for all states, normalisation adds up over
the devices that share a batch, and max pooling needs a second derivative that is exact under XLA.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from keras import ops
from keras.backend import standardize_dtype

from keras_blur.backend import replica, replicas
from keras_blur.core import random
from keras_blur.core.derivatives import jvp, mean, transpose, vjp
from keras_blur.core.equations import SharedBatch
from keras_blur.core.patches import taps
from keras_blur.core.states import first_states, later_states

if TYPE_CHECKING:
    from jaxtyping import Float, Int

Array = Any
Shape = tuple[Any, ...]


class WeightlessMap(abc.ABC):
    """A map from one or more arrays of states `[..., k, batch, *features]` to one.

    Args:
        sources: shapes of the features that enter.
        target: shape of the features that leave.
    """

    def __init__(self, sources: Sequence[Shape], target: Shape):
        self.sources = tuple(tuple(shape) for shape in sources)
        self.target = tuple(target)

    def context(self, states: Sequence[Array], training: bool) -> Any:
        """What is drawn once for all states and both passes, such as a dropout mask."""
        return None

    @abc.abstractmethod
    def forward(self, states: Sequence[Array], context: Any, batch: SharedBatch | None = None) -> Array:
        """The states after the map, `[..., k, batch, *target]`. All inputs have the same number of
        states."""

    @abc.abstractmethod
    def backward(
        self, states: Sequence[Array], cotangent: Array, context: Any, batch: SharedBatch | None = None
    ) -> tuple[Array, ...]:
        """The cotangent, `[..., k, batch, *target]`, after the transposed Jacobian at state 1 of
        `states`: one array for each input."""


class Linear(WeightlessMap):
    """A linear function of examples. States pass through it as if they were more examples.

    Args:
        function: a function from arrays `[n, *features]` to an array `[n, *target]`.
        sources: shapes of the features that enter.
        target: shape of the features that leave.

    Example:

    >>> halves = Linear(lambda x: 0.5 * x, [(3,)], (3,))
    >>> tuple(halves.forward([ops.ones((2, 4, 3))], None).shape)
    (2, 4, 3)
    """

    def __init__(self, function: Callable[..., Array], sources: Sequence[Shape], target: Shape):
        super().__init__(sources, target)
        self.function = _same_type(function)

    def forward(self, states: Sequence[Array], context: Any, batch: SharedBatch | None = None) -> Array:
        flat = [_merged(value, len(shape)) for value, shape in zip(states, self.sources, strict=True)]
        return _split(self.function(*flat), states[0], len(self.sources[0]), self.target)

    def backward(
        self, states: Sequence[Array], cotangent: Array, context: Any, batch: SharedBatch | None = None
    ) -> tuple[Array, ...]:
        flat = _merged(cotangent, len(self.target))
        points = [ops.zeros((ops.shape(flat)[0], *shape), dtype=flat.dtype) for shape in self.sources]
        back = vjp(self.function, *points)[1](flat)
        return tuple(
            _split(value, cotangent, len(self.target), shape) for value, shape in zip(back, self.sources, strict=True)
        )


class Jacobian(WeightlessMap):
    """Any differentiable function of whole batches. The other states go through its Jacobian at
    state 1.

    Args:
        function: a function from arrays `[batch, *features]` to an array `[batch, *target]`.
        sources: shapes of the features that enter.
        target: shape of the features that leave.
    """

    def __init__(self, function: Callable[..., Array], sources: Sequence[Shape], target: Shape):
        super().__init__(sources, target)
        self.function = _same_type(function)

    def _members(self, states: Sequence[Array]) -> tuple[list[list[Array]], Shape]:
        """The states of each member of a population, and the shape of its leading axes."""
        rank = len(self.sources[0]) + 2
        leading = tuple(states[0].shape[: len(states[0].shape) - rank])
        if not leading:
            return [list(states)], ()
        flat = [ops.reshape(value, (math.prod(leading), *ops.shape(value)[len(leading) :])) for value in states]
        return [[value[member] for value in flat] for member in range(math.prod(leading))], leading

    def forward(self, states: Sequence[Array], context: Any, batch: SharedBatch | None = None) -> Array:
        members, leading = self._members(states)
        found = []
        for member in members:
            first = [value[0] for value in member]
            rest = range(1, member[0].shape[0])
            if not rest:
                found.append(self.function(*first)[None])
                continue
            moved = [jvp(self.function, first, [value[state] for value in member]) for state in rest]
            found.append(ops.stack([moved[0][0], *(change for _, change in moved)]))
        return _gathered(found, leading)

    def backward(
        self, states: Sequence[Array], cotangent: Array, context: Any, batch: SharedBatch | None = None
    ) -> tuple[Array, ...]:
        members, leading = self._members([*states, cotangent])
        found = []
        for *member, back in members:
            _, pull = vjp(self.function, *(value[0] for value in member))
            pulled = [pull(back[state]) for state in range(back.shape[0])]
            found.append([ops.stack(parts) for parts in zip(*pulled, strict=True)])
        return tuple(_gathered(parts, leading) for parts in zip(*found, strict=True))


class ActivationMap(Jacobian):
    """An activation, which may depend on several features of an example."""


class Softmax(ActivationMap):
    """A softmax over the last axis. For a cross-entropy of probabilities it is skipped: the loss is
    computed from the logits."""

    def __init__(self, shape: Shape):
        super().__init__(ops.softmax, [shape], shape)


class Elementwise(ActivationMap):
    """An elementwise function, whose Jacobian is its derivative: a number for each entry.

    Example:

    >>> square = Elementwise(ops.square, [(1,)], (1,))
    >>> states = ops.array([[[3.0]], [[1.0]]])  # state 2 goes through the derivative at state 1
    >>> ops.convert_to_numpy(square.forward([states], None)).tolist()
    [[[9.0]], [[6.0]]]
    """

    def forward(self, states: Sequence[Array], context: Any, batch: SharedBatch | None = None) -> Array:
        (value,) = states
        rank = len(self.target)
        axis = -rank - 2
        first = first_states(value, 1, rank)
        if value.shape[axis] == 1:
            return self.function(first)
        through, pull = vjp(self.function, first)
        rest = later_states(value, rank)
        return ops.concatenate([through, pull(ops.ones_like(through))[0] * rest], axis=axis)

    def backward(
        self, states: Sequence[Array], cotangent: Array, context: Any, batch: SharedBatch | None = None
    ) -> tuple[Array, ...]:
        first = first_states(states[0], 1, len(self.target))
        through, pull = vjp(self.function, first)
        if cotangent.shape[-2 - len(self.target)] == 1:  # no array for the derivative
            return pull(cotangent)
        return (pull(ops.ones_like(through))[0] * cotangent,)


class Sigmoid(Elementwise):
    """A sigmoid after an output. For a cross-entropy of probabilities it is skipped, as a softmax
    is."""

    def __init__(self, shape: Shape):
        super().__init__(ops.sigmoid, [shape], shape)


class MaxPooling(Jacobian):
    """Max pooling. Its Jacobian takes from each window the entry where state 1 is largest; in a
    tie, the first.

    Written by hand: XLA rounds the second derivative of TensorFlow's max pooling to 16 bits.

    Args:
        function: the pooling, of arrays `[n, *spatial, channels]`.
        source: shape of the features that enter.
        target: shape of the features that leave.
        size: size of a window.
        strides: strides of the windows.
        padding: `"valid"` or `"same"`.
        first: whether channels come before the spatial axes.
    """

    def __init__(
        self,
        function: Callable[..., Array],
        source: Shape,
        target: Shape,
        size: Shape,
        strides: Shape,
        padding: str,
        first: bool = False,
    ):
        super().__init__(function, [source], target)
        self.size, self.strides, self.padding, self.first = tuple(size), tuple(strides), padding, first

    def _taps(self, states: Array, outside: float = 0.0) -> list[Array]:
        """What each tap of the windows reads, `[..., *positions, channels]`."""
        return taps(self._last(states), self.size, self.strides, self.padding, (1,) * len(self.size), outside)

    def _last(self, states: Array) -> Array:
        return ops.moveaxis(states, -len(self.target), -1) if self.first else states

    def _first(self, states: Array) -> Array:
        return ops.moveaxis(states, -1, -len(self.target)) if self.first else states

    def _pooled(self, one: Array) -> Array:
        rank = len(self.target)
        return _split(self.function(_merged(one, rank)), one, rank, self.target)

    def _winners(self, one: Array, largest: Array) -> list[Array]:
        """For each tap, where it is the first to read the largest entry of a window."""
        found: list[Array] = []
        taken = None
        for read in self._taps(one, -math.inf):
            wins = read >= self._last(largest)  # 0.0 is as large as -0.0
            found.append(wins if taken is None else ops.logical_and(wins, ops.logical_not(taken)))
            taken = wins if taken is None else ops.logical_or(taken, wins)
        return found

    def forward(self, states: Sequence[Array], context: Any, batch: SharedBatch | None = None) -> Array:
        (value,) = states
        axis, rank = len(value.shape) - 2 - len(self.target), len(self.target)
        one = first_states(value, 1, rank)
        largest = self._pooled(one)
        if value.shape[axis] == 1:
            return largest
        read = zip(self._winners(one, largest), self._taps(later_states(value, rank)), strict=True)
        chosen = sum(ops.where(wins, rest, ops.zeros_like(rest)) for wins, rest in read)
        return ops.concatenate([largest, self._first(chosen)], axis=axis)

    def backward(
        self, states: Sequence[Array], cotangent: Array, context: Any, batch: SharedBatch | None = None
    ) -> tuple[Array, ...]:
        rank = len(self.target)
        if len(states[0].shape) == rank + 2:
            # A network that learns alone. The backend's own kernel is faster, but XLA rounds its
            # derivative, which an outer gradient takes.
            return super().backward(states, cotangent, context, batch)
        one = first_states(states[0], 1, rank)
        winners = self._winners(one, self._pooled(one))
        back = self._last(cotangent)

        def chosen(entering: Array) -> Array:
            read = zip(winners, self._taps(entering), strict=True)
            return sum(ops.where(wins, value, ops.zeros_like(value)) for wins, value in read)

        shape = (*ops.shape(cotangent)[: len(cotangent.shape) - rank], *self.sources[0])
        return (transpose(chosen, shape, back),)


class Phases(WeightlessMap):
    """A map that is another one in training, such as a layer that takes `training`.

    Args:
        training: the map in training.
        prediction: the map in prediction, of the same shapes.
    """

    def __init__(self, training: WeightlessMap, prediction: WeightlessMap):
        super().__init__(training.sources, training.target)
        self.training, self.prediction = training, prediction

    def context(self, states: Sequence[Array], training: bool) -> Any:
        return () if training else None  # no arrays, so it passes through any program

    def _now(self, context: Any) -> WeightlessMap:
        return self.prediction if context is None else self.training

    def forward(self, states: Sequence[Array], context: Any, batch: SharedBatch | None = None) -> Array:
        return self._now(context).forward(states, None, batch)

    def backward(
        self, states: Sequence[Array], cotangent: Array, context: Any, batch: SharedBatch | None = None
    ) -> tuple[Array, ...]:
        return self._now(context).backward(states, cotangent, None, batch)


class Dropout(WeightlessMap):
    """Dropout: one mask for all states and both passes.

    The mask follows from the layer's own seed. It is not drawn by the layer, whose random numbers
    differ in a step that XLA compiles. Every replica draws the mask of the whole batch and takes
    its own rows.

    Args:
        shape: shape of the features.
        rate: share of the entries that are dropped.
        noise_shape: shape of the mask before it is broadcast, batch included, as in Keras; `None`
            for the full size of an axis, 1 for an axis that is dropped as a whole.
        draw: a function that returns a new seed, two integers, at each call.
    """

    def __init__(self, shape: Shape, rate: float, noise_shape: Sequence[int | None], draw: Callable[[], Array]):
        super().__init__([shape], shape)
        self.rate, self.noise_shape, self.draw = rate, tuple(noise_shape), draw

    def context(self, states: Sequence[Array], training: bool) -> Any:
        if not training or not self.rate:
            return None
        (value,) = states
        ones = ops.ones_like(first_states(value, 1, len(self.target)))
        rows = ops.shape(ops.reshape(ones, (-1, *self.target)))[0]
        mask = drop_mask(self.draw(), self.rate, rows, self.target, self.noise_shape, value.dtype)
        return ops.reshape(mask, ops.shape(ones))

    def forward(self, states: Sequence[Array], context: Any, batch: SharedBatch | None = None) -> Array:
        return states[0] if context is None else states[0] * context

    def backward(
        self, states: Sequence[Array], cotangent: Array, context: Any, batch: SharedBatch | None = None
    ) -> tuple[Array, ...]:
        return (cotangent if context is None else cotangent * context,)


class Normalize(WeightlessMap):
    """Centring and scaling by statistics of the values themselves, as in batch, layer and group
    normalisation.

    With y = (x - mean) / deviation, the Jacobian takes v to (v - mean(v) - y mean(y v)) /
    deviation. It is symmetric, so it is its own transpose. States in half precision are normalised
    in float32, since their squares would overflow.

    Args:
        shape: shape of the features.
        axes: axes of `[batch, *features]` that the statistics run over; 0 is the batch.
        epsilon: added to the variance.
        center: whether the mean is subtracted; if not, the second moment takes the place of the
            variance.
        groups: shape to which the features are reshaped for the statistics; afterwards they are
            reshaped back.
        given: a function that returns mean and variance to use instead, as in prediction; `None`
            always takes those of the values.
        active: a function that returns whether training takes the statistics of the values; a
            frozen layer takes the given ones.
    """

    def __init__(
        self,
        shape: Shape,
        axes: Sequence[int],
        epsilon: float,
        *,
        center: bool = True,
        groups: Shape | None = None,
        given: Callable[[], tuple[Array, Array]] | None = None,
        active: Callable[[], bool] = lambda: True,
    ):
        super().__init__([shape], shape)
        self.axes, self.epsilon, self.center = tuple(axes), epsilon, center
        self.groups = tuple(groups or shape)
        self.given, self.active = given, active

    @property
    def over_batch(self) -> bool:
        """Whether the statistics run over the batch."""
        return 0 in self.axes

    def context(self, states: Sequence[Array], training: bool) -> Any:
        """The statistics to normalise by, or `None` for those of the values."""
        if self.given is None or (training and self.active()):
            return None
        return tuple(ops.reshape(value, self._broadcast(value)) for value in self.given())

    def _broadcast(self, value: Array) -> Shape:
        kept = [1 if axis + 1 in self.axes else size for axis, size in enumerate(self.groups)]
        return (1, *kept)

    def _grouped(self, value: Array, features: Shape) -> Array:
        return value if self.groups == self.target else _features(value, len(self.target), features)

    @property
    def _turns(self) -> int:
        """How often axes of statistics and others take turns in `[batch, *groups]`."""
        inside = [axis in self.axes for axis in range(1 + len(self.groups))]
        return sum(one != other for one, other in pairwise(inside))

    def _mean(self, value: Array, batch: SharedBatch | None) -> Array:
        axes = [axis - len(self.groups) - 1 for axis in self.axes]
        if not self.over_batch or batch is None:
            return mean(value, axes, keepdims=True)
        others = math.prod(self.groups[axis - 1] for axis in self.axes if axis)
        count = ops.cast(batch.examples, value.dtype) * others
        return batch.total([ops.sum(value, axis=axes, keepdims=True)])[0] / count

    def moments(self, states: Sequence[Array], batch: SharedBatch | None = None) -> tuple[Array, Array]:
        """Mean and variance of state 1, `[..., 1, 1 or batch, *groups]`."""
        first = self._grouped(_at_least_single(first_states(states[0], 1, len(self.target))), self.groups)
        mean = self._mean(first, batch) if self.center else ops.zeros_like(first[..., :1])
        return mean, self._mean(ops.square(first - mean), batch)

    def _parts(self, states: Sequence[Array], context: Any, batch: SharedBatch | None) -> tuple[Array, Array]:
        """State 1 normalised, and the inverse deviation."""
        first = self._grouped(_at_least_single(first_states(states[0], 1, len(self.target))), self.groups)
        mean, variance = self.moments(states, batch) if context is None else map(_at_least_single, context)
        inverse = ops.rsqrt(variance + self.epsilon)
        return (first - mean if self.center else first) * inverse, inverse

    def _jacobian(self, value: Array, y: Array, inverse: Array, context: Any, batch: SharedBatch | None) -> Array:
        if context is not None:
            return value * inverse
        straight = value - self._mean(value, batch) if self.center else value
        states = value.shape[-2 - len(self.groups)]
        if states > 1 and self._turns > 2:  # TensorFlow broadcasts no more alternations of axes than that
            repeated = ops.ones((states, *[1] * (1 + len(self.groups))), value.dtype)
            y, inverse = y * repeated, inverse * repeated
        return inverse * (straight - y * self._mean(y * value, batch))

    def forward(self, states: Sequence[Array], context: Any, batch: SharedBatch | None = None) -> Array:
        y, inverse = self._parts(states, context, batch)
        axis = -2 - len(self.target)
        count = states[0].shape[axis]
        if count > 1:
            rest = self._grouped(_at_least_single(later_states(states[0], len(self.target))), self.groups)
            moved = self._jacobian(rest, y, inverse, context, batch)
            y = ops.concatenate([y, moved], axis=-2 - len(self.groups))
        y = ops.cast(y, states[0].dtype)
        return y if self.groups == self.target else _features(y, len(self.groups), self.target)

    def backward(
        self, states: Sequence[Array], cotangent: Array, context: Any, batch: SharedBatch | None = None
    ) -> tuple[Array, ...]:
        y, inverse = self._parts(states, context, batch)
        back = self._jacobian(self._grouped(_at_least_single(cotangent), self.groups), y, inverse, context, batch)
        back = ops.cast(back, cotangent.dtype)
        return (back if self.groups == self.target else _features(back, len(self.groups), self.target),)


def _at_least_single(value: Array) -> Array:
    """A value in float32 if it is in half precision."""
    return ops.cast(value, "float32") if standardize_dtype(value.dtype) in ("float16", "bfloat16") else value


def _same_type(function: Callable[..., Array]) -> Callable[..., Array]:
    """A function whose value keeps the type of its first argument, even if a layer of another dtype
    policy changes it."""

    def cast(*arrays: Array) -> Array:
        return ops.cast(function(*arrays), arrays[0].dtype)

    return cast


def drop_mask(
    seed: Int[Array, " 2"], rate: float, rows: Any, shape: Shape, noise_shape: Sequence[int | None], dtype: Any
) -> Float[Array, "rows ..."]:
    """The factors of a dropout, `[rows, *shape]`: 0, or the inverse of the fraction that stays.

    Args:
        seed: two integers.
        rate: share of the entries that are dropped.
        rows: number of rows of this replica.
        shape: shape of a row.
        noise_shape: as in `Dropout`.
        dtype: dtype of the mask.
    """
    whole = (rows * replicas(), *shape)
    drawn = tuple(size if wanted is None else wanted for size, wanted in zip(whole, noise_shape, strict=True))
    stays = random.uniform(ops.cast(seed, "int32"), drawn) >= rate
    mask = ops.broadcast_to(ops.cast(stays, dtype) / ((1.0 - rate) or 1.0), whole)  # at rate 1 nothing stays
    if replicas() > 1:
        mask = ops.take(mask, replica() * rows + ops.arange(rows), axis=0)
    return mask


def _features(states: Array, known: int, features: Shape) -> Array:
    """The array with its last `known` axes reshaped to `features`."""
    return ops.reshape(states, (*ops.shape(states)[: len(states.shape) - known], *features))


def _merged(states: Array, features: int) -> Array:
    """States `[..., batch, *features]` as `[n, *features]`."""
    shape = ops.shape(states)
    return ops.reshape(states, (-1, *shape[len(shape) - features :]))


def _split(flat: Array, like: Array, known: int, features: Shape) -> Array:
    """The inverse of `_merged`: leading axes and batch are those of `like`, which has `known`
    feature axes."""
    shape = ops.shape(like)
    return ops.reshape(flat, (*shape[: len(shape) - known], *features))


def _gathered(members: Sequence[Array], leading: Shape) -> Array:
    """The results of the members of a population as one array."""
    if not leading:
        return members[0]
    stacked = ops.stack(list(members))
    return ops.reshape(stacked, (*leading, *ops.shape(stacked)[1:]))
