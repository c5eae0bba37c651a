"""`Sequential` in its details: a step computed by hand, weights of examples, freezing, formats, and
late bad data."""

import keras
import numpy as np
import pytest
from keras import layers as kl
from on_backend import JAX, dataset, digits, served

import keras_blur as kb
from keras_blur.core.equations import averaging_share
from keras_blur.layers import Dense
from keras_blur.models.convert import copy_weights

LOGITS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
RNG = np.random.default_rng(0)
X = RNG.standard_normal((24, 5)).astype("float32")
Y = RNG.integers(0, 3, 24)
GENOME = kb.Genome.random(kb.Rule(), seed=1, std=0.5, synapse_update=-0.05)


def random(**options):
    return kb.Genome.random(kb.Rule(**options), seed=1, std=0.5, synapse_update=-0.05)


def make(genome=GENOME, layers=None, *, inputs=None, loss=LOGITS, **options):
    keras.utils.set_random_seed(0)
    layers = [Dense(6), Dense(3)] if layers is None else layers
    model = kb.Sequential([keras.Input((5,)) if inputs is None else inputs, *layers], genome=genome)
    model.compile(loss=loss, **{"run_eagerly": "jit_compile" not in options, **options})
    return model


def weights(model):
    return [np.array(variable.value) for variable in model.weights]


def kernel(model, layer=0):
    return np.array(model.layers[layer].synapses["kernel"].value)


def assert_same(first, second, **tolerance):
    tolerance = tolerance or {"rtol": 0, "atol": 0}
    for one, other in zip(weights(first), weights(second), strict=True):
        np.testing.assert_allclose(one, other, **tolerance)


# What a step computes.


def test_one_layer_by_hand_with_target_values():
    genome = random(directions="tied", channels="tied", last_activation="tanh")
    model = make(genome, [Dense(2)], loss="mean_squared_error")
    target = RNG.standard_normal((24, 2)).astype("float32")
    kernel, bias = (np.array(v.value)[0].astype("float64") for v in model.layers[0].weights)
    g = {name: np.asarray(array, "float64") for name, array in genome.arrays.items()}
    sums = X @ kernel * g["nu"][0, 0] + g["nu"].sum(0)[0] * bias  # the bias unit is 1 in every state
    output = np.tanh(g["neuron_update"] * sums)
    received = g["mu_tilde"][0, 0] * output + g["mu_tilde"][0, 1] * target  # channel 1 of states 1 and 2
    change = g["synapse_update"] * g["nu_tilde"][0, 0] * X.T @ received
    change_of_bias = g["synapse_update"] * g["nu_tilde"].sum(0)[0] * received.sum(0, keepdims=True)
    loss = model.train_on_batch(X, target)
    got_kernel, got_bias = (np.array(v.value)[0] for v in model.layers[0].weights)
    assert np.abs(change).max() > 0.01
    np.testing.assert_allclose(got_kernel, g["synapse_keep"] * kernel + change, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got_bias, g["synapse_keep"] * bias + change_of_bias, rtol=1e-5, atol=1e-6)
    assert loss == pytest.approx(np.mean((output / g["temperature"] - target) ** 2), rel=1e-5)


def test_numbers_shown_are_of_the_prediction_before_the_step():
    model = make(metrics=["accuracy"])
    before = model.evaluate(X, Y, verbose=0, return_dict=True)
    shown = model.train_on_batch(X, Y, return_dict=True)
    assert shown == pytest.approx(before, rel=1e-5)
    after = model.evaluate(X, Y, verbose=0, return_dict=True)
    assert abs(after["loss"] - before["loss"]) > 1e-4


def test_loss_of_an_epoch_is_the_mean_over_examples():
    model = make(GENOME.replace(synapse_update=np.float32(0.0)))  # nothing is learned: one network for all batches
    shown = model.fit(X[:20], Y[:20], batch_size=8, shuffle=False, verbose=0).history["loss"][0]
    assert shown == pytest.approx(float(LOGITS(Y[:20], model(X[:20]))), rel=1e-5)


