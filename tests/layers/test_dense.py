"""`keras_blur.layers.Dense` as a Keras layer, next to `keras.layers.Dense`, and the pure operations
of its connection."""

import itertools
import re

import keras
import numpy as np
import pytest
from keras import ops
from layer_harness import run_layer_test
from on_backend import slopes

from keras_blur import Genome, Rule, Sequential
from keras_blur.core.connections.dense import DenseConnection
from keras_blur.core.rule import ACTIVATIONS
from keras_blur.layers import Dense

REFERENCE = {
    None: lambda z: z,
    "linear": lambda z: z,
    "tanh": np.tanh,
    "relu": lambda z: np.maximum(z, 0.0),
    "relu_tanh": lambda z: np.maximum(np.tanh(z), 0.0),
    "sigmoid": lambda z: 1.0 / (1.0 + np.exp(-z)),
}
DIRECTIONS = ("untied", "tied", "tied_updates", "fixed", "signs")
CHANNELS = ("own", "tied", "tied_updates")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


@pytest.mark.parametrize(
    ("kwargs", "shape", "output", "weights"),
    [
        ({"units": 3}, (4, 5), (4, 3), 2),
        ({"units": 3, "name": "own_name"}, (2, 6, 5), (2, 6, 3), 2),
        ({"units": 1, "activation": "tanh"}, (2, 3, 4, 5), (2, 3, 4, 1), 2),
        ({"units": 7, "use_bias": False}, (1, 2), (1, 7), 1),
        ({"units": 3, "use_bias": False, "activation": "relu"}, (2, 6, 5), (2, 6, 3), 1),
        (
            {
                "units": 3,
                "kernel_initializer": "he_normal",
                "bias_initializer": "ones",
                "backward_initializer": keras.initializers.RandomNormal(stddev=0.1, seed=1),
                "trainable": False,
            },
            (4, 5),
            (4, 3),
            2,
        ),
        *(({"units": 4, "activation": name}, (3, 2), (3, 4), 2) for name in ACTIVATIONS),
    ],
)
def test_harness(kwargs, shape, output, weights, tmp_path):
    run_layer_test(Dense, kwargs, shape, output, weights, tmp_path)


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_prediction_in_a_keras_model_is_that_of_keras(activation):
    x, kernel, bias = normal(6, 5), normal(5, 3, seed=1), normal(3, seed=2)
    twin_activation = (lambda z: keras.ops.relu(keras.ops.tanh(z))) if activation == "relu_tanh" else activation
    twin = keras.Sequential([keras.Input((5,)), keras.layers.Dense(3, twin_activation)])
    twin.set_weights([kernel, bias])
    ours = keras.Sequential([keras.Input((5,)), Dense(3, activation)])
    ours.set_weights([kernel[None], bias[None, None]])
    result = ours.predict(x, verbose=0)
    np.testing.assert_allclose(result, twin.predict(x, verbose=0), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(result, REFERENCE[activation](x @ kernel + bias), rtol=1e-5, atol=1e-6)


def test_a_keras_model_trains_it_by_gradients_as_its_own():
    x, y = normal(8, 5), normal(8, 2, seed=3)
    models = []
    for kind in (keras.layers.Dense, Dense):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((5,)), kind(4, "tanh"), kind(2)])
        model.compile(keras.optimizers.SGD(0.1), "mean_squared_error", jit_compile=False)
        models.append(model)
    models[1].set_weights([w.reshape(v.shape) for w, v in zip(models[0].get_weights(), models[1].weights, strict=True)])
    before = models[0].get_weights()[0].copy()
    for model in models:
        model.fit(x, y, epochs=3, verbose=0, batch_size=4, shuffle=False)
    assert np.abs(models[0].get_weights()[0] - before).max() > 1e-3
    for theirs, ours in zip(models[0].get_weights(), models[1].get_weights(), strict=True):
        np.testing.assert_allclose(ours.reshape(theirs.shape), theirs, rtol=1e-5, atol=1e-6)


