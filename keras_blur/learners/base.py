"""A learner learns one task from batches. Pure: what it reads is given, what it writes is returned.

Meta-learning, comparisons and benchmarks see every way to learn through three functions, `init`, `step` and `predict`, so
that all of them get the same batches and the same initial networks. What is the same in all tasks, the outer parameters, is
an argument of each; a `MetaLearner` also says where these start and what they are to a user.
"""

from __future__ import annotations

import abc
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_blur import files, random
from keras_blur.distribution import ALL, Shard

Array = Any
Outer = Mapping[str, Array]


class Learner(abc.ABC):
    """How something learns inside a task.

    Arrays may carry leading axes `[members, tasks]`: members differ in their outer parameters, tasks in their data.
    """

    @abc.abstractmethod
    def init(
        self, outer: Outer, seed: Array, features: int, outputs: int, leading: tuple[int, ...] = (), shard: Shard = ALL
    ) -> Any:
        """The state before the first batch.

        Args:
            outer: the outer parameters, with axes that go with `leading`.
            seed: a seed; equal seeds give equal initial networks, to every learner and every member.
            features: number of input features.
            outputs: size of the output.
            leading: sizes of the leading axes; members get the same network, tasks their own.
            shard: which of the tasks of all replicas these are; a task's network is the same whatever its replica.

        Returns:
            A nest of tensors.
        """

    @abc.abstractmethod
    def step(self, outer: Outer, state: Any, x: Array, y: Array) -> tuple[Any, Array]:
        """Learns from a batch.

        Args:
            outer: the outer parameters.
            state: from `init` or `step`.
            x: `[..., batch, features]`.
            y: `[..., batch, outputs]`: +1 for the true class and -1 for others, or values.

        Returns:
            The new state, and the prediction for x before it learned.
        """

    @abc.abstractmethod
    def predict(self, outer: Outer, state: Any, x: Array) -> Array:
        """Outputs `[..., batch, outputs]`: logits of the classes, or values."""


class MetaLearner(Learner):
    """A learner whose outer parameters can be learned: what `meta.MetaTrainer` takes."""

    @abc.abstractmethod
    def draw(self, seed: int, members: int, features: int, outputs: int) -> dict[str, np.ndarray]:
        """Outer parameters to begin meta-training with, by name, `[members, ...]`.

        Args:
            seed: of what is drawn.
            members: how many, each from numbers of its own.
            features: number of input features of the tasks.
            outputs: size of their output.
        """

    @abc.abstractmethod
    def learned(self, outer: Mapping[str, np.ndarray]) -> Any:
        """A single set of outer parameters as a user keeps it: something with `save(path)`."""

    @abc.abstractmethod
    def parameters(self, learned: Any) -> dict[str, np.ndarray]:
        """The outer parameters, `[1 or members, ...]`, of what `learned` gave or of a path to its file.

        Raises:
            ValueError: if it does not fit this learner.
        """

    def adapted(self, state: Any) -> dict[str, Array]:
        """The weights of a state that a task adapts, by the names of the outer parameters that they start from, if any."""
        return {}

    def shares_outer(self, other: Learner) -> bool:
        """Whether another learner can have the same outer parameters."""
        return other is self

    def check(self, kind: str, outputs: int) -> None:
        """Raises a `ValueError` if this learner cannot learn tasks of a kind, `"classes"` or `"values"`, so many of them."""


def keras_model(learned: Any) -> keras.Model:
    """A Keras model that is given, or that is in a file of the given path.

    Raises:
        ValueError: if it is neither.
    """
    if isinstance(learned, (str, os.PathLike)):
        try:
            with files.local(learned) as copy:
                learned = keras.models.load_model(copy, compile=False)
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{os.fspath(learned)!r} is no Keras model, or is damaged: {error}") from error
    if not isinstance(learned, keras.Model):
        raise ValueError(f"A Keras model or a path to one is needed. Received: {learned!r}")
    return learned


def draw_kernel(
    seed: Array, place: tuple[int, ...], shape: tuple[int, int], leading: tuple[int, ...], shard: Shard = ALL
) -> Array:
    """An initial kernel: normal, of deviation `1 / sqrt(in)`; equal for members (the first axis), not for tasks."""
    tasks, rows = leading[1:], None
    if shard.count > 1:
        rows = shard.index + shard.count * tf.range(leading[1])
        tasks = (leading[1] * shard.count, *leading[2:])
    kernel = random.normal(random.fold_in(seed, *place), (*tasks, *shape), rows) / float(shape[0]) ** 0.5
    return tf.broadcast_to(kernel, (*leading, *shape))


class Place(NamedTuple):
    """A layer in a model.

    Attributes:
        layer: the layer; of weights that a model has beside its layers, the model.
        weights: its weights, without those of a layer before it.
    """

    layer: keras.layers.Layer
    weights: tuple[keras.Variable, ...]


def places(model: keras.Model) -> dict[str, Place]:
    """The layers of a model, and of the models in it, by their paths.

    A path is the names from the outermost model's layers inwards, joined by slashes. A layer that is used several times
    has one path, the first. Layers are in the order in which a functional model runs them; those of a subclass of
    `keras.Model` in the order in which Keras lists them.

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
    """Raises a `ValueError` if a layer is in several of the models inside a model: its copy would have it twice."""
    paths: dict[int, str] = {}
    for path, layer, own in _walk(model):
        if own and id(layer) in paths:
            raise ValueError(
                "`model` must have each layer in one of the models inside it, so that it can be copied. Received: one that "
                f"is {paths[id(layer)]} and {path}"
            )
        paths[id(layer)] = path


def resolve(chosen: Sequence[str], paths: Iterable[str], argument: str) -> tuple[str, ...]:
    """The paths of the layers that are named, by a path or, where no other layer has it, by its last part.

    Args:
        chosen: the names.
        paths: those of all layers.
        argument: what `chosen` is called in an error.

    Raises:
        ValueError: if there is no name, or one is of no layer or of several.
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
    """Paths, layers and weights of all layers, repeated ones too; before them what a model has of its own."""
    within = {id(weight) for layer in model.layers for weight in layer.weights}
    beside = tuple(weight for weight in model.weights if id(weight) not in within)
    if beside:
        yield above.rstrip("/") or model.name, model, beside
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from _walk(layer, f"{above}{layer.name}/")
        else:
            yield f"{above}{layer.name}", layer, tuple(layer.weights)
