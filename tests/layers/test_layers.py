"""Every layer next to its Keras twin: arguments, output, config, the map that it is, and
learning."""

import dataclasses
import inspect
import json
from typing import Any

import keras
import numpy as np
import pytest
from descent import ROUNDING, assert_descends, randomized
from on_backend import JAX

import keras_blur as kb
from keras_blur.core.derivatives import vjp
from keras_blur.models.convert import _pairs

VALUE_DIM = 3 if JAX else 2  # Keras's own attention on JAX takes only values as wide as the keys


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer of the table: its kind, its arguments and the shape of what enters."""

    kind: str
    shape: tuple[int, ...]
    options: dict[str, Any]
    calls: dict[str, Any] = dataclasses.field(default_factory=dict)
    entries: int = 0

    def twin(self, **options):
        return getattr(keras.layers, self.kind)(**{**self.options, **options})

    def layer(self, **options):
        return getattr(kb.layers, self.kind)(**{**self.options, **options})

    def inputs(self, batch=3, seed=0):
        rng = np.random.default_rng(seed)
        if self.entries:
            return rng.integers(0, self.entries, (batch, *self.shape))
        return rng.standard_normal((batch, *self.shape))

    def call(self, layer, x):
        return layer(x, x, **self.calls) if self.kind == "MultiHeadAttention" else layer(x, **self.calls)


def case(kind, shape, /, calls=None, entries=0, **options):
    return Case(kind, shape, options, calls or {}, entries)


TABLE = {
    "dense": case("Dense", (5,), units=4, activation="tanh"),
    "dense rank 3": case("Dense", (3, 5), units=4, use_bias=False),
    "dense rank 4": case("Dense", (2, 3, 5), units=2, activation="gelu"),
    "einsum": case("EinsumDense", (4,), equation="ab,bc->ac", output_shape=3, bias_axes="c", activation="relu"),
    "einsum heads": case("EinsumDense", (3, 4), equation="abc,cde->abde", output_shape=(3, 2, 3), bias_axes="de"),
    "einsum joins": case("EinsumDense", (3, 2, 4), equation="abcd,cde->abe", output_shape=(3, 5), bias_axes="e"),
    "einsum own": case("EinsumDense", (3, 4), equation="abc,bcd->abd", output_shape=(3, 2)),
    "einsum dots": case("EinsumDense", (3, 4), equation="...x,xy->...y", output_shape=2, bias_axes="y"),
    "einsum dots behind": case("EinsumDense", (4, 3), equation="ab...,bc->ac...", output_shape=2, bias_axes="c"),
    "einsum adds": case("EinsumDense", (3, 4), equation="abc,cd->ad", output_shape=2, bias_axes="d"),
    "embedding": case("Embedding", (4,), entries=6, input_dim=6, output_dim=3),
    "conv1d": case("Conv1D", (7, 3), filters=4, kernel_size=3, strides=2, padding="same", activation="tanh"),
    "conv1d causal": case("Conv1D", (7, 2), filters=3, kernel_size=3, dilation_rate=2, padding="causal"),
    "conv2d": case("Conv2D", (5, 6, 3), filters=4, kernel_size=(3, 2)),
    "conv2d same": case("Conv2D", (5, 6, 2), filters=3, kernel_size=3, strides=(2, 1), padding="same", activation="relu"),
    "conv2d dilated": case("Conv2D", (7, 6, 2), filters=3, kernel_size=2, dilation_rate=(3, 2), use_bias=False),
    "conv2d groups": case("Conv2D", (4, 5, 4), filters=6, kernel_size=2, groups=2, padding="same"),
    "conv3d": case("Conv3D", (3, 4, 3, 2), filters=3, kernel_size=2, strides=(1, 2, 1), padding="same"),
    "transpose": case("Conv2DTranspose", (3, 4, 2), filters=3, kernel_size=3, strides=2, padding="same"),
    "transpose padded": case(
        "Conv2DTranspose", (3, 4, 2), filters=3, kernel_size=3, strides=2, padding="valid", output_padding=1
    ),
    "transpose wide": case("Conv2DTranspose", (3, 3, 2), filters=2, kernel_size=(4, 2), strides=(2, 3), activation="tanh"),
    "depthwise1d": case("DepthwiseConv1D", (6, 3), kernel_size=3, depth_multiplier=2, padding="same"),
    "depthwise2d": case("DepthwiseConv2D", (5, 4, 3), kernel_size=2, depth_multiplier=2, activation="tanh"),
    "depthwise2d strides": case("DepthwiseConv2D", (5, 5, 2), kernel_size=3, strides=2, padding="same", use_bias=False),
    "separable": case("SeparableConv2D", (4, 5, 3), filters=4, kernel_size=3, padding="same", depth_multiplier=2),
    "batch norm": case("BatchNormalization", (3, 4)),
    "batch norm axis": case("BatchNormalization", (3, 4), axis=1, scale=False, momentum=0.8),
    "layer norm": case("LayerNormalization", (3, 4)),
    "layer norm axes": case("LayerNormalization", (3, 4), axis=(1, 2), center=False),
    "group norm": case("GroupNormalization", (3, 3, 4), groups=2),
    "group norm each": case("GroupNormalization", (4, 3), groups=-1, axis=1),
    "rms norm": case("RMSNormalization", (3, 4)),
    "attention": case("MultiHeadAttention", (4, 5), num_heads=2, key_dim=3),
    "attention causal": case(
        "MultiHeadAttention", (4, 5), {"use_causal_mask": True}, num_heads=2, key_dim=3, value_dim=VALUE_DIM, output_shape=6
    ),
    "attention plain": case("MultiHeadAttention", (4, 5), num_heads=1, key_dim=3, use_bias=False),
}  # fmt: skip
# TensorFlow has no such convolution of its own on the CPU, so these have no twin here.
CHANNELS_FIRST = {
    "conv2d first": case("Conv2D", (2, 4, 5), filters=3, kernel_size=2, padding="same", data_format="channels_first"),
    "depthwise first": case("DepthwiseConv2D", (2, 4, 4), kernel_size=2, strides=2, data_format="channels_first"),
    "transpose first": case("Conv2DTranspose", (2, 3, 4), filters=3, kernel_size=2, data_format="channels_first"),
}
ALL = TABLE | CHANNELS_FIRST
CONNECTIONS = [name for name, one in ALL.items() if one.kind not in ("SeparableConv2D", "MultiHeadAttention")]
LEFT_OUT = {
    "lora_rank", "lora_alpha", "quantization_config", "gptq_unpacked_column_size", "renorm", "renorm_clipping",
    "renorm_momentum", "weights", "attention_axes", "sliding_window", "flash_attention", "use_gate",
}  # fmt: skip


def built(name):
    """The case, its Keras layer with random weights, a model of its twin alone, and the twin."""
    one = TABLE[name]
    entry = keras.Input(one.shape, dtype="int32" if one.entries else None)
    plain = one.twin()
    network = randomized(keras.Model(entry, one.call(plain, entry)))
    model = kb.convert(network, kb.genomes.backprop(last_activation="linear"))
    (layer,) = (layer for layer in model.layers if type(layer).__name__ == one.kind)
    return one, plain, model, layer


def test_the_table_has_every_layer():
    assert {one.kind for one in TABLE.values()} == set(kb.layers.__all__)


@pytest.mark.parametrize("kind", kb.layers.__all__)
def test_signature_is_that_of_keras(kind):
    ours = inspect.signature(getattr(kb.layers, kind).__init__).parameters
    theirs = inspect.signature(getattr(keras.layers, kind).__init__).parameters
    missing = [name for name in theirs if name not in ours]
    assert set(missing) <= LEFT_OUT
    assert [name for name in ours if name not in theirs] in ([], ["backward_initializer"])
    shared = [name for name in theirs if name in ours]
    assert [name for name in ours if name in theirs] == shared
    by_place = [name for name, one in ours.items() if one.kind is one.POSITIONAL_OR_KEYWORD and name in theirs]
    assert by_place == list(theirs)[: len(by_place)]  # nothing left out before an argument that can go by its place
    for name in shared:
        assert ours[name].kind in (theirs[name].kind, inspect.Parameter.KEYWORD_ONLY)
        default = theirs[name].default
        if isinstance(default, tuple) and set(default) == {1}:
            default = (1, default)
            assert ours[name].default in default
        else:
            assert ours[name].default == default


@pytest.mark.parametrize("name", TABLE)
def test_output_is_that_of_keras(name, float64):
    one, plain, model, layer = built(name)
    x = one.inputs(batch=5, seed=1)
    wanted = np.array(one.call(plain, x))
    near = max(1e-12, ROUNDING)
    np.testing.assert_allclose(model(x), wanted, rtol=near, atol=near)
    np.testing.assert_allclose(one.call(layer, x), wanted, rtol=near, atol=near)
    shapes = [(5, *one.shape)] * (2 if one.kind == "MultiHeadAttention" else 1)
    assert tuple(layer.compute_output_shape(*shapes)) == wanted.shape


@pytest.mark.parametrize("name", TABLE)
def test_config_round_trip(name):
    one = TABLE[name]
    x, layer = one.inputs(), one.layer()
    y = one.call(layer, x)
    config = layer.get_config()
    clone = type(layer).from_config(json.loads(json.dumps(config)))
    assert clone.get_config() == config
    one.call(clone, x)
    clone.set_weights(layer.get_weights())
    np.testing.assert_array_equal(one.call(clone, x), y)


@pytest.mark.parametrize("name", TABLE)
def test_initial_weights_of_one_seed_are_those_of_keras(name):
    one = TABLE[name]
    arguments = inspect.signature(getattr(keras.layers, one.kind).__init__).parameters
    named = [name for name in arguments if name.endswith("_initializer") and "moving" not in name]
    layers = []
    for make in (one.twin, one.layer):
        drawn = {name: keras.initializers.HeNormal(seed=3 + place) for place, name in enumerate(named)}
        layers.append(make(**drawn))
        one.call(layers[-1], one.inputs())
        for name, initializer in drawn.items():
            config = keras.saving.serialize_keras_object(initializer)
            assert layers[-1].get_config()[name] == config
    for part, *theirs in _pairs(*layers):
        for name, wanted in zip(("kernel", "bias"), theirs, strict=True):
            own = part.synapses.get(name)
            assert (own is None) == (wanted is None)
            if own is not None:
                np.testing.assert_array_equal(np.reshape(own, wanted.shape), wanted)


@pytest.mark.parametrize("name", ["einsum heads", "einsum joins"])
@pytest.mark.parametrize("seed", [None, 7, keras.random.SeedGenerator])
def test_kernels_of_all_channels_have_the_size_of_the_first(name, seed):
    one = TABLE[name]
    made = keras.initializers.GlorotUniform(seed(7) if callable(seed) else seed)
    layer = one.layer(kernel_initializer=made, output_shape=(None, *(64,) * (len(one.options["bias_axes"]))))
    entry = keras.Input(one.shape)
    value = keras.layers.Flatten()(layer(kb.layers.Dense(one.shape[-1])(entry)))
    kb.Model(entry, value, genome=kb.Genome.random(kb.Rule(states=3), seed=0))
    inputs, outputs = (np.prod([layer.kernel.shape[1 + axis] for axis in axes]) for axes in layer.connection.unit_axes)
    kernels = [*np.array(layer.kernel), *np.array(layer.backward_kernel)]
    for place, kernel in enumerate(kernels):
        assert kernel.std() == pytest.approx(np.sqrt(2 / (inputs + outputs)), rel=0.1)
        assert all(np.abs(kernel - other).max() > 1e-3 for other in kernels[:place])


def connection_of(name, leading=(), channels=1):
    """A connection, the shape of what enters, and a kernel."""
    one = ALL[name]
    layer = one.layer()
    source = one.shape
    connection = layer.make_connection(source)
    shape = (*leading, channels, *connection.kernel_shape(source))
    return connection, source, np.random.default_rng(1).standard_normal(shape)


def states_of(name, leading, states, batch, shape, seed):
    rng = np.random.default_rng(seed)
    entries = ALL[name].entries if seed == 2 else 0
    size = (*leading, states, batch, *shape)
    return rng.integers(0, entries, size) if entries else rng.standard_normal(size)


LEADING = [((), 1, 1), ((), 1, 3), ((), 3, 3), ((), 3, 1), ((2,), 1, 3), ((2, 2), 2, 2)]


@pytest.mark.parametrize(
    ("name", "leading", "channels", "states"),
    # Keras compiles a grouped convolution at each call, which takes seconds.
    [(name, *one) for name in CONNECTIONS for one in (LEADING if name != "conv2d groups" else LEADING[2::3])],
)
def test_transpose_is_the_adjoint_and_outer_the_derivative(name, leading, channels, states, float64):
    connection, source, kernel = connection_of(name, leading, channels)
    wide = max(channels, states)
    x = keras.ops.convert_to_tensor(states_of(name, leading, states, 2, source, 2))
    y = keras.ops.convert_to_tensor(states_of(name, leading, wide, 2, connection.target(source), 3))
    kernel = keras.ops.convert_to_tensor(kernel)
    z = connection.linear(kernel, x)
    assert tuple(z.shape) == tuple(y.shape)
    axes = tuple(range(len(leading) + 1, len(y.shape)))
    if not ALL[name].entries:  # numbers of an embedding have no derivative
        back = connection.linear_transpose(kernel, y, source)
        if states == wide:
            assert tuple(back.shape) == tuple(x.shape)
        around = tuple(range(len(leading) + 1, len(x.shape)))
        np.testing.assert_allclose(np.sum(z * y, axes), np.sum(x * back, around), rtol=1e-9, atol=1e-9)
    if states in (1, wide):  # a kernel for each state of y
        each = keras.ops.broadcast_to(kernel, (*leading, wide, *kernel.shape[len(leading) + 1 :]))
        _, pull = vjp(lambda kernel: connection.linear(kernel, x), each)
        outer = connection.outer(x, y, source)
        np.testing.assert_allclose(outer, pull(y)[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CONNECTIONS)
def test_rows_and_matrix_are_inverted(name, float64):
    connection, source, kernel = connection_of(name, (2,), 3)
    y = states_of(name, (2,), 3, 4, connection.target(source), 3)
    rows = connection.rows(keras.ops.convert_to_tensor(y))
    assert tuple(rows.shape) == (2, 3, 4 * connection.positions_of(source), connection.units)
    np.testing.assert_array_equal(connection.features(rows, source), y)
    matrix = connection.matrix(keras.ops.convert_to_tensor(kernel))
    assert matrix.shape[-1] == connection.units
    np.testing.assert_array_equal(connection.kernel(matrix, kernel), kernel)


@pytest.mark.parametrize("name", TABLE)
def test_learning_is_gradient_descent(name, float64):
    one = TABLE[name]
    x = one.inputs(batch=6)
    entry = keras.Input(one.shape, dtype="int32" if one.entries else None)
    value = entry
    if not one.entries:  # so that feedback goes through the layer
        value = keras.layers.Dense(one.shape[-1], "tanh", name="before")(value)
    value = one.call(one.twin(name="inner"), value)
    value = keras.layers.Activation("tanh")(value)
    twin = randomized(keras.Model(entry, keras.layers.Dense(2, name="after")(keras.layers.Flatten()(value))))
    y = np.random.default_rng(5).standard_normal((6, 2))
    assert_descends(twin, x, y, still={"inner/key/bias"})  # a softmax does not see that bias


@pytest.mark.parametrize("name", CHANNELS_FIRST)
def test_channels_first_is_channels_last_on_moved_axes(name, float64):
    one = CHANNELS_FIRST[name]
    x, y = one.inputs(batch=6), np.random.default_rng(5).standard_normal((6, 2))
    models = []
    for data_format in ("channels_first", "channels_last"):
        keras.utils.set_random_seed(0)
        entry = keras.Input(one.shape)
        before, after = keras.layers.Permute((2, 3, 1)), keras.layers.Permute((3, 1, 2))
        first = data_format == "channels_first"
        inner = one.layer(data_format=data_format)
        value = keras.layers.Reshape(one.shape)(kb.layers.Dense(int(np.prod(one.shape)))(keras.layers.Flatten()(entry)))
        value = inner(value) if first else after(inner(before(value)))
        model = kb.Model(entry, kb.layers.Dense(2)(keras.layers.Flatten()(value)), genome=kb.genomes.backprop(0.125))
        model.compile(loss="mean_squared_error", jit_compile=False)
        for _ in range(3):
            model.train_on_batch(x, y)
        models.append(model)
    for found, wanted in zip(*(model.get_weights() for model in models), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)
    moved, last = (model.layers[3 if place == 0 else 4] for place, model in enumerate(models))
    assert type(moved) is type(last)
    np.testing.assert_allclose(moved(x), np.moveaxis(last(np.moveaxis(x, 1, -1)), -1, 1), rtol=1e-9, atol=1e-12)


def test_mistakes_about_normalisation():
    for groups in (0, -2, 1.5):
        with pytest.raises(ValueError, match="`groups` must be a positive integer"):
            kb.layers.GroupNormalization(groups)
    for name in ("gamma_initializer", "beta_constraint"):
        with pytest.raises(ValueError, match=f"keras_blur's RMSNormalization has no argument `{name}`"):
            kb.layers.RMSNormalization(**{name: None})


@pytest.mark.parametrize("axis", [2, -3])
def test_an_axis_that_is_not_there_is_refused(axis):
    with pytest.raises(ValueError, match=r"`axis` of layer .* must be axes of features"):
        kb.layers.BatchNormalization(axis=axis)(np.ones((2, 3), "float32"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_shape": (7, 4)}, "must have size 7 for|must have size 5 for the axis 'b'"),
        ({"equation": "abc,cd->abd", "output_shape": (None, None)}, "must have a size for the axis 'd'"),
        ({"equation": "abc,cdz->abd", "output_shape": (None, 4)}, "each letter of the kernel .* but 'z' is in neither"),
        ({"equation": "abc,cd", "output_shape": 4}, "`equation` must have the form 'input,kernel->output'"),
    ],
)
def test_sizes_of_an_einsum_are_compared(options, message):
    layer = kb.layers.EinsumDense(**{"equation": "abc,cd->abd", **options})
    with pytest.raises(ValueError, match=message):
        layer(np.ones((2, 5, 3), "float32"))


def test_attention_has_one_output_size():
    assert kb.layers.MultiHeadAttention(2, 3, output_shape=(4,)).size == 4
    with pytest.raises(ValueError, match="`output_shape` must be one size"):
        kb.layers.MultiHeadAttention(2, 3, output_shape=(4, 8))


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float16"], indirect=True)
@pytest.mark.parametrize("kind", ["BatchNormalization", "LayerNormalization", "RMSNormalization"])
def test_statistics_are_in_float32_in_a_keras_model(kind, policy):
    x = 600.0 * np.random.default_rng(0).standard_normal((8, 4))
    entry = keras.Input((4,))
    ours = keras.Model(entry, getattr(kb.layers, kind)()(entry))
    theirs = keras.Model(entry, getattr(keras.layers, kind)()(entry))
    for training in (False, True):
        mine, wanted = (np.array(keras.ops.cast(one(x, training=training), "float32")) for one in (ours, theirs))
        np.testing.assert_allclose(mine, wanted, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_large_indices_are_not_rounded(policy):
    layer, rows = kb.layers.Embedding(3000, 2, dtype=policy), np.array([[257, 2049]])
    found = np.array(keras.ops.cast(layer(rows.astype("float32")), "float32"))
    np.testing.assert_array_equal(found, np.array(keras.ops.cast(layer(rows), "float32")))
    assert found.std() > 0.0
