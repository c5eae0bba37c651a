"""Maps without synapses: state 1 goes through the function, the others through its Jacobian, and
all back transposed.

References are central differences of the function along each state, and its gradients.
"""

import keras
import numpy as np
import pytest
from keras import layers as kl
from keras import ops
from on_backend import JAX, compiled, of_any_batch, slopes

from keras_blur.core.derivatives import mean, tanh
from keras_blur.core.weightless import Dropout, Elementwise, Jacobian, Linear, MaxPooling, Normalize, Softmax

STATES, BATCH = 3, 2
pytestmark = pytest.mark.usefixtures("float64")

LINEAR = {
    "flatten": (lambda: kl.Flatten(), [(2, 3, 4)]),
    "reshape": (lambda: kl.Reshape((2, -1, 2)), [(3, 4)]),
    "permute": (lambda: kl.Permute((3, 1, 2)), [(2, 3, 4)]),
    "repeat": (lambda: kl.RepeatVector(3), [(4,)]),
    "average pooling 1d": (lambda: kl.AveragePooling1D(3, 2, "same"), [(8, 2)]),
    "average pooling 2d": (lambda: kl.AveragePooling2D((2, 3), (1, 2)), [(4, 5, 2)]),
    "average pooling 2d same": (lambda: kl.AveragePooling2D(3, 2, "same"), [(5, 4, 2)]),
    "global average": (lambda: kl.GlobalAveragePooling2D(), [(3, 4, 2)]),
    "global average kept": (lambda: kl.GlobalAveragePooling1D(keepdims=True), [(5, 3)]),
    "zero padding": (lambda: kl.ZeroPadding2D(((1, 0), (2, 1))), [(2, 3, 2)]),
    "cropping": (lambda: kl.Cropping2D(((1, 0), (1, 1))), [(3, 4, 2)]),
    "upsampling": (lambda: kl.UpSampling2D((2, 3)), [(2, 2, 2)]),
    "add": (lambda: lambda *x: kl.Add()(x), [(2, 3), (2, 3), (2, 3)]),
    "subtract": (lambda: lambda *x: kl.Subtract()(x), [(4,), (4,)]),
    "average": (lambda: lambda *x: kl.Average()(x), [(4,), (4,)]),
    "concatenate": (lambda: lambda *x: kl.Concatenate(axis=1)(x), [(2, 3), (4, 3)]),
}
OTHERS = {
    "max pooling 1d": (lambda: kl.MaxPooling1D(3, 2, "same"), [(8, 2)]),
    "max pooling 2d": (lambda: kl.MaxPooling2D((3, 2), (1, 2)), [(4, 5, 2)]),
    "global max": (lambda: kl.GlobalMaxPooling2D(), [(3, 4, 2)]),
    "softmax": (lambda: kl.Softmax(), [(2, 4)]),
    "multiply": (lambda: lambda *x: kl.Multiply()(x), [(4,), (4,)]),
    "maximum": (lambda: lambda *x: kl.Maximum()(x), [(4,), (4,)]),
    "dot": (lambda: lambda *x: kl.Dot((2, 2), normalize=True)(x), [(3, 4), (2, 4)]),
    "unit norm": (lambda: kl.UnitNormalization(), [(4,)]),
    "rescaling": (lambda: kl.Rescaling([1.0, -2.0, 3.0], 0.3), [(2, 3)]),
    "cumulative product": (lambda: lambda x: ops.cumprod(x, axis=1), [(4, 2)]),
    "attention": (lambda: lambda q, v: kl.Attention()([q, v]), [(3, 4), (5, 4)]),
    "across examples": (lambda: lambda x: x - mean(x, 0), [(4,)]),
}
# On JAX Keras itself computes these in float32: see `keras_blur.backend`.
ROUNDED = ("global average", "global average kept", "tanh") if JAX else ()
ELEMENTWISE = ["tanh", "relu", "gelu", "elu", "softplus", "exponential", "hard_sigmoid", "leaky_relu"]


def normal(*shape, seed=0):
    return ops.convert_to_tensor(np.random.default_rng(seed).normal(size=shape))


