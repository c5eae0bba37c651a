"""`Sequential` beside Keras: the loss of `compile`, learning afresh, running statistics, callbacks,
nesting and files."""

import errno
import functools
import os
import zipfile

import keras
import numpy as np
import pytest
from keras import layers as kl
from marks import slow_but
from on_backend import dataset, digits, served

import keras_blur as kb
from keras_blur.layers import Dense

RNG = np.random.default_rng(0)
X = RNG.standard_normal((48, 5)).astype("float32")
Y = RNG.integers(0, 3, 48)
ONE_HOT = np.eye(3, dtype="float32")[Y]
SIGNS = 2.0 * ONE_HOT - 1.0
VALUES = RNG.uniform(0.1, 2.0, (48, 3)).astype("float32")
SPARSE = keras.losses.SparseCategoricalCrossentropy
CATEGORICAL = keras.losses.CategoricalCrossentropy
LOGITS = SPARSE(from_logits=True)


def make(genome=None, *first, compiled=True, **options):
    keras.utils.set_random_seed(0)
    genome = kb.genomes.backprop(0.1) if genome is None else genome
    model = kb.Sequential([keras.Input((5,)), *first, Dense(6), Dense(3)], genome=genome)
    if compiled:
        model.compile(**{"loss": LOGITS, "run_eagerly": "jit_compile" not in options, **options})
    return model


def kernel(model):
    return np.array(model.layers[0].synapses["kernel"].value)


def flat_digits():
    x, y, *_ = digits()
    return (x.reshape(-1, 64) / 16).astype("float32"), y


# The loss.

LOSSES = {
    "sparse": (LOGITS, Y),
    "sparse column": (LOGITS, Y[:, None]),
    "sparse sum": (SPARSE(from_logits=True, reduction="sum"), Y),
    "smoothed": (CATEGORICAL(from_logits=True, label_smoothing=0.1), ONE_HOT),
    "binary": (keras.losses.BinaryCrossentropy(from_logits=True), ONE_HOT),
    "squared": ("mse", VALUES),
    "absolute": ("mean_absolute_error", VALUES),
    "huber": (keras.losses.Huber(0.5), VALUES),
    "log cosh": ("log_cosh", VALUES),
    "hinge": ("hinge", SIGNS),
    "squared hinge": ("squared_hinge", SIGNS),
}


