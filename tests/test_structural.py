"""The maps of layers without weights: states forward through them and back through their transpose.

The Keras layer on state 1 is the reference, and automatic differentiation through it the reference of the transpose.
"""

from functools import partial

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers as kl

from keras_blur import Genome, Rule, Sequential
from keras_blur.core.weightless import structural_map
from keras_blur.layers import Dense

STATES, BATCH = 3, 2

LINEAR = [
    (kl.Flatten, {}, (5,)),
    (kl.Flatten, {}, (2, 3)),
    (kl.Flatten, {}, (2, 3, 4)),
    (kl.Reshape, {"target_shape": (3, 4)}, (12,)),
    (kl.Reshape, {"target_shape": (2, -1, 2)}, (3, 4)),
    (kl.Reshape, {"target_shape": (-1,)}, (3, 2)),
    (kl.Permute, {"dims": (2, 1)}, (3, 4)),
    (kl.Permute, {"dims": (3, 1, 2)}, (2, 3, 4)),
    (kl.Permute, {"dims": (1,)}, (4,)),
    (kl.Rescaling, {"scale": 0.5}, (5,)),
    (kl.Rescaling, {"scale": -2.0, "offset": 0.3}, (2, 3)),
    (kl.Rescaling, {"scale": [1.0, 2.0, 3.0], "offset": [0.0, -1.0, 1.0]}, (2, 3)),
    (kl.Identity, {}, (4, 2)),
    (kl.Dropout, {"rate": 0.5}, (6,)),
    (kl.SpatialDropout2D, {"rate": 0.5}, (2, 3, 4)),
    (kl.AveragePooling1D, {"pool_size": 2}, (6, 3)),
    (kl.AveragePooling1D, {"pool_size": 3, "strides": 2}, (7, 2)),
    (kl.AveragePooling1D, {"pool_size": 3, "strides": 2, "padding": "same"}, (8, 2)),
    (kl.AveragePooling1D, {"pool_size": 2, "strides": 3}, (7, 1)),
    (kl.AveragePooling2D, {"pool_size": 2}, (4, 6, 3)),
    (kl.AveragePooling2D, {"pool_size": (2, 3), "strides": (1, 2)}, (4, 5, 2)),
    (kl.AveragePooling2D, {"pool_size": 3, "strides": 2, "padding": "same"}, (5, 4, 2)),
    (kl.AveragePooling2D, {"pool_size": 1, "strides": 2}, (4, 3, 1)),
    (kl.AveragePooling3D, {"pool_size": 2}, (4, 2, 2, 3)),
    (kl.AveragePooling3D, {"pool_size": (2, 1, 3), "strides": 2, "padding": "same"}, (3, 4, 3, 2)),
    (kl.GlobalAveragePooling1D, {}, (5, 3)),
    (kl.GlobalAveragePooling1D, {"keepdims": True}, (5, 3)),
    (kl.GlobalAveragePooling2D, {}, (3, 4, 2)),
    (kl.GlobalAveragePooling2D, {"keepdims": True}, (3, 4, 2)),
    (kl.GlobalAveragePooling3D, {}, (2, 3, 2, 2)),
]
LARGEST = [
    (kl.MaxPooling1D, {"pool_size": 2}, (6, 3)),
    (kl.MaxPooling1D, {"pool_size": 3, "strides": 1}, (7, 2)),
    (kl.MaxPooling1D, {"pool_size": 3, "strides": 2, "padding": "same"}, (8, 2)),
    (kl.MaxPooling2D, {"pool_size": 2}, (5, 6, 3)),
    (kl.MaxPooling2D, {"pool_size": (3, 2), "strides": (1, 2)}, (4, 5, 2)),
    (kl.MaxPooling2D, {"pool_size": 3, "strides": 2, "padding": "same"}, (5, 4, 2)),
    (kl.MaxPooling2D, {"pool_size": 2, "strides": 3, "padding": "same"}, (5, 4, 1)),
    (kl.MaxPooling3D, {"pool_size": 2}, (4, 2, 2, 3)),
    (kl.MaxPooling3D, {"pool_size": (2, 1, 3), "strides": 2, "padding": "same"}, (3, 4, 3, 2)),
    (kl.GlobalMaxPooling1D, {}, (5, 3)),
    (kl.GlobalMaxPooling2D, {}, (3, 4, 2)),
    (kl.GlobalMaxPooling2D, {"keepdims": True}, (3, 4, 2)),
    (kl.GlobalMaxPooling3D, {}, (2, 3, 2, 2)),
]
DROPOUTS = [
    (kl.Dropout, {"rate": 0.4}, (50,), ()),
    (kl.Dropout, {"rate": 0.4, "noise_shape": (None, 1, 5)}, (10, 5), (0,)),
    (kl.SpatialDropout1D, {"rate": 0.4}, (4, 40), (0,)),
    (kl.SpatialDropout2D, {"rate": 0.4}, (2, 3, 40), (0, 1)),
    (kl.SpatialDropout3D, {"rate": 0.4}, (2, 2, 2, 40), (0, 1, 2)),
]