def states_of(shapes, leading=(), states=STATES):
    return tuple(normal(*leading, states, BATCH, *shape, seed=place) for place, shape in enumerate(shapes))


def target_of(function, shapes):
    return tuple(function(*(ops.zeros((BATCH, *shape), "float64") for shape in shapes)).shape[1:])


def assert_is_the_jacobian(made, function, states, tolerance=1e-7, rounded=False):
    """Both passes of a map are a function's Jacobian at state 1; `rounded` says that the function
    computes in float32."""
    context = made.context(states, False)
    forward = made.forward(states, context)
    first = [value[0] for value in states]
    assert tuple(forward.shape) == (STATES, BATCH, *made.target)
    np.testing.assert_allclose(forward[0], function(*first), rtol=1e-12, atol=1e-12)
    step, tolerance = (1e-3, 1e-3) if rounded else (1e-6, tolerance)
    for state in range(1, STATES):
        above = function(*(one + step * value[state] for one, value in zip(first, states, strict=True)))
        below = function(*(one - step * value[state] for one, value in zip(first, states, strict=True)))
        np.testing.assert_allclose(forward[state], (above - below) / (2 * step), rtol=tolerance, atol=tolerance)
    cotangent = normal(STATES, BATCH, *made.target, seed=9)
    back = made.backward(states, cotangent, context)
    assert len(back) == len(states)
    for state in range(STATES):
        for found, value in zip(back, slopes(function, first, cotangent[state]), strict=True):
            near = 1e-6 if rounded else 1e-9
            np.testing.assert_allclose(found[state], value, rtol=near, atol=near)


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("kind", [Linear, Jacobian])
def test_linear_functions(kind, name):
    make, shapes = LINEAR[name]
    function = make()
    made = kind(function, shapes, target_of(function, shapes))
    states = states_of(shapes)
    assert_is_the_jacobian(made, function, states, rounded=name in ROUNDED)
    if kind is Linear:  # every state goes through the function itself
        forward = made.forward(states, None)
        for state in range(STATES):
            np.testing.assert_allclose(forward[state], function(*(value[state] for value in states)), rtol=1e-12)


@pytest.mark.parametrize("name", OTHERS)
def test_other_functions(name):
    make, shapes = OTHERS[name]
    function = make()
    assert_is_the_jacobian(Jacobian(function, shapes, target_of(function, shapes)), function, states_of(shapes))


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize("kind", [Elementwise, Jacobian])
def test_elementwise_functions(kind, name):
    function = getattr(keras.activations, name)
    made = kind(function, [(2, 4)], (2, 4))
    assert_is_the_jacobian(made, function, states_of([(2, 4)]), rounded=name in ROUNDED)


def test_softmax():
    assert_is_the_jacobian(Softmax((2, 4)), keras.ops.softmax, states_of([(2, 4)]))


def test_max_pooling_by_hand():
    """The places that win in state 1 win in all states."""
    made = Jacobian(kl.MaxPooling1D(2), [(4, 1)], (2, 1))
    states = (ops.array([[[[1.0], [5.0], [7.0], [2.0]]], [[[10.0], [20.0], [30.0], [40.0]]]], "float64"),)
    np.testing.assert_array_equal(made.forward(states, None)[:, 0, :, 0], [[5.0, 7.0], [20.0, 30.0]])
    (back,) = made.backward(states, ops.array([[[[1.0], [2.0]]], [[[3.0], [4.0]]]], "float64"), None)
    np.testing.assert_array_equal(back[:, 0, :, 0], [[0.0, 1.0, 2.0, 0.0], [0.0, 3.0, 4.0, 0.0]])


def test_the_first_of_equals_wins_in_both_passes():
    """A zero of either sign, as relu and a negative factor leave it, equals another."""
    made = MaxPooling(
        lambda x: ops.max_pool(x, 2, 2, "valid", data_format="channels_last"), (4, 1), (2, 1), (2,), (2,), "valid"
    )
    states = ops.array([[[[-0.0], [0.0], [7.0], [7.0]]], [[[10.0], [20.0], [30.0], [40.0]]]], "float64")
    np.testing.assert_array_equal(made.forward((states,), None)[1, 0, :, 0], [10.0, 30.0])
    (back,) = made.backward((states,), ops.ones((2, 1, 2, 1), "float64"), None)
    np.testing.assert_array_equal(back[1, 0, :, 0], [1.0, 0.0, 1.0, 0.0])


