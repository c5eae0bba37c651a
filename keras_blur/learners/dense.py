"""Dense networks as plain arrays, for learners whose outer parameters are network weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_blur import arguments
from keras_blur.core import equations
from keras_blur.core.rule import ACTIVATIONS
from keras_blur.learners.base import keras_model, places

Array = Any


KERAS_ACTIVATIONS = tuple(name for name in ACTIVATIONS if name != "relu_tanh")  # those that Keras has by that name


def check(activation: str, known: Sequence[str] = KERAS_ACTIVATIONS, **units: Sequence[int]) -> None:
    """Raises a `ValueError` for an unknown activation or a non-positive number of units."""
    arguments.choice("activation", activation, known)
    for name, numbers in units.items():
        arguments.counts(name, numbers)


def draw(name: str, sizes: Sequence[int], activation: str, members: int, seed: Sequence[int]) -> dict[str, np.ndarray]:
    """Draws weights `[members, in, out]` and zero biases `[members, 1, out]`.

    Weights are normal with standard deviation `1 / sqrt(in)`, or `sqrt(2 / in)` before a relu,
    which keeps the scale of activations.

    Args:
        name: prefix of the array names.
        sizes: units of each layer, starting with the input.
        activation: hidden activation.
        members: number of networks.
        seed: random seed.
    """
    rng, made = np.random.default_rng(seed), {}
    for index, (before, after) in enumerate(pairwise(sizes)):
        deviation = np.sqrt((2.0 if activation == "relu" else 1.0) / before)
        made[f"{name}_kernel_{index}"] = (deviation * rng.standard_normal((members, before, after))).astype(np.float32)
        made[f"{name}_bias_{index}"] = np.zeros((members, 1, after), np.float32)
    return made


def weights(name: str, outer: Mapping[str, Array]) -> tuple[Array, ...]:
    """The arrays that `draw` made under a name, alternating kernels and biases."""
    count = sum(key.startswith(f"{name}_kernel_") for key in outer)
    return tuple(outer[f"{name}_{kind}_{index}"] for index in range(count) for kind in ("kernel", "bias"))


def forward(arrays: Sequence[Array], x: Array, activation: str) -> Array:
    """Outputs `[..., batch, out]` of inputs `[..., batch, in]`; leading axes broadcast."""
    for index in range(0, len(arrays), 2):
        x = ops.matmul(x, arrays[index]) + arrays[index + 1]
        if index < len(arrays) - 2:
            x = equations.activate(activation, x)
    return x


def layers(name: str, outer: Mapping[str, np.ndarray], activation: str) -> list[keras.layers.Layer]:
    """The network as Keras layers. `fill` sets their weights once they are built."""
    biases = weights(name, outer)[1::2]
    return [
        keras.layers.Dense(bias.shape[-1], activation if index < len(biases) - 1 else "linear", name=f"{name}_{index}")
        for index, bias in enumerate(biases)
    ]


def sequential(name: str, outer: Mapping[str, np.ndarray], activation: str) -> keras.Model:
    """The network as a Keras model."""
    features = weights(name, outer)[0].shape[-2]
    return fill(keras.Sequential([keras.Input((features,)), *layers(name, outer, activation)]), outer)


def fill(model: keras.Model, outer: Mapping[str, np.ndarray]) -> keras.Model:
    """Sets the weights of the layers made by `layers`; returns the model."""
    for layer in model.layers:
        if isinstance(layer, keras.layers.Dense):
            name, _, index = layer.name.rpartition("_")
            layer.set_weights([outer[f"{name}_kernel_{index}"], outer[f"{name}_bias_{index}"][0]])
    return model


def read(model: Any, *names: str) -> dict[str, np.ndarray]:
    """Reads the arrays of one member from a model made by `fill`, or from its file.

    Args:
        model: the model, a model that contains it, or a path.
        names: prefixes of the networks in the model.

    Raises:
        ValueError: if the model does not contain these networks.
    """
    found = {}
    for place in places(keras_model(model)).values():
        name, _, index = place.layer.name.rpartition("_")
        if isinstance(place.layer, keras.layers.Dense) and name in names and index.isdigit() and place.layer.use_bias:
            kernel, bias = place.layer.get_weights()
            found[f"{name}_kernel_{index}"], found[f"{name}_bias_{index}"] = kernel[None], bias[None, None]
    missing = [name for name in names if f"{name}_kernel_0" not in found]
    if missing:
        raise ValueError(
            f"The model must have dense layers named {missing[0]}_0, {missing[0]}_1 and so on. Received: {model!r}"
        )
    return found
