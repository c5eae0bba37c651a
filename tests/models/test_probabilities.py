"""Cross-entropies of probabilities: learned from the logits of a softmax or a sigmoid, where
probabilities round to 0 or 1 as well."""

import dataclasses

import keras
import numpy as np
import pytest
from descent import RATE
from keras import layers as kl
from on_backend import JAX

import keras_blur as kb

RNG = np.random.default_rng(0)
X = 60.0 * RNG.standard_normal((8, 4))  # so that probabilities are 0 and 1
CLASSES, ONE, SEVERAL = RNG.integers(0, 3, 8), RNG.integers(0, 2, (8, 1)), RNG.integers(0, 2, (8, 3))
LOSSES = keras.losses
CASES = {
    "sigmoid": (1, "sigmoid", LOSSES.BinaryCrossentropy, ONE),
    "sigmoids": (3, "sigmoid", LOSSES.BinaryCrossentropy, SEVERAL),
    "focal": (1, "sigmoid", LOSSES.BinaryFocalCrossentropy, ONE),
    "softmax": (3, "softmax", LOSSES.SparseCategoricalCrossentropy, CLASSES),
    "one hot": (3, "softmax", LOSSES.CategoricalCrossentropy, np.eye(3)[CLASSES]),
}


def network(units, activation, alone=False):
    keras.utils.set_random_seed(0)
    last = [kl.Dense(units), kl.Activation(activation)] if alone else [kl.Dense(units, activation)]
    return keras.Sequential([keras.Input((4,)), kl.Dense(3, "relu"), *last])


def learned(model, loss, y, genome=None):
    model = model if genome is None else kb.convert(model, genome)
    model.compile(**({"optimizer": keras.optimizers.SGD(RATE)} if genome is None else {}), loss=loss)
    history = model.fit(X, y, batch_size=4, epochs=2, shuffle=False, verbose=0).history["loss"]
    return model, history


def weights(model):
    return [np.array(one) for one in model.weights if "step" not in one.path]


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_step_is_that_of_the_logits(case, alone, float64):
    units, activation, kind, y = CASES[case]
    ours, shown = learned(network(units, activation, alone), kind(), y, kb.genomes.backprop(RATE))
    theirs, of_logits = learned(network(units, "linear", alone), kind(from_logits=True), y)
    for mine, wanted, start in zip(
        weights(ours.to_keras()), weights(theirs), weights(network(units, "linear")), strict=True
    ):
        np.testing.assert_allclose(mine, wanted, rtol=1e-6 if JAX else 1e-12, atol=1e-7 if JAX else 1e-12)
        assert np.abs(wanted - start).max() > 1e-3
    if not JAX and case != "focal":  # Keras computes losses from logits on TensorFlow alone
        np.testing.assert_allclose(shown, of_logits, rtol=1e-6)
    predicted = ours.predict(X, verbose=0)
    np.testing.assert_allclose(predicted, ours.to_keras().predict(X, verbose=0), atol=1e-6)
    assert predicted.min() >= 0.0
    assert predicted.max() <= 1.0


@pytest.mark.parametrize("case", ["sigmoid", "softmax"])
def test_an_operation_is_as_its_layer(case, float64):
    units, activation, kind, y = CASES[case]
    entry = keras.Input((4,))
    apply = getattr(keras.ops, activation)
    twins = [network(units, activation, alone=True), network(units, "linear")]
    twins[1] = keras.Model(entry, apply(twins[1](entry)))
    layer, operation = (learned(twin, kind(), y, kb.genomes.backprop(RATE))[0] for twin in twins)
    for mine, wanted in zip(weights(operation), weights(layer), strict=True):
        np.testing.assert_array_equal(mine, wanted)


def test_a_learned_genome_takes_the_step_of_the_logits():
    units, activation, kind, y = CASES["sigmoid"]
    ours, _ = learned(network(units, activation), kind(), y, kb.genomes.load("fast"))
    logits, _ = learned(network(units, "linear"), kind(from_logits=True), y, kb.genomes.load("fast"))
    for mine, wanted in zip(weights(ours), weights(logits), strict=True):
        np.testing.assert_allclose(mine, wanted, rtol=1e-5, atol=1e-6)


def test_outputs_and_a_model_that_is_not_built_learn_from_logits(float64):
    def two(activation):
        keras.utils.set_random_seed(0)
        entry = keras.Input((4,))
        hidden = kl.Dense(3, "relu")(entry)
        return keras.Model(entry, [kl.Dense(1, activation, name="one")(hidden), kl.Dense(3, name="other")(hidden)])

    y, absolute = [ONE, RNG.standard_normal((8, 3))], LOSSES.MeanAbsoluteError()
    ours, _ = learned(two("sigmoid"), [LOSSES.BinaryCrossentropy(), absolute], y, kb.genomes.backprop(RATE))
    theirs, _ = learned(two("linear"), [LOSSES.BinaryCrossentropy(from_logits=True), absolute], y)
    for mine, wanted in zip(weights(ours.to_keras()), weights(theirs), strict=True):
        np.testing.assert_allclose(mine, wanted, rtol=1e-6 if JAX else 1e-12, atol=1e-7 if JAX else 1e-12)
    for activation, kind, labels in (("sigmoid", LOSSES.BinaryCrossentropy, SEVERAL), ("softmax", *CASES["softmax"][2:])):
        model = kb.Sequential([kb.layers.Dense(3, activation)], genome=kb.genomes.backprop(RATE))
        model.compile(loss=kind())
        model.train_on_batch(X[:1], labels[:1])
        start = weights(model)
        model.fit(X, labels, verbose=0)
        assert max(np.abs(now - then).max() for now, then in zip(weights(model), start, strict=True)) > 1e-3