def test_what_comes_back_may_have_another_number_of_states():
    made = Jacobian(kl.MaxPooling1D(2), [(4, 1)], (2, 1))
    (back,) = made.backward(states_of([(4, 1)]), normal(1, BATCH, 2, 1), None)
    assert back.shape == (1, BATCH, 4, 1)


@pytest.mark.parametrize("name", ["bilinear", "nearest", "bicubic"])
def test_a_resized_image(name):
    """TensorFlow resizes in float32, and has no derivative of the transpose: `Linear` needs
    none."""
    resize = kl.UpSampling2D(2, interpolation=name, dtype="float32")
    made = Linear(resize, [(2, 3, 2)], (4, 6, 2))
    states = tuple(ops.cast(value, "float32") for value in states_of([(2, 3, 2)]))
    forward = made.forward(states, None)
    cotangent = ops.cast(normal(*forward.shape, seed=9), "float32")
    (back,) = made.backward(states, cotangent, None)
    for state in range(STATES):
        np.testing.assert_allclose(forward[state], resize(states[0][state]), rtol=1e-6)
    np.testing.assert_allclose(np.sum(forward * cotangent), np.sum(states[0] * back), rtol=1e-4)


def test_pooling_of_volumes():
    """TensorFlow pools volumes in float32."""
    states = tuple(ops.cast(value, "float32") for value in states_of([(4, 2, 2, 3)]))
    for kind, pooling in (
        (Linear, kl.AveragePooling3D(2, dtype="float32")),
        (Jacobian, kl.MaxPooling3D(2, dtype="float32")),
    ):
        made = kind(pooling, [(4, 2, 2, 3)], (2, 1, 1, 3))
        forward = made.forward(states, None)
        cotangent = ops.cast(normal(*forward.shape, seed=9), "float32")
        (back,) = made.backward(states, cotangent, None)
        np.testing.assert_allclose(forward[0], pooling(states[0][0]), rtol=1e-6)
        np.testing.assert_allclose(np.sum(forward * cotangent), np.sum(states[0] * back), rtol=1e-4)


# Normalisation.

NORMALIZED = {
    "batch": ((4,), [0], {}),
    "batch and positions": ((3, 4), [0, 1], {}),
    "layer": ((3, 4), [2], {}),
    "layer, all": ((3, 4), [1, 2], {}),
    "mean square": ((3, 4), [2], {"center": False}),
    "groups": ((3, 4), [1, 3], {"groups": (3, 2, 2)}),
}


def normalized(axes, center=True, groups=None):
    def function(x):
        y = x if groups is None else ops.reshape(x, (-1, *groups))
        centre = mean(y, axes, keepdims=True) if center else 0.0
        variance = mean(ops.square(y - centre), axes, keepdims=True)
        return ops.reshape((y - centre) / ops.sqrt(variance + 1e-3), ops.shape(x))

    return function


@pytest.mark.parametrize("name", NORMALIZED)
def test_normalisation(name):
    shape, axes, options = NORMALIZED[name]
    made = Normalize(shape, axes, 1e-3, **options)
    assert made.over_batch == ("batch" in name)
    assert_is_the_jacobian(made, normalized(axes, **options), states_of([shape]), 1e-6)


def test_normalisation_by_given_statistics():
    centre, variance, active = normal(4), ops.square(normal(4, seed=1)) + 0.1, [True]
    made = Normalize((3, 4), [0, 1], 1e-3, given=lambda: (centre, variance), active=lambda: active[0])
    states = states_of([(3, 4)])
    assert_is_the_jacobian(made, lambda x: (x - centre) / ops.sqrt(variance + 1e-3), states)  # not in training
    assert made.context(states, True) is None
    active[0] = False  # a frozen layer keeps to them in training too
    assert made.context(states, True) is not None


