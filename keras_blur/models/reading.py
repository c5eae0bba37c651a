"""Converts Keras's Functional graph to a plan of the core, once, when a model is created.

The result has three parts. The operations before the first layer with synapses prepare the input
and are run by Keras. The operations from there to the outputs form the `core.graph.Graph`. A chain
of maps after the last layer of neurons is a head: it turns the network's output into the
prediction, and the derivative of a loss passes back through it.

Layers are identified as objects, not by name or position: a layer that is called twice has one set
of synapses. Nested models are unfolded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_blur.core.equations import Activation
from keras_blur.core.graph import Builder, Connect, Graph, Pass
from keras_blur.core.rule import Rule
from keras_blur.core.weightless import (
    ActivationMap,
    Dropout,
    Elementwise,
    Jacobian,
    Linear,
    MaxPooling,
    Normalize,
    Phases,
    Sigmoid,
    Softmax,
    WeightlessMap,
)
from keras_blur.layers.base import BlurLayer, SynapticLayer, activation_map, is_elementwise, seed_generators

Array = Any
Shape = tuple[Any, ...]

kl = keras.layers
_LINEAR = (
    kl.Flatten, kl.Reshape, kl.Permute, kl.RepeatVector, kl.Add, kl.Subtract, kl.Average, kl.Concatenate,
    kl.ZeroPadding1D, kl.ZeroPadding2D, kl.ZeroPadding3D, kl.Cropping1D, kl.Cropping2D, kl.Cropping3D,
    kl.UpSampling1D, kl.UpSampling2D, kl.UpSampling3D, kl.Resizing,
    kl.AveragePooling1D, kl.AveragePooling2D, kl.AveragePooling3D,
    kl.GlobalAveragePooling1D, kl.GlobalAveragePooling2D, kl.GlobalAveragePooling3D,
)  # fmt: skip
_MAX_POOLING = (kl.MaxPooling1D, kl.MaxPooling2D, kl.MaxPooling3D)
_ELEMENTWISE = (kl.ReLU, kl.LeakyReLU, kl.ELU)
_MIXING = (kl.Softmax, kl.UnitNormalization)  # normalise over features of an example
_MIXING_OPERATIONS = ("Softmax", "LogSoftmax", "Sparsemax", "Normalize")  # the same, of keras.ops
_DROPOUTS = (kl.Dropout, kl.SpatialDropout1D, kl.SpatialDropout2D, kl.SpatialDropout3D)
_TWINS = (
    "Dense", "Conv1D", "Conv2D", "Conv3D", "Conv2DTranspose", "DepthwiseConv1D", "DepthwiseConv2D", "SeparableConv2D",
    "EinsumDense", "Embedding", "BatchNormalization", "LayerNormalization", "GroupNormalization", "RMSNormalization",
    "MultiHeadAttention",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class _Connect:
    layer: SynapticLayer
    source: int
    activation: Activation | None


@dataclasses.dataclass(frozen=True, eq=False)
class _Map:
    map: WeightlessMap
    sources: tuple[int, ...]


def _is_function(one: _Map) -> bool:
    """Whether a map is a function of one array only, without random numbers or batch statistics."""
    return len(one.sources) == 1 and isinstance(one.map, (Linear, Jacobian))


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """A Keras operation before the first synapses.

    Attributes:
        operation: a layer or another operation.
        arguments: its positional and keyword arguments, with a `Tensor` in place of each array.
        results: numbers of its results.
    """

    operation: Any
    arguments: tuple[Any, Any]
    results: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Stands for an array in the arguments of an operation."""

    number: int


