"""Derivatives where a formula has a root or a quotient at 0: finite, and the same compiled and
not."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_blur import Genome, Rule, bilevel, learners, meta, random
from keras_blur.bilevel.evograd import named
from keras_blur.bilevel.hypergradient import Bilevel
from keras_blur.core import equations, terms
from keras_blur.learners import updates

FEATURES, CLASSES = 4, 3

OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.1),
    "momentum": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    "global norm": lambda: keras.optimizers.SGD(0.1, global_clipnorm=0.5),
    "adam": lambda: keras.optimizers.Adam(0.01),
    "rmsprop": lambda: keras.optimizers.RMSprop(0.01),
}


def both(function, *arguments):
    """The results of a function, not compiled and compiled; both finite and equal to rounding."""
    plain, whole = function(*arguments), tf.function(function, jit_compile=True, autograph=False)(*arguments)
    for one, other in zip(tf.nest.flatten(plain), tf.nest.flatten(whole), strict=True):
        assert np.isfinite(one).all()
        assert np.isfinite(other).all()
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-5)
    return whole


def dead(steps=2, tasks=2, batch=5, query=4):
    """Episodes with an input that is always 0, as a pixel at a border: its weights have gradients
    of exactly 0."""
    rng = np.random.default_rng(0)

    def x(*shape):
        values = rng.standard_normal((*shape, FEATURES)).astype("float32")
        values[..., 0] = 0.0
        return tf.constant(values)

    def y(*shape):
        return tf.constant(2.0 * np.eye(CLASSES, dtype="float32")[rng.integers(0, CLASSES, shape)] - 1.0)

    return {
        "x": x(tasks, steps, batch), "y": y(tasks, steps, batch), "query_x": x(tasks, query), "query_y": y(tasks, query),
    }  # fmt: skip


def warp(optimizer):
    model, warps = learners.warped(FEATURES, (5,), CLASSES)
    return learners.Warp(model, warps, optimizer)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_update_has_a_derivative_where_gradients_are_zero(name):
    optimizer, rate = OPTIMIZERS[name](), tf.constant(0.01)
    zeros = (tf.zeros(3),)

    def derivative(gradient):
        with tf.GradientTape() as tape:
            tape.watch(gradient)
            new, *_ = updates.updated(optimizer, rate, tf.constant(0), (tf.ones(3),), zeros, zeros, (gradient,))
        return new[0], tape.gradient(new[0], gradient)

    _, slope = both(derivative, tf.constant([0.0, 0.0, 1e-3]))
    slope = slope.numpy()
    assert slope[0] == slope[1]
    if name == "adam":  # first / epsilon, the way through the root of the second moment having no part in it
        scale = np.sqrt(1.0 - 0.999) / (1.0 - 0.9)
        assert slope[0] == pytest.approx(-0.01 * scale * 0.1 / optimizer.epsilon, rel=1e-4)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_update_in_double_precision_is_that_in_single(name):
    results = []
    for dtype in ("float32", "float64"):
        weight, zeros = (tf.constant([1.0, -2.0], dtype),), (tf.zeros(2, dtype),)
        gradient = (tf.constant([0.5, -0.1], dtype),)
        rate = tf.constant(0.01, dtype)
        results.append(updates.updated(OPTIMIZERS[name](), rate, tf.constant(2), weight, zeros, zeros, gradient)[0][0])
    assert results[1].dtype == tf.float64
    np.testing.assert_allclose(results[0], results[1], rtol=1e-5)


def test_the_root_is_the_root_and_not_a_number_stays_so():
    values = tf.constant([0.0, 1e-30, 2.0, np.inf, np.nan])
    np.testing.assert_array_equal(updates.root(values), tf.sqrt(values))
    with tf.GradientTape() as tape:
        tape.watch(values)
        found = updates.root(values)
    np.testing.assert_allclose(tape.gradient(found, values)[:3], [0.0, 0.5e15, 0.5 / np.sqrt(2.0)], rtol=1e-6)


_OTHERS = [*(("maml", name) for name in OPTIMIZERS if name != "adam"), ("warp", "adam")]


@pytest.mark.parametrize(
    ("kind", "name"),
    [("maml", "adam"), ("warp", "rmsprop"), *(pytest.param(*one, marks=pytest.mark.slow) for one in _OTHERS)],
)
def test_meta_gradients_of_dead_inputs(kind, name):
    make = warp if kind == "warp" else lambda optimizer: learners.MAML(optimizer, (5,), "relu")
    learner, data = make(OPTIMIZERS[name]()), dead()
    outer = {key: tf.constant(own) for key, own in learner.draw(0, 1, FEATURES, CLASSES).items()}

    def gradients(outer, data):
        return meta.Unroll(2)(learner, outer, data, random.seed_of(0))[0]

    found = both(gradients, outer, data)
    assert max(np.abs(own).max() for own in found.gradients.values()) > 1e-3


def test_leap_of_a_network_that_does_not_move():
    learner, data = learners.MAML(keras.optimizers.SGD(0.0), (5,)), dead(steps=3)
    outer = {key: tf.constant(own) for key, own in learner.draw(0, 1, FEATURES, CLASSES).items()}
    found = both(lambda outer, data: meta.WarpGrad(2, start="leap")(learner, outer, data, random.seed_of(0))[0], outer, data)
    assert all(not np.asarray(own).any() for own in found.gradients.values())


def test_orthogonal_of_zeros_is_zero_and_so_is_its_gradient():
    rng = np.random.default_rng(0)
    matrix = tf.constant(np.stack([np.zeros((3, 4)), rng.standard_normal((3, 4))]).astype("float32"))

    def derivative(matrix):
        with tf.GradientTape() as tape:
            tape.watch(matrix)
            result = terms.orthogonal(matrix, 3)
            loss = tf.reduce_sum(result * tf.constant(np.arange(12.0).reshape(3, 4), tf.float32))
        return result, tape.gradient(loss, matrix)

    result, slope = both(derivative, matrix)
    assert not np.asarray(result[0]).any()
    assert not np.asarray(slope[0]).any()
    assert np.abs(slope[1]).max() > 0.1


@pytest.mark.parametrize("alpha", [0.0, 1e-20, 1e-6])
def test_a_saturation_of_nothing(alpha):
    rule = Rule(saturation="tanh")

    def derivative(saturation, old):
        with tf.GradientTape() as tape:
            tape.watch([saturation, old])
            one = tf.ones(())
            new = equations.new_synapse(rule, old, 0.1 * old, None, keep=one, gate=one, saturation=saturation)
        return new, tape.gradient(new, [saturation, old])

    new, _ = both(derivative, tf.constant(alpha), tf.constant([[[0.0, 0.5], [-0.5, 2.0]]]))
    np.testing.assert_allclose(new, [[[0.0, alpha], [-alpha, alpha]]], atol=1e-12)


def test_a_rule_that_orthogonalises_has_a_meta_gradient_of_dead_layers():
    rule = Rule(normalize_term="orthogonal", orthogonal_iterations=2, batch_reduction="mean", last_activation="linear")
    learner, data = learners.Blur((5,), rule), dead()
    outer = {key: tf.constant(own) for key, own in learner.draw(0, 1, FEATURES, CLASSES).items()}
    data = {**data, "x": tf.zeros_like(data["x"])}  # no activity at all
    both(lambda outer, data: meta.Unroll(2)(learner, outer, data, random.seed_of(0))[0], outer, data)
    assert isinstance(learner.learned({key: own.numpy()[0] for key, own in outer.items()}), Genome)


def flat_problem():
    """A two-layer network with one output, on inputs of zeros: only the bias has a gradient that is
    not 0."""
    x = tf.zeros((4, 3))

    def predict(w):
        return tf.nn.relu(x @ w["low"]) @ w["high"] + w["bias"]

    def train(outer, w):
        return tf.reduce_mean(tf.sigmoid(outer["examples"]) * tf.square(predict(w)[:, 0] - 1.0))

    def judge(w):
        return tf.reduce_mean(tf.square(predict(w)))

    weights = {"low": tf.ones((3, 2)), "high": tf.ones((2, 1)), "bias": tf.zeros(1)}
    return Bilevel(train, judge, {"low": ("low",), "high": ("high", "bias")}), {"examples": tf.zeros(4)}, weights


HYPERGRADIENTS = {
    "one step": bilevel.OneStep(),
    "difference": bilevel.FiniteDifference(),
    "evograd": bilevel.EvoGrad(1),
    "sampler": bilevel.LayerwiseMetaGradient(None, bilevel.GradientSampler(target=1, hidden=3)),
}


@pytest.mark.parametrize("rate", [0.0, 0.1])
@pytest.mark.parametrize("name", HYPERGRADIENTS)
def test_hypergradients_where_gradients_vanish(name, rate):
    (problem, outer, weights), estimator = flat_problem(), HYPERGRADIENTS[name]
    own = estimator.parameters({layer: [tuple(weights[n].shape) for n in names] for layer, names in problem.layers.items()})

    def found(outer, weights):
        return estimator.estimate(problem, outer, weights, tf.constant(rate), random.seed_of(0), own)

    if estimator.branches:
        assert all(np.isfinite(leaf).all() for leaf in tf.nest.flatten(tf.function(found)(outer, weights)))
    else:
        both(found, outer, weights)
    assert named(problem.layers, ("high",), "layers") == ["high", "bias"]


@pytest.mark.parametrize("name", [name for name in HYPERGRADIENTS if name != "evograd"])
def test_without_a_learning_rate_a_step_says_nothing_of_the_outer_parameters(name):
    (problem, outer, weights), estimator = flat_problem(), HYPERGRADIENTS[name]
    if name == "sampler":
        estimator = bilevel.LayerwiseMetaGradient(None, bilevel.GradientSampler(target=1, hidden=3, distance_weight=0.0))
    own = estimator.parameters({layer: [tuple(weights[n].shape) for n in names] for layer, names in problem.layers.items()})
    found, _ = estimator.estimate(problem, outer, weights, tf.constant(0.0), random.seed_of(0), own)
    np.testing.assert_array_equal(found.gradients["examples"], np.zeros(4))