@pytest.mark.parametrize("pinned", slow_but([None], [None, "huber"]))
@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_of_compile_is_learned_from_and_shown(name, pinned):
    """The genome that is backpropagation ends where Keras's `fit` with SGD does, whatever loss its
    rule names."""
    loss, labels = LOSSES[name]
    rate = 0.01
    keras.utils.set_random_seed(0)
    twin = keras.Sequential([keras.Input((5,)), kl.Dense(6, "tanh"), kl.Dense(3)])
    model = kb.convert(twin, kb.genomes.backprop(rate, loss=pinned))
    before = twin.get_weights()[0]
    twin.compile(keras.optimizers.SGD(rate), loss, jit_compile=False)
    model.compile(loss=loss, jit_compile=False)
    shown = [one.fit(X, labels, batch_size=8, epochs=2, shuffle=False, verbose=0).history["loss"] for one in (model, twin)]
    np.testing.assert_allclose(*shown, rtol=1e-5)
    for own, layer in zip(model.layers, twin.layers, strict=True):
        np.testing.assert_allclose(own.synapses["kernel"][0], layer.kernel, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(own.synapses["bias"][0, 0], layer.bias, rtol=1e-4, atol=1e-6)
    assert np.abs(twin.get_weights()[0] - before).max() > 1e-3


def test_the_loss_of_the_rule_is_the_default():
    given, default = (make(kb.genomes.backprop(0.1, loss="mse"), loss=loss) for loss in ("mse", None))
    for model in (given, default):
        model.fit(X, VALUES, batch_size=8, shuffle=False, verbose=0)
    np.testing.assert_array_equal(kernel(given), kernel(default))


@pytest.mark.parametrize("name", slow_but(["fast", "functions"], kb.genomes.names()))
def test_shipped_genomes_take_integer_labels(name):
    """With integers and a sparse loss the same is learned as with indicators and the categorical
    one."""
    models = [
        make(kb.genomes.load(name), loss=kind(from_logits=True), metrics=["accuracy"]) for kind in (SPARSE, CATEGORICAL)
    ]
    for model, labels in zip(models, (Y, ONE_HOT), strict=True):
        history = model.fit(X, labels, batch_size=8, epochs=2, shuffle=False, verbose=0).history
        assert set(history) == {"loss", "accuracy"}
    np.testing.assert_allclose(kernel(models[0]), kernel(models[1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["arrays", "dataset"])
def test_functions_of_a_user_are_metrics(form):
    class Wrong:
        def __call__(self, y, prediction):
            return 1.0 - keras.metrics.sparse_categorical_accuracy(y, prediction)

    functions = [
        functools.partial(keras.metrics.sparse_top_k_categorical_accuracy, k=1),
        lambda y, prediction: keras.metrics.sparse_categorical_accuracy(y, prediction),
        Wrong(),
    ]
    model = make(kb.Genome.random(kb.Rule(), seed=0, synapse_update=0.0), metrics=functions)
    data = (X, Y) if form == "arrays" else (dataset(X, Y),)
    history = model.fit(*data, verbose=0).history
    right = np.mean(np.argmax(np.asarray(model(X)), axis=-1) == Y)
    assert [history[name][0] for name in ("partial", "lambda", "wrong")] == pytest.approx([right, right, 1 - right])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "sgd"}, "`optimizer` must be left out"),
        ({"loss_weights": [2.0]}, r"`loss_weights` must be left out.*Received: loss_weights=\[2\.0\]"),
    ],
)
def test_arguments_of_compile_without_a_meaning_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize("options", [{"run_eagerly": True}, {"steps_per_execution": 3}, {"auto_scale_loss": False}])
def test_other_arguments_of_compile_change_nothing(options):
    plain, other = make(), make(**options)
    for model in (plain, other):
        model.fit(X, Y, batch_size=8, shuffle=False, verbose=0)
    np.testing.assert_allclose(kernel(other), kernel(plain), rtol=1e-5, atol=1e-6)


def test_layers_that_add_a_loss_are_refused():
    class Adds(kl.Layer):
        def call(self, x):
            self.add_loss(keras.ops.sum(x))
            return x

        def compute_output_shape(self, shape):
            return shape

    with pytest.raises(ValueError, match="`layers` must add no losses of their own"):
        make(None, Adds()).fit(X, Y, verbose=0)
    with pytest.raises(ValueError, match="must have no `activity_regularizer`"):
        make(None, kl.ActivityRegularization(0.1))


@pytest.mark.parametrize("name", ["lora_rank", "quantization_config", "input_shape"])
def test_arguments_that_dense_does_not_know_are_refused(name):
    with pytest.raises(ValueError, match=f"keras_blur's Dense has no argument `{name}`"):
        Dense(3, **{name: 2})
    with pytest.raises(ValueError, match=f"keras_blur's Sequential has no argument `{name}`"):
        kb.Sequential([Dense(3)], genome=kb.genomes.backprop(), **{name: 2})


# Learning afresh.


def test_compile_starts_learning_afresh():
    genome = kb.genomes.load("mnist-orthogonal")  # a gate that decays, and traces
    used, fresh = make(genome), make(genome)
    used.fit(X, Y, batch_size=8, verbose=0)
    assert np.abs(used.layers[0].synapses["kernel_trace"]).max() > 0
    used.compile(loss=LOGITS, run_eagerly=True)
    assert int(used.learning_step.value) == 0
    assert np.abs(used.layers[0].synapses["kernel_trace"]).max() == 0
    for layer, other in zip(used.layers, fresh.layers, strict=True):
        for name, variable in layer.synapses.items():
            other.synapses[name].assign(variable)
    for model in (used, fresh):
        model.fit(X, Y, batch_size=8, shuffle=False, verbose=0)
    np.testing.assert_array_equal(kernel(used), kernel(fresh))


