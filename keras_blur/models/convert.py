"""Conversion of Keras networks to networks that learn with a genome, and back."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np

from keras_blur import layers as kb_layers
from keras_blur.core import equations
from keras_blur.core.companions import AVERAGE, TRACE
from keras_blur.core.genome import Genome
from keras_blur.layers.base import BlurLayer, SynapticLayer, numbers_of, relu_tanh
from keras_blur.layers.normalization import BatchNormalization
from keras_blur.models.base import BlurModel
from keras_blur.models.model import Model
from keras_blur.models.networks import cloned
from keras_blur.models.reading import calls_as_keras, check_weightless
from keras_blur.models.sequential import Sequential

# For each kind of Keras layer with weights and each part of its twin: the attribute path to the
# Keras layer that holds the part's weights, and the names of kernel and bias there.
_SELF = ((), "kernel", "bias")
_NORMAL = ((), "gamma", "beta")
_PARTS: dict[str, tuple[tuple[tuple[str, ...], str, str], ...]] = {
    "Dense": (_SELF,),
    "EinsumDense": (_SELF,),
    "Conv1D": (_SELF,),
    "Conv2D": (_SELF,),
    "Conv3D": (_SELF,),
    "Conv2DTranspose": (_SELF,),
    "DepthwiseConv1D": (_SELF,),
    "DepthwiseConv2D": (_SELF,),
    "SeparableConv2D": (((), "depthwise_kernel", ""), ((), "pointwise_kernel", "bias")),
    "Embedding": (((), "embeddings", ""),),
    "BatchNormalization": (_NORMAL,),
    "LayerNormalization": (_NORMAL,),
    "GroupNormalization": (_NORMAL,),
    "RMSNormalization": (((), "scale", ""),),
    "MultiHeadAttention": tuple(
        ((name,), "kernel", "bias") for name in ("_query_dense", "_key_dense", "_value_dense", "_output_dense")
    ),
}
# Options of Keras layers that only affect how something is computed, or that are recreated.
_NEUTRAL = (
    "quantization_config", "flash_attention", "build_config", "gptq_unpacked_column_size", "activity_regularizer",
    "rms_scaling", "renorm", "renorm_clipping", "renorm_momentum", "use_gate", "sliding_window", "attention_axes",
)  # fmt: skip

_USUAL = (("renorm_momentum", 0.99), ("attention_axes", (1,)), ("attention_axes", [1]))

# Layers that a config and weights do not give back: it lacks their function or their vocabulary, or
# Keras refuses it once boundaries are adapted.
_SHARED = (
    keras.layers.Lambda, keras.layers.TextVectorization, keras.layers.StringLookup, keras.layers.IntegerLookup,
    keras.layers.Discretization,
)  # fmt: skip


def convert(model: keras.Model, genome: Genome) -> BlurModel:
    """Makes a model that learns with a genome from a Keras model, with its weights.

    Args:
        model: a built Functional or Sequential model. Each layer with weights must have a twin in
            `keras_blur.layers`; all other layers are copied. Nested models are unfolded. A layer
            used twice stays one layer.
        genome: the genome of the new model.

    Returns:
        A `Sequential` for a `keras.Sequential`, else a `Model`. It has the same weights in each
        forward channel, the same names and the same moving statistics. Backward synapses that the
        rule updates with the same terms as the forward ones (`directions="tied_updates"`) start
        equal to these. Other backward synapses start at random.

    Raises:
        ValueError: if the model is not built, has a layer with weights but without a twin, or uses
            an option that the twin lacks: LoRA, quantization, an activity regularizer.

    Example:

    >>> import numpy as np
    >>> from keras_blur import genomes
    >>> twin = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> model = convert(twin, genomes.backprop(loss="mean_squared_error"))
    >>> bool(np.allclose(model(np.ones((1, 4))), twin(np.ones((1, 4)))))
    True
    """
    if not _is_plain(model):
        raise ValueError(f"`model` must be a keras.Sequential or a Functional keras.Model. Received: {model!r}")
    if not model.built:
        raise ValueError("`model` must be built: start it with a keras.Input, or call it on data.")
    twins: dict[int, Any] = {}

    def twin(layer: Any) -> Any:
        if id(layer) not in twins:
            twins[id(layer)] = cloned(layer, twin) if _is_plain(layer) else _twin(layer)
        return twins[id(layer)]

    made: BlurModel
    if type(model) is keras.Sequential:
        inputs = keras.layers.InputLayer(batch_shape=model.input_shape, dtype=model.inputs[0].dtype)
        chain = _merged([twin(layer) for layer in _unfolded(model)])
        made = Sequential([inputs, *chain], genome=genome, name=model.name, dtype=model.dtype_policy)
    else:
        clone = cloned(model, twin)
        struct = keras.tree.pack_sequence_as(model._outputs_struct, keras.tree.flatten(clone.outputs))
        entered = keras.tree.pack_sequence_as(model._inputs_struct, keras.tree.flatten(clone.inputs))
        made = Model(entered, struct, genome=genome, name=model.name, dtype=model.dtype_policy)
    for layer in _all_layers(model):
        if isinstance(twins.get(id(layer)), BlurLayer):
            _copy(layer, twins[id(layer)])
    return made


def copy_weights(source: keras.Model, target: BlurModel) -> None:
    """Copies the weights of a Keras model into each forward channel of a model with the same
    layers.

    Args:
        source: a built model.
        target: a built model that learns with a genome, with the layers in the same order.
    """
    own = [layer for layer in target.layers if isinstance(layer, BlurLayer)]
    theirs = [layer for layer in _all_layers(source) if type(layer).__name__ in _PARTS]
    for layer, twin in zip(theirs, own, strict=True):
        _copy(layer, twin)


def _is_plain(layer: Any) -> bool:
    """Whether a layer is a Sequential or Functional model of Keras, without a `call` of its own."""
    if isinstance(layer, (keras.Sequential, BlurModel)):
        return type(layer) is keras.Sequential
    return isinstance(layer, keras.Model) and hasattr(layer, "_nodes_by_depth") and calls_as_keras(layer)


def _unfolded(model: keras.Model) -> Iterator[Any]:
    """The layers of a chain, with the layers of nested chains in their places."""
    for layer in model.layers:
        if type(layer) is keras.Sequential:
            yield from _unfolded(layer)
        else:
            yield layer


def _merged(chain: list[Any]) -> list[Any]:
    """The chain in which a linear layer absorbs an elementwise activation layer right after it."""
    found: list[Any] = []
    for layer in chain:
        before = found[-1] if found else None
        if (
            type(layer) is keras.layers.Activation
            and isinstance(before, SynapticLayer)
            and before.get_config().get("activation") == "linear"  # normalisation layers take no activation
        ):
            name = getattr(layer.activation, "__name__", "")
            if name in ("relu", "tanh", "sigmoid") and getattr(keras.activations, name) is layer.activation:
                before.activation = name
                continue
        found.append(layer)
    return found


def _all_layers(model: keras.Model) -> Iterator[Any]:
    """The layers of a model and of all models inside it."""
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from _all_layers(layer)
        else:
            yield layer


def _twin(layer: Any) -> Any:
    """The keras_blur twin of a Keras layer with weights, or a copy of a layer without."""
    kind = type(layer).__name__
    if isinstance(layer, (keras.layers.InputLayer,)):
        return layer
    if kind not in _PARTS or type(layer) is not getattr(keras.layers, kind):
        allowed = (keras.layers.Normalization, keras.Model)
        if isinstance(layer, keras.Layer) and layer.weights and not isinstance(layer, allowed):
            raise ValueError(
                f"Layer {layer.name!r} ({kind}) has weights and no keras_blur twin: build `model` from layers that have one "
                f"instead ({', '.join(_PARTS)}; a layer of scales is EinsumDense('...c,c->...c', units))."
            )
        check_weightless(layer)
        return _copied(layer)
    own = getattr(kb_layers, kind)
    known = inspect.signature(own.__init__).parameters
    plain = _defaults(type(layer))
    config = layer.get_config()
    kept: dict[str, Any] = {}
    for name, value in config.items():
        if name == "activation":  # a config has only a function's name
            kept[name] = layer.activation
        elif name != "activity_regularizer" and (name in known or name in ("name", "trainable", "dtype")):
            kept[name] = value
        elif name in _NEUTRAL and (not value or (name, value) in _USUAL):
            continue
        elif value != plain.get(name):
            raise ValueError(
                f"`{name}` of layer {layer.name!r} must be {plain.get(name)!r}, since the twin has no such option. "
                f"Received: {name}={value!r}"
            )
    if isinstance(layer.dtype_policy, keras.dtype_policies.QuantizedDTypePolicy):
        raise ValueError(
            f"`dtype` of layer {layer.name!r} must not be quantized. Received: dtype={layer.dtype_policy.name!r}"
        )
    if getattr(layer, "lora_enabled", False):
        raise ValueError(
            f"`lora_rank` of layer {layer.name!r} must be None, since the twin has no such option. "
            f"Received: lora_rank={layer.lora_rank!r}"
        )
    return own(**kept)


def _copied(layer: Any) -> Any:
    """A copy of a layer without synapses that keeps its function, of which a config may have only
    the name, and its statistics. A layer of `_SHARED` is returned itself."""
    if isinstance(layer, _SHARED):
        return layer
    config = layer.get_config()
    if isinstance(layer, keras.layers.Activation):
        config["activation"] = layer.activation
    copy = type(layer).from_config(config)
    if isinstance(layer, keras.layers.Normalization) and layer.built:
        copy.build(layer._build_input_shape)
        copy.set_weights(layer.get_weights())
        copy.finalize_state()
    return copy


def _defaults(kind: Any) -> dict[str, Any]:
    return {name: one.default for name, one in inspect.signature(kind.__init__).parameters.items()}


def _pairs(layer: Any, twin: BlurLayer) -> Iterator[tuple[SynapticLayer, Any, Any]]:
    """The parts of a twin with the kernel and the bias of the Keras layer, or `None`."""
    for part, (path, kernel, bias) in zip(twin.parts(), _PARTS[type(layer).__name__], strict=True):
        holder = layer
        for name in path:
            holder = getattr(holder, name)
        yield part, getattr(holder, kernel, None), getattr(holder, bias, None) if bias else None


def _copy(layer: Any, twin: BlurLayer) -> None:
    """Copies the weights of a Keras layer into each forward channel of its twin."""
    for part, kernel, bias in _pairs(layer, twin):
        equal = part.rule is not None and part.rule.directions == "tied_updates"
        for name, variable in part.synapses.items():
            if name.endswith(TRACE) or (name == "backward_kernel" and not equal):
                continue
            # Copied through numpy: JAX's trainer donates arrays, so a second model that shared them
            # would lose them.
            of_bias = name.removesuffix(AVERAGE) == "bias"
            value = numbers_of(bias if of_bias else kernel)
            # Scales of several axes are in the order of these axes, which Keras's need not be.
            value = value.reshape(variable.shape[2 if of_bias else 1 :])
            variable.assign(np.broadcast_to(value, variable.shape))
    if isinstance(twin, BatchNormalization):
        mean, variance = (numbers_of(value) for value in (layer.moving_mean, layer.moving_variance))
        twin.moving_mean.assign(mean)
        twin.moving_variance.assign(variance)
        if np.any(mean != 0.0) or np.any(variance != 1.0):  # statistics of a trained network
            twin.settle()


def to_keras(model: BlurModel) -> keras.Model:
    """Makes a plain Keras model from the first channel of a model that learned with a genome.

    Args:
        model: a built model whose genome predicts from state 1 alone, as backpropagation does.

    Returns:
        A `keras.Sequential` for a `Sequential`, else a `keras.Model`, with the same names and
        predictions.

    Raises:
        ValueError: if the model is not built, or its predictions depend on other states than state
            1 or on more than the plain weights.

    Example:

    >>> from keras_blur import genomes
    >>> model = convert(keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)]), genomes.backprop())
    >>> to_keras(model).count_params()
    15
    """
    if not model.built:
        raise ValueError("The model must be built: start `layers` with a keras.Input, or call `fit`.")
    _check_plain(model.genome)
    _check_uses(model)
    twins: dict[int, Any] = {}

    def plain(layer: Any) -> Any:
        if id(layer) not in twins:
            twins[id(layer)] = cloned(layer, plain) if _is_plain(layer) else _keras_twin(layer)
        return twins[id(layer)]

    clone = cloned(model._network, plain)
    if isinstance(model, Sequential):
        clone = keras.Sequential([clone.inputs[0], *(plain(layer) for layer in model.layers)], name=model.name)
    else:
        clone = keras.Model(
            keras.tree.pack_sequence_as(model._network._inputs_struct, keras.tree.flatten(clone.inputs)),
            keras.tree.pack_sequence_as(model._network._outputs_struct, keras.tree.flatten(clone.outputs)),
            name=model.name,
        )
    for layer in _all_layers(model._network):
        if isinstance(layer, BlurLayer):
            _copy_back(layer, twins[id(layer)])
    return clone


def _check_plain(genome: Genome) -> None:
    """Raises a `ValueError` if a plain network cannot reproduce a genome's predictions."""
    rule = genome.rule
    first = equations.swapped(np.asarray(genome.nu))[..., 0, :]
    numbers = {"neuron_update": 1.0, "temperature": 1.0}
    reasons = [f"{name} is not 1" for name, one in numbers.items() if np.any(np.asarray(genome.arrays[name]) != one)]
    if np.any(first[..., 0] != 1.0) or np.any(first[..., 1:] != 0.0):
        reasons.append("state 1 reads more than state 1 of the layer before")
    if rule.normalize_activations in ("forward", "both"):
        reasons.append("it normalises summed inputs")
    if rule.normalize_synapses != "none":
        reasons.append("it normalises synapses")
    if rule.keep_neurons:
        reasons.append("it keeps neurons")
    if reasons:
        raise ValueError(
            "`genome` must predict from state 1 and the plain weights for a Keras model to predict the same. "
            f"Received a genome where {reasons[0]}"
        )


