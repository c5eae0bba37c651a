"""Warped gradient descent: layers that bend the loss surface on which the layers around them descend.

Source: "Meta-Learning with Warped Gradient Descent" (Flennerhag et al., ICLR 2020). A network's task layers adapt to a task
by plain gradient descent; warp layers between them are held while they do, and are what is meta-learned. Through them the
same descent is a preconditioned one: with Omega the map that they induce, a step is theta - alpha G^-1 grad L with G^-1 =
(D Omega)(D Omega)^T, to second order in alpha. A warp that is the identity changes nothing: that is where it starts.

Any Keras model will do. Its layers know nothing of leading axes, so networks of several members and tasks take turns in a
loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_blur import arguments
from keras_blur.checks import checked_arrays, model_expects
from keras_blur.distribution import ALL, Shard
from keras_blur.learners import dense, updates
from keras_blur.learners.base import Array, MetaLearner, Outer, check_unshared, keras_model, places, resolve

_START, _WARP = "start_", "warp_"


class WarpState(NamedTuple):
    """A network inside a task.

    Attributes:
        weights, first, second: of the task layers, with two arrays of moments for each.
        buffers: what layers keep that is not trained, such as moving averages; a task starts with the model's own.
        step: number of steps.
    """

    weights: tuple[Array, ...]
    first: tuple[Array, ...]
    second: tuple[Array, ...]
    buffers: tuple[Array, ...]
    step: Array


class Warp(MetaLearner):
    """A Keras model of which some layers are warps; the outer parameters are their weights and the start of the others'.

    Args:
        model: a built Keras model from `[batch, features]` to logits or values `[batch, outputs]`. Of several members the
            first starts with its weights, others with random task layers of the same mean and deviation; all with its warps.
        warp: the warp layers, by their paths, such as `"block/bend"` of a layer in a model in the model, or by names that
            no other layer has; of none, it is a model whose start is learned, and no more.
        optimizer: a Keras SGD, Adam or RMSprop for the task layers in meta-training, `global_clipnorm` included.
        loss: what the task layers descend, `"cross_entropy"` of logits or `"squared"`.

    Raises:
        ValueError: if a name is not that of a layer with weights, or none is left to adapt, or an argument is out of range.

    Example:

    >>> bend = keras.layers.Dense(4, name="bend", kernel_initializer="identity")
    >>> model = keras.Sequential([keras.Input((4,)), bend, keras.layers.Dense(3)])
    >>> sorted(Warp(model, ["bend"], keras.optimizers.SGD(0.1)).draw(0, 1, 4, 3))[2:]
    ['warp_bend_0', 'warp_bend_1']
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
        check_unshared(model)
        trainable = {id(variable) for variable in model.trainable_variables}
        known = [path for path, place in places(model).items() if any(id(own) in trainable for own in place.weights)]
        self.warp = resolve(warp, known, "warp") if warp else ()
        self.model, self.optimizer, self.loss = model, optimizer, loss
        self.rate = updates.rate_of(optimizer)
        names = _names(model, self.warp)
        self._trainable = [names[id(variable)] for variable in model.trainable_variables]
        self._buffers = [variable.numpy() for variable in model.non_trainable_variables]  # with which a task starts
        self._adapted = [name for name in self._trainable if name.startswith(_START)]
        if not self._adapted:
            raise ValueError(f"`warp` must leave a layer to adapt. Received: warp={list(warp)!r}")

    def draw(self, seed: int, members: int, features: int, outputs: int) -> dict[str, np.ndarray]:
        if self.model.input_shape[1:] != (features,) or self.model.output_shape[1:] != (outputs,):
            raise ValueError(
                f"`model` must map [batch, {features}] to [batch, {outputs}], as the tasks are. Received: "
                f"{self.model.input_shape} to {self.model.output_shape}"
            )
        rng, made = np.random.default_rng(seed), {}
        for name, variable in zip(self._trainable, self.model.trainable_variables, strict=True):
            own = variable.numpy()
            others = np.broadcast_to(own, (members - 1, *own.shape))
            if name.startswith(_START):
                others = own.mean() + own.std() * rng.standard_normal(others.shape)
            made[name] = np.concatenate([own[None], others]).astype(own.dtype)
        return made

    def learned(self, outer: Mapping[str, np.ndarray]) -> keras.Model:
        """The model with the learned start and warps, which are frozen: `fit` adapts the rest."""
        model = keras.models.clone_model(self.model)
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
        found = {names[id(v)]: v.numpy()[None] for v in model.weights}
        missing = [name for name in self._trainable if name not in found]
        if missing:
            raise ValueError(
                f"The model must have the layers of this learner's. Received: {learned!r} without {', '.join(missing)}"
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
        """Learns a task with the warps held.

        Args:
            learned: from `learned`, or a file of it that Keras loaded.
            x: inputs `[n, features]`.
            y: integer classes `[n]`, of a single output 0 and 1, or values `[n, outputs]`.
            steps: steps of the optimizer.
            batch_size: examples of a batch, at most n.
            optimizer: any Keras optimizer; `None` takes a new one like this learner's.
            loss: any Keras loss; `None` takes this learner's.
            seed: of the order of the examples.

        Returns:
            An ordinary Keras model, compiled; `learned` is not changed.

        Raises:
            ValueError: if data don't fit the model or the loss.
        """
        model = keras.models.clone_model(learned)
        model.set_weights(learned.get_weights())
        for own, other in zip(places(model).values(), places(learned).values(), strict=True):
            own.layer.trainable = other.layer.trainable
        if loss is None:
            classes = "binary" if model.output_shape[-1] == 1 else "classes"
            loss = _LOSSES["values" if self.loss == "squared" else classes]
        x, y, _ = checked_arrays(x, y, None, model_expects(model, loss))
        kind = type(self.optimizer)
        model.compile(optimizer or kind.from_config(self.optimizer.get_config()), loss)
        data = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(len(x), seed).repeat()
        model.fit(data.batch(min(batch_size, len(x))), epochs=1, steps_per_epoch=steps, shuffle=False, verbose=0)
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
        kept = [tf.constant(value) for value in self._buffers]
        zeros = tuple(tf.zeros_like(weight) for weight in weights)
        buffers = tuple(_spread(value, leading, value.shape.rank) for value in kept)
        return WarpState(tuple(weights), zeros, zeros, buffers, tf.zeros((), tf.int32))

    def step(self, outer: Outer, state: WarpState, x: Array, y: Array) -> tuple[WarpState, Array]:
        def one(outer: Outer, state: WarpState, x: Array, y: Array) -> tuple[Any, Array]:
            with tf.GradientTape() as tape:
                tape.watch(state.weights)
                prediction, buffers = self._call(outer, state, x, training=True)
                loss = tf.reduce_mean(updates.losses(self.loss, prediction, y))
            gradients = tape.gradient(loss, state.weights, unconnected_gradients="zero")
            rate = tf.constant(self.rate, loss.dtype)
            moments = (state.weights, state.first, state.second, gradients)
            return (*updates.updated(self.optimizer, rate, state.step, *moments), buffers), prediction

        arrays, prediction = self._each(one, True, outer, state, x, y)
        return WarpState._make((*arrays, state.step + 1)), prediction

    def predict(self, outer: Outer, state: WarpState, x: Array) -> Array:
        def one(outer: Outer, state: WarpState, x: Array) -> Array:
            return self._call(outer, state, x, training=False)[0]

        return self._each(one, False, outer, state, x)

    def _call(self, outer: Outer, state: WarpState, x: Array, training: bool) -> tuple[Array, tuple[Array, ...]]:
        """The model's outputs and new buffers, of a single network."""
        every = {**outer, **self.adapted(state)}
        trainable = [every[name] for name in self._trainable]
        prediction, buffers = self.model.stateless_call(trainable, list(state.buffers), x, training=training)
        return tf.cast(prediction, trainable[0].dtype), tuple(buffers)  # the model may compute in another type

    def _each(self, one: Callable[..., Any], learns: bool, outer: Outer, state: WarpState, *data: Array) -> Any:
        """A function of a single network, of which a prediction comes, and new arrays if it learns, for each of several."""
        ranks = {name: len(v.shape) for name, v in zip(self._trainable, self.model.trainable_variables, strict=True)}
        place = state.weights[0].shape.rank - ranks[self._adapted[0]]
        leading = tuple(state.weights[0].shape[:place])
        count = int(np.prod(leading, dtype=int))

        def flat(value: Array, rank: int) -> Array:
            value = _spread(value, leading, rank)
            return tf.reshape(value, (count, *value.shape[place:]))

        def single(given: Any) -> Any:
            warps, arrays, *data = given
            return one(warps, WarpState._make((*arrays, state.step)), *data)

        warps = {name: flat(outer[name], ranks[name]) for name in self._trainable if name.startswith(_WARP)}
        arrays = tf.nest.map_structure(lambda leaf: flat(leaf, leaf.shape.rank - place), tuple(state[:-1]))
        given = (warps, arrays, *(flat(value, 2) for value in data))
        if count == 1:  # no loop where there is nothing to loop over
            results = single(tf.nest.map_structure(lambda leaf: leaf[0], given))
            return tf.nest.map_structure(lambda leaf: tf.reshape(leaf, (*leading, *leaf.shape)), results)
        specs = tf.nest.map_structure(lambda leaf: tf.TensorSpec(leaf.shape[1:], leaf.dtype), arrays)
        output = tf.TensorSpec((data[0].shape[-2], *self.model.output_shape[1:]), state.weights[0].dtype)
        results = tf.map_fn(single, given, fn_output_signature=(specs, output) if learns else output)
        return tf.nest.map_structure(lambda leaf: tf.reshape(leaf, (*leading, *leaf.shape[1:])), results)


def warped(
    features: int, hidden: Sequence[int], outputs: int, activation: str = "tanh", *, warps: bool = True, seed: int = 0
) -> tuple[keras.Model, list[str]]:
    """A dense network with a linear warp, at first the identity, before each hidden nonlinearity.

    Args:
        features: inputs.
        hidden: units of the hidden layers.
        outputs: outputs.
        activation: a Keras nonlinearity.
        warps: whether there are any; without them it is the control.
        seed: of the task layers' weights, the same with and without warps.

    Returns:
        The model, and the names of its warps, for `Warp`.

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
    """An array of a network, `rank` axes, for each on the leading axes, of which it may have the first ones, or ones."""
    own, given = value.shape[value.shape.rank - rank :], value.shape[: value.shape.rank - rank]
    value = tf.reshape(value, (*given, *[1] * (len(leading) - len(given)), *own))
    return tf.broadcast_to(value, (*leading, *own))


def _names(model: keras.Model, warp: Sequence[str]) -> dict[int, str]:
    """Names of the outer parameters that a model's weights are, by the weights' identity."""
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
