"""Networks of many kinds for the benchmarks, as plain Keras models, and data of their shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import layers as kl

from keras_blur.models import networks

Array = Any


def mlp() -> keras.Model:
    """784-512-256-10, tanh."""
    hidden = [kl.Dense(units, "tanh") for units in (512, 256)]
    return keras.Sequential([keras.Input((784,)), *hidden, kl.Dense(10)], name="mlp")


def lenet() -> keras.Model:
    """LeNet-5 on 28x28 images, tanh and average pooling."""
    return networks.lenet((28, 28, 1), 10, "tanh")


def resnet() -> keras.Model:
    """A residual net of two stages on 16x16 images, with strides and 1x1 shortcuts."""
    return networks.resnet((16, 16, 3), 10, (8, 16), 1)


def resnet20() -> keras.Model:
    """ResNet-20 on 32x32 images."""
    return networks.resnet((32, 32, 3), 10)


def depthwise() -> keras.Model:
    """A depthwise-separable net."""
    x = keras.Input((16, 16, 3))
    h = kl.Conv2D(8, 3, strides=2, padding="same", activation="relu")(x)
    h = kl.ReLU(6.0)(kl.BatchNormalization()(kl.DepthwiseConv2D(3, padding="same", use_bias=False)(h)))
    h = kl.Conv2D(16, 1, activation="relu")(h)
    h = kl.SeparableConv2D(16, 3, padding="same", depth_multiplier=2, activation="relu")(h)
    return keras.Model(x, kl.Dense(10)(kl.GlobalMaxPooling2D()(h)), name="depthwise")


def branches() -> keras.Model:
    """Concatenated branches with max pooling."""
    x = keras.Input((12, 12, 3))
    narrow = kl.Conv2D(4, 1, activation="relu")(x)
    wide = kl.Conv2D(4, 5, padding="same", activation="relu")(x)
    pooled = kl.Conv2D(4, 1, activation="relu")(kl.MaxPooling2D(3, 1, padding="same")(x))
    h = kl.MaxPooling2D(2)(kl.Concatenate()([narrow, wide, pooled]))
    return keras.Model(x, kl.Dense(10, activation="softmax")(kl.Flatten()(h)), name="branches")


def transformer() -> keras.Model:
    """Two blocks of attention on token sequences: embedding, positions, layer normalisation,
    gelu."""
    tokens, places = keras.Input((16,), dtype="int32"), keras.Input((16,), dtype="int32")
    h = kl.Add()([kl.Embedding(50, 32)(tokens), kl.Embedding(16, 32)(places)])
    for _ in range(2):
        n = kl.LayerNormalization()(h)
        h = kl.Add()([h, kl.MultiHeadAttention(4, 8)(n, n, use_causal_mask=True)])
        n = kl.LayerNormalization()(h)
        h = kl.Add()([h, kl.Dense(32)(kl.Dense(64, activation="gelu")(n))])
    return keras.Model([tokens, places], kl.Dense(10)(kl.GlobalAveragePooling1D()(h)), name="transformer")


def two_ways() -> keras.Model:
    """Two inputs and two outputs."""
    a, b = keras.Input((6,), name="a"), keras.Input((5,), name="b")
    h = kl.Dense(12, activation="tanh")(kl.Concatenate()([kl.Dense(8, activation="relu")(a), b]))
    return keras.Model([a, b], [kl.Dense(10, name="class")(h), kl.Dense(3, name="values")(h)], name="two_ways")


def siamese() -> keras.Model:
    """Two inputs through shared layers, compared by their difference."""
    shared = [kl.Conv2D(4, 3, activation="relu"), kl.Flatten(), kl.Dense(8, activation="tanh")]
    inputs = [keras.Input((8, 8, 1)), keras.Input((8, 8, 1))]
    found = []
    for value in inputs:
        for layer in shared:
            value = layer(value)
        found.append(value)
    return keras.Model(inputs, kl.Dense(10)(kl.Subtract()(found)), name="siamese")


ARCHITECTURES: dict[str, Callable[[], keras.Model]] = {
    "lenet": lenet,
    "resnet": resnet,
    "depthwise": depthwise,
    "branches": branches,
    "transformer": transformer,
    "two_ways": two_ways,
    "siamese": siamese,
}
# Of keras.applications, with their smallest input.
APPLICATIONS = {
    "MobileNetV2": 32,
    "ResNet50V2": 32,
    "EfficientNetV2B0": 32,
    "DenseNet121": 32,
    "NASNetMobile": 32,
    "ConvNeXtTiny": 32,
    "MobileNet": 32,
    "MobileNetV3Small": 32,
    "EfficientNetB0": 32,
    "ResNet50": 32,
    "VGG16": 32,
    "Xception": 71,
    "InceptionV3": 75,
}


def application(name: str) -> keras.Model:
    """A network of keras.applications with ten classes, its weights drawn at random.

    ConvNeXt's own `LayerScale` has weights and no twin, so an `EinsumDense` takes its place. The
    scales start at 1, not at 1e-6, so that the residual branches learn as fast as the rest.
    """
    size = APPLICATIONS[name]
    model = getattr(keras.applications, name)(weights=None, input_shape=(size, size, 3), classes=10)

    def replaced(layer: Any) -> Any:
        if type(layer).__name__ != "LayerScale":
            return type(layer).from_config(layer.get_config())
        scales = (layer.projection_dim,)
        return kl.EinsumDense("...c,c->...c", scales, kernel_initializer="ones", name=layer.name)

    return keras.models.clone_model(model, clone_function=replaced) if name.startswith("ConvNeXt") else model


def losses(model: keras.Model) -> Any:
    """The losses that go with a network's outputs."""
    if len(model.outputs) > 1:
        return [keras.losses.SparseCategoricalCrossentropy(from_logits=True), keras.losses.MeanSquaredError()]
    last = model.layers[-1]
    probabilities = getattr(last, "activation", None) is keras.activations.softmax
    return keras.losses.SparseCategoricalCrossentropy(from_logits=not probabilities)


def batch(model: keras.Model, size: int, rng: np.random.Generator) -> tuple[Any, Any]:
    """A batch of random inputs and labels."""
    x: list[Array] = []
    for tensor in model.inputs:
        shape = (size, *tensor.shape[1:])
        if tensor.dtype == "int32":
            x.append(np.broadcast_to(np.arange(shape[1]), shape) if x else rng.integers(0, 50, shape))
        else:
            x.append(rng.normal(size=shape).astype(keras.config.floatx()))
    y: list[Array] = [rng.integers(0, 10, size)]
    if len(model.outputs) > 1:
        y.append(rng.normal(size=(size, *model.outputs[1].shape[1:])).astype(keras.config.floatx()))
    return (x if len(x) > 1 else x[0]), (y if len(y) > 1 else y[0])