def case_name(value):
    return value.__name__ if isinstance(value, type) else None


def normal(*shape, seed=0):
    return tf.constant(np.random.default_rng(seed).normal(size=shape).astype("float32"))


def gradient(layer, x, y):
    """What comes back through the Keras layer at input x for the output gradient y."""
    with tf.GradientTape() as tape:
        tape.watch(x)
        out = layer(x)
    return tape.gradient(out, x, output_gradients=y).numpy()


@pytest.mark.parametrize(("kind", "kwargs", "shape"), LINEAR, ids=case_name)
def test_linear_layer_on_every_state(kind, kwargs, shape):
    layer = kind(**kwargs)
    states = normal(STATES, BATCH, *shape)
    structural = structural_map(layer, shape)
    context = structural.context(states, False)
    forward = structural.forward(states, context)
    assert structural.target == tuple(layer(states[0]).shape[1:])
    assert tuple(forward.shape) == (STATES, BATCH, *structural.target)
    for state, result in zip(states, forward, strict=True):
        np.testing.assert_allclose(result, layer(state), rtol=1e-6, atol=1e-6)

    y = normal(*forward.shape, seed=1)
    back = structural.transpose(y, context)
    assert back.shape == states.shape
    for index in range(STATES):
        np.testing.assert_allclose(back[index], gradient(layer, states[0], y[index]), rtol=1e-5, atol=1e-6)
    straight = forward - structural.forward(tf.zeros_like(states), context)  # without an offset
    np.testing.assert_allclose(tf.reduce_sum(straight * y), tf.reduce_sum(states * back), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "kwargs", "shape"), LARGEST, ids=case_name)
def test_max_pooling_lets_state_1_choose(kind, kwargs, shape):
    layer = kind(**kwargs)
    states = normal(STATES, BATCH, *shape) - 3.0  # mostly negative: padding must not win
    structural = structural_map(layer, shape)
    context = structural.context(states, False)
    forward = structural.forward(states, context)
    assert tuple(forward.shape) == (STATES, BATCH, *structural.target)
    np.testing.assert_allclose(forward[0], layer(states[0]), rtol=1e-6, atol=1e-6)

    y = normal(*forward.shape, seed=1)
    back = structural.transpose(y, context)
    for index in range(STATES):
        expected = gradient(layer, states[0], y[index])
        np.testing.assert_allclose(back[index], expected, rtol=1e-5, atol=1e-6)
    # With the transpose known, the adjoint says that states 2 to k come from the places that won in state 1.
    products = next(np.sum(forward * y, axis=tuple(range(1, forward.ndim))) for forward, y in [(np.array(forward), y)])
    np.testing.assert_allclose(products, np.sum(states * back, axis=tuple(range(1, states.ndim))), rtol=1e-4, atol=1e-4)
    for state, other in zip(states[1:], forward[1:], strict=True):
        assert np.abs(other - layer(state)).max() > 0.1