@dataclasses.dataclass(frozen=True, eq=False)
class Reading:
    """A network as read from Keras.

    Attributes:
        graph: the network, with every layer learning.
        layers: the layer of each set of synapses.
        preparations: the operations before the graph.
        entries: numbers of the prepared arrays that enter the graph.
        heads: the maps after each output.
        follows: layers with moving statistics, the maps that normalise by them, and the inputs of
            these maps.
        shapes: shape of the features of each layer of neurons.
    """

    graph: Graph
    layers: tuple[SynapticLayer, ...]
    preparations: tuple[Prepared, ...]
    entries: tuple[int, ...]
    heads: tuple[tuple[WeightlessMap, ...], ...]
    follows: tuple[tuple[Any, Any, int], ...]
    shapes: tuple[Shape, ...]

    def prepare(self, inputs: Sequence[Array], training: bool) -> list[Array]:
        """The arrays that enter the graph."""
        known: dict[int, Array] = dict(enumerate(inputs))
        for one in self.preparations:
            args, kwargs = keras.tree.map_structure(
                lambda value: known[value.number] if isinstance(value, Tensor) else value, one.arguments
            )
            if isinstance(one.operation, keras.Layer):  # layers inside it may take `training`
                kwargs = {**kwargs, "training": training}
            with _unrounded(one.operation):
                results = keras.tree.flatten(one.operation(*args, **kwargs))
            known.update(zip(one.results, results, strict=True))
        return [known[number] for number in self.entries]

    def learning(self, flags: Sequence[bool]) -> Graph:
        """The graph in which only the layers with a set flag learn."""
        operations = tuple(
            dataclasses.replace(one, learns=flags[one.holder]) if isinstance(one, Connect) else one
            for one in self.graph.operations
        )
        return dataclasses.replace(self.graph, operations=operations)

    def is_sigmoid(self, index: int, rule: Rule) -> bool:
        """Whether an output ends in the sigmoid of neurons that nothing else reads."""
        number = self.graph.outputs[index]
        one = self.graph.operations[number - len(self.graph.features)]
        if self.heads[index] or not isinstance(one, Connect) or self.graph.outputs.count(number) > 1:
            return False
        sources = (other.sources if isinstance(other, Pass) else (other.source,) for other in self.graph.operations)
        read = any(number in own for own in sources)
        return not read and (one.connection.activation or rule.last_activation) == "sigmoid"

    def at_logits(self, moved: Sequence[bool]) -> Reading:
        """The same network, in which the sigmoid of some outputs is a map after their neurons."""
        operations, heads, first = list(self.graph.operations), list(self.heads), len(self.graph.features)
        for index, chosen in enumerate(moved):
            place = self.graph.outputs[index] - first
            one = operations[place]
            if chosen and isinstance(one, Connect):
                linear = dataclasses.replace(one.connection, activation="linear")
                operations[place] = dataclasses.replace(one, connection=linear)
                heads[index] = (Sigmoid(self.shapes[self.graph.connects.index(one)]),)
        graph = dataclasses.replace(self.graph, operations=tuple(operations))
        return dataclasses.replace(self, graph=graph, heads=tuple(heads))