def network_layer(rule, initializer, inputs=6, units=4):
    """A layer in the middle of a network, so that it may have a feedback path."""
    layer = Dense(units, kernel_initializer=initializer)
    Sequential([keras.Input((3,)), Dense(inputs), layer, Dense(2)], genome=Genome.random(rule, seed=0))
    return layer


@pytest.mark.parametrize("name", ["GlorotUniform", "HeNormal", "RandomNormal", "TruncatedNormal", "Orthogonal"])
def test_seeded_first_channel_is_the_kernel_of_keras_and_the_others_differ(name):
    twin = keras.layers.Dense(4, kernel_initializer=getattr(keras.initializers, name)(seed=7))
    twin.build((None, 6))
    layer = network_layer(Rule(states=3), getattr(keras.initializers, name)(seed=7))
    kernels = [*layer.synapses["kernel"].numpy(), *layer.synapses["backward_kernel"].numpy()]
    assert len(kernels) == 6
    np.testing.assert_array_equal(kernels[0], twin.kernel.numpy())
    for one, other in itertools.combinations(kernels, 2):
        assert np.abs(one - other).max() > 0.01
    again = network_layer(Rule(states=3), getattr(keras.initializers, name)(seed=7))
    np.testing.assert_array_equal(again.synapses["kernel"].numpy(), kernels[:3])
    np.testing.assert_array_equal(again.synapses["backward_kernel"].numpy(), kernels[3:])


@pytest.mark.parametrize("initializer", ["glorot_uniform", "he_normal", keras.initializers.RandomNormal])
def test_unseeded_channels_differ_and_follow_set_random_seed(initializer):
    draws = []
    for seed in (5, 5, 6):
        keras.utils.set_random_seed(seed)
        layer = network_layer(Rule(states=3), initializer if isinstance(initializer, str) else initializer())
        draws.append([*layer.synapses["kernel"].numpy(), *layer.synapses["backward_kernel"].numpy()])
    np.testing.assert_array_equal(draws[0], draws[1])
    for one, other in itertools.combinations(draws[0] + draws[2], 2):
        assert np.abs(one - other).max() > 0.01


def test_a_seed_generator_serves_all_channels_in_turn():
    initializer = keras.initializers.RandomNormal(seed=keras.random.SeedGenerator(3))
    layer = network_layer(Rule(states=2), initializer)
    kernels = [*layer.synapses["kernel"].numpy(), *layer.synapses["backward_kernel"].numpy()]
    for one, other in itertools.combinations(kernels, 2):
        assert np.abs(one - other).max() > 0.01


def test_backward_initializer_makes_the_backward_kernel_only():
    layer = Dense(4, kernel_initializer="zeros", bias_initializer="ones", backward_initializer="ones")
    Sequential([keras.Input((3,)), Dense(5), layer], genome=Genome.random(Rule(), seed=0))
    assert layer.synapses["kernel"].numpy().max() == 0.0
    np.testing.assert_array_equal(layer.synapses["bias"].numpy(), np.ones((2, 1, 4)))
    np.testing.assert_array_equal(layer.synapses["backward_kernel"].numpy(), np.ones((2, 5, 4)))


# The pure operations.


def leading_shapes():
    return [((), 1), ((), 3), ((2,), 1), ((2,), 3)]


@pytest.mark.parametrize(("leading", "channels"), leading_shapes())
def test_linear_is_the_matrix_product(leading, channels):
    kernel, x = normal(*leading, channels, 5, 4), normal(*leading, 3, 6, 5, seed=1)
    result = DenseConnection(4).linear(kernel, x)
    np.testing.assert_allclose(result, np.matmul(x, kernel), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("leading", "channels"), leading_shapes())