def _check_uses(model: BlurModel) -> None:
    """Raises a `ValueError` if a layer has one nonlinearity in one use and another in the next."""
    graph, rule = model.reading.graph, model.rule
    known: dict[int, Any] = {}
    for one in graph.connects:
        of_rule = rule.last_activation if one.target in graph.last else rule.forward_activation
        own = one.connection.activation or of_rule
        if known.setdefault(one.holder, own) != own:
            name = model.reading.layers[one.holder].name
            raise ValueError(
                f"Layer {name!r} must have an `activation` for a Keras model to predict the same, since its uses have "
                f"different ones by default. Received: {known[one.holder]!r} and {own!r}"
            )


def _keras_twin(layer: Any) -> Any:
    if not isinstance(layer, BlurLayer):
        return layer if isinstance(layer, keras.layers.InputLayer) else _copied(layer)
    kind = getattr(keras.layers, type(layer).__name__)
    known = inspect.signature(kind.__init__).parameters
    config: Mapping[str, Any] = layer.get_config()
    kept = {name: value for name, value in config.items() if name in known or name in ("name", "trainable", "dtype")}
    if "activation" in kept:
        part = layer.parts()[-1]
        activation = part.activation or part._default
        kept["activation"] = relu_tanh if activation == "relu_tanh" else activation
    return kind.from_config(kept)


def _copy_back(layer: BlurLayer, plain: Any) -> None:
    """Copies the weights that a layer predicts with into its Keras twin."""
    for part, kernel, bias in _pairs(plain, layer):
        predicting = part.predicting()
        for name, value in (("kernel", kernel), ("bias", bias)):
            own = predicting.get(name)
            if own is not None and value is not None:
                value.assign(numbers_of(own)[0].reshape(value.shape))
    if isinstance(layer, BatchNormalization):
        plain.moving_mean.assign(numbers_of(layer.moving_mean))
        plain.moving_variance.assign(numbers_of(layer.moving_variance))