class Plan:
    """The plan under construction. Layers see it as `layers.base.Plan`."""

    def __init__(self) -> None:
        self._inputs: list[Shape] = []
        self._operations: dict[int, _Connect | _Map] = {}
        self._shapes: dict[int, Shape] = {}
        self._follows: list[tuple[Any, WeightlessMap, int]] = []

    def enter(self, shape: Shape) -> int:
        """Adds an input array of the graph."""
        number = -1 - len(self._inputs)
        self._inputs.append(shape)
        self._shapes[number] = tuple(shape)
        return number

    def connect(self, layer: SynapticLayer, value: int, activation: Activation | None) -> int:
        if not layer.built:
            layer.build((None, *self._shapes[value]))
        number = len(self._operations)
        self._operations[number] = _Connect(layer, value, activation)
        self._shapes[number] = tuple(layer.make_connection(self._shapes[value]).target(self._shapes[value]))
        return number

    def map(self, weightless: WeightlessMap, *values: int) -> int:
        number = len(self._operations)
        self._operations[number] = _Map(weightless, values)
        self._shapes[number] = tuple(weightless.target)
        return number

    def shape(self, value: int) -> Shape:
        return self._shapes[value]

    def follow(self, layer: Any, weightless: WeightlessMap, value: int) -> None:
        self._follows.append((layer, weightless, value))

    def _sources(self, number: int) -> tuple[int, ...]:
        one = self._operations[number]
        return (one.source,) if isinstance(one, _Connect) else one.sources

    def finished(
        self, outputs: Sequence[int], rule: Rule, groups: Callable[[Sequence[SynapticLayer]], Sequence[int]]
    ) -> tuple[Graph, tuple[SynapticLayer, ...], tuple[Any, ...], tuple[Any, ...], tuple[Shape, ...]]:
        """The graph, its layers, heads, moving statistics and the shapes of its neurons."""
        readers: dict[int, list[int]] = {}
        for number in self._operations:
            for source in self._sources(number):
                readers.setdefault(source, []).append(number)
        heads, fed = [], []
        for output in outputs:
            head: list[WeightlessMap] = []
            number = output
            while number >= 0 and isinstance(one := self._operations[number], _Map) and _is_function(one):
                if len(readers.get(number, ())) > (number != output):  # read by another operation as well
                    break
                head.insert(0, one.map)
                number = one.sources[0]
            if number >= 0 and isinstance(self._operations[number], _Map):
                head, number = [], output
            heads.append(tuple(head))
            fed.append(number)
        needed = self._ancestors(fed)
        if not any(isinstance(self._operations[number], _Connect) for number in needed):
            raise ValueError(
                "`outputs` must depend on a keras_blur layer, since nothing else learns with a genome. "
                "Received: other outputs"
            )
        first = len(self._inputs)
        builder = Builder([len(shape) for shape in self._inputs])
        places = {-1 - index: index for index in range(first)}
        layers: list[SynapticLayer] = []
        for number in needed:
            one = self._operations[number]
            if isinstance(one, _Map):
                places[number] = builder.map(one.map, *(places[source] for source in one.sources))
                continue
            if not any(one.layer is layer for layer in layers):
                layers.append(one.layer)
            activation = one.activation or ("linear" if self._is_taken_over(number, readers) else None)
            connection = dataclasses.replace(one.layer.connection_for(self._shapes[one.source]), activation=activation)
            places[number] = builder.connect(connection, places[one.source], key=id(one.layer))
        graph = builder.graph([places[number] for number in fed])
        graph = dataclasses.replace(graph, groups=tuple(groups(layers)))  # may raise, so it comes before layers change
        defaults: dict[int, str] = {}
        for made in reversed(graph.connects):  # a layer used twice takes the default of its first use
            taken_over = layers[made.holder].activation is None and made.connection.activation == "linear"
            of_rule = rule.last_activation if made.target in graph.last else rule.forward_activation
            defaults[made.holder] = "linear" if taken_over else of_rule
        for holder, (layer, feeds_back) in enumerate(zip(layers, graph.feeds_back, strict=True)):
            layer.join(rule, feeds_back=feeds_back, default=defaults[holder])
        follows = tuple((layer, one, places[value]) for layer, one, value in self._follows if value in places)
        shapes = tuple(self._shapes[number] for number in needed if isinstance(self._operations[number], _Connect))
        return graph, tuple(layers), tuple(heads), follows, shapes

    def _ancestors(self, outputs: Sequence[int]) -> list[int]:
        found, todo = set(), list(outputs)
        while todo:
            number = todo.pop()
            if number >= 0 and number not in found:
                found.add(number)
                todo.extend(self._sources(number))
        return sorted(found)

    def _is_taken_over(self, number: int, readers: Mapping[int, list[int]]) -> bool:
        """Whether a normalisation, activation or merging layer reads a layer, maybe behind a scale
        or a shift. The layer then has no default nonlinearity."""
        for reader in readers.get(number, ()):
            one = self._operations[reader]
            if isinstance(one, _Map):
                if len(one.sources) > 1 or isinstance(one.map, (Normalize, ActivationMap)):
                    return True
                if isinstance(one.map, _Affine) and self._is_taken_over(reader, readers):
                    return True
        return False


