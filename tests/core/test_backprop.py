"""The backprop genome is backpropagation: its weights follow a Keras model under plain SGD to
1e-5."""

import keras
import numpy as np
import pytest
from keras import layers as kl
from marks import slow_but
from on_backend import JAX
from sklearn.datasets import load_digits

import keras_blur as kb

STEPS, BATCH, RATE = 50, 32, 0.1
MEAN_SQUARED = keras.losses.MeanSquaredError
SOFTMAX = keras.losses.CategoricalCrossentropy


def batches(classes=10, steps=STEPS):
    digits = load_digits()
    rng = np.random.default_rng(0)
    for _ in range(steps):
        chosen = rng.integers(0, len(digits.images), BATCH)
        x = (digits.images[chosen] / 16.0).reshape(BATCH, 64).astype("float32")
        label = digits.target[chosen] % classes
        weight = rng.uniform(0.0, 2.0, BATCH).astype("float32")
        yield x, np.eye(classes, dtype="float32")[label], weight


def differences(twin, genome, loss, data, weighted=False, rate=RATE, start=None):
    """Largest difference of each weight array over its largest weight, after each batch; `start`
    may alter the model."""
    model = kb.convert(twin, genome)
    if start is not None:
        start(model)
    model.compile(loss=loss)
    twin.compile(keras.optimizers.SGD(rate), loss, jit_compile=JAX)

    found = []
    ours = [layer for layer in model.layers if isinstance(layer, kb.layers.Dense)]
    theirs = [layer for layer in twin.layers if isinstance(layer, kl.Dense)]
    for x, y, weight in data:
        for one in (model, twin):
            one.train_on_batch(x, y, sample_weight=weight if weighted else None)
        worst = 0.0
        for own, layer in zip(ours, theirs, strict=True):
            pairs = [(own.synapses["kernel"], layer.kernel)]
            if layer.use_bias:
                pairs.append((own.synapses["bias"], layer.bias))
            for got, wanted in pairs:
                wanted = np.array(wanted.value)
                got = np.array(got.value).reshape(got.shape[0], *wanted.shape)[0]
                worst = max(worst, float(np.max(np.abs(got - wanted)) / np.max(np.abs(wanted))))
        found.append(worst)
    return found


def chain(*layers):
    keras.utils.set_random_seed(1)
    return keras.Sequential([keras.Input((64,)), *layers])


@pytest.mark.parametrize("depth", slow_but([1, 2], [1, 2, 3, 4]))
@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "relu"])
@pytest.mark.parametrize("loss", [MEAN_SQUARED(), SOFTMAX(from_logits=True)], ids=["mse", "softmax"])
def test_equals_sgd(loss, activation, depth):
    for weighted in (False, True):
        hidden = [kl.Dense(units, activation) for units in (40, 32, 24, 16)[:depth]]
        twin = chain(*hidden, kl.Dense(10))
        before = [np.array(v.value) for v in twin.trainable_variables]
        genome = kb.genomes.backprop(RATE, activation, loss=loss)
        found = differences(twin, genome, loss, batches(), weighted)
        assert max(found) <= 1e-5
        moved = [np.abs(np.array(v.value) - old).max() for v, old in zip(twin.trainable_variables, before, strict=True)]
        assert min(moved) > 1e-4  # something was learned, in every array


