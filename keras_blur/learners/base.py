"""The interface of learners. A learner learns one task from batches, as a set of pure functions.

Meta-learning, comparisons and benchmarks use every learner through `init`, `step` and `predict`, so
all learners see the same batches and the same initial networks. Outer parameters, which are common
to all tasks, are an argument of each function. A `MetaLearner` also defines their initial values
and their saved form.
"""

from __future__ import annotations

import abc
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

import keras
import numpy as np
from keras import ops

from keras_blur import files
from keras_blur.core import random
from keras_blur.distribution import ALL, Shard

Array = Any
Outer = Mapping[str, Array]


class Learner(abc.ABC):
    """An algorithm that learns a task: the base class of learners without outer parameters.

    Arrays may have leading axes `[members, tasks]`. Members differ in their outer parameters, tasks
    in their data. Examples are rows; a learner with a network that looks at images restores their
    shape (`on`).

    Example:

    >>> class Last(Learner):  # predicts the last label that it saw
    ...     def init(self, outer, seed, features, outputs, leading=(), shard=ALL):
    ...         return ops.zeros((*leading, outputs))
    ...
    ...     def step(self, outer, state, x, y):
    ...         return y[..., -1, :], self.predict(outer, state, x)
    ...
    ...     def predict(self, outer, state, x):
    ...         return ops.repeat(state[..., None, :], x.shape[-2], axis=-2)
    >>> learner = Last()
    >>> state = learner.init({}, random.seed_of(0), features=4, outputs=2)
    >>> state, prediction = learner.step({}, state, ops.ones((3, 4)), ops.ones((3, 2)))
    >>> ops.convert_to_numpy(learner.predict({}, state, ops.ones((1, 4)))).tolist()
    [[1.0, 1.0]]
    """

    def on(self, shape: tuple[int, ...], outputs: int) -> Self:
        """The learner for tasks whose examples have this shape.

        It is the learner itself, unless the learner has a network that depends on the shape.

        Args:
            shape: shape of an example, `Tasks.shape`.
            outputs: size of the output.

        Returns:
            A learner of the same kind.

        Raises:
            ValueError: if the learner's network does not fit.
        """
        return self

    @abc.abstractmethod
    def init(
        self, outer: Outer, seed: Array, features: int, outputs: int, leading: tuple[int, ...] = (), shard: Shard = ALL
    ) -> Any:
        """The state before the first batch.

        Args:
            outer: outer parameters by name, whose leading axes broadcast with `leading`.
            seed: a seed, `[2]` int32. Equal seeds give equal initial networks for every learner and
                member.
            features: number of input features.
            outputs: size of the output.
            leading: sizes of the leading axes. Members get the same network, tasks get different
                ones.
            shard: the shard of tasks to initialise. The network of a task does not depend on the
                sharding.

        Returns:
            A tree of arrays.
        """

    @abc.abstractmethod
    def step(self, outer: Outer, state: Any, x: Array, y: Array) -> tuple[Any, Array]:
        """Learns from a batch.

        Args:
            outer: the outer parameters.
            state: from `init` or `step`.
            x: inputs `[..., batch, features]`.
            y: `[..., batch, outputs]`: +1 for the true class and -1 for the others, or values.

        Returns:
            The new state, and the prediction for `x` made before the update, as in `predict`.
        """

    @abc.abstractmethod
    def predict(self, outer: Outer, state: Any, x: Array) -> Array:
        """The prediction for inputs.

        Args:
            outer: the outer parameters.
            state: from `init` or `step`.
            x: inputs `[..., batch, features]`.

        Returns:
            Outputs `[..., batch, outputs]`: logits of the classes, or values.
        """