@pytest.mark.slow
def test_a_second_fit_learns_other_labels_after_compile():
    x, y = flat_digits()
    model = kb.Sequential([keras.Input((64,)), Dense(32), Dense(10)], genome=kb.genomes.load("mnist-4state"))
    for labels in (y, (y + 3) % 10):
        model.compile(loss=LOGITS, metrics=["accuracy"], jit_compile=False)
        model.fit(x, labels, epochs=2, verbose=0)
        assert model.evaluate(x, labels, verbose=0)[1] > 0.8


def test_a_fit_whose_gate_has_decayed_says_so(tmp_path):
    rule = kb.Rule(update_decay="power")
    genome = kb.Genome.random(rule, seed=0, synapse_update=-0.01).replace(decay_power=2.0, log_decay_steps=0.0)
    model = make(genome)
    model.fit(X, Y, batch_size=4, verbose=0)  # twelve steps: (1 + 12) ** -2 is 0.006
    with pytest.warns(UserWarning, match=r"gate is 0\.0059 of its initial value after 12 learning steps.*`compile`"):
        model.fit(X, Y, batch_size=24, verbose=0)
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    assert int(loaded.learning_step.value) == 14  # a loaded model goes on
    with pytest.warns(UserWarning, match="after 14 learning steps"):
        loaded.fit(X, Y, batch_size=24, verbose=0)
    model.compile(loss=LOGITS, jit_compile=False)
    model.fit(X, Y, batch_size=24, verbose=0)  # warnings are errors here


# Running statistics.


@pytest.mark.parametrize("name", ["mnist-4state", "mnist-orthogonal"])
def test_evaluate_agrees_with_training_after_few_steps(name, tmp_path):
    x, y = flat_digits()
    keras.utils.set_random_seed(0)
    model = kb.Sequential([keras.Input((64,)), Dense(64), Dense(64), Dense(10)], genome=kb.genomes.load(name))
    model.compile(loss=LOGITS, metrics=["accuracy"], jit_compile=False)
    for steps in (5, 10):
        for start in range(64 * (steps - 5), 64 * steps, 64):
            rows = np.arange(start, start + 64) % len(x)
            model.train_on_batch(x[rows], y[rows])
        trained = np.mean(np.argmax(np.asarray(model(x, training=True)), axis=-1) == y)
        assert trained > 0.85
        assert model.evaluate(x, y, verbose=0)[1] == pytest.approx(trained, abs=0.03)  # lagging ones are 0.3 below
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    assert int(loaded.statistics_step.value) == 10
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))


def test_statistics_of_other_synapses_are_forgotten():
    model = make(kb.Genome.random(kb.Rule(normalize_activations="forward", batch_reduction="mean"), 0))
    model.trainable = False  # only the test moves the synapses
    model.compile(loss=LOGITS, run_eagerly=True)
    x = X + 2.0
    for _ in range(20):
        model.train_on_batch(x, Y)
    first = model.layers[0]
    before = np.array(first.moving_mean.value)
    first.synapses["kernel"].assign(-3.0 * first.synapses["kernel"])
    model.train_on_batch(x, Y)
    np.testing.assert_allclose(first.moving_mean.value, -3.0 * before, atol=0.1 * np.abs(before).max())