@pytest.mark.parametrize("case", CASES)
def test_a_loss_of_logits_is_refused_after_probabilities(case):
    units, activation, kind, _ = CASES[case]
    for alone in (False, True):
        model = kb.convert(network(units, activation, alone), kb.genomes.backprop(RATE))
        with pytest.raises(ValueError, match=f"must take probabilities.*those of a {activation}"):
            model.compile(loss=kind(from_logits=True))


def test_a_sigmoid_that_something_else_reads_stays_with_its_neurons(float64):
    entry = keras.Input((4,))
    gate = kl.Dense(1, "sigmoid", name="gate")(entry)
    model = keras.Model(entry, [gate, kl.Dense(2, name="value")(gate)])
    y, losses = [ONE, RNG.standard_normal((8, 2))], [LOSSES.BinaryCrossentropy(), LOSSES.MeanSquaredError()]
    small = X / 60.0
    ours = kb.convert(model, kb.genomes.backprop(RATE))
    ours.compile(loss=losses)
    model.compile(keras.optimizers.SGD(RATE), losses)
    for one in (ours, model):
        one.train_on_batch(small, y)
    for mine, wanted in zip(weights(ours.to_keras()), weights(model), strict=True):
        np.testing.assert_allclose(mine, wanted, rtol=1e-6 if JAX else 1e-9, atol=1e-7 if JAX else 1e-9)


def test_a_temperature_stays_after_the_sigmoid():
    genome = kb.genomes.backprop(RATE)
    hot = genome.replace(temperature=np.full_like(genome.arrays["temperature"], 2.0))
    models = [kb.convert(network(1, "sigmoid"), one) for one in (hot, genome)]
    for model in models:
        model.compile(loss="binary_crossentropy")
    models[1].genome = hot  # after `compile`
    for model in models:
        model.train_on_batch(X / 60.0, ONE)
    predicted = [model.predict(X, verbose=0) for model in models]
    np.testing.assert_array_equal(*predicted)
    assert predicted[0].max() <= 0.5


def test_kept_neurons_keep_the_sigmoid():
    genome = kb.genomes.backprop(RATE)
    genome = kb.Genome(dataclasses.replace(genome.rule, keep_neurons=True), genome.arrays)
    layer = kb.layers.Dense(1, "sigmoid")
    model = kb.Sequential([keras.Input((4,), batch_size=8), layer], genome=genome)
    model.compile(loss="binary_crossentropy")
    model.train_on_batch(X / 60.0, ONE)
    kept = np.array(model._neurons[-1].value)[0]
    assert 0.0 < kept.min() < kept.max() < 1.0


@pytest.mark.parametrize(
    "options",
    [{"derivative_state": False}, {"oja": "activations"}, {"channels": "own"}, {"forward_synapse_update": True}],
)
def test_a_sigmoid_that_the_rule_reads_stays_with_its_neurons(options):
    """As it does in `learners.Blur`."""
    rule = kb.genomes.backprop(RATE).rule.replace(**options)
    model = kb.convert(network(1, "sigmoid"), kb.Genome.random(rule, 0))
    model.compile(loss="binary_crossentropy")
    assert model.reading.heads == ((),)
    model.genome = kb.Genome.random(rule, 1)
    assert model.reading.heads == ((),)
    with pytest.raises(ValueError, match="must take probabilities"):
        model.compile(loss=LOSSES.BinaryCrossentropy(from_logits=True))


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        ({"directions": "untied"}, {}),  # a backward kernel learns from the outputs
        ({}, {"mu": [[0.0, 0.5], [0.0, 1.0]]}),  # state 1 of the outputs is sent back
    ],
)
def test_a_sigmoid_that_backpropagation_reads_too_stays_with_its_neurons(options, numbers):
    genome = kb.genomes.backprop(RATE)
    genome = genome.with_rule(genome.rule.replace(**options)).replace(**numbers)
    model = kb.convert(network(1, "sigmoid"), genome)
    model.compile(loss="binary_crossentropy")
    assert model.reading.heads == ((),)


def test_another_loss_or_metric_of_probabilities_is_computed_from_them():
    model = kb.convert(network(3, "softmax"), kb.genomes.backprop(RATE))
    for loss in (LOSSES.BinaryCrossentropy(), LOSSES.CategoricalCrossentropy()):
        model.compile(loss=loss, metrics=["binary_crossentropy"])
        small = X / 60.0
        shown, metric = model.evaluate(small, np.eye(3)[CLASSES], verbose=0)
        predicted = model.predict(small, verbose=0)
        assert shown == pytest.approx(float(np.mean(np.array(loss(np.eye(3)[CLASSES], predicted)))), rel=1e-5)
        wanted = np.mean(np.array(LOSSES.BinaryCrossentropy()(np.eye(3)[CLASSES], predicted)))
        assert metric == pytest.approx(float(wanted), rel=1e-5)
        logs = model.train_on_batch(small, np.eye(3)[CLASSES], return_dict=True)
        assert (logs["loss"], logs["binary_crossentropy"]) == pytest.approx((shown, metric), rel=1e-5)