def test_linear_transpose_is_the_adjoint_of_linear(leading, channels):
    connection = DenseConnection(4)
    kernel = normal(*leading, channels, 5, 4)
    x, y = normal(*leading, 3, 6, 5, seed=1), normal(*leading, 3, 6, 4, seed=2)
    forward = np.sum(connection.linear(kernel, x) * y, axis=(-2, -1))
    back = np.sum(x * connection.linear_transpose(kernel, y, (5,)), axis=(-2, -1))
    assert back.shape == (*leading, 3)
    np.testing.assert_allclose(forward, back, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("leading", "channels"), leading_shapes())
def test_outer_is_the_derivative_of_linear_by_the_kernel(leading, channels):
    connection = DenseConnection(4)
    kernel = ops.convert_to_tensor(normal(*leading, channels, 5, 4))
    x, y = normal(*leading, 3, 6, 5, seed=1), normal(*leading, 3, 6, 4, seed=2)
    (slope,) = slopes(lambda kernel: connection.linear(kernel, x), [kernel], y)
    outer = np.asarray(connection.outer(x, y, (5,)))
    assert outer.shape == (*leading, 3, 5, 4)
    if channels == 1:  # one kernel serves all states: its derivative is their sum
        outer = outer.sum(axis=-3, keepdims=True)
    np.testing.assert_allclose(slope, outer, rtol=1e-4, atol=1e-5)


def test_compute_dtype_rounds_the_factors_and_keeps_the_sums():
    kernel, x = normal(1, 500, 3), normal(1, 2, 500, seed=1)
    rounded = [np.asarray(ops.cast(ops.cast(a, "bfloat16"), "float32")) for a in (x, kernel)]
    result = DenseConnection(3, compute_dtype="bfloat16").linear(kernel, x)
    assert keras.backend.standardize_dtype(result.dtype) == "float32"
    np.testing.assert_allclose(result, rounded[0] @ rounded[1], rtol=1e-4, atol=1e-4)
    assert np.abs(np.asarray(result) - x @ kernel).max() > 1e-3


@pytest.mark.parametrize("feeds_back", [True, False])
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("directions", DIRECTIONS)
def test_synapse_shapes_of_each_option(directions, channels, feeds_back):
    rule = Rule(states=3, directions=directions, channels=channels)
    c = 1 if channels == "tied" else 3
    expected = {"kernel": (c, 5, 4), "bias": (c, 1, 4)}
    if feeds_back and directions != "tied":
        expected["backward_kernel"] = (c, 5, 4)
    drawn = []

    def draw(name, channel, shape):
        drawn.append((name, channel))
        return np.full(shape, channel, "float32")

    synapses = DenseConnection(4).init(rule, 5, draw, feeds_back=feeds_back)
    assert {name: tuple(value.shape) for name, value in synapses.items()} == expected
    assert drawn == [(name, channel) for name in expected for channel in range(c)]
    np.testing.assert_array_equal(np.asarray(synapses["kernel"])[:, 0, 0], np.arange(c))

    layer = Dense(4)
    layer.join(rule, feeds_back=feeds_back, default="tanh")
    layer.build((None, 5))
    assert {name: tuple(value.shape) for name, value in layer.synapses.items()} == expected
    assert [tuple(w.shape) for w in layer.weights] == list(expected.values())


# Errors.


@pytest.mark.parametrize("units", [0, -1, 2.5, 3.0, True, "3", None])
def test_units_must_be_a_positive_integer(units):
    with pytest.raises(ValueError, match=f"`units` must be a positive integer.*{re.escape(repr(units))}"):
        Dense(units)
    assert Dense(np.int64(3)).units == 3


@pytest.mark.parametrize("activation", ["TANH", "", "no_such_activation", 1])
def test_activation_must_be_one_that_keras_or_the_rule_knows(activation):
    with pytest.raises(ValueError, match=r"`activation` must be None, one of 'tanh'.*or a Keras activation.*Received: act"):
        Dense(3, activation)


