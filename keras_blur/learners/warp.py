"""Warped gradient descent: layers that precondition the descent of the layers around them.

Source: "Meta-Learning with Warped Gradient Descent" (Flennerhag et al., ICLR 2020). The task layers
of a network adapt to a task by gradient descent. The warp layers between them are frozen meanwhile
and are meta-learned. They precondition the descent: with the map Omega that they induce, a step is
theta - alpha G^-1 grad L with G^-1 = (D Omega)(D Omega)^T, to second order in alpha. Warps start as
the identity, which has no effect.

Any Keras model can be used. Keras layers know no leading axes, so networks of several members and
tasks are processed in a loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_blur import arguments, backend
from keras_blur.checks import checked_arrays, model_expects
from keras_blur.distribution import ALL, Shard
from keras_blur.layers.base import check_trained_by_gradients, seed_generators
from keras_blur.learners import dense, updates
from keras_blur.learners.base import (
    Array,
    MetaLearner,
    Outer,
    check_unshared,
    draw_generator,
    keras_model,
    places,
    resolve,
)
from keras_blur.models.networks import copied

_START, _WARP = "start_", "warp_"


class WarpState(NamedTuple):
    """The state of a network during adaptation.

    Attributes:
        weights, first, second: weights of the task layers with two moment arrays each.
        buffers: non-trainable state such as moving averages. It starts with the values of the
            model.
        step: number of steps.
    """

    weights: tuple[Array, ...]
    first: tuple[Array, ...]
    second: tuple[Array, ...]
    buffers: tuple[Array, ...]
    step: Array


class Warp(MetaLearner):
    """A Keras model whose layers are split into warp layers and task layers.

    The outer parameters are the warps and the initial weights of the task layers.

    Args:
        model: a built Keras model from examples `[batch, *shape]`, such as images, to logits or
            values `[batch, outputs]`. Its regularizers and constraints act on the task layers as in
            `fit`. The first member starts with its weights. Other members have the same warps but
            random task layers with the same mean and standard deviation. Layers that draw random
            numbers, such as dropout, draw from the seed of a meta-step, alike for members but not
            for tasks.
        warp: warp layers, by path (such as `"block/bend"` in a nested model) or by unambiguous
            name. Without warps only the initial weights are learned. Batch normalisation belongs
            among the task layers: Keras uses moving statistics in a frozen one.
        optimizer: a Keras SGD, Adam or RMSprop for the task layers in meta-training.
            `global_clipnorm` is supported.
        loss: loss of the task layers, `"cross_entropy"` of logits or `"squared"`.

    Raises:
        ValueError: if a name matches no layer with weights or one with batch normalisation, no task
            layer is left, or an argument is out of range.

    Attributes:
        buffers: the values that the model's other variables, such as moving averages, have at the
            start of a task; zeros for generators of random numbers.

    Example:

    >>> bend = keras.layers.Dense(4, name="bend", kernel_initializer="identity")
    >>> model = keras.Sequential([keras.Input((4,)), bend, keras.layers.Dense(3)])
    >>> sorted(Warp(model, ["bend"], keras.optimizers.SGD(0.1)).draw(0, 1, 4, 3))[2:]
    ['warp_bend_0', 'warp_bend_1']

    Source: "Meta-Learning with Warped Gradient Descent" (Flennerhag et al., ICLR 2020).
    """

    def __init__(
        self,
        model: keras.Model,
        warp: Sequence[str],
        optimizer: keras.optimizers.Optimizer,
        *,
        loss: str = "cross_entropy",
    ):
        updates.check_optimizer(optimizer)
        updates.check_loss(loss)
        if not isinstance(model, keras.Model) or not model.built:
            raise ValueError(f"`model` must be a Keras model that is built: give it an Input. Received: {model!r}")
        check_trained_by_gradients("model", model)
        check_unshared(model)
        trainable = {id(variable) for variable in model.trainable_variables}
        known = [path for path, place in places(model).items() if any(id(own) in trainable for own in place.weights)]
        self.warp = resolve(warp, known, "warp") if warp else ()
        for path in self.warp:
            if any(isinstance(one, keras.layers.BatchNormalization) for one in places(model)[path].layer._flatten_layers()):
                raise ValueError(
                    "`warp` must name no batch normalisation: warps are frozen, and a frozen one uses moving "
                    f"statistics in Keras. Received: {path}"
                )
        self.model, self.optimizer, self.loss = model, optimizer, loss
        self.rate = updates.rate_of(optimizer)
        names = _names(model, self.warp)
        self._trainable = [names[id(variable)] for variable in model.trainable_variables]
        drawn = {id(one.state) for one in seed_generators(model)}
        self._generators = [id(variable) in drawn for variable in model.non_trainable_variables]
        self.buffers = [
            backend.numbers_of(variable) * (not draws)
            for variable, draws in zip(model.non_trainable_variables, self._generators, strict=True)
        ]
        self._adapted = [name for name in self._trainable if name.startswith(_START)]
        self._limits = [own.constraint for own in model.trainable_variables if names[id(own)].startswith(_START)]
        if not self._adapted:
            raise ValueError(f"`warp` must leave a layer to adapt. Received: warp={list(warp)!r}")

    def draw(self, seed: int, members: int, features: int, outputs: int) -> dict[str, np.ndarray]:
        if math.prod(self.model.input_shape[1:]) != features or self.model.output_shape[1:] != (outputs,):
            raise ValueError(
                f"`model` must map {features} features to {outputs} outputs, as the tasks do. Received: "
                f"{self.model.input_shape} to {self.model.output_shape}"
            )
        rng, made = np.random.default_rng(seed), {}
        for name, variable in zip(self._trainable, self.model.trainable_variables, strict=True):
            own = backend.numbers_of(variable)
            others = np.broadcast_to(own, (members - 1, *own.shape))
            if name.startswith(_START):
                others = own.mean() + own.std() * rng.standard_normal(others.shape)
            made[name] = np.concatenate([own[None], others]).astype(own.dtype)
        return made

    def learned(self, outer: Mapping[str, np.ndarray]) -> keras.Model:
        """The model with the learned initial weights and frozen warps.

        `fit` adapts the task layers.

        Args:
            outer: arrays by name, without the axis of members.
        """
        model = copied(self.model)
        model.set_weights(self.model.get_weights())
        names = _names(model, self.warp)
        for variable in model.trainable_variables:
            variable.assign(outer[names[id(variable)]])
        for path, place in places(model).items():
            if path in self.warp:
                place.layer.trainable = False
        return model

    def parameters(self, learned: Any) -> dict[str, np.ndarray]:
        model = keras_model(learned)
        names = _names(model, self.warp)
        found = {names[id(v)]: backend.numbers_of(v)[None] for v in model.weights}
        missing = [name for name in self._trainable if name not in found]
        if missing:
            raise ValueError(
                f"The model must have the layers of this learner's model. Received: {learned!r} without {', '.join(missing)}"
            )
        return {name: found[name] for name in self._trainable}

    def adapt(
        self,
        learned: keras.Model,
        x: Any,
        y: Any,
        *,
        steps: int = 50,
        batch_size: int = 32,
        optimizer: keras.optimizers.Optimizer | None = None,
        loss: Any = None,
        seed: int = 0,
    ) -> keras.Model:
        """Learns a task with frozen warps.

        Args:
            learned: a model from `learned`, or loaded from its file.
            x: inputs `[n, *shape]` of any numeric dtype, as the model takes them.
            y: integer classes `[n]` (0 and 1 for a single output) or values `[n, outputs]`.
            steps: number of optimizer steps.
            batch_size: examples per batch, at most n.
            optimizer: any Keras optimizer; `None` uses a copy of this learner's.
            loss: any Keras loss; `None` uses this learner's.
            seed: seed of the order of examples.

        Returns:
            A compiled Keras model. `learned` is unchanged.

        Raises:
            ValueError: if an argument is out of range, or the data do not fit the model or the
                loss.

        Example:

        >>> model, warps = warped(2, (4,), 2)
        >>> learner = Warp(model, warps, keras.optimizers.SGD(0.1))
        >>> start = learner.learned({name: own[0] for name, own in learner.draw(0, 1, 2, 2).items()})
        >>> adapted = learner.adapt(start, np.eye(2), np.arange(2), steps=1)
        >>> adapted.get_layer("warp_0").trainable
        False
        """
        arguments.count("steps", steps)
        arguments.count("batch_size", batch_size)
        arguments.integer("seed", seed, 0)
        model = copied(learned)
        model.set_weights(learned.get_weights())
        for own, other in zip(places(model).values(), places(learned).values(), strict=True):
            own.layer.trainable = other.layer.trainable
        if loss is None:
            classes = "binary" if model.output_shape[-1] == 1 else "classes"
            loss = _LOSSES["values" if self.loss == "squared" else classes]
        x, y, _ = checked_arrays(x, y, None, model_expects(model, loss))
        kind = type(self.optimizer)
        model.compile(optimizer or kind.from_config(self.optimizer.get_config()), loss)
        rng, size = np.random.default_rng(seed), min(batch_size, len(x))
        rows = np.concatenate([rng.permutation(len(x)) for _ in range(-(-steps * size // len(x)))])
        batches = ((x[own], y[own]) for own in rows[: steps * size].reshape(steps, size))
        model.fit(batches, epochs=1, steps_per_epoch=steps, shuffle=False, verbose=0)
        return model

    def check(self, kind: str, outputs: int) -> None:
        updates.check_loss(self.loss, kind)

    def adapted(self, state: WarpState) -> dict[str, Array]:
        return dict(zip(self._adapted, state.weights, strict=True))

    def init(
        self, outer: Outer, seed: Array, features: int, outputs: int, leading: tuple[int, ...] = (), shard: Shard = ALL
    ) -> WarpState:
        weights = [
            _spread(outer[name], leading, len(variable.shape))
            for name, variable in zip(self._trainable, self.model.trainable_variables, strict=True)
            if name.startswith(_START)
        ]
        zeros = tuple(ops.zeros_like(weight) for weight in weights)
        buffers = [
            ops.cast(draw_generator(seed, place, leading, shard), str(value.dtype))
            if draws
            else _spread(ops.convert_to_tensor(value), leading, value.ndim)
            for place, (value, draws) in enumerate(zip(self.buffers, self._generators, strict=True))
        ]
        return WarpState(tuple(weights), zeros, zeros, tuple(buffers), ops.zeros((), "int32"))

    def step(self, outer: Outer, state: WarpState, x: Array, y: Array) -> tuple[WarpState, Array]:
        def one(outer: Outer, state: WarpState, x: Array, y: Array) -> tuple[Any, Array]:
            def loss(weights: tuple[Array, ...]) -> tuple[Array, Any]:
                prediction, buffers, added = self._call(outer, state._replace(weights=weights), x, training=True)
                loss = backend.mean(updates.losses(self.loss, prediction, y), 0)
                return loss + sum(ops.cast(one, loss.dtype) for one in added), (prediction, buffers)

            (prediction, buffers), gradients = backend.gradient(loss, state.weights)
            rate = ops.convert_to_tensor(self.rate, dtype=prediction.dtype)
            moments = (state.weights, state.first, state.second, gradients)
            learned, first, second = updates.updated(self.optimizer, rate, state.step, *moments)
            learned = tuple(
                value if limit is None else limit(value) for value, limit in zip(learned, self._limits, strict=True)
            )
            return (learned, first, second, buffers), prediction

        arrays, prediction = self._each(one, True, outer, state, x, y)
        return WarpState._make((*arrays, state.step + 1)), prediction

    def predict(self, outer: Outer, state: WarpState, x: Array) -> Array:
        def one(outer: Outer, state: WarpState, x: Array) -> Array:
            return self._call(outer, state, x, training=False)[0]

        return self._each(one, False, outer, state, x)

    def _call(
        self, outer: Outer, state: WarpState, x: Array, training: bool
    ) -> tuple[Array, tuple[Array, ...], Sequence[Array]]:
        """Outputs, new buffers and added losses of the model for a single network."""
        every = {**outer, **self.adapted(state)}
        x = ops.reshape(x, (-1, *self.model.input_shape[1:]))
        trainable = [every[name] for name in self._trainable]
        prediction, buffers, losses = self.model.stateless_call(
            trainable, list(state.buffers), x, training=training, return_losses=True
        )
        return ops.cast(prediction, trainable[0].dtype), tuple(buffers), losses  # the model may compute in another type

    def _each(self, one: Callable[..., Any], learns: bool, outer: Outer, state: WarpState, *data: Array) -> Any:
        """Maps a function of a single network over several networks.

        The function returns a prediction and, if it learns, new arrays.
        """
        ranks = {name: len(v.shape) for name, v in zip(self._trainable, self.model.trainable_variables, strict=True)}
        place = len(state.weights[0].shape) - ranks[self._adapted[0]]
        leading = tuple(state.weights[0].shape[:place])
        count = int(np.prod(leading, dtype=int))

        def flat(value: Array, rank: int) -> Array:
            value = _spread(value, leading, rank)
            return ops.reshape(value, (count, *value.shape[place:]))

        def single(given: Any) -> Any:
            warps, arrays, *data = given
            return one(warps, WarpState._make((*arrays, state.step)), *data)

        warps = {name: flat(outer[name], ranks[name]) for name in self._trainable if name.startswith(_WARP)}
        arrays = backend.tree_map(lambda leaf: flat(leaf, len(leaf.shape) - place), tuple(state[:-1]))
        given = (warps, arrays, *(flat(value, 2) for value in data))
        if count == 1:  # no loop where there is nothing to loop over
            results = single(backend.tree_map(lambda leaf: leaf[0], given))
            return backend.tree_map(lambda leaf: ops.reshape(leaf, (*leading, *leaf.shape)), results)
        kept = backend.tree_map(lambda leaf: keras.KerasTensor(leaf.shape[1:], leaf.dtype), arrays)
        output = keras.KerasTensor((data[0].shape[-2], *self.model.output_shape[1:]), state.weights[0].dtype)
        results = backend.one_by_one(single, given, (kept, output) if learns else output)
        return backend.tree_map(lambda leaf: ops.reshape(leaf, (*leading, *leaf.shape[1:])), results)


def warped(
    features: int, hidden: Sequence[int], outputs: int, activation: str = "tanh", *, warps: bool = True, seed: int = 0
) -> tuple[keras.Model, list[str]]:
    """A dense network with a linear warp, initially the identity, before each hidden activation.

    Args:
        features: number of inputs.
        hidden: units of the hidden layers.
        outputs: number of outputs.
        activation: a Keras activation.
        warps: whether to add warps. Without them the network is a control.
        seed: seed of the task layers' weights, which are the same with and without warps.

    Returns:
        The model, and the names of its warps for `Warp`.

    Raises:
        ValueError: if a number is not positive, or the activation is unknown.

    Example:

    >>> model, names = warped(1, (32, 32), 1)
    >>> names
    ['warp_0', 'warp_1']
    """
    arguments.count("features", features)
    hidden = arguments.counts("hidden", hidden)
    arguments.count("outputs", outputs)
    arguments.choice("activation", activation, dense.KERAS_ACTIVATIONS)
    arguments.flag("warps", warps)
    arguments.integer("seed", seed, 0)
    layers: list[Any] = [keras.Input((features,))]
    for index, units in enumerate((*hidden, outputs)):
        drawn = keras.initializers.GlorotUniform(seed * 1000 + index)
        layers.append(keras.layers.Dense(units, kernel_initializer=drawn, name=f"task_{index}"))
        if index < len(hidden):
            if warps:
                layers.append(keras.layers.Dense(units, kernel_initializer="identity", name=f"warp_{index}"))
            layers.append(keras.layers.Activation(activation))
    return keras.Sequential(layers), [f"warp_{index}" for index in range(len(hidden))] if warps else []


def _spread(value: Array, leading: tuple[int, ...], rank: int) -> Array:
    """Broadcasts an array with `rank` own axes to the leading axes.

    The array may have the first of the leading axes, or axes of size 1.
    """
    place = len(value.shape) - rank
    own, given = value.shape[place:], value.shape[:place]
    value = ops.reshape(value, (*given, *[1] * (len(leading) - len(given)), *own))
    return ops.broadcast_to(value, (*leading, *own))


def _names(model: keras.Model, warp: Sequence[str]) -> dict[int, str]:
    """Names of the outer parameters by the identity of the model's weights."""
    return {
        id(variable): f"{_WARP if path in warp else _START}{path}_{index}"
        for path, place in places(model).items()
        for index, variable in enumerate(place.weights)
    }


_LOSSES = {
    "values": keras.losses.MeanSquaredError(),
    "binary": keras.losses.BinaryCrossentropy(from_logits=True),
    "classes": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
}
