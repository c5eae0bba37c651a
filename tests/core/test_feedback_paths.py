"""`Rule.directions`: what the backward synapses of dense and convolutional layers are, and what
becomes of them."""

import keras
import numpy as np
import pytest
from on_backend import digits

import keras_blur as kb
from keras_blur.core.connections.dense import DenseConnection

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
NAMES = ("convolution", "dense", "output")


def genome(directions, *, rate=0.1, decay=0.0, **options):
    """Backpropagation with other directions and weight decay."""
    known = kb.genomes.backprop(rate, "tanh", loss=LOSS)
    changed = known.with_rule(known.rule.replace(directions=directions, **options))
    return changed.replace(synapse_keep=np.float32(1.0 - rate * decay))


def network(own, seed=0):
    """Two convolutions and two dense layers."""
    keras.utils.set_random_seed(seed)
    layers = [keras.Input((8, 8, 1)), keras.layers.Rescaling(1 / 16), kb.layers.Conv2D(4, 3, name="first")]
    layers += [kb.layers.Conv2D(8, 3, name=NAMES[0]), keras.layers.Flatten(), kb.layers.Dense(32, name=NAMES[1])]
    model = kb.Sequential([*layers, kb.layers.Dense(10, name=NAMES[2])], genome=own)
    model.compile(loss=LOSS, metrics=["accuracy"])
    return model


def learn(model, epochs):
    x, y, test_x, test_y = digits()
    model.fit(x, y, batch_size=64, epochs=epochs, verbose=0)
    return model.evaluate(test_x, test_y, batch_size=360, verbose=0, return_dict=True)["accuracy"]


def both(model):
    """Forward and backward kernels of the layers that have both."""
    synapses = [model.get_layer(name).synapses for name in NAMES]
    return [(own["kernel"].numpy(), own["backward_kernel"].numpy()) for own in synapses]


def test_with_tied_updates_and_weight_decay_the_kernels_come_to_agree():
    """Kolen and Pollack: equal updates leave the difference to weight decay, which takes the same
    share of it each step."""
    rate, decay, epochs = 0.1, 0.1, 20
    model = network(genome("tied_updates", rate=rate, decay=decay))
    before = both(model)
    learn(model, epochs)
    steps = int(model.learning_step.numpy())
    assert steps == epochs * 23
    left = (1.0 - rate * decay) ** steps
    assert left < 0.011
    for (kernel, backward), (new_kernel, new_backward) in zip(before, both(model), strict=True):
        start, end = (one / np.linalg.norm(one) for one in (kernel, backward))
        assert abs(np.vdot(start, end)) < 0.3
        np.testing.assert_allclose(new_kernel - new_backward, left * (kernel - backward), atol=1e-5)
        start, end = (one / np.linalg.norm(one) for one in (new_kernel, new_backward))
        assert np.vdot(start, end) > 0.99


@pytest.mark.parametrize("directions", ["fixed", "signs"])
def test_backward_kernels_that_are_held_stay_as_they_are(directions):
    model = network(genome(directions, decay=0.01, momentum="before").replace(momentum=np.float32(0.5)))
    before = both(model)
    learn(model, 1)
    for (kernel, backward), (new_kernel, new_backward) in zip(before, both(model), strict=True):
        np.testing.assert_array_equal(new_backward, backward)
        assert np.abs(new_kernel - kernel).max() > 1e-3
    traces = {name for layer in NAMES for name in model.get_layer(layer).synapses if name.endswith("_trace")}
    assert traces == {"kernel_trace", "bias_trace"}


def test_regularizers_and_constraints_leave_what_is_held():
    model = kb.Sequential(
        [
            keras.Input((5,)),
            kb.layers.Dense(4),
            kb.layers.Dense(3, kernel_regularizer="l2", kernel_constraint=keras.constraints.MaxNorm(0.1)),
        ],
        genome=genome("fixed"),
    )
    model.compile(loss=LOSS)
    before = model.layers[1].synapses["backward_kernel"].numpy()
    model.train_on_batch(np.ones((4, 5), "float32"), np.array([0, 1, 2, 0]))
    np.testing.assert_array_equal(model.layers[1].synapses["backward_kernel"].numpy(), before)
    assert np.linalg.norm(model.layers[1].synapses["kernel"].numpy()[0], axis=0).max() < 0.101


@pytest.mark.parametrize("kind", ["dense", "convolution"])
def test_what_comes_back_has_the_signs_of_the_forward_kernel_and_the_sizes_of_the_other(kind):
    rng = np.random.default_rng(0)
    if kind == "dense":
        connection, source, target = DenseConnection(4), (5,), (4,)
    else:
        layer = kb.layers.Conv2D(4, 3, strides=2, padding="same")
        layer.build((None, 6, 5, 2))
        connection, source, target = layer.connection, (6, 5, 2), (3, 3, 4)
    shape = connection.kernel_shape(source)
    forward, size = (rng.normal(size=(1, *shape)).astype("float32") for _ in range(2))
    forward[..., 0] = 0.0  # no sign: nothing comes back through these
    post = rng.normal(size=(2, 3, *target)).astype("float32")
    signed = connection.backward(genome("signs"), {"kernel": forward, "backward_kernel": size}, post, source)
    tied = connection.backward(genome("tied"), {"kernel": np.abs(size) * np.sign(forward)}, post, source)
    plain = connection.backward(genome("fixed"), {"kernel": forward, "backward_kernel": size}, post, source)
    np.testing.assert_allclose(signed, tied, rtol=1e-6, atol=1e-6)
    assert np.abs(np.asarray(signed) - np.asarray(plain)).max() > 0.1


@pytest.mark.parametrize(("directions", "least"), [("tied", 0.94), ("tied_updates", 0.94), ("signs", 0.94), ("fixed", 0.85)])
def test_each_path_learns_the_digits(directions, least):
    assert learn(network(genome(directions, rate=0.3, decay=1e-3)), 15) > least