class MetaLearner(Learner):
    """A learner whose outer parameters `meta.MetaTrainer` learns: the base class of your own.

    Besides a learner's functions, it says where its outer parameters start (`draw`), turns them
    into what a user works with (`learned`), and reads them back from that (`parameters`). The names
    of learned initial weights begin with `start_`.

    Example:

    >>> from keras_blur.learners import Blur
    >>> learner = Blur((8,))
    >>> outer = learner.draw(0, members=2, features=4, outputs=3)
    >>> genome = learner.learned({name: own[0] for name, own in outer.items()})
    >>> genome.nu.shape, learner.parameters(genome)["nu"].shape
    ((2, 2), (1, 2, 2))
    """

    @abc.abstractmethod
    def draw(self, seed: int, members: int, features: int, outputs: int) -> dict[str, np.ndarray]:
        """Draws initial outer parameters.

        Args:
            seed: random seed.
            members: number of independent sets.
            features: number of input features of the tasks.
            outputs: number of outputs of the tasks.

        Returns:
            Arrays by name, `[members, ...]`.
        """

    @abc.abstractmethod
    def learned(self, outer: Mapping[str, np.ndarray]) -> Any:
        """Converts one set of outer parameters to what a user works with.

        Args:
            outer: arrays by name, without the axis of members.

        Returns:
            An object with `save(path)`: a `Genome` or a Keras model.
        """

    @abc.abstractmethod
    def parameters(self, learned: Any) -> dict[str, np.ndarray]:
        """The inverse of `learned`.

        Args:
            learned: the result of `learned`, or the path to its file.

        Returns:
            Arrays by name, `[1 or members, ...]`.

        Raises:
            ValueError: if it does not fit this learner.
        """

    def adapted(self, state: Any) -> dict[str, Array]:
        """The adapted weights in a state, named as the outer parameters that initialise them.

        Args:
            state: from `init` or `step`.

        Returns:
            Arrays by name; none if the learner has no learned initial weights.
        """
        return {}

    def shares_outer(self, other: Learner) -> bool:
        """Whether another learner has the same outer parameters.

        Args:
            other: the other learner.
        """
        return other is self

    def check(self, kind: str, outputs: int) -> None:
        """Checks that the learner supports tasks of a kind and a size.

        Args:
            kind: `"classes"`, `"values"` or `"bits"`.
            outputs: number of outputs.

        Raises:
            ValueError: if it does not.
        """

    def check_batch(self, batch: int, query: int) -> None:
        """Checks that the learner can learn from batches of a size.

        Args:
            batch: examples of a support batch.
            query: examples of the query.

        Raises:
            ValueError: if it cannot, as with a rule that normalises over a batch of one.
        """


def keras_model(learned: Any) -> keras.Model:
    """Returns a Keras model, or loads it from a path.

    Raises:
        ValueError: if the argument is neither a model nor a path to one.
    """
    if isinstance(learned, (str, os.PathLike)):
        try:
            with files.local(learned) as copy:
                learned = keras.models.load_model(copy, compile=False)
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{os.fspath(learned)!r} is not a Keras model, or is damaged: {error}") from error
    if not isinstance(learned, keras.Model):
        raise ValueError(f"A Keras model or a path to one is needed. Received: {learned!r}")
    return learned


def draw_kernel(
    seed: Array,
    place: tuple[int, ...],
    shape: tuple[int, ...],
    leading: tuple[int, ...],
    shard: Shard = ALL,
    fan_in: int | None = None,
) -> Array:
    """An initial kernel: normal with standard deviation `1 / sqrt(fan_in)`.

    Kernels are equal for members (the first axis) and different for tasks.

    Args:
        seed: a seed.
        place: numbers that tell this kernel from the others of a network.
        shape: shape of the kernel, `(in, units)` for a dense layer.
        leading: sizes of the leading axes.
        shard: the shard of tasks to draw for.
        fan_in: number of inputs of a unit; `None` is the first axis of `shape`.
    """
    tasks, rows = _of_all(leading, shard)
    # A product, which every compiler rounds alike; XLA makes one of a division by a constant.
    deviation = float(np.float32(1.0) / np.float32(float(fan_in or shape[0]) ** 0.5))
    kernel = deviation * random.normal(random.fold_in(seed, *place), (*tasks, *shape), rows)
    return ops.broadcast_to(kernel, (*leading, *shape))


def draw_generator(seed: Array, place: int, leading: tuple[int, ...], shard: Shard = ALL) -> Array:
    """The initial state of a Keras `SeedGenerator`, `[*leading, 2]` uint32: equal for members and
    different for tasks, as in `draw_kernel`."""
    tasks, rows = _of_all(leading, shard)
    seed = random.fold_in(seed, place)
    drawn = random.bits(seed, tasks) if rows is None else random.bits_of_rows(seed, rows, math.prod(tasks[1:]))
    drawn = ops.right_shift(ops.reshape(drawn, leading[1:]), ops.cast(2, "uint32"))  # fits in Keras's int32
    return ops.broadcast_to(ops.stack([drawn, ops.zeros_like(drawn)], axis=-1), (*leading, 2))