@pytest.mark.parametrize("genome", [random(states=3), kb.genomes.backprop(0.01)], ids=["labels", "error"])
def test_weight_0_is_absence_and_weight_2_is_twice(genome):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum")
    weight = np.repeat([0.0, 1.0, 2.0], 8)
    chosen = np.r_[8:24, 16:24]
    models = [make(genome, loss=loss) for _ in range(3)]
    models[0].train_on_batch(X, Y, sample_weight=weight)
    models[1].train_on_batch(X[chosen], Y[chosen])
    models[2].train_on_batch(X, Y)
    assert_same(models[0], models[1], rtol=1e-5, atol=1e-6)
    assert np.abs(kernel(models[0]) - kernel(models[2])).max() > 1e-3


def test_class_weight_of_a_dataset():
    share = {0: 0.5, 1: 2.0, 2: 0.0}
    models = [make() for _ in range(2)]
    models[0].fit(X, Y, batch_size=8, shuffle=False, class_weight=share, verbose=0)
    models[1].fit(dataset(X, Y), class_weight=share, verbose=0)
    assert_same(*models)


def test_training_normalises_over_the_batch_where_prediction_does_not():
    model = make(random(normalize_activations="both", batch_reduction="mean"))
    model.fit(X, Y, batch_size=8, verbose=0)
    whole, part = (np.asarray(model(rows, training=True))[:4] for rows in (X, X[:4]))
    assert np.abs(whole - part).max() > 0.01
    whole, part = (np.asarray(model(rows, training=False))[:4] for rows in (X, X[:4]))
    np.testing.assert_allclose(whole, part, rtol=1e-5, atol=1e-6)


NORMALISED = random(normalize_activations="forward", batch_reduction="mean")


@pytest.mark.parametrize(
    "genome",
    [kb.genomes.backprop(0.1, "sigmoid"), random(states=3), NORMALISED],
    ids=["backprop", "three states", "normalised"],
)
def test_compiled_equals_uncompiled_over_several_steps(genome):
    models = [make(genome, jit_compile=jit) for jit in (False, True)]
    for model in models:
        model.fit(X, Y, batch_size=8, epochs=2, shuffle=False, verbose=0)
    assert int(models[1].learning_step.value) == 6
    assert_same(*models, rtol=1e-5, atol=1e-5)


def test_learning_steps_are_counted():
    model = make()
    model.fit(X, Y, batch_size=10, epochs=2, validation_data=(X, Y), verbose=0)
    assert int(model.learning_step.value) == 6
    model.train_on_batch(X, Y)
    model.evaluate(X, Y, verbose=0)
    model.predict(X, verbose=0)
    model.test_on_batch(X, Y)
    assert int(model.learning_step.value) == 7


def test_kept_neurons_set_to_zero_before_each_batch_are_fresh_ones():
    kept, carried = (make(random(keep_neurons=True), inputs=keras.Input((5,), batch_size=8)) for _ in range(2))
    fresh = make(random())
    for start in (0, 8, 16):
        rows = slice(start, start + 8)
        for model in (kept, carried, fresh):
            model.train_on_batch(X[rows], Y[rows])
        kept.reset_states()
    for index in range(2):
        np.testing.assert_allclose(kernel(kept, index), kernel(fresh, index), rtol=1e-6, atol=1e-7)
        assert np.abs(kernel(carried, index) - kernel(fresh, index)).max() > 1e-4


def test_input_is_prepared_by_the_layers_before_the_first_synapses():
    images = RNG.integers(0, 256, (24, 5), dtype="uint8")
    inner = make(layers=[kl.Rescaling(1 / 255.0), Dense(6), Dense(3)], inputs=keras.Input((5,), dtype="uint8"))
    outer = make()
    outer.set_weights(inner.get_weights())
    inner.fit(images, Y, batch_size=8, shuffle=False, verbose=0)
    outer.fit(images.astype("float32") / 255.0, Y, batch_size=8, shuffle=False, verbose=0)
    assert_same(inner, outer, rtol=1e-5, atol=1e-6)