def test_statistics_of_the_same_synapses_are_averaged():
    keras.utils.set_random_seed(0)
    genome = kb.Genome.random(kb.Rule(normalize_activations="forward", batch_reduction="mean"), 0)
    model = kb.Sequential([keras.Input((40,)), Dense(30), Dense(3)], genome=genome)
    model.trainable = False
    model.compile(loss=LOGITS, run_eagerly=True)
    batches = np.random.default_rng(1).standard_normal((30, 16, 40)).astype("float32")
    for x in batches:
        model.train_on_batch(x, Y[:16])
    kernel = np.array(model.layers[0].synapses["kernel"].value)
    means = np.einsum("tbi,kio->tko", batches / 16, kernel) * np.array(genome.nu)[0][:, None]
    found = np.array(model.layers[0].moving_mean.value)[:, 0]
    assert np.abs(found).mean() < 0.4 * np.abs(means).mean()  # the true mean is 0


def test_running_statistics_are_those_of_the_new_synapses():
    genome = kb.Genome.random(kb.Rule(normalize_activations="both", batch_reduction="mean"), 0, synapse_update=-0.5)
    model = make(genome, kl.Dropout(0.0))
    model.train_on_batch(X, Y)
    np.testing.assert_allclose(model(X, training=False), model(X, training=True), rtol=1e-4, atol=1e-5)
    model.compile(loss=LOGITS, jit_compile=False)
    assert int(model.statistics_step.value) == 1  # they describe the network, not the learning


def test_summary_counts_parameters_and_shows_shapes():
    lines = []
    model = make(kb.Genome.random(kb.Rule(normalize_activations="both"), seed=0), kl.Flatten())
    model.summary(print_fn=lambda text, **_: lines.append(text))
    text = "\n".join(lines)
    count = sum(int(np.prod(variable.shape)) for variable in model.weights)
    assert f"Total params: {count} " in text
    assert model.count_params() == count
    for shape in ("(None, 5)", "(None, 6)", "(None, 3)"):
        assert shape in text
    assert "?" not in text


# Types.


@pytest.mark.parametrize("policy", ["float64", "mixed_bfloat16", "mixed_float16"])
def test_each_type_policy_learns_predicts_and_saves(policy, tmp_path):
    plain = make(kb.genomes.backprop(0.1))
    keras.config.set_dtype_policy(policy)
    try:
        model = make(kb.genomes.backprop(0.1))
    finally:
        keras.config.set_dtype_policy("float32")
    model.set_weights(plain.get_weights())
    start = kernel(plain)
    for one in (plain, model):
        one.fit(X, Y, batch_size=8, epochs=3, shuffle=False, verbose=0)
    moved = np.abs(kernel(plain) - start).max()
    assert np.abs(kernel(model) - kernel(plain)).max() < 0.05 * moved
    assert model.evaluate(X, Y, verbose=0) == pytest.approx(plain.evaluate(X, Y, verbose=0), rel=0.02)
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(loaded.predict(X, verbose=0), model.predict(X, verbose=0))


def test_small_errors_are_not_lost_in_float16():
    """A loss of 1e-6 times another moves the synapses by 1e-6 times as much: float16 alone would
    round it to 0."""
    keras.config.set_dtype_policy("mixed_float16")
    try:
        models = [make(kb.genomes.backprop(rate), loss="mse") for rate in (0.1, 1e-7)]
    finally:
        keras.config.set_dtype_policy("float32")
    moved = []
    for model in models:
        model.layers[0].synapses["kernel"].assign(np.zeros((1, 5, 6)))
        model.train_on_batch(X, VALUES)
        moved.append(kernel(model))
    assert np.abs(moved[0]).max() > 1e-3
    np.testing.assert_allclose(moved[1] * 1e6, moved[0], rtol=0.01, atol=1e-6)


def test_quantized_layers_are_refused():
    with pytest.raises(ValueError, match="`dtype` must not be quantized"):
        Dense(3, dtype="int8_from_float32")


# Callbacks and nesting.


