"""A learner by one of Keras's optimizers equals Keras's own training, step by step."""

import keras
import numpy as np
import pytest
from keras import ops
from on_backend import in_a_graph

from keras_blur import Rule, backend, random
from keras_blur.learners import BaselineLearner, Blur


def batches(steps=6, leading=()):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((steps, *leading, 9, 5)).astype("float32")
    y = 2 * np.eye(3, dtype="float32")[rng.integers(0, 3, (steps, *leading, 9))] - 1
    return ops.array(x), ops.array(y)


MAKERS = {
    "SGD": lambda: keras.optimizers.SGD(0.1),
    "momentum": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    "Adam": lambda: keras.optimizers.Adam(0.01),
    "RMSprop": lambda: keras.optimizers.RMSprop(0.01),
}


@pytest.mark.parametrize("name", MAKERS)
def test_optimizer_equals_keras_step_by_step(name):
    learner = BaselineLearner(MAKERS[name](), (7, 4))
    state = learner.init({}, random.seed_of(2), 5, 3)
    twin = keras.Sequential([keras.Input((5,)), *(keras.layers.Dense(u, "tanh") for u in (7, 4)), keras.layers.Dense(3)])
    twin.set_weights([np.array(w).reshape(v.shape) for w, v in zip(state.weights, twin.weights, strict=True)])
    twin.compile(MAKERS[name](), keras.losses.CategoricalCrossentropy(from_logits=True))
    xs, ys = batches()
    for x, y in zip(xs, ys, strict=True):
        state, prediction = learner.step({}, state, x, y)
        np.testing.assert_allclose(prediction, twin(x), rtol=1e-4, atol=1e-5)
        twin.train_on_batch(x, (y + 1) / 2)
    for own, wanted in zip(state.weights, twin.weights, strict=True):
        np.testing.assert_allclose(np.array(own).reshape(wanted.shape), wanted, rtol=1e-4, atol=1e-5)


def test_leading_axes_are_separate_networks_with_their_own_rates():
    learner = BaselineLearner(keras.optimizers.Adam(), (6,))
    rates = ops.array([[0.01], [0.1]])
    xs, ys = batches(leading=(2,))  # two tasks
    state = learner.init({}, random.seed_of(2), 5, 3, (2, 2))
    for x, y in zip(xs, ys, strict=True):
        state, _ = learner.step({"learning_rate": rates}, state, x[None], y[None])
    start = learner.init({}, random.seed_of(2), 5, 3, (2, 2))
    for member in range(2):
        for task in range(2):

            def own(leaf, member=member, task=task):
                return leaf[member, task] if len(leaf.shape) else leaf

            alone = backend.tree_map(own, start)
            for x, y in zip(xs, ys, strict=True):
                alone, _ = learner.step({"learning_rate": rates[member, 0]}, alone, x[task], y[task])
            for one, other in zip(alone.weights, state.weights, strict=True):
                np.testing.assert_allclose(one, other[member, task], rtol=1e-4, atol=1e-5)


def test_learners_start_from_the_same_network():
    seed = random.seed_of(4)
    ours = Blur((7, 4), Rule(states=3)).init({}, seed, 5, 3)
    theirs = BaselineLearner(keras.optimizers.SGD(0.1), (7, 4)).init({}, seed, 5, 3)
    for index, layer in enumerate(ours.synapses):
        np.testing.assert_array_equal(layer["kernel"][0], theirs.weights[2 * index])


SGD, Adam, RMSprop = keras.optimizers.SGD, keras.optimizers.Adam, keras.optimizers.RMSprop
DECAY = keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.5)
REFUSED = [keras.optimizers.Adagrad(), SGD(0.1, momentum=0.9, nesterov=True), SGD(DECAY), RMSprop(momentum=0.5)]
REFUSED += [Adam(clipnorm=1.0), Adam(gradient_accumulation_steps=2), Adam(weight_decay=0.1)]


@pytest.mark.parametrize("optimizer", REFUSED)
def test_other_optimizers_are_refused(optimizer):
    with pytest.raises(ValueError, match="`optimizer` must be a Keras SGD, Adam or RMSprop"):
        BaselineLearner(optimizer)


def test_learner_errors():
    with pytest.raises(ValueError, match=r"`activation` must be one of.*'swish'"):
        BaselineLearner(keras.optimizers.SGD(0.1), activation="swish")


@pytest.mark.parametrize("name", MAKERS)
def test_compiled_equals_eager(name):
    learner = BaselineLearner(MAKERS[name](), (7,))
    xs, ys = batches(1)
    state = learner.init({}, random.seed_of(2), 5, 3)
    eager, _ = learner.step({}, state, xs[0], ys[0])
    compiled, _ = in_a_graph(lambda s, x, y: learner.step({}, s, x, y), True)(state, xs[0], ys[0])
    for one, other in zip(eager.weights, compiled.weights, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
