"""Outputs of several kinds: several from the same neurons, with positions, in a dict, without a
loss. The backprop genome is SGD for each."""

import collections

import keras
import numpy as np
import pytest
from descent import RATE, assert_descends, randomized
from keras import layers as kl
from on_backend import JAX

import keras_blur as kb
from keras_blur.models import response

RNG = np.random.default_rng(0)
IMAGES, ROWS, TWO = RNG.standard_normal((6, 6, 6, 2)), RNG.standard_normal((6, 5)), RNG.standard_normal((6, 2))
CLASSES = RNG.integers(0, 3, 6)
GENOME = kb.genomes.backprop(RATE)
CROSS = keras.losses.SparseCategoricalCrossentropy


def slices():
    """A mean and a deviation, which are two halves of one layer."""
    entry = keras.Input((5,))
    both = kl.Dense(5, name="both")(kl.Dense(4, "tanh")(entry))
    return keras.Model(entry, [both[:, :2], both[:, 2:]]), ["mean_squared_error"] * 2, [TWO, RNG.standard_normal((6, 3))]


def softmax_beside_logits():
    entry = keras.Input((5,))
    logits = kl.Dense(3, name="logits")(kl.Dense(4, "tanh")(entry))
    return keras.Model(entry, [logits, kl.Softmax()(logits)]), [CROSS(from_logits=True), CROSS()], [CLASSES, CLASSES]


def twice():
    entry = keras.Input((5,))
    value = kl.Dense(2, name="value")(entry)
    return keras.Model(entry, [value, value]), ["mean_squared_error", "mean_absolute_error"], [TWO, -TWO]


@pytest.mark.parametrize("make", [slices, softmax_beside_logits, twice])
def test_outputs_of_the_same_neurons_add_their_errors(make, float64):
    model, loss, y = make()
    assert_descends(randomized(model), ROWS, y, loss=loss, loss_weights=[1.0, 0.3])


def sequence(units=3):
    entry = keras.Input((5, 2))
    return keras.Model(entry, kl.Dense(units, name="head")(kl.Conv1D(4, 3, padding="same", activation="tanh")(entry)))


def segmentation():
    entry = keras.Input((6, 6, 2))
    value = kl.MaxPooling2D(2)(kl.Conv2D(3, 3, padding="same", activation="tanh")(entry))
    return keras.Model(entry, kl.Conv2D(3, 1, activation="softmax", name="head")(kl.UpSampling2D(2)(value)))