# Freezing, types and formats.


def test_a_frozen_model_learns_nothing():
    model = make()
    model.trainable = False
    before = [kernel(model, index) for index in range(2)]
    model.compile(loss=LOGITS, jit_compile=False)
    model.fit(X, Y, verbose=0)
    for index, old in enumerate(before):
        np.testing.assert_array_equal(kernel(model, index), old)
    assert int(model.learning_step.value) == 1


def test_what_is_frozen_stays_frozen_in_a_file_and_in_a_clone(tmp_path):
    model = make(layers=[Dense(6, trainable=False, name="first"), Dense(3, name="second")])
    model.save(tmp_path / "m.keras")
    for other in (keras.models.load_model(tmp_path / "m.keras"), keras.models.clone_model(model)):
        assert [layer.trainable for layer in other.layers] == [False, True]
        assert [one.learns for one in other._graph.connects] == [False, True]
        frozen, free = kernel(other, 0), kernel(other, 1)
        other.fit(X, Y, verbose=0)
        np.testing.assert_array_equal(kernel(other, 0), frozen)
        assert np.abs(kernel(other, 1) - free).max() > 1e-4


def test_options_of_compile_are_in_the_file(tmp_path):
    model = make(metrics=["accuracy"], weighted_metrics=["accuracy"], targets="classes", steps_per_execution=2)
    model.fit(X, Y, verbose=0)
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    assert loaded.target_kind() == "classes"
    assert loaded.steps_per_execution == 2
    assert loaded.jit_compile is False
    results = loaded.evaluate(X, Y, verbose=0, return_dict=True)
    assert set(results) == {"loss", "accuracy", "weighted_accuracy"}
    assert results == model.evaluate(X, Y, verbose=0, return_dict=True)


def test_a_new_genome_is_used_and_saved(tmp_path):
    model = make()
    before = model.predict(X, verbose=0)
    model.genome = GENOME.replace(temperature=np.float32(2.0))
    np.testing.assert_allclose(model.predict(X, verbose=0), before / 2, rtol=1e-6)
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_allclose(loaded.predict(X, verbose=0), before / 2, rtol=1e-6)
    again = keras.models.model_from_json(model.to_json())
    assert again.genome == model.genome


def test_exported_model_predicts_the_same(tmp_path):
    pytest.importorskip("tensorflow")  # which `export` writes for
    model = make()
    expected = model.predict(X, verbose=0)
    model.export(str(tmp_path / "exported"), verbose=False)
    np.testing.assert_allclose(served(tmp_path / "exported", X), expected, rtol=1e-6, atol=1e-7)


def test_mixed_precision_learns_the_digits_as_float32_does():
    x, y, *_ = digits()
    x = (x.reshape(-1, 64) / 16.0).astype("float32")
    accuracies = {}
    for policy in ("float32", "mixed_bfloat16"):
        layers = [Dense(32, dtype=policy), Dense(10, dtype=policy)]
        model = make(kb.genomes.backprop(0.2), layers, inputs=keras.Input((64,)), metrics=["accuracy"], jit_compile=False)
        model.fit(x, y, epochs=4, verbose=0)
        accuracies[policy] = model.evaluate(x, y, verbose=0)[1]
        assert {v.dtype for layer in model.layers for v in layer.synapses.values()} == {"float32"}
    assert min(accuracies.values()) > 0.9
    assert abs(accuracies["float32"] - accuracies["mixed_bfloat16"]) < 0.02


def test_float64_models_compute_in_float64():
    keras.config.set_dtype_policy("float64")
    try:
        model = make(random(normalize_activations="both", oja="weights", saturation="tanh", batch_reduction="mean"))
        model.fit(X.astype("float64"), Y, verbose=0)
        assert model.predict(X, verbose=0).dtype == np.float64
        assert {v.dtype for layer in model.layers for v in layer.weights} == {"float64"}
    finally:
        keras.config.set_dtype_policy("float32")


# Bad data that come late.