def test_moments():
    x = states_of([(3, 4)])
    centre, variance = Normalize((3, 4), [0, 1], 1e-3).moments(x)
    np.testing.assert_allclose(np.ravel(centre), np.mean(x[0][0], axis=(0, 1)), rtol=1e-12)
    np.testing.assert_allclose(np.ravel(variance), np.var(x[0][0], axis=(0, 1)), rtol=1e-12)


# Dropout.

DROPPED = {
    "each": ((50,), (None, None), ()),
    "shared by positions": ((10, 5), (None, 1, 5), (0,)),
    "shared by places of an image": ((2, 3, 40), (None, 1, 1, None), (0, 1)),
}


def dropout(shape, rate, noise_shape):
    seeds = iter(range(1000))
    return Dropout(shape, rate, noise_shape, lambda: ops.array([next(seeds), 7]))


@pytest.mark.parametrize("name", DROPPED)
def test_dropout_has_one_mask_for_all_states_and_both_passes(name):
    shape, noise_shape, shared = DROPPED[name]
    made = dropout(shape, 0.4, noise_shape)
    states = normal(STATES, 20, *shape)
    context = made.context((states,), True)
    mask = np.asarray(made.forward((ops.ones_like(states),), context))
    np.testing.assert_allclose(np.unique(mask), [0.0, 1.0 / 0.6], rtol=1e-6)
    np.testing.assert_array_equal(mask, np.broadcast_to(mask[:1], mask.shape))
    assert np.any(mask[0, 0] != mask[0, 1])  # each example has its own
    for axis in shared:
        np.testing.assert_array_equal(mask, np.broadcast_to(mask.take([0], 2 + axis), mask.shape))
    free = mask[0].take([0], 1 + shared[-1]) if shared else mask[0]
    assert abs(np.mean(mask[0] == 0.0) - 0.4) < 4 * (0.24 / free.size * np.prod([mask.shape[2 + a] for a in shared])) ** 0.5
    np.testing.assert_allclose(made.forward((states,), context), states * mask, rtol=1e-12)
    np.testing.assert_allclose(made.backward((states,), states, context)[0], states * mask, rtol=1e-12)

    assert np.any(np.asarray(made.context((states,), True)) != np.asarray(context))
    assert made.context((states,), False) is None
    np.testing.assert_array_equal(made.forward((states,), None), states)
    np.testing.assert_array_equal(made.backward((states,), states, None)[0], states)


def test_dropout_of_a_population_drops_for_each_member():
    made = dropout((30,), 0.5, (None, None))
    ones = ops.ones((4, STATES, BATCH, 30), "float32")
    mask = np.asarray(made.forward((ones,), made.context((ones,), True)))
    assert mask.shape == ones.shape
    np.testing.assert_array_equal(mask, np.broadcast_to(mask[:, :1], mask.shape))
    assert all(np.any(mask[0] != mask[member]) for member in range(1, 4))


# Populations and graphs.


def maps():
    def of(kind, table, name):
        make, shapes = table[name]
        function = make()
        return kind(function, shapes, target_of(function, shapes))

    return {
        "flatten": of(Linear, LINEAR, "flatten"),
        "concatenate": of(Linear, LINEAR, "concatenate"),
        "average pooling 2d": of(Linear, LINEAR, "average pooling 2d"),
        "max pooling 2d": Jacobian(lambda x: ops.max_pool(x, (3, 2), (1, 2)), [(4, 5, 2)], (2, 2, 2)),
        "multiply": of(Jacobian, OTHERS, "multiply"),
        "across examples": of(Jacobian, OTHERS, "across examples"),
        "tanh": Elementwise(tanh, [(2, 3)], (2, 3)),
        "softmax": Softmax((4,)),
        "batch": Normalize((3, 4), [0, 1], 1e-3),
        "groups": Normalize((3, 4), [1, 3], 1e-3, groups=(3, 2, 2)),
    }