SEQUENCES = RNG.standard_normal((6, 5, 2))
SERIES, LABELS = RNG.standard_normal((6, 5, 3)), RNG.integers(0, 3, (6, 5))
POSITIONS = {
    "values": (sequence, SEQUENCES, SERIES, "mean_squared_error", None),
    "classes": (sequence, SEQUENCES, LABELS, CROSS(from_logits=True, dtype="float64"), None),
    "one unit": (lambda: sequence(1), SEQUENCES, SERIES[..., 0], "huber", None),
    "images": (segmentation, IMAGES, RNG.integers(0, 3, (6, 6, 6)), CROSS(dtype="float64"), None),
    "all of them": (segmentation, IMAGES, RNG.uniform(size=(6, 6, 6, 3)), keras.losses.Dice(dtype="float64"), None),
    "a class ignored": (sequence, SEQUENCES, LABELS, CROSS(from_logits=True, ignore_class=0, dtype="float64"), None),
    "weights of examples": (sequence, SEQUENCES, SERIES, "mean_squared_error", 0.5 * np.arange(6.0)[:, None]),
    "weights of positions": (
        sequence, SEQUENCES, LABELS, CROSS(from_logits=True, dtype="float64"), 0.25 * RNG.integers(0, 5, (6, 5)),
    ),
    "weights divide": (
        sequence, SEQUENCES, SERIES, keras.losses.MeanSquaredError(reduction="mean_with_sample_weight", dtype="float64"),
        0.25 * np.arange(1.0, 7.0)[:, None],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", POSITIONS)
def test_each_position_has_a_loss(name, float64):
    make, x, y, loss, weight = POSITIONS[name]
    assert_descends(randomized(make()), x, y, loss=loss, sample_weight=weight)


def test_a_weight_of_an_example_is_that_of_all_its_positions():
    weight = np.arange(6.0)
    models = [kb.convert(randomized(sequence()), GENOME) for _ in range(2)]
    models[1].set_weights(models[0].get_weights())
    for model, given in zip(models, (weight, weight[:, None] * np.ones((6, 5))), strict=True):
        model.compile(loss="mean_squared_error")
        model.fit(SEQUENCES, SERIES, sample_weight=given, batch_size=6, epochs=1, verbose=0)
    for found, wanted in zip(models[0].get_weights(), models[1].get_weights(), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_positions_beside_examples(float64):
    """Each output has the weight of its own loss, whatever its number of positions."""
    entry = keras.Input((5, 2))
    value = kl.Conv1D(4, 3, padding="same", activation="tanh")(entry)
    outputs = [kl.Dense(3, name="series")(value), kl.Dense(2, name="whole")(kl.GlobalAveragePooling1D()(value))]
    assert_descends(randomized(keras.Model(entry, outputs)), SEQUENCES, [SERIES, TWO], loss=["mean_squared_error"] * 2)


def keyed(kind=dict):
    entry = keras.Input((5,))
    value = kl.Dense(4, "tanh")(entry)
    return keras.Model(entry, kind({"z": kl.Dense(3, name="p")(value), "b": kl.Dense(2, name="q")(value)}))


@pytest.mark.parametrize("kind", [dict, collections.OrderedDict])
@pytest.mark.parametrize("form", ["dict", "list"])
def test_outputs_in_a_dict_go_by_their_keys(form, kind, float64):
    """Keras sorts the keys of a dict, and keeps the order of an OrderedDict."""
    loss = kind({"z": CROSS(from_logits=True), "b": "mean_squared_error"})
    if form == "list":
        loss = [loss[key] for key in (sorted(loss) if kind is dict else ("z", "b"))]
    y, weight = kind({"z": CLASSES, "b": TWO}), kind({"z": np.arange(6.0), "b": np.arange(6.0)[::-1].copy()})
    assert_descends(randomized(keyed(kind)), ROWS, y, loss=loss, sample_weight=weight)


@pytest.mark.filterwarnings("ignore:Gradients do not exist")  # of Keras
def test_an_output_without_a_loss_needs_no_labels(float64):
    loss = {"b": "mean_squared_error"}
    model = assert_descends(randomized(keyed()), ROWS, {"b": TWO}, loss=loss, still={"p/kernel", "p/bias"})
    model.compile(loss={**loss, "z": CROSS(from_logits=True)}, run_eagerly=not JAX)
    with pytest.raises(ValueError, match=r"Received: none for z|have different structures"):  # JAX asks Keras first
        model.train_on_batch(ROWS, {"b": TWO})
    with pytest.raises(ValueError, match=r"`y` must have keys among the outputs \['b', 'z'\]. Received: \['c'\]"):
        response.labels_of({"c": TWO}, ["b", "z"])


def test_one_input_and_one_output_may_be_in_a_dict():
    entry = keras.Input((5,), name="u")
    twin = randomized(keras.Model({"u": entry}, {"out": kl.Dense(2)(entry)}))
    model = kb.convert(twin, kb.genomes.backprop(RATE))
    model.compile(loss={"out": "mean_squared_error"})
    twin.compile(keras.optimizers.SGD(RATE), {"out": "mean_squared_error"})
    for one in (model, twin):
        one.fit({"u": ROWS}, {"out": TWO}, batch_size=6, epochs=2, verbose=0)
    for found, wanted in zip(model.to_keras().get_weights(), twin.get_weights(), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_class_weights_of_positions_are_refused():
    model = kb.convert(sequence(), GENOME)
    model.compile(loss=CROSS(from_logits=True))
    with pytest.raises(ValueError, match=r"`class_weight` must be None where outputs have positions.*\(batch, 5, 3\)"):
        model.fit(SEQUENCES, LABELS, class_weight={0: 2.0}, verbose=0)


def test_weights_of_an_output_that_is_not_there_are_refused():
    with pytest.raises(ValueError, match=r"`sample_weight` must have keys among .*Received: \['q'\]"):
        response.weights_of({"q": np.ones(6)}, ["b", "z"], "float32")