class Rows(keras.utils.PyDataset):
    def __init__(self, *batch):
        super().__init__()
        self.batch = batch

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return self.batch if len(self.batch) > 1 else self.batch[0]


LATE = {
    "tf.data": dataset,
    "PyDataset": Rows,
    "generator": lambda *batch: (batch if len(batch) > 1 else batch[0] for _ in range(2)),
}


def hole(values):
    values = np.array(values, "float32")
    values[3] = np.nan
    return values


@pytest.mark.parametrize("form", LATE)
def test_batches_without_labels(form):
    with pytest.raises(ValueError, match="`y` must be given"):
        make().fit(LATE[form](X), steps_per_epoch=2, verbose=0)


@pytest.mark.parametrize("form", LATE)
@pytest.mark.parametrize(
    ("batch", "loss", "message"),
    [
        ((X, Y + 1), LOGITS, "`y` must hold integers from 0 to 2"),
        ((X, Y - 1), LOGITS, "`y` must hold integers from 0 to 2"),
        ((hole(X), Y), LOGITS, "`x` must be finite"),
        ((X, hole(X[:, :3])), "mean_squared_error", "`y` must be finite"),
    ],
    ids=["label too large", "label below 0", "x not finite", "y not finite"],
)
def test_bad_batches(form, batch, loss, message):
    model = make(loss=loss)
    with pytest.raises(ValueError, match=message):
        model.fit(LATE[form](*batch), steps_per_epoch=2, verbose=0)
    assert all(np.isfinite(value).all() for value in weights(model))


def test_weights_of_examples_must_be_finite():
    model = make()
    with pytest.raises(ValueError, match="`sample_weight` must be finite"):
        model.fit(X, Y, sample_weight=hole(np.ones(24)), verbose=0)
    assert all(np.isfinite(value).all() for value in weights(model))


def test_one_hot_labels_with_a_loss_of_integers_and_the_other_way():
    with pytest.raises(ValueError, match=r"`y` must have shape \(batch,\) or \(batch, 1\) of integer labels"):
        make().fit(X, np.eye(3)[Y], verbose=0)
    with pytest.raises(ValueError, match="integer labels need a sparse loss"):
        make(loss=keras.losses.CategoricalCrossentropy(from_logits=True)).fit(X, Y, verbose=0)


def test_a_kept_batch_takes_no_other_size():
    model = make(random(keep_neurons=True), inputs=keras.Input((5,), batch_size=8))
    model.fit(X, Y, batch_size=8, verbose=0)
    before = weights(model)
    with pytest.raises(ValueError, match="needs batches of the size that the model was built for, 8"):
        model.train_on_batch(X[:3], Y[:3])
    for new, old in zip(weights(model), before, strict=True):
        np.testing.assert_array_equal(new, old)


def test_traces_are_saved_and_learning_goes_on_from_them(tmp_path):
    """A rule with momentum keeps a trace beside each array; without it a loaded model would learn
    otherwise."""
    rule = kb.Rule(momentum="before", normalize_term="orthogonal")
    model = make(kb.Genome.random(rule, seed=1, std=0.5, synapse_update=-0.05).replace(momentum=np.float32(0.8)))
    traces = [name for name in model.layers[0].synapses if name.endswith("_trace")]
    assert traces == ["kernel_trace", "bias_trace"]
    model.fit(X, Y, batch_size=8, epochs=2, shuffle=False, verbose=0)
    assert np.abs(model.layers[0].synapses["kernel_trace"].numpy()).max() > 0
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    assert_same(loaded, model)
    for one in (model, loaded):
        one.fit(X, Y, batch_size=8, epochs=1, shuffle=False, verbose=0)
    assert_same(loaded, model)


# What `compile` keeps, and what users read of a model.


@pytest.mark.parametrize("where", ["metrics", "weighted_metrics"])
def test_metrics_may_be_objects(where, tmp_path):
    model = make()
    for _ in range(2):
        model.compile(loss=LOGITS, **{where: [keras.metrics.SparseCategoricalAccuracy(name="right"), "accuracy"]})
    history = model.fit(X, Y, verbose=0).history
    assert set(history) == {"loss", "right", "accuracy"}
    assert history["right"] == history["accuracy"]
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.evaluate(X, Y, verbose=0) == model.evaluate(X, Y, verbose=0)