def test_max_pooling_by_hand():
    layer = kl.MaxPooling1D(2)
    states = tf.constant([[[[1.0], [5.0], [7.0], [2.0]]], [[[10.0], [20.0], [30.0], [40.0]]]])
    structural = structural_map(layer, (4, 1))
    context = structural.context(states, True)
    np.testing.assert_array_equal(structural.forward(states, context)[:, 0, :, 0], [[5.0, 7.0], [20.0, 30.0]])
    back = structural.transpose(tf.constant([[[[1.0], [2.0]]], [[[3.0], [4.0]]]]), context)
    np.testing.assert_array_equal(back[:, 0, :, 0], [[0.0, 1.0, 2.0, 0.0], [0.0, 3.0, 4.0, 0.0]])


def test_equal_entries_have_one_winner_the_one_of_keras():
    layer = kl.MaxPooling2D(2)
    x = tf.ones((BATCH, 4, 4, 1))
    structural = structural_map(layer, (4, 4, 1))
    context = structural.context(x[None], True)
    back = structural.transpose(tf.ones((1, BATCH, 2, 2, 1)), context)
    np.testing.assert_array_equal(back[0], gradient(layer, x, tf.ones((BATCH, 2, 2, 1))))
    assert np.sum(back) == BATCH * 4


@pytest.mark.parametrize(("kind", "kwargs", "shape", "shared"), DROPOUTS, ids=case_name)
def test_dropout_has_one_mask_for_all_states_and_both_ways(kind, kwargs, shape, shared):
    layer = kind(**kwargs, seed=3)
    structural = structural_map(layer, shape)
    states = normal(STATES, 20, *shape)
    context = structural.context(states, True)
    mask = np.asarray(structural.forward(tf.ones_like(states), context))
    np.testing.assert_allclose(np.unique(mask), [0.0, 1.0 / 0.6], rtol=1e-6)
    np.testing.assert_array_equal(mask[0], mask[1])
    np.testing.assert_array_equal(mask[0], mask[2])
    assert np.any(mask[0, 0] != mask[0, 1])  # each example has its own
    for axis in shared:  # and what the Keras layer drops as one stays one
        np.testing.assert_array_equal(mask, np.broadcast_to(mask.take([0], 2 + axis), mask.shape))
    independent = mask[0].take([0], 1 + shared[-1]) if shared else mask[0]
    assert abs(np.mean(mask[0] == 0.0) - 0.4) < 4 * (0.24 / independent.size) ** 0.5 * np.prod([1, *shape]) ** 0.25
    np.testing.assert_allclose(structural.forward(states, context), states * mask, rtol=1e-6)
    np.testing.assert_allclose(structural.transpose(states, context), states * mask, rtol=1e-6)

    other = structural.context(states, True)
    assert np.any(np.asarray(other) != np.asarray(context))
    off = structural.context(states, False)
    np.testing.assert_array_equal(structural.forward(states, off), states)
    np.testing.assert_array_equal(structural.transpose(states, off), states)


@pytest.mark.parametrize(
    ("kind", "kwargs", "shape"),
    [
        (kl.Flatten, {}, (2, 3)),
        (kl.Reshape, {"target_shape": (3, 2)}, (6,)),
        (kl.Permute, {"dims": (2, 1)}, (3, 4)),
        (kl.Rescaling, {"scale": 2.0, "offset": 1.0}, (3,)),
        (kl.Identity, {}, (3,)),
        (kl.AveragePooling2D, {"pool_size": 3, "strides": 2, "padding": "same"}, (5, 4, 2)),
        (kl.MaxPooling1D, {"pool_size": 3, "strides": 2}, (7, 2)),
        (kl.GlobalMaxPooling2D, {}, (3, 4, 2)),
        (kl.GlobalAveragePooling1D, {}, (3, 4)),
    ],
    ids=case_name,
)
@pytest.mark.parametrize("population", [(2,), (2, 3)])
def test_population_axes_in_front(kind, kwargs, shape, population):
    structural = structural_map(kind(**kwargs), shape)
    states = normal(*population, STATES, BATCH, *shape)
    context = structural.context(states, True)
    forward = structural.forward(states, context)
    y = normal(*forward.shape, seed=1)
    back = structural.transpose(y, context)
    assert forward.shape == (*population, STATES, BATCH, *structural.target)
    assert back.shape == states.shape
    for member in np.ndindex(population):
        own = structural.context(states[member], True)
        np.testing.assert_allclose(forward[member], structural.forward(states[member], own), rtol=1e-6)
        np.testing.assert_allclose(back[member], structural.transpose(y[member], own), rtol=1e-6)


