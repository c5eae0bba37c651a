"""The networks of the command line and of comparisons, as plain Keras models, with and without
batch normalisation."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import layers as kl

from keras_blur import arguments
from keras_blur.layers.base import check_trained_by_gradients, relu_tanh
from keras_blur.models.reading import entering, functional_of, nodes_of

NETWORKS = ("mlp", "lenet", "resnet20")

_NORMALIZING = ("BatchNormalization", "LayerNormalization", "GroupNormalization", "RMSNormalization", "UnitNormalization")
_ACTIVATIONS = (kl.Activation, kl.ReLU, kl.LeakyReLU, kl.ELU, kl.PReLU)


def activation_of(name: str) -> Any:
    """A Keras activation by its name in a rule."""
    return relu_tanh if name == "relu_tanh" else name


def mlp_layers(classes: int, hidden: Sequence[int], activation: Any = "relu", kind: Any = kl) -> list[Any]:
    """Dense layers on flattened examples.

    Args:
        classes: number of outputs.
        hidden: units of the hidden layers.
        activation: activation of the hidden layers.
        kind: where layers with weights come from: `keras.layers` or `keras_blur.layers`.
    """
    return [kl.Flatten(), *(kind.Dense(units, activation) for units in hidden), kind.Dense(classes)]


def lenet_layers(shape: Sequence[int], classes: int, activation: Any = "relu", kind: Any = kl) -> list[Any]:
    """LeNet: two convolutions with average pooling, and three dense layers.

    For images smaller than 14 pixels, the second convolution also pads.

    Args:
        shape: `[height, width, channels]` of an image.
        classes: number of outputs.
        activation: activation of the hidden layers.
        kind: where layers with weights come from: `keras.layers` or `keras_blur.layers`.
    """
    padding = "valid" if min(shape[:2]) >= 14 else "same"
    return [
        kind.Conv2D(6, 5, padding="same", activation=activation),
        kl.AveragePooling2D(2),
        kind.Conv2D(16, 5, padding=padding, activation=activation),
        kl.AveragePooling2D(2),
        *mlp_layers(classes, (120, 84), activation, kind),
    ]


def mlp(shape: Sequence[int], classes: int, hidden: Sequence[int], activation: Any = "relu") -> keras.Model:
    """A model of `mlp_layers`.

    Example:

    >>> mlp((4,), 3, (8,)).count_params()
    67
    """
    return keras.Sequential([keras.Input(tuple(shape)), *mlp_layers(classes, hidden, activation)], name="mlp")


def lenet(shape: Sequence[int], classes: int, activation: Any = "relu") -> keras.Model:
    """A model of `lenet_layers`.

    Example:

    >>> lenet((28, 28, 1), 10).count_params()
    61706
    """
    return keras.Sequential([keras.Input(tuple(shape)), *lenet_layers(shape, classes, activation)], name="lenet")


def resnet(
    shape: Sequence[int], classes: int, widths: Sequence[int] = (16, 32, 64), blocks: int = 3, activation: Any = "relu"
) -> keras.Model:
    """A residual network with batch normalisation; the defaults are ResNet-20.

    Args:
        shape: `[height, width, channels]` of an image.
        classes: number of outputs.
        widths: filters of each stage. Each stage but the first halves the image.
        blocks: residual blocks in a stage.
        activation: activation of all hidden neurons.

    Example:

    >>> resnet((8, 8, 3), 10, widths=(4,), blocks=1).output_shape
    (None, 10)
    """

    def convolved(h: Any, filters: int, size: int, stride: int = 1) -> Any:
        return kl.Conv2D(filters, size, strides=stride, padding="same", use_bias=False)(h)

    x = keras.Input(tuple(shape))
    h = kl.Activation(activation)(kl.BatchNormalization()(convolved(x, widths[0], 3)))
    for stage, filters in enumerate(widths):
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            r = kl.Activation(activation)(kl.BatchNormalization()(convolved(h, filters, 3, stride)))
            r = kl.BatchNormalization()(convolved(r, filters, 3))
            h = kl.Activation(activation)(kl.Add()([convolved(h, filters, 1, stride) if stride > 1 else h, r]))
    return keras.Model(x, kl.Dense(classes)(kl.GlobalAveragePooling2D()(h)), name="resnet")


def builder(network: str | Sequence[int] | keras.Model) -> tuple[str, Callable[..., Any]]:
    """Describes a network and gives a function that builds it with new weights.

    Args:
        network: units of the hidden layers of an MLP, `"lenet"`, `"resnet20"`, the path of a
            `.keras` file, or a built Keras model with one input and one output per class.

    Returns:
        The description, and `build(shape, classes, activation)`. A model keeps its own activations,
        but no seeds of its initializers.

    Raises:
        ValueError: if `network` is none of these. `build` raises it if a model does not fit the
            shape or the classes.

    Example:

    >>> builder((8, 8))[0]
    'hidden 8,8'
    """
    if isinstance(network, str) and network in ("lenet", "resnet20"):
        return network, lenet if network == "lenet" else resnet
    if isinstance(network, str) and network.endswith(".keras"):
        name = os.path.basename(network)
        model = keras.models.load_model(network)
    elif isinstance(network, keras.Model):
        name, model = network.name, network
    elif not isinstance(network, str):
        units = arguments.counts("network", network)

        def dense(shape: Sequence[int], classes: int, activation: Any = "relu") -> keras.Model:
            return mlp(shape, classes, units, activation)

        return f"hidden {','.join(map(str, units))}", dense
    else:
        raise ValueError(
            "`network` must be units of hidden layers, 'lenet', 'resnet20', a .keras file or a Keras model. "
            f"Received: network={network!r}"
        )

    check_trained_by_gradients("network", model)

    def again(shape: Sequence[int], classes: int, activation: Any = None) -> keras.Model:
        del activation
        own = tuple(model.input_shape[1:]), tuple(model.output_shape[1:])
        if own != (tuple(shape), (classes,)):
            raise ValueError(
                f"`network` must take examples of {tuple(shape)} and have {classes} outputs. "
                f"Received: {name}, which takes {own[0]} and has {own[1]}"
            )
        return flattened(keras.models.clone_model(model) if functional_of(model) is None else copied(model, _drawn_anew))

    return name, again


def _drawn_anew(layer: keras.Layer) -> keras.Layer:
    """A copy of a layer whose initializers have no seed."""

    def seedless(config: Any, name: str = "") -> Any:
        if isinstance(config, (list, tuple)):
            return type(config)(seedless(one) for one in config)
        if not isinstance(config, dict):
            return config
        found = {key: seedless(value, key) for key, value in config.items()}
        own = found.get("config")
        if name.endswith("initializer") and isinstance(own, dict) and "seed" in own:
            found["config"] = {**own, "seed": None}
        return found

    return type(layer).from_config(seedless(layer.get_config()))


def cloned(model: keras.Model, copy: Callable[[Any], Any]) -> keras.Model:
    """The same network of other layers, not compiled.

    `keras.models.clone_model` compiles the clone of a compiled model from a config, which lacks a
    user's own losses and metrics.

    Args:
        model: a built Sequential or Functional model.
        copy: a function from a layer, or a model inside, to the one in its place.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), kl.Dense(3)])
    >>> model.compile(loss="mse")
    >>> cloned(model, lambda layer: kl.Dense(2)).compiled
    False
    """
    if isinstance(model, keras.Sequential):
        (entry,) = model.inputs
        entry = keras.Input(batch_shape=entry.shape, dtype=entry.dtype, name=entry.name)
        return keras.Sequential([entry, *map(copy, model.layers)], name=model.name, trainable=model.trainable)
    functional = keras.Model(model._inputs_struct, model._outputs_struct, name=model.name)
    return keras.models.clone_model(functional, clone_function=copy)


def copied(model: keras.Model, copy: Callable[[Any], Any] | None = None) -> keras.Model:
    """The same network with variables of its own, not compiled, also of the models inside.

    Args:
        model: a built Sequential or Functional model.
        copy: a function from a layer to its copy; `None` for one by its config.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), kl.Dense(3)])
    >>> copied(model).layers[0] is model.layers[0]
    False
    """
    copies: dict[int, Any] = {}

    def once(layer: Any) -> Any:
        if id(layer) not in copies:
            if functional_of(layer) is not None:
                copies[id(layer)] = cloned(layer, once)
            else:
                copies[id(layer)] = copy(layer) if copy else type(layer).from_config(layer.get_config())
        return copies[id(layer)]

    return once(model)


def flattened(model: keras.Model) -> keras.Model:
    """The same layers in a model without other models inside it.

    Args:
        model: a built Sequential or Functional model.

    Raises:
        ValueError: if two layers have the same name, or a model inside is called with `training`.

    Example:

    >>> inner = keras.Sequential([keras.Input((4,)), kl.Dense(3, name="hidden")])
    >>> [layer.name for layer in flattened(keras.Sequential([inner, kl.Dense(2, name="last")])).layers[1:]]
    ['hidden', 'last']
    """
    if not any(isinstance(layer, keras.Model) for layer in model.layers):
        return model
    names = [
        layer.name
        for layer in model._flatten_layers(include_self=False)
        if not isinstance(layer, (keras.layers.InputLayer, keras.Model))
    ]
    if len(set(names)) < len(names):
        raise ValueError(f"`network` must have layers with different names, in models inside it too. Received: {names}")

    def run(functional: Any, tensors: Sequence[Any]) -> list[Any]:
        values = dict(zip(map(id, functional.inputs), tensors, strict=True))

        def now(one: Any) -> Any:
            return values.get(id(one), one)

        for node in nodes_of(functional):
            inner, given = functional_of(node.operation), node.arguments
            if inner is None:
                args, kwargs = keras.tree.map_structure(now, (given.args, given.kwargs))
                found = keras.tree.flatten(node.operation(*args, **kwargs))
            elif given.kwargs.get("training") is not None:
                raise ValueError(
                    f"`network` must call the model {inner.name!r} inside it without `training`. Received: {given.kwargs}"
                )
            else:
                found = run(inner, [now(one) for one in entering(inner, node)])
            values.update(zip(map(id, keras.tree.flatten(node.outputs)), found, strict=True))
        return [now(one) for one in functional.outputs]

    (entry,) = model.inputs
    fresh = keras.Input(batch_shape=entry.shape, dtype=entry.dtype)
    return keras.Model(fresh, run(functional_of(model), [fresh])[0])


def normalized(model: keras.Model) -> keras.Model | None:
    """The same network with batch normalisation before each activation of its hidden neurons.

    Args:
        model: a built Sequential or Functional model.

    Returns:
        A new model with the weights of `model`; `None` if `model` already has normalisation layers.

    Example:

    >>> normalized(mlp((4,), 3, (8,))).count_params()
    99
    """
    if any(type(layer).__name__ in _NORMALIZING for layer in model._flatten_layers(include_self=False)):
        return None
    outputs = {tensor._keras_history.operation.name for tensor in model.outputs}
    after: dict[str, Any] = {}

    def linear(layer: Any) -> Any:
        config = layer.get_config()
        inner = getattr(layer, "activation", None)
        if layer.weights and inner not in (None, keras.activations.linear) and layer.name not in outputs:
            after[layer.name] = inner
            config["activation"] = "linear"
        return type(layer).from_config(config)

    def called(layer: Any, *inputs: Any, **options: Any) -> Any:
        if isinstance(layer, _ACTIVATIONS) and layer.name not in outputs:
            return layer(kl.BatchNormalization()(*inputs), **options)
        found = layer(*inputs, **options)
        return kl.Activation(after[layer.name])(kl.BatchNormalization()(found)) if layer.name in after else found

    functional = keras.Model(model.inputs[0], model.outputs[0])
    made = keras.models.clone_model(functional, clone_function=linear, call_function=called)
    for layer in model.layers:
        if layer.weights:
            made.get_layer(layer.name).set_weights(layer.get_weights())
    return made