def read(network: keras.Model, rule: Rule, groups: Callable[[Sequence[SynapticLayer]], Sequence[int]]) -> Reading:
    """Reads a Functional or Sequential model of Keras.

    Args:
        network: the model, of keras_blur layers and layers without weights.
        rule: the rule whose synapses the layers will hold.
        groups: a function from the layers to the number of the genome's layer for each.

    Raises:
        ValueError: if a layer cannot learn with a genome.
    """
    plan = Plan()
    prepared: dict[int, int] = {}  # id of a Keras tensor: number of a prepared array
    values: dict[int, int] = {}  # id of a Keras tensor: number of a value
    entries: list[int] = []
    entered: dict[int, int] = {}
    preparations: list[Prepared] = []
    count = len(network.inputs)
    for number, tensor in enumerate(network.inputs):
        prepared[id(tensor)] = number

    def value_of(tensor: Any) -> int:
        if id(tensor) in values:
            return values[id(tensor)]
        number = prepared[id(tensor)]
        if number not in entered:
            shape = tuple(tensor.shape[1:])
            if None in shape:
                raise ValueError(
                    "`inputs` must have a known size on every axis but the first, since a plan has static shapes. "
                    f"Received shape {tuple(tensor.shape)}"
                )
            entered[number] = plan.enter(shape)
            entries.append(number)
        return entered[number]

    def walk(model: Any) -> None:
        nonlocal count
        for node in nodes_of(model):
            operation, tensors = node.operation, node.arguments.keras_tensors
            outputs = keras.tree.flatten(node.outputs)
            inner = functional_of(operation)
            if inner is not None:
                _check_masks(operation, tensors)
                for outside, inside in zip(entering(inner, node), inner.inputs, strict=True):
                    place = values if id(outside) in values else prepared
                    place[id(inside)] = place[id(outside)]
                    (prepared if place is values else values).pop(id(inside), None)
                walk(inner)
                _check_masks(operation, inner.outputs)
                for outside, inside in zip(outputs, keras.tree.flatten(inner.outputs), strict=True):
                    place = values if id(inside) in values else prepared
                    place[id(outside)] = place[id(inside)]
                continue
            if isinstance(operation, BlurLayer):
                given = _arguments_of(operation, node)
                _check_call(operation, given)
                _check_masks(operation, tensors)
                keywords = {name: value for name, value in given.items() if not _is_tensor(value)}
                result = operation.trace(plan, *(value_of(one) for one in given.values() if _is_tensor(one)), **keywords)
                values[id(outputs[0])] = result
                continue
            check_weightless(operation)
            if all(id(tensor) in prepared and id(tensor) not in values for tensor in tensors):
                numbers = tuple(range(count, count + len(outputs)))
                count += len(outputs)
                arguments = keras.tree.map_structure(
                    lambda value: Tensor(prepared[id(value)]) if _is_tensor(value) else value,
                    (list(node.arguments.args), dict(node.arguments.kwargs)),
                )
                preparations.append(Prepared(operation, arguments, numbers))
                for tensor, number in zip(outputs, numbers, strict=True):
                    prepared[id(tensor)] = number
                    values.pop(id(tensor), None)
                continue
            if len(outputs) != 1:
                raise ValueError(
                    f"Layer {operation.name!r} must have one output, since it comes after a layer with synapses. "
                    f"Received: {len(outputs)}"
                )
            if _uses_masks(operation):
                _check_masks(operation, tensors)
            sources = [value_of(tensor) for tensor in tensors]
            shapes = [plan.shape(source) for source in sources]
            values[id(outputs[0])] = plan.map(_map_of(operation, node, shapes, tuple(outputs[0].shape[1:])), *sources)

    walk(network)
    _check_masks(network, network.outputs)
    for tensor in network.outputs:
        if len(tensor.shape) < 2:
            raise ValueError(f"`outputs` must have axes of features after the batch. Received shape {tuple(tensor.shape)}")
    outputs = [values[id(tensor)] for tensor in network.outputs if id(tensor) in values]
    if len(outputs) < len(network.outputs):
        raise ValueError(
            "`outputs` must depend on a keras_blur layer, since nothing else learns with a genome. Received: other outputs"
        )
    graph, layers, heads, follows, shapes = plan.finished(outputs, rule, groups)
    return Reading(graph, layers, tuple(preparations), tuple(entries), heads, follows, shapes)


