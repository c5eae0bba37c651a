"""Keras networks as networks that learn by a genome."""

from __future__ import annotations

from collections.abc import Iterator

import keras
import numpy as np
from keras import ops

from keras_blur.core import equations
from keras_blur.core.connection import TRACE
from keras_blur.core.genome import Genome
from keras_blur.core.rule import ACTIVATIONS
from keras_blur.layers.dense import Dense
from keras_blur.models.sequential import Sequential

_SAMPLES = np.array([-1e3, -7.0, -3.0, -1.0, -0.3, 0.0, 0.3, 1.0, 3.0, 7.0, 1e3], np.float32)


def convert(model: keras.Sequential, genome: Genome) -> Sequential:
    """A Keras Sequential of Dense and structural layers as a network that learns by a genome.

    Args:
        model: a built `keras.Sequential` of `keras.layers.Dense`, `keras.layers.Activation` right after a linear one, and
            layers without weights. Nested `keras.Sequential` models are unfolded.
        genome: the genome of the new model.

    Returns:
        A `Sequential` with the same weights in each forward channel; backward synapses that the rule updates with the same
        terms as the forward ones (`directions="tied_updates"`) start equal to them, independent ones at random.

    Raises:
        ValueError: if the model is not built, holds another layer with weights, a nonlinearity that no rule knows, or an
            option without a place in `keras_blur.layers.Dense`: regularizers, constraints, LoRA, quantization.

    Example:

    >>> import numpy as np
    >>> from keras_blur import genomes
    >>> twin = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> model = convert(twin, genomes.backprop(loss="mean_squared_error"))
    >>> bool(np.allclose(model(np.ones((1, 4))), twin(np.ones((1, 4)))))
    True
    """
    if type(model) is not keras.Sequential:
        raise ValueError(f"`model` must be a keras.Sequential. Received: {model!r}")
    if not model.built:
        raise ValueError("`model` must be built: start it with a keras.Input, or call it on data.")
    chain: list[keras.Layer] = [keras.layers.InputLayer(batch_shape=model.input_shape)]
    for layer in _unfolded(model):
        if type(layer) is keras.layers.Dense:
            _check_options(layer)
            copy = Dense(
                layer.units, _activation_name(layer), layer.use_bias, layer.kernel_initializer, layer.bias_initializer,
                name=layer.name, dtype=layer.dtype_policy, trainable=layer.trainable,
            )  # fmt: skip
            chain.append(copy)
        elif type(layer) is keras.layers.Activation and isinstance(chain[-1], Dense) and chain[-1].activation == "linear":
            Sequential.check_weightless(layer)
            chain[-1].activation = _activation_name(layer)
        elif layer.weights:
            raise ValueError(
                f"Layer {layer.name!r} ({type(layer).__name__}) has weights and no keras_blur twin; only Dense has one."
            )
        else:
            Sequential.check_weightless(layer)  # a regularizer is not in the config
            chain.append(type(layer).from_config(layer.get_config()))
    blur = Sequential(chain, genome=genome, name=model.name, dtype=model.dtype_policy)
    blur.build(tuple(model.input_shape))
    copy_kernels(model, blur)
    return blur


def _unfolded(model: keras.Sequential) -> Iterator[keras.Layer]:
    """The layers, those of nested models in their place."""
    for layer in model.layers:
        if type(layer) is keras.Sequential:
            yield from _unfolded(layer)
        else:
            yield layer


def _check_options(layer: keras.layers.Dense) -> None:
    """Raises a `ValueError` if a Dense layer has an option that is not its default and has no place in ours."""
    plain = keras.layers.Dense(layer.units).get_config()
    own = Dense(layer.units).get_config()
    for name, value in layer.get_config().items():
        if name not in own and value != plain.get(name):
            raise ValueError(
                f"`{name}` of layer {layer.name!r} must be {plain.get(name)!r}, since a genome has no place for it. "
                f"Received: {name}={value!r}"
            )
    if isinstance(layer.dtype_policy, keras.dtype_policies.QuantizedDTypePolicy):
        raise ValueError(
            f"`dtype` of layer {layer.name!r} must not be quantized. Received: dtype={layer.dtype_policy.name!r}"
        )


def copy_kernels(source: keras.Sequential, target: Sequential) -> None:
    """Copies the weights of a Keras network's Dense layers into each forward channel of a network of the same shape.

    Backward kernels that receive the same updates as the forward ones start equal to them; independent ones are left.
    """
    dense = [layer for layer in _unfolded(source) if isinstance(layer, keras.layers.Dense)]
    own = [layer for layer in target.layers if isinstance(layer, Dense)]
    for layer, copy in zip(dense, own, strict=True):
        for name, variable in copy.synapses.items():
            if name.endswith(TRACE):
                continue
            if name == "backward_kernel" and target.rule.directions != "tied_updates":
                continue
            value = layer.bias if name == "bias" else layer.kernel
            variable.assign(ops.broadcast_to(value, variable.shape))


def _activation_name(layer: keras.Layer) -> str:
    name = getattr(layer.activation, "__name__", str(layer.activation))
    if name not in ACTIVATIONS:
        hint = " For a softmax output, use a linear layer and a loss with from_logits=True." if name == "softmax" else ""
        raise ValueError(
            f"Layer {layer.name!r} has the activation {name!r}, which no rule knows; known: {', '.join(ACTIVATIONS)}.{hint}"
        )
    if not np.allclose(layer.activation(ops.array(_SAMPLES)), equations.activate(name, ops.array(_SAMPLES)), atol=1e-6):
        raise ValueError(
            f"Layer {layer.name!r} has a function of its own for activation, {name!r}, which no rule knows; known: "
            f"{', '.join(ACTIVATIONS)}."
        )
    return name