def test_compile_and_copied_weights_hold_for_slow_synapses(tmp_path):
    def slow():
        return make(kb.genomes.load("fast"), [Dense(6, "relu"), Dense(3)])

    model = slow()
    model.fit(X, Y, batch_size=8, verbose=0)
    predicted = model.predict(X, verbose=0)
    assert np.abs(kernel(model) - np.array(model.layers[0].synapses["kernel_average"].value)).max() > 1e-3
    model.save_weights(tmp_path / "model.weights.h5")
    loaded = slow()
    loaded.load_weights(tmp_path / "model.weights.h5")
    for one in (model, loaded):
        one.compile(loss=LOGITS)
        np.testing.assert_array_equal(one.predict(X, verbose=0), predicted)
        assert int(one.learning_step.value) == 0
    source = keras.Sequential([keras.Input((5,)), kl.Dense(6, "relu"), kl.Dense(3)])
    model.fit(X, Y, batch_size=8, verbose=0)
    copy_weights(source, model)
    np.testing.assert_allclose(model.predict(X, verbose=0), source.predict(X, verbose=0), atol=1e-6)


def slow_model():
    """A model with slow synapses and layers that read them in different ways."""
    keras.utils.set_random_seed(0)
    rule = kb.genomes.backprop(0.3).rule.replace(slow_synapses=True)
    entry = keras.Input((4,), dtype="int32")
    h = kb.layers.Embedding(6, 4, name="embedding")(entry)
    h = kb.layers.MultiHeadAttention(2, 3, name="attention")(h, h)
    h = kb.layers.SeparableConv2D(3, 2, activation="tanh", name="separable")(kl.Reshape((4, 4, 1))(h))
    model = kb.Model(entry, Dense(3, name="head")(kl.Flatten()(h)), genome=kb.genomes.backprop(0.3).with_rule(rule))
    model.compile(loss=LOGITS, run_eagerly=not JAX)
    return model


NUMBERS = np.random.default_rng(1).integers(0, 6, (24, 4))
NAMES = ("embedding", "attention", "separable", "head")


def learned(model):
    """The model after six steps, with synapses far away from their averages."""
    model.fit(NUMBERS, Y, batch_size=8, epochs=2, verbose=0)
    rng = np.random.default_rng(0)
    for part in parts(model):
        part.kernel.assign(part.kernel + 0.3 * rng.standard_normal(part.kernel.shape))
    return model


def parts(model):
    return [part for name in NAMES for part in model.get_layer(name).parts()]


def transfer(source, target, names=NAMES):
    for name in names:
        target.get_layer(name).set_weights(source.get_layer(name).get_weights())


def predicted(model, name="head"):
    """What a model, as a Keras model of its layers, gives after one of them."""
    return np.array(keras.Model(model.inputs[0], model.get_layer(name).output)(NUMBERS))


def test_features_are_those_of_the_slow_synapses(tmp_path):
    model = slow_model()
    np.testing.assert_allclose(predicted(model), model(NUMBERS), atol=1e-6)
    learned(model).save(tmp_path / "model.keras")
    plain = model.to_keras()
    for one in (model, keras.models.load_model(tmp_path / "model.keras")):
        np.testing.assert_allclose(one(NUMBERS), plain(NUMBERS), atol=1e-5)
        for name in NAMES:
            np.testing.assert_allclose(predicted(one, name), predicted(plain, name), atol=1e-5)


def test_weights_of_layers_carry_what_they_predict():
    source = learned(slow_model())
    wanted, models = np.array(source(NUMBERS)), [slow_model(), slow_model()]
    for one in models:
        transfer(source, one)
        for found in (one(NUMBERS), one.to_keras()(NUMBERS), predicted(one)):
            np.testing.assert_allclose(found, wanted, atol=1e-6)
    models[0].compile(loss=LOGITS, run_eagerly=not JAX)  # learning begins in the same way without it
    for one in models:
        np.testing.assert_allclose(one(NUMBERS), wanted, atol=1e-6)
        one.train_on_batch(NUMBERS, Y)
    assert_same(*models)
    assert {int(part.averaged.value) for part in parts(models[1])} == {1}