def nodes_of(model: Any) -> list[Any]:
    """The calls of a Functional model in topological order."""
    by_depth = model._nodes_by_depth
    return [node for depth in sorted(by_depth, reverse=True) for node in by_depth[depth] if not node.is_input]


def functional_of(operation: Any) -> Any:
    """The Functional model that a nested model is, or `None` for a layer and for a model with a
    `call` of its own."""
    if not calls_as_keras(operation):
        return None
    if isinstance(operation, keras.Sequential):
        return operation._functional
    return operation if isinstance(operation, keras.Model) and hasattr(operation, "_nodes_by_depth") else None


def calls_as_keras(layer: Any) -> bool:
    """Whether a layer's `call` is one that Keras defines."""
    return getattr(type(layer).call, "__module__", "").startswith("keras.")


def entering(inner: Any, node: Any) -> list[Any]:
    """The tensors with which a nested model is called, in the order of its inputs."""
    given = next(iter(_arguments_of(inner, node).values()))
    if isinstance(given, Mapping) and not isinstance(inner._inputs_struct, Mapping):
        return [given[tensor.name] for tensor in inner.inputs]
    return list(keras.tree.flatten(given))


def _arguments_of(operation: Any, node: Any) -> dict[str, Any]:
    """The arguments of a layer's call by name, in the order of its signature. Keras's own list of
    tensors has keywords in alphabetical order."""
    signature, keywords = inspect.signature(operation.call), dict(node.arguments.kwargs)
    if "training" not in signature.parameters:  # every layer of Keras may be called with it
        keywords.pop("training", None)
    return dict(signature.bind(*node.arguments.args, **keywords).arguments)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, keras.KerasTensor)


def _check_call(layer: BlurLayer, given: Mapping[str, Any]) -> None:
    """Raises a `ValueError` if a layer has a call of its own, or arguments that a plan does not
    support."""
    own = {name: getattr(type(layer), name).__module__.startswith("keras_blur.") for name in ("call", "trace")}
    if own["trace"] and not own["call"]:
        raise ValueError(
            f"Layer {layer.name!r} must not have a `call` of its own, since a model reads what the layer does from its "
            f"`trace`. Received: {type(layer).__name__}"
        )
    first = next(iter(given))
    for name, value in given.items():
        known = (first, "key", "value", "query", "training", "use_causal_mask")
        if value is not None and value is not False and name not in known:
            raise ValueError(
                f"`{name}` in the call of layer {layer.name!r} must be left out, since the layer does not take it. "
                f"Received: {name}={value!r}"
            )


def _uses_masks(operation: Any) -> bool:
    """Whether Keras fills an argument of a call with the mask of another."""
    names = inspect.signature(operation.call).parameters if isinstance(operation, keras.Layer) else ()
    return any(name.rpartition("_")[2] == "mask" for name in names)


def _check_masks(operation: Any, tensors: Sequence[Any]) -> None:
    """Raises a `ValueError` if a tensor carries a mask, which Keras would use or pass on."""
    if any(getattr(tensor, "_keras_mask", None) is not None for tensor in tensors):
        raise ValueError(
            f"Layer {operation.name!r} must not read a mask that another layer makes, since layers with synapses pass none "
            "on: give the examples to leave out a sample weight of 0. Received: a tensor with a mask"
        )