def test_dropout_of_a_population_drops_for_each_member():
    structural = structural_map(kl.Dropout(0.5, seed=1), (30,))
    ones = tf.ones((4, STATES, BATCH, 30))
    mask = np.asarray(structural.forward(ones, structural.context(ones, True)))
    assert mask.shape == ones.shape
    np.testing.assert_array_equal(mask, np.broadcast_to(mask[:, :1], mask.shape))
    assert all(np.any(mask[0] != mask[member]) for member in range(1, 4))


@pytest.mark.parametrize(
    ("kind", "kwargs", "shape"),
    [(kl.MaxPooling2D, {"pool_size": 2}, (4, 4, 2)), (kl.Flatten, {}, (2, 3)), (kl.Dropout, {"rate": 0.5}, (3,))],
    ids=case_name,
)
@pytest.mark.parametrize("jit", [False, True])
def test_in_a_graph_of_any_batch_size(kind, kwargs, shape, jit):
    structural = structural_map(kind(**kwargs), shape)

    def both(states):
        context = structural.context(states, False)
        forward = structural.forward(states, context)
        return forward, structural.transpose(forward, context)

    compiled = tf.function(both, input_signature=[tf.TensorSpec((STATES, None, *shape))], jit_compile=jit)
    for batch in (1, 4):
        states = normal(STATES, batch, *shape)
        for result, expected in zip(compiled(states), both(states), strict=True):
            assert result.shape == expected.shape
            np.testing.assert_allclose(result, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (kl.ReLU(name="odd_one"), (4,)),
        (kl.Activation("tanh", name="odd_one"), (4,)),
        (kl.Softmax(name="odd_one"), (4,)),
        (kl.ZeroPadding2D(name="odd_one"), (4, 4, 1)),
        (kl.UpSampling1D(name="odd_one"), (4, 2)),
        (kl.GaussianNoise(0.1, name="odd_one"), (4,)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_unsupported_layer_is_named_with_what_to_use(layer, shape):
    kind = type(layer).__name__
    with pytest.raises(ValueError, match=rf"Layer 'odd_one' \({kind}\) stands between.*Use one of: AveragePooling1D, .*"):
        structural_map(layer, shape)
    chain = [keras.Input((3,)), Dense(int(np.prod(shape))), kl.Reshape(shape), layer, kl.Flatten(), Dense(2)]
    with pytest.raises(ValueError, match="or put it before the first layer of synapses"):
        Sequential(chain, genome=Genome.random(Rule(), seed=0))
    first = type(layer).from_config(layer.get_config())
    model = Sequential([keras.Input(shape), first, kl.Flatten(), Dense(2)], genome=Genome.random(Rule(), seed=0))
    assert model(normal(BATCH, *shape)).shape == (BATCH, 2)


def test_a_subclass_may_do_anything_so_it_is_not_taken_for_its_parent():
    class Doubled(kl.Identity):
        def call(self, inputs):
            return 2 * inputs

    with pytest.raises(ValueError, match=r"\(Doubled\).*its transpose is not known"):
        structural_map(Doubled(), (3,))


@pytest.mark.parametrize("kind", [kl.Flatten, partial(kl.AveragePooling2D, 2), kl.MaxPooling2D, kl.GlobalAveragePooling2D])
def test_channels_first_is_refused(kind):
    with pytest.raises(ValueError, match=r"must have data_format='channels_last'\. Received: 'channels_first'"):
        structural_map(kind(data_format="channels_first"), (2, 4, 4))