def _of_all(leading: tuple[int, ...], shard: Shard) -> tuple[tuple[int, ...], Array | None]:
    """The axes after that of members for the tasks of all shards, and the tasks of this one;
    `None` if these are all."""
    if shard.count == 1:
        return leading[1:], None
    return (leading[1] * shard.count, *leading[2:]), shard.places(leading[1])


class Place(NamedTuple):
    """A layer in a model.

    Attributes:
        layer: the layer; the model itself for weights that belong to no layer.
        weights: the weights of the layer that belong to no earlier layer.
    """

    layer: keras.layers.Layer
    weights: tuple[keras.Variable, ...]


def places(model: keras.Model) -> dict[str, Place]:
    """Layers of a model and of its nested models by path.

    A path consists of the layer names from the outermost model inwards, joined by slashes. A layer
    that is used several times has one path, the first. Layers of a functional model are in
    execution order; layers of a subclass of `keras.Model` are in the order of `layers`.

    Example:

    >>> inner = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4, name="fc")], name="inner")
    >>> list(places(keras.Sequential([keras.Input((4,)), inner, keras.layers.Dense(3, name="head")])))
    ['inner/fc', 'head']
    """
    found: dict[str, Place] = {}
    layers: set[int] = set()
    weights: set[int] = set()
    for path, layer, own in _walk(model):
        fresh = tuple(weight for weight in own if id(weight) not in weights)
        if id(layer) in layers:
            continue
        layers.add(id(layer))
        weights.update(map(id, fresh))
        unique, number = path, 0
        while unique in found:  # a subclass of a model may have layers of one name
            number += 1
            unique = f"{path}_{number}"
        found[unique] = Place(layer, fresh)
    return found


def check_unshared(model: keras.Model) -> None:
    """Raises a `ValueError` if a layer belongs to several nested models.

    A copy of the model would duplicate such a layer.
    """
    paths: dict[int, str] = {}
    for path, layer, own in _walk(model):
        if own and id(layer) in paths:
            raise ValueError(
                "`model` must have each layer in one of the models inside it, so that it can be copied. Received: one that "
                f"is {paths[id(layer)]} and {path}"
            )
        paths[id(layer)] = path


def resolve(chosen: Sequence[str], paths: Iterable[str], argument: str) -> tuple[str, ...]:
    """Resolves layer names to paths. A name is a path or an unambiguous last part of one.

    Args:
        chosen: the names.
        paths: the paths of all layers.
        argument: name of the argument, for errors.

    Raises:
        ValueError: if `chosen` is empty, or a name matches no layer or several.
    """
    paths = list(paths)
    if isinstance(chosen, str) or not chosen or not all(isinstance(name, str) for name in chosen):
        raise ValueError(
            f"`{argument}` must be names of layers with weights, some of {', '.join(paths)}. Received: {chosen!r}"
        )
    found = []
    for name in chosen:
        fits = [name] if name in paths else [path for path in paths if path.endswith(f"/{name}")]
        if len(fits) > 1:
            raise ValueError(
                f"`{argument}` must have the path of a layer where several have its name, one of {', '.join(fits)}. "
                f"Received: {name!r}"
            )
        if not fits:
            raise ValueError(
                f"`{argument}` must be names of layers with weights, some of {', '.join(paths)}. Received: {list(chosen)}"
            )
        found += fits
    return tuple(found)


def _walk(model: keras.Model, above: str = "") -> Iterator[tuple[str, keras.layers.Layer, tuple[keras.Variable, ...]]]:
    """Yields path, layer and weights of all layers, including repeated ones.

    Weights that belong to the model itself come first.
    """
    within = {id(weight) for layer in model.layers for weight in layer.weights}
    beside = tuple(weight for weight in model.weights if id(weight) not in within)
    if beside:
        yield above.rstrip("/") or model.name, model, beside
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from _walk(layer, f"{above}{layer.name}/")
        else:
            yield f"{above}{layer.name}", layer, tuple(layer.weights)