def check_weightless(layer: Any) -> None:
    """Raises a `ValueError` if an operation without synapses has weights or a penalty, or makes a
    mask."""
    if not isinstance(layer, keras.Layer):
        return
    if layer.activity_regularizer is not None or isinstance(layer, kl.ActivityRegularization):
        raise ValueError(
            f"Layer {layer.name!r} must have no `activity_regularizer`, since a genome learns from the loss of "
            f"`compile` alone. Received: {layer.activity_regularizer!r}"
        )
    if isinstance(layer, kl.Masking):
        raise ValueError(
            f"Layer {layer.name!r} (Masking) makes a mask, which layers with synapses do not pass on: give the examples "
            "to leave out a sample weight of 0."
        )
    if isinstance(layer, keras.Model) and not calls_as_keras(layer):
        raise ValueError(
            f"Layer {layer.name!r} must be a keras.Sequential or a Functional keras.Model, since a `call` of its own has no "
            f"graph to read. Received: {type(layer).__name__}"
        )
    kind = type(layer).__name__
    twin = kind if kind in _TWINS and type(layer) is getattr(kl, kind) else None
    if isinstance(layer, kl.Normalization):
        return
    if layer.weights or twin or isinstance(layer, (keras.Model, kl.RNN)):
        use = (
            f"Use keras_blur.layers.{twin} in its place, or keras_blur.convert(model, genome) for a whole model."
            if twin
            else "Use a keras_blur layer, or apply that layer to the data beforehand."
        )
        raise ValueError(f"Layer {layer.name!r} ({kind}) has weights of its own, which no genome would update. {use}")


def _map_of(layer: Any, node: Any, shapes: Sequence[Shape], target: Shape) -> WeightlessMap:
    """The map of an operation without weights."""
    kind = type(layer)
    if kind in (kl.Identity,):
        return Linear(lambda x: x, shapes, target)
    if kind in _DROPOUTS:
        return Dropout(shapes[0], layer.rate, _noise_shape(layer, shapes[0]), lambda: layer.seed_generator.next())
    function = _function_of(layer, node)
    in_training = _function_of(layer, node, training=True) if _acts_in_training(layer) else function
    if isinstance(layer, keras.Layer) and (seed_generators(layer) or _draws(layer, in_training, shapes)):
        raise ValueError(
            f"Layer {layer.name!r} ({kind.__name__}) must not draw random numbers after a layer with synapses, where its "
            "Jacobian is needed. Use keras.layers.Dropout, or put it before the first layer with synapses."
        )
    if in_training is not function:
        function = _function_of(layer, node, training=False)
        return Phases(Jacobian(in_training, shapes, target), Jacobian(function, shapes, target))
    masked = isinstance(layer, keras.Layer) and _arguments_of(layer, node).get("mask") is not None
    if kind in _MAX_POOLING:
        size = tuple(layer.pool_size)
        strides = size if layer.strides is None else tuple(layer.strides)
        first = layer.data_format == "channels_first"
        return MaxPooling(function, shapes[0], target, size, strides, layer.padding, first)
    linear = (kind in _LINEAR and not masked) or kind.__name__ == "Resize"  # the operation behind keras.ops.image.resize
    if linear and not (getattr(layer, "pad_to_aspect_ratio", False) and layer.fill_value):
        return Linear(function, shapes, target)
    if kind is kl.Activation:
        return activation_map(layer.activation, shapes[0])
    name = "" if isinstance(layer, keras.Layer) else kind.__name__  # of an operation
    if (kind is kl.Softmax or name == "Softmax") and layer.axis in (-1, len(target)) and not masked:
        return Softmax(shapes[0])
    if name == "Sigmoid":
        return Sigmoid(shapes[0])
    if kind in _MIXING or name in _MIXING_OPERATIONS:
        return ActivationMap(function, shapes, target)
    if kind not in _ELEMENTWISE and not (
        shapes == [target] and inspect.unwrap(is_elementwise)(function)
    ):  # a cache would keep the model
        return Jacobian(function, shapes, target)
    return (_Affine if _is_affine(function) else Elementwise)(function, shapes, target)