@pytest.mark.parametrize("activation", ["gelu", "softmax", "elu", "hard_sigmoid", "log_softmax", keras.activations.silu])
def test_any_activation_of_keras(activation):
    x = normal(6, 5)
    twin = keras.layers.Dense(3, activation)
    twin.build((None, 5))
    ours = Dense(3, activation)
    ours.build((None, 5))
    ours.set_weights([w.reshape(v.shape) for w, v in zip(twin.get_weights(), ours.weights, strict=True)])
    np.testing.assert_allclose(ours(x), twin(x), rtol=1e-6, atol=1e-6)
    again = Dense.from_config(ours.get_config())
    assert again.activation is ours.activation


def test_a_known_function_becomes_its_name():
    assert Dense(3, keras.activations.relu).activation == "relu"
    assert Dense(3, keras.activations.linear).activation == "linear"


def test_unknown_initializer_and_argument():
    with pytest.raises(ValueError, match="no_such_initializer"):
        Dense(3, kernel_initializer="no_such_initializer")
    with pytest.raises(ValueError, match=r"`kernel_regularizer` must be a Keras regularizer or its name.*'no_such'"):
        Dense(3, kernel_regularizer="no_such")
    with pytest.raises(ValueError, match=r"`bias_constraint` must be a Keras constraint or its name.*'no_such'"):
        Dense(3, bias_constraint="no_such")
    with pytest.raises(ValueError, match=r"`activity_regularizer` must be None, since.*Received: activity_regularizer='l2'"):
        Dense(3, activity_regularizer="l2")
    with pytest.raises(ValueError, match="keras_blur's Dense has no argument `lora_rank`"):
        Dense(3, lora_rank=2)


def test_input_of_unknown_size():
    with pytest.raises(ValueError, match="input of layer 'first' must have a known size on every axis but the first"):
        Dense(3, name="first").build((None, None))
    with pytest.raises(ValueError, match="must have a known size"):
        Sequential([keras.Input((None,)), Dense(3)], genome=Genome.random(Rule(), seed=0))


def test_input_of_another_size_after_build():
    layer = Dense(3)
    layer.build((None, 5))
    with pytest.raises(ValueError, match="expected axis -1 of input shape to have value 5"):
        layer(normal(2, 4))


def test_a_layer_belongs_to_one_network():
    genome = Genome.random(Rule(), seed=0)
    layer = Dense(3, name="shared")
    Sequential([keras.Input((5,)), layer], genome=genome)
    with pytest.raises(ValueError, match=r"'shared' must keep its place and rule.*a part in a second network"):
        Sequential([keras.Input((5,)), Dense(5), layer], genome=genome)
    with pytest.raises(ValueError, match="'shared' must keep its place and rule"):
        Sequential([keras.Input((5,)), layer], genome=Genome.random(Rule(states=3), seed=0))


def test_a_built_layer_joins_with_the_weights_that_it_has():
    layer = Dense(3)
    layer.build((None, 5))
    kernel = np.array(layer.kernel)[0]
    Sequential([keras.Input((5,)), layer], genome=Genome.random(Rule(states=3), seed=0))
    assert layer.kernel.shape == (3, 5, 3)
    np.testing.assert_array_equal(layer.kernel[0], kernel)
    assert np.abs(np.array(layer.kernel)[1] - kernel).max() > 0.01


def test_a_keras_model_heeds_its_regularizers_and_constraints():
    options = {"kernel_regularizer": "l2", "bias_regularizer": "l1", "bias_constraint": keras.constraints.MaxNorm(0.1)}
    x, y, models = normal(8, 5), normal(8, 3, seed=3), []
    for kind in (keras.layers.Dense, Dense):
        model = keras.Sequential([keras.Input((5,)), kind(3, **options)])
        model.set_weights([w.reshape(v.shape) for w, v in zip([normal(5, 3), normal(3)], model.weights, strict=True)])
        model.compile(keras.optimizers.SGD(0.1), "mean_squared_error", jit_compile=False)
        models.append(model)
    losses = [model.train_on_batch(x, y) for model in models]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for theirs, ours in zip(models[0].get_weights(), models[1].get_weights(), strict=True):
        np.testing.assert_allclose(ours.reshape(theirs.shape), theirs, rtol=1e-5, atol=1e-6)