def test_what_is_frozen_keeps_what_it_predicts_from_another_model():
    source, model = learned(slow_model()), slow_model()
    transfer(source, model, NAMES[:-1])
    for name in NAMES[:-1]:
        model.get_layer(name).trainable = False
    model.fit(NUMBERS, Y, batch_size=8, verbose=0)
    np.testing.assert_allclose(predicted(model, "separable"), predicted(source.to_keras(), "separable"), atol=1e-6)


def test_a_layer_with_new_weights_begins_its_averages_with_them():
    model, new = learned(slow_model()), slow_model()
    transfer(new, model, ["head"])
    head, start = model.get_layer("head"), np.array(new.get_layer("head").kernel)
    np.testing.assert_allclose(model.to_keras()(NUMBERS), model(NUMBERS), atol=1e-6)
    np.testing.assert_array_equal(model.to_keras().get_layer("head").kernel, start[0])
    model.train_on_batch(NUMBERS, Y)
    share = averaging_share(model.genome, 6)
    np.testing.assert_allclose(head.kernel_average, start + (np.array(head.kernel) - start) * share, rtol=1e-5, atol=1e-6)


def test_inputs_and_outputs_are_read_as_in_keras():
    model, twin = make(), keras.Sequential([keras.Input((5,)), kl.Dense(6), kl.Dense(3)])
    for name in ("input_shape", "output_shape"):
        assert getattr(model, name) == getattr(twin, name)
    assert [tuple(one.shape) for one in (*model.inputs, *model.outputs)] == [(None, 5), (None, 3)]
    assert (model.input, model.output) == (model.inputs[0], model.outputs[0])
    assert len(model.output_names) == 1
    inner = keras.Model(model.inputs, model.layers[0].output)
    assert inner.predict(X, verbose=0).shape == (24, 6)
    with pytest.raises(AttributeError, match="not built"):
        _ = kb.Sequential([Dense(3)], genome=GENOME).inputs


def test_quantization_is_refused():
    model = make()
    with pytest.raises(ValueError, match=r"quantize the one of `to_keras\(\)`"):
        model.quantize("int8")


def test_tied_updates_stay_equal_when_slow_synapses_begin_afresh():
    genome = kb.genomes.load("fast")
    rule = genome.rule.replace(directions="tied_updates")
    model = kb.convert(keras.Sequential([keras.Input((5,)), kl.Dense(6, "relu"), kl.Dense(3)]), genome.with_rule(rule))
    model.compile(loss=LOGITS)
    model.fit(X, Y, batch_size=8, verbose=0)
    model.compile(loss=LOGITS)
    own = model.layers[-1].synapses
    np.testing.assert_allclose(own["backward_kernel"], own["kernel"], rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(own["kernel"], own["kernel_average"])


def test_a_variable_in_a_genome_is_followed_or_refused():
    """A program on JAX would keep the value that it had."""
    genome = kb.genomes.backprop(0.1)
    rate = keras.Variable(np.float32(genome.synapse_update), trainable=False)
    moving = genome.replace(synapse_update=rate)
    if JAX:
        with pytest.raises(ValueError, match="`synapse_update` of a model's genome must be an array"):
            kb.Sequential([keras.Input((4,)), kb.layers.Dense(2)], genome=moving)
        return
    model = kb.Sequential([keras.Input((4,)), kb.layers.Dense(2)], genome=moving)
    model.compile(loss="mean_squared_error")
    x, y = np.ones((2, 4), "float32"), np.ones((2, 2), "float32")
    model.train_on_batch(x, y)
    rate.assign(0.0)
    before = model.predict(x, verbose=0)
    model.train_on_batch(x, y)
    np.testing.assert_array_equal(model.predict(x, verbose=0), before)