@pytest.mark.parametrize(
    "callback",
    [
        keras.callbacks.LearningRateScheduler(lambda epoch: 0.1),
        keras.callbacks.ReduceLROnPlateau(),
        keras.callbacks.SwapEMAWeights(),
    ],
)
def test_callbacks_of_an_optimizer_are_refused_before_training(callback):
    model = make()
    before = kernel(model)
    for call in (
        lambda: model.fit(X, Y, callbacks=callback),
        lambda: model.fit(X, Y, 8, 1, 0, [callback]),
        lambda: model.fit(X, Y, callbacks=keras.callbacks.CallbackList([callback])),
    ):
        with pytest.raises(ValueError, match=f"`callbacks` must not use .*Received: {type(callback).__name__}"):
            call()
    np.testing.assert_array_equal(kernel(model), before)


ASKED = {
    "predict": lambda model: model.predict(X, verbose=0),
    "evaluate": lambda model: model.evaluate(X, Y, verbose=0),
    "test_on_batch": lambda model: model.test_on_batch(X, Y),
    "fit": lambda model: model.fit(X, Y, verbose=0),
    "call": lambda model: model(X),
    "stateless_call": lambda model: model.stateless_call(model.trainable_variables, model.non_trainable_variables, X),
    "call of a layer": lambda model: model.layers[0].call(keras.ops.convert_to_tensor(X)),
}


@pytest.mark.parametrize("ask", ASKED.values(), ids=ASKED)
def test_other_models_do_not_inherit_its_call(ask):
    """Keras resolves `training` by the outermost call that is under way, so none may be left."""
    model = make(jit_compile=False)
    ask(model)
    other = keras.Sequential([keras.Input((5,)), kl.Dropout(0.5)])
    assert np.any(np.asarray(other(X, training=True)) == 0)
    np.testing.assert_array_equal(other(X), X)


def test_a_dense_of_no_genome_is_an_ordinary_one():
    layer = Dense(3)
    model = keras.Sequential([keras.Input((5,)), layer])
    before = np.array(layer.kernel.value)
    model.compile("sgd", LOGITS, jit_compile=False)
    model.fit(X, Y, verbose=0)
    assert np.abs(np.array(layer.kernel.value) - before).max() > 1e-4


# Files.


@pytest.mark.parametrize("fitted", [True, False])
def test_export_needs_no_call_before(fitted, tmp_path):
    model = make(kb.genomes.load("mnist-orthogonal"))
    if fitted:
        model.fit(X, Y, verbose=0)
    model.export(str(tmp_path / "exported"), verbose=False)
    predicted = served(tmp_path / "exported", X[:7])
    np.testing.assert_allclose(predicted, model.predict(X[:7], verbose=0), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="must be built before `export`"):
        kb.Sequential([Dense(3)], genome=kb.genomes.backprop()).export(str(tmp_path / "other"))


@pytest.mark.parametrize("name", ["m.h5", "m.hdf5", "m", "m.tf", "m.weights.h5"])
def test_other_endings_are_refused_and_leave_no_file(name, tmp_path):
    with pytest.raises(ValueError, match=r"^`filepath` must end in '\.keras'\. Received: filepath="):
        make().save(tmp_path / name)
    with pytest.raises(ValueError, match=r"^`filepath` must end in '\.weights\.h5'\. Received: filepath="):
        make().save_weights(tmp_path / "m.keras")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["m.keras", "m.weights.h5"])
def test_a_full_disk_leaves_the_old_file(name, tmp_path, monkeypatch):
    model, path = make(), tmp_path / name
    save = model.save if name == "m.keras" else model.save_weights
    save(path)
    old = path.read_bytes()

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "writestr", full)
    monkeypatch.setattr(os, "fsync", full)
    model.fit(X, Y, verbose=0)
    with pytest.raises(OSError, match="No space left on device"):
        save(path)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == [name]


def test_a_folder_of_a_model_is_saved_as_in_keras(tmp_path):
    model = make()
    model.save(tmp_path / "folder", zipped=False)
    np.testing.assert_array_equal(keras.models.load_model(tmp_path / "folder")(X), model(X))