NAMES = ["flatten", "concatenate", "average pooling 2d", "max pooling 2d", "multiply", "across examples", "tanh", "softmax",
         "batch", "groups"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("population", [(2,), (2, 3)])
def test_population_axes_are_a_loop_over_members(name, population):
    made = maps()[name]
    states = states_of(made.sources, population)
    if name == "groups":  # XLA alone broadcasts so many axes at once
        made.forward = compiled(made.forward)
        made.backward = compiled(made.backward)
    forward = made.forward(states, made.context(states, True))
    assert tuple(forward.shape) == (*population, STATES, BATCH, *made.target)
    y = normal(*forward.shape, seed=8)
    back = made.backward(states, y, made.context(states, True))
    for member in np.ndindex(population):
        own = tuple(value[member] for value in states)
        np.testing.assert_allclose(forward[member], made.forward(own, None), rtol=1e-9, atol=1e-12)
        for found, wanted in zip(back, made.backward(own, y[member], None), strict=True):
            np.testing.assert_allclose(found[member], wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("jit", [False, True])
def test_in_a_graph_of_any_batch_size(name, jit):
    made = maps()[name]
    dtype = "float32" if "max" in name else "float64"  # XLA has no second derivative of this one in float64

    def both(*states):
        forward = made.forward(states, made.context(states, False))
        return forward, *made.backward(states, forward, made.context(states, False))

    graph = of_any_batch(both, [(STATES, *shape) for shape in made.sources], dtype, jit)
    for batch in (1, 4):
        states = [ops.cast(normal(STATES, batch, *shape), dtype) for shape in made.sources]
        for result, expected in zip(graph(*states), both(*states), strict=True):
            assert result.shape == expected.shape
            tolerance = {"float32": 1e-5, "float64": 1e-9}[dtype]
            np.testing.assert_allclose(result, expected, rtol=tolerance, atol=tolerance)


POOLINGS = [
    (kl.MaxPooling1D, {"pool_size": 3, "strides": 2, "padding": "same"}, (8, 2)),
    (kl.MaxPooling2D, {"pool_size": 2}, (5, 6, 3)),
    (kl.MaxPooling2D, {"pool_size": (3, 2), "strides": (1, 2)}, (4, 5, 2)),
    (kl.MaxPooling2D, {"pool_size": 2, "strides": 3, "padding": "same", "data_format": "channels_first"}, (2, 5, 4)),
    (kl.MaxPooling3D, {"pool_size": (2, 1, 3), "strides": 2, "padding": "same"}, (3, 4, 3, 2)),
]


@pytest.mark.parametrize(
    ("kind", "options", "shape", "dtype"),
    [
        (*pooling, dtype)
        for pooling in POOLINGS
        for dtype in ("float32", "float64")
        if (pooling[0], dtype) != (kl.MaxPooling3D, "float64")  # TensorFlow has no such pooling
    ],
)
def test_max_pooling_takes_the_winners_of_state_1_compiled_and_not(kind, options, shape, dtype):
    layer = kind(**options, dtype=dtype)
    target = tuple(layer.compute_output_shape((None, *shape))[1:])
    first = layer.data_format == "channels_first"
    made = MaxPooling(layer, shape, target, layer.pool_size, layer.strides, layer.padding, first)
    rng = np.random.default_rng(0)
    states = ops.array(rng.normal(size=(3, 2, *shape)) - 3.0, dtype)  # mostly negative: padding must not win
    found = made.forward((states,), None)
    np.testing.assert_array_equal(compiled(lambda x: made.forward((x,), None))(states), found)
    np.testing.assert_array_equal(found[0], layer(states[0]))
    step = 1e-3 if dtype == "float32" else 1e-7
    for state in (1, 2):  # winners stay where a change is small
        moved = (layer(states[0] + step * states[state]) - layer(states[0] - step * states[state])) / (2 * step)
        np.testing.assert_allclose(found[state], moved, rtol=1e-2, atol=1e-2)
    cotangent = ops.array(rng.normal(size=found.shape), dtype)
    (back,) = made.backward((states,), cotangent, None)
    for state in (1, 2):
        pairing = ops.sum(found[state] * cotangent[state]), ops.sum(states[state] * back[state])
        np.testing.assert_allclose(*pairing, rtol=1e-4)