class _Affine(Jacobian):
    """A scale or a shift of each entry, which is no activation by itself."""


def _is_affine(function: Callable[[Array], Array]) -> bool:
    """Whether an elementwise function is a line, by a test on sample values."""
    points = np.array([[0.0, 1.0, -1e3, -7.0, -3.0, -1.0, -0.3, 0.3, 3.0, 7.0, 1e3]], np.float32)
    found = np.asarray(keras.ops.cast(function(keras.ops.array(points)), "float32"))
    if not np.isfinite(found).all():
        return False
    line = found[0, 0] + (found[0, 1] - found[0, 0]) * points
    return np.allclose(found, line, rtol=1e-4, atol=1e-4)


def _noise_shape(layer: Any, source: Shape) -> tuple[int | None, ...]:
    if type(layer) is not kl.Dropout:
        whole = (1,) * (len(source) - 1)
        return (None, None, *whole) if getattr(layer, "data_format", "") == "channels_first" else (None, *whole, None)
    return tuple(layer.noise_shape or (None,) * (len(source) + 1))


def _acts_in_training(layer: Any) -> bool:
    """Whether a layer may compute something else in training. Layers of Keras without random
    numbers do not."""
    if not isinstance(layer, keras.Layer):
        return False
    functions = [
        one.function if isinstance(one, kl.Lambda) else one.call
        for one in layer._flatten_layers()
        if isinstance(one, kl.Lambda) or not calls_as_keras(one)
    ]
    return any("training" in inspect.signature(function).parameters for function in functions)


def _draws(layer: keras.Layer, function: Callable[..., Array], shapes: Sequence[Shape]) -> bool:
    """Whether a layer that is not Keras's own gives two results for the same arrays."""
    if all(calls_as_keras(one) and not isinstance(one, kl.Lambda) for one in layer._flatten_layers()):
        return False
    rng = np.random.default_rng(0)
    arrays = [keras.ops.convert_to_tensor(rng.standard_normal((2, *shape)), layer.compute_dtype) for shape in shapes]
    try:
        first, second = (np.asarray(keras.ops.cast(function(*arrays), "float32")) for _ in range(2))
    except Exception:  # a layer of one batch size, for instance
        return False
    return not np.allclose(first, second, rtol=1e-4, atol=1e-6, equal_nan=True)


def _function_of(operation: Any, node: Any, **phase: bool) -> Callable[..., Array]:
    """An operation as a function of its arrays, with its other arguments and `training` fixed.

    States are floating-point numbers: integers and booleans become such for the operation alone.
    """
    template = (list(node.arguments.args), {**node.arguments.kwargs, **phase})
    if not phase:
        template[1].pop("training", None)
    order = {id(tensor): place for place, tensor in enumerate(node.arguments.keras_tensors)}

    def function(*arrays: Array) -> Array:
        def given(value: Any) -> Any:
            if not _is_tensor(value):
                return value
            array = arrays[order[id(value)]]
            return array if keras.backend.is_float_dtype(value.dtype) else keras.ops.cast(array, value.dtype)

        args, kwargs = keras.tree.map_structure(given, template)
        with _unrounded(operation):
            return operation(*args, **kwargs)

    return function


@contextlib.contextmanager
def _unrounded(operation: Any) -> Iterator[None]:
    """Layers compute in the type of their variables here. A mixed policy rounds the factors of
    products, and layers without weights have none."""
    layers = operation._flatten_layers() if isinstance(operation, keras.Layer) else ()
    before = [(one, one._dtype_policy) for one in layers if one.compute_dtype != one.variable_dtype]
    for one, _ in before:
        one._dtype_policy = keras.DTypePolicy(one.variable_dtype)
    try:
        yield
    finally:
        for one, policy in before:
            one._dtype_policy = policy