FOUR = kl.Reshape((4, 4, 3))
STRUCTURES = {
    "max pooling": [kl.Dense(48, "tanh"), FOUR, kl.MaxPooling2D(2), kl.Flatten()],
    "overlapping max pooling": [kl.Dense(48, "tanh"), kl.Reshape((16, 3)), kl.MaxPooling1D(3, 2, "same"), kl.Flatten()],
    "average pooling": [kl.Dense(48, "relu"), FOUR, kl.AveragePooling2D(3, 1, "same"), kl.Flatten()],
    "global pooling": [kl.Dense(48, "tanh"), FOUR, kl.GlobalAveragePooling2D()],
    "rescaling": [kl.Dense(12, "tanh"), kl.Rescaling(0.5, 0.25)],
    "permutation": [kl.Dense(12, "tanh"), kl.Reshape((3, 4)), kl.Permute((2, 1)), kl.Flatten()],
    "dropout of nothing": [kl.Dense(20, "tanh"), kl.Dropout(0.0)],
    "no bias": [kl.Dense(20, "tanh", use_bias=False)],
    "different nonlinearities": [kl.Dense(20, "sigmoid"), kl.Dense(16, "relu"), kl.Dense(12)],
    "activation layers": [kl.Dense(20), kl.Activation("tanh")],
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_through_structural_layers(name):
    layers = [type(layer).from_config(layer.get_config()) for layer in STRUCTURES[name]] + [kl.Dense(10)]
    loss = SOFTMAX(from_logits=True)
    assert max(differences(chain(*layers), kb.genomes.backprop(RATE), loss, batches(steps=20))) <= 1e-5


@pytest.mark.parametrize("reduction", ["sum", "mean", "mean_with_sample_weight", "sum_over_batch_size"])
def test_each_reduction_of_the_loss(reduction):
    loss = MEAN_SQUARED(reduction=reduction)
    rate = RATE / BATCH if reduction == "sum" else RATE
    twin = chain(kl.Dense(12, "tanh"), kl.Dense(10))
    found = differences(twin, kb.genomes.backprop(rate), loss, batches(steps=10), weighted=True, rate=rate)
    assert max(found) <= 1e-5


def test_binary_cross_entropy_of_one_unit():
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    data = ((x, y[:, :1], weight) for x, y, weight in batches(2, 20))
    twin = chain(kl.Dense(12, "tanh"), kl.Dense(1, bias_initializer="ones"))  # no difference relative to a bias near 0
    assert max(differences(twin, kb.genomes.backprop(RATE), loss, data)) <= 1e-5


def test_a_nonlinear_output_layer():
    loss = MEAN_SQUARED()
    genome = kb.genomes.backprop(RATE, "tanh", last_activation="sigmoid")
    assert max(differences(chain(kl.Dense(12, "tanh"), kl.Dense(10, "sigmoid")), genome, loss, batches(steps=20))) <= 1e-5


@pytest.mark.parametrize("option", [{"directions": "untied"}, {"backward_activation": "tanh"}, {"presynaptic": "forward"}])
def test_the_check_can_fail(option):
    genome = kb.genomes.backprop(RATE)
    genome = genome.with_rule(genome.rule.replace(**option))
    found = differences(chain(kl.Dense(12, "tanh"), kl.Dense(10)), genome, SOFTMAX(from_logits=True), batches(steps=5))
    if option == {"presynaptic": "forward"}:
        assert max(found) <= 1e-5  # the first state is the same after both passes: no difference
    else:
        assert max(found) > 1e-3


def both_ways_equal(model):
    """The feedback path starts with the numbers of the forward path."""
    for layer in model.layers:
        if "backward_kernel" in layer.synapses:
            layer.synapses["backward_kernel"].assign(np.array(layer.synapses["kernel"].value))


@pytest.mark.parametrize("option", [{"directions": "untied"}, {"channels": "own"}])
def test_separate_synapses_are_exact_for_one_step_only(option):
    genome = kb.genomes.backprop(RATE)
    genome = genome.with_rule(genome.rule.replace(**option))
    twin = chain(kl.Dense(12, "tanh"), kl.Dense(10, "linear"))
    found = differences(twin, genome, SOFTMAX(from_logits=True), batches(steps=10), start=both_ways_equal)
    assert found[0] <= 1e-6
    assert found[-1] > 1e-3


@pytest.mark.parametrize(
    "option",
    [
        {"directions": "tied_updates", "channels": "tied_updates"},
        # Channel 1 of the forward path takes (state 1 before) x (state 2 after); so does channel 2
        # of the feedback path, the one that carries the error; the other two channels, which take
        # state 2 x state 1, are not read.
        {"directions": "untied", "channels": "own"},
    ],
)
def test_separate_synapses_that_receive_the_same_terms_stay_exact(option):
    genome = kb.genomes.backprop(RATE)
    genome = genome.with_rule(genome.rule.replace(**option))
    twin = chain(kl.Dense(12, "tanh"), kl.Dense(10))
    data = batches(steps=20)
    assert max(differences(twin, genome, SOFTMAX(from_logits=True), data, start=both_ways_equal)) <= 1e-5


def test_convert_names_what_does_not_fit():
    genome = kb.genomes.backprop()
    with pytest.raises(ValueError, match="must be a keras"):
        kb.convert(keras.Model(), genome)
    with pytest.raises(ValueError, match="must be built"):
        kb.convert(keras.Sequential([kl.Dense(3)]), genome)
    with pytest.raises(ValueError, match=r"'odd' \(LSTM\) has weights and no keras_blur twin"):
        kb.convert(chain(kl.Reshape((8, 8)), kl.LSTM(3, name="odd"), kl.Dense(3)), genome)


OTHERS = {
    "softmax": [kl.Dense(12, "tanh"), kl.Dense(10, "softmax")],
    "convolution": [kl.Reshape((8, 8, 1)), kl.Conv2D(4, 3, activation="relu"), kl.Flatten(), kl.Dense(10, "softmax")],
    "gelu": [kl.Dense(12, "gelu"), kl.Dense(10, "softmax")],
    "normalised": [kl.Dense(12, use_bias=False), kl.LayerNormalization(), kl.Activation("tanh"), kl.Dense(10, "softmax")],
}


@pytest.mark.parametrize("name", OTHERS)
def test_layers_of_other_kinds(name):
    layers = [type(layer).from_config(layer.get_config()) for layer in OTHERS[name]]
    assert max(differences(chain(*layers), kb.genomes.backprop(RATE), SOFTMAX(), batches(steps=10))) <= 2e-5


def test_convert_fills_each_forward_channel():
    twin = chain(kl.Dense(5, "tanh"), kl.Dense(3))
    rule = kb.Rule(states=3, directions="tied_updates")
    model = kb.convert(twin, kb.Genome.random(rule, seed=0))
    for own, layer in zip(model.layers, twin.layers, strict=True):
        for channel in range(3):
            np.testing.assert_array_equal(own.synapses["kernel"][channel], layer.kernel)
    np.testing.assert_array_equal(model.layers[1].synapses["backward_kernel"][2], twin.layers[1].kernel)
