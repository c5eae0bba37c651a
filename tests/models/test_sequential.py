"""`Sequential` as Keras users meet it: fit in all its forms, saving, options, and errors before any
work is lost."""

import contextlib

import keras
import numpy as np
import pytest
from keras import layers as kl
from marks import slow_but
from on_backend import TAPES, dataset

import keras_blur as kb
from keras_blur.layers import Dense

LOGITS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
EAGER = {"run_eagerly": True}  # for tests of a few steps
RULES = {
    "default": kb.Rule(),
    "three states": kb.Rule(states=3, oja="weights", saturation="exp_update", batch_reduction="mean"),
    "normalised": kb.Rule(normalize_activations="both", normalize_synapses="stored", batch_reduction="mean"),
    "tied": kb.Rule(directions="tied", channels="tied", forward_synapse_update=True, update_decay="power"),
    "every other step": kb.Rule(supervised_every=2, presynaptic="forward", last_activation="linear"),
}


def data(count=24, classes=3, features=5, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, features)).astype("float32"), rng.integers(0, classes, count)


def make(rule=None, *, units=(6, 3), seed=0, loss=LOGITS, inputs=None, genome=None, compile_options=None, **options):
    keras.utils.set_random_seed(seed)
    if genome is None:
        genome = kb.Genome.random(rule or kb.Rule(), seed=1, std=0.5, synapse_update=-0.05)
    layers = [keras.Input((5,)) if inputs is None else inputs, *(Dense(number) for number in units)]
    model = kb.Sequential(layers, genome=genome, **options)
    model.compile(loss=loss, **(compile_options or {}))
    return model


def weights(model):
    return [np.array(variable.value) for variable in model.weights]


def kernel(model):
    return np.array(model.layers[0].synapses["kernel"].value)


def assert_same(first, second, **tolerance):
    for one, other in zip(weights(first), weights(second), strict=True):
        if tolerance:
            np.testing.assert_allclose(one, other, **tolerance)
        else:
            np.testing.assert_array_equal(one, other)


class Batches(keras.utils.PyDataset):
    def __init__(self, x, y, size):
        super().__init__()
        self.x, self.y, self.size = x, y, size

    def __len__(self):
        return len(self.x) // self.size

    def __getitem__(self, index):
        chosen = slice(index * self.size, (index + 1) * self.size)
        return self.x[chosen], self.y[chosen]


def batches(x, y):
    for start in range(0, 24, 8):
        yield x[start : start + 8], y[start : start + 8]


FORMS = {
    "arrays": lambda x, y: ((x, y), {"batch_size": 8, "shuffle": False}),
    "tf.data": lambda x, y: ((dataset(x, y),), {}),
    "PyDataset": lambda x, y: ((Batches(x, y, 8),), {"shuffle": False}),
    "generator": lambda x, y: ((batches(x, y),), {"steps_per_epoch": 3}),
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_of_data_learns_the_same(form):
    x, y = data()
    reference = make()
    for start in range(0, 24, 8):
        reference.train_on_batch(x[start : start + 8], y[start : start + 8])
    model = make()
    before = weights(model)
    arguments, options = FORMS[form](x, y)
    history = model.fit(*arguments, verbose=0, validation_data=(x[:5], y[:5]), **options).history
    assert_same(model, reference)
    assert any(np.abs(new - old).max() > 1e-3 for new, old in zip(weights(model), before, strict=True))
    assert set(history) == {"loss", "val_loss"}
    assert int(model.learning_step.value) == 3


def test_callbacks(tmp_path):
    x, y = data()
    model = make(compile_options={"metrics": ["accuracy"]})
    seen = []
    callbacks = [
        keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: seen.append(logs["accuracy"])),
        keras.callbacks.ModelCheckpoint(tmp_path / "best.keras", monitor="val_loss"),
        keras.callbacks.CSVLogger(tmp_path / "log.csv"),
        keras.callbacks.EarlyStopping(monitor="val_loss", patience=0, min_delta=1e9),
    ]
    model.fit(x, y, batch_size=8, epochs=9, validation_data=(x, y), callbacks=callbacks, verbose=0)
    assert len(seen) == 6  # stopped after the second epoch
    assert (tmp_path / "log.csv").read_text().splitlines()[0] == "epoch,accuracy,loss,val_accuracy,val_loss"
    assert_same(keras.models.load_model(tmp_path / "best.keras"), model)


@pytest.mark.parametrize("feedback", ["labels", "error"])
def test_class_weight_is_a_sample_weight(feedback):
    x, y = data()
    share = {0: 0.5, 1: 2.0, 2: 0.0}
    models = [make(kb.Rule(feedback=feedback), compile_options=EAGER) for _ in range(3)]
    models[0].fit(x, y, batch_size=8, shuffle=False, class_weight=share, verbose=0)
    models[1].fit(x, y, batch_size=8, shuffle=False, sample_weight=np.vectorize(share.get)(y), verbose=0)
    models[2].fit(x, y, batch_size=8, shuffle=False, verbose=0)
    assert_same(models[0], models[1])
    assert np.abs(kernel(models[0]) - kernel(models[2])).max() > 1e-4


def test_forms_of_labels_learn_the_same():
    x, y = data()
    onehot = np.eye(3, dtype="float32")[y]
    by_form = [
        (y, LOGITS, "auto"),
        (y[:, None], LOGITS, "auto"),
        (onehot, keras.losses.CategoricalCrossentropy(from_logits=True), "auto"),
        (onehot, "squared_hinge", "auto"),
        (2 * onehot - 1, "hinge", "auto"),
        (2 * onehot - 1, "mean_squared_error", "signs"),
        (2 * onehot - 1, "mean_squared_error", "auto"),
        (onehot, "mean_squared_error", "indicators"),
    ]
    models = []
    for labels, loss, targets in by_form:
        model = make(loss=loss, compile_options={"targets": targets, **EAGER})
        model.fit(x, labels, batch_size=8, shuffle=False, verbose=0)
        models.append(model)
    for model in models[1:]:
        for one, other in zip(model.layers, models[0].layers, strict=True):
            np.testing.assert_array_equal(one.synapses["kernel"], other.synapses["kernel"])


def test_binary_labels_of_one_unit():
    x, y = data(classes=2)
    integers = make(units=(4, 1), loss=keras.losses.BinaryCrossentropy(from_logits=True))
    integers.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    signs = make(units=(4, 1), loss="hinge")
    signs.fit(x, 2.0 * y - 1.0, batch_size=8, shuffle=False, verbose=0)
    assert_same(integers, signs)
    assert integers.predict(x, verbose=0).shape == (24, 1)


def test_regression_by_the_error_descends():
    x, _ = data(200)
    y = np.stack([x[:, 0] - x[:, 1], 0.5 * x[:, 2]], axis=1)
    model = make(genome=kb.genomes.backprop(0.1, "tanh"), units=(16, 2), loss="mean_squared_error")
    losses = model.fit(x, y, batch_size=20, epochs=30, verbose=0).history["loss"]
    assert losses[-1] < 0.05 * losses[0]


def test_evaluate_predict_and_call_agree():
    x, y = data()
    model = make(RULES["normalised"], compile_options={"metrics": ["accuracy"]})
    model.fit(x, y, batch_size=8, verbose=0)
    predicted = model.predict(x, batch_size=7, verbose=0)
    np.testing.assert_allclose(predicted, model(x), rtol=1e-5, atol=1e-6)
    results = model.evaluate(x, y, verbose=0, return_dict=True)
    assert results["accuracy"] == pytest.approx(np.mean(predicted.argmax(-1) == y))
    assert results["loss"] == pytest.approx(float(LOGITS(y, predicted)), rel=1e-5)
    assert model.test_on_batch(x, y, return_dict=True)["loss"] == pytest.approx(results["loss"], rel=1e-5)


@pytest.mark.parametrize("axis", ["batch", "units"])
def test_predictions_do_not_depend_on_the_batch(axis):
    x, y = data()
    model = make(kb.Rule(normalize_activations="both", normalization_axis=axis, batch_reduction="mean"))
    model.fit(x, y, batch_size=8, epochs=2, verbose=0)
    alone = np.concatenate([model.predict(row[None], verbose=0) for row in x[:4]])
    np.testing.assert_allclose(alone, model.predict(x, verbose=0)[:4], rtol=1e-5, atol=1e-6)


def test_running_statistics_are_weighted_means_of_the_batches():
    x, y = data()
    model = make(kb.Rule(normalize_activations="forward", normalization_momentum=0.9, batch_reduction="mean"),
                 genome=None, compile_options={})  # fmt: skip
    model.trainable = False  # the synapses stay, so that batches have known sums
    model.compile(loss=LOGITS)
    model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    first = model.layers[0]
    sums = np.einsum("bi,kio->kbo", x, np.array(first.synapses["kernel"].value))
    sums *= np.asarray(model.genome.nu)[0][:, None, None]
    batches = sums.reshape(2, 3, 8, 6)
    means, variances = batches.mean(axis=2), batches.var(axis=2)
    wanted = means[:, 0]  # the first batch replaces the initial value
    for step in (1, 2):
        ratio = 8 * np.mean(np.square(means[:, step] - wanted) / (variances[:, step] + 1e-5))
        old = min(0.9, step / (step + 1), (2 / max(ratio, 2)) ** 2)
        wanted = old * wanted + (1 - old) * means[:, step]
    np.testing.assert_allclose(np.array(first.moving_mean.value)[:, 0], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", slow_but(["default", "three states"], RULES))
def test_compiled_equals_uncompiled(name):
    x, y = data()
    models = [make(RULES[name], compile_options={"jit_compile": jit}) for jit in (False, True)]
    for model in models:
        model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    assert_same(*models, rtol=1e-4, atol=1e-5)


def test_steps_per_execution_changes_nothing():
    x, y = data()
    models = [make(compile_options={"steps_per_execution": steps}) for steps in (1, 3)]
    for model in models:
        model.fit(x, y, batch_size=8, shuffle=False, epochs=2, verbose=0)
    assert_same(*models, rtol=1e-6, atol=1e-7)


def test_one_trace_a_shape():
    traces = []

    class Counting(kb.Sequential):
        def train_step(self, *given):  # the batch is the last
            traces.append(given[-1][0].shape)
            return super().train_step(*given)

    x, y = data()
    keras.utils.set_random_seed(0)
    model = Counting([keras.Input((5,)), Dense(4), Dense(3)], genome=kb.Genome.random(kb.Rule(), seed=0))
    model.compile(loss=LOGITS)
    model.fit(x, y, batch_size=8, epochs=4, verbose=0)
    model.fit(x, y, batch_size=8, epochs=2, verbose=0)
    assert len(traces) == 1


def test_no_tape_is_used(monkeypatch):
    def refused(*args, **kwargs):
        raise AssertionError("a gradient tape was opened")

    for module, name in TAPES:
        monkeypatch.setattr(module, name, refused)
    x, y = data()
    for genome in (kb.genomes.backprop(0.1), kb.Genome.random(kb.Rule(), seed=0)):
        make(genome=genome).fit(x, y, verbose=0)
    twin = keras.Sequential([keras.Input((5,)), kl.Dense(3)])
    twin.compile("sgd", LOGITS)
    with pytest.raises(AssertionError, match="a gradient tape"):
        twin.fit(x, y, verbose=0)  # the check can fail


def test_set_random_seed_reproduces():
    x, y = data()
    runs = []
    for seed in (3, 3, 4):
        keras.utils.set_random_seed(seed)
        inner = [keras.Input((5,)), Dense(8), kl.Dropout(0.3), Dense(3)]
        model = kb.Sequential(inner, genome=kb.Genome.random(kb.Rule(), seed=0))
        model.compile(loss=LOGITS)
        model.fit(x, y, batch_size=8, verbose=0)
        runs.append(kernel(model))
    np.testing.assert_array_equal(runs[0], runs[1])
    assert np.abs(runs[0] - runs[2]).max() > 0.01


@pytest.mark.parametrize("name", RULES)
def test_save_load_continue(name, tmp_path):
    x, y = data()
    model = make(RULES[name], compile_options={"metrics": ["accuracy"], **EAGER})
    model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    assert loaded.genome == model.genome
    assert loaded.layers[0].connection == model.layers[0].connection
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))
    for learner in (model, loaded):
        learner.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    assert_same(model, loaded)
    assert model.evaluate(x, y, verbose=0) == loaded.evaluate(x, y, verbose=0)


def test_weights_files(tmp_path):
    x, y = data()
    model = make(RULES["normalised"])
    model.fit(x, y, batch_size=8, verbose=0)
    model.save_weights(tmp_path / "m.weights.h5")
    from_weights = make(RULES["normalised"], seed=9)
    from_weights.load_weights(tmp_path / "m.weights.h5")
    assert_same(from_weights, model)


def test_clone_model():
    model = make()
    clone = keras.models.clone_model(model)
    assert type(clone) is kb.Sequential
    assert clone.genome == model.genome
    assert clone.compiled
    assert np.abs(kernel(clone) - kernel(model)).max() > 0.01  # new synapses
    clone.set_weights(model.get_weights())
    x, _ = data()
    np.testing.assert_array_equal(clone(x), model(x))


def unbuilt():
    keras.utils.set_random_seed(0)
    model = kb.Sequential(genome=kb.Genome.random(kb.Rule(), seed=0))
    for layer in (kl.Flatten(), Dense(4), Dense(3)):
        model.add(layer)
    model.compile(loss=LOGITS)
    return model


def test_unbuilt_model_takes_its_shape_from_the_data_and_saves(tmp_path):
    model = unbuilt()
    x, y = data(features=6)
    model.fit(x.reshape(-1, 2, 3), y, verbose=0)
    model.save(tmp_path / "m.keras")
    np.testing.assert_array_equal(
        keras.models.load_model(tmp_path / "m.keras")(x.reshape(-1, 2, 3)), model(x.reshape(-1, 2, 3))
    )
    removed = kb.Sequential([Dense(4), Dense(3)], genome=model.genome)
    assert removed.pop().units == 3
    assert [layer.units for layer in removed.layers] == [4]


@pytest.mark.parametrize("form", FORMS)
def test_unbuilt_model_learns_from_each_form_of_data_as_a_built_one(form):
    x, y = data()
    model, built = unbuilt(), unbuilt()
    keras.utils.set_random_seed(1)
    arguments, options = FORMS[form](x, y)
    model.fit(*arguments, verbose=0, **options)
    keras.utils.set_random_seed(1)
    built.build((None, 5))
    before = weights(built)
    built.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    assert_same(model, built)
    assert int(model.learning_step.value) == 3
    assert any(np.abs(new - old).max() > 1e-3 for new, old in zip(weights(model), before, strict=True))


CALLS = {
    "predict": lambda model, x, y: model.predict(x, verbose=0),
    "predict_on_batch": lambda model, x, y: model.predict_on_batch(x),
    "evaluate": lambda model, x, y: model.evaluate(x, y, verbose=0),
    "test_on_batch": lambda model, x, y: model.test_on_batch(x, y),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_unbuilt_model_is_built_by_what_it_is_asked_first(call):
    x, y = data()
    model = unbuilt()
    found = call(model, x, y)
    assert model.built
    np.testing.assert_allclose(found, call(model, x, y), rtol=1e-6)  # the synapses are still there
    synapse = model.layers[1].synapses["kernel"]
    before = np.array(synapse.value)
    model.fit(x, y, verbose=0)
    assert np.abs(np.array(synapse.value) - before).max() > 1e-3


@pytest.fixture
def mixed_policy():
    """Models made while the value is entered are of mixed precision."""

    @contextlib.contextmanager
    def policy():
        before = keras.config.dtype_policy()
        keras.config.set_dtype_policy("mixed_bfloat16")
        try:
            yield
        finally:
            keras.config.set_dtype_policy(before)

    return policy


def test_mixed_precision_keeps_synapses_in_float32(mixed_policy):
    x, y = data()
    plain = make()
    with mixed_policy():
        mixed = make()
    start = kernel(plain)
    for model in (plain, mixed):
        model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    assert mixed.layers[0].connection.compute_dtype == "bfloat16"
    for layer in mixed.layers:
        assert all(variable.dtype == "float32" for variable in layer.synapses.values())
    moved = np.abs(kernel(plain) - start).max()
    gap = np.abs(kernel(mixed) - kernel(plain)).max()
    assert 0 < gap < 0.05 * moved


@pytest.mark.parametrize("rule", ["default", "tied"])
def test_mixed_precision_predicts_as_it_learns(rule, mixed_policy):
    x, y = data()
    with mixed_policy():
        model = make(RULES[rule])
    model.fit(x, y, batch_size=8, verbose=0)
    shown = model.evaluate(x, y, batch_size=24, verbose=0)
    assert model.train_on_batch(x, y) == pytest.approx(shown, rel=1e-6)  # of the prediction before it learns


def test_mixed_precision_keeps_running_statistics_in_float32(mixed_policy):
    x, y = data()
    plain = make(RULES["normalised"])
    with mixed_policy():
        mixed = make(RULES["normalised"])
    for model in (plain, mixed):
        model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    gap = np.abs(mixed.predict(x, verbose=0) - plain.predict(x, verbose=0)).max()
    assert 0 < gap < 0.05


def test_frozen_layer_keeps_its_synapses():
    x, y = data()
    model = make()
    model.layers[0].trainable = False
    frozen, free = (np.array(layer.synapses["kernel"].value) for layer in model.layers)
    model.fit(x, y, verbose=0)
    np.testing.assert_array_equal(model.layers[0].synapses["kernel"], frozen)
    assert np.abs(np.array(model.layers[1].synapses["kernel"].value) - free).max() > 1e-4


def test_kept_neurons_carry_over():
    x, y = data(8)
    rule = kb.Rule(keep_neurons=True)
    model = make(rule, inputs=keras.Input((5,), batch_size=8))
    fresh = model.predict(x, batch_size=8, verbose=0)
    model.layers[0].trainable = model.layers[1].trainable = False
    model.compile(loss=LOGITS)
    model.fit(x, y, batch_size=8, verbose=0)
    assert np.abs(model.predict(x, batch_size=8, verbose=0) - fresh).max() > 1e-3
    model.reset_states()
    np.testing.assert_allclose(model.predict(x, batch_size=8, verbose=0), fresh, rtol=1e-6)
    with pytest.raises(ValueError, match="batch_size=N"):
        make(rule)


def test_summary_shows_states_and_genome():
    lines = []
    make().summary(print_fn=lines.append)
    text = "\n".join(map(str, lines))
    for part in ("dense", "States per neuron: 2", "learning steps so far: 0", "eq. 5", "nu_tilde"):
        assert part in text


def test_genome_setter_changes_what_is_learned():
    x, y = data()
    model, same = make(), make()
    model.fit(x, y, verbose=0)
    model.genome = model.genome.replace(synapse_update=np.float32(0.0))
    kept = kernel(model)
    model.fit(x, y, verbose=0)
    np.testing.assert_array_equal(kernel(model), kept)
    with pytest.raises(ValueError, match="own rule"):
        same.genome = kb.Genome.random(kb.Rule(states=3), seed=0)
    with pytest.raises(ValueError, match="single keras_blur"):
        same.genome = kb.Genome.random(kb.Rule(), seed=0, population=(2,))


GENOME = kb.Genome.random(kb.Rule(), seed=0)


@pytest.mark.parametrize(
    ("layers", "genome", "message"),
    [
        ([Dense(3)], None, "`genome` must be a keras_blur.Genome"),
        ([Dense(3)], "backprop", "Received: genome='backprop'"),
        ([Dense(3)], kb.Genome.random(kb.Rule(), 0, population=(4,)), r"population of shape \(4,\)"),
        ([kl.Flatten()], GENOME, "layer must hold synapses.*Received 'flatten"),
        ([kl.Dense(3, name="mine")], GENOME, r"'mine' \(Dense\) has weights .* keras_blur.layers.Dense in its place"),
        ([kl.BatchNormalization(), Dense(3)], GENOME, "BatchNormalization.* has weights of its own"),
        ([kl.Reshape((5, 1)), kl.Conv1D(2, 2), kl.Flatten(), Dense(3)], GENOME, "Conv1D.* has weights of its own"),
        ([kl.Embedding(9, 2), kl.Flatten(), Dense(3)], GENOME, "Embedding.* has weights of its own"),
        ([Dense(4), kl.LayerNormalization(), Dense(3)], GENOME, "LayerNormalization.* has weights of its own"),
        ([Dense(4), kl.GaussianNoise(0.1), Dense(3)], GENOME, "must not draw random numbers after a layer with synapses"),
        (["dense"], GENOME, "must hold Keras layers"),
        ([Dense(3, name="a"), Dense(3, name="a")], GENOME, "two layers named 'a'"),
        ([Dense(3), keras.Input((3,))], GENOME, "must be the first entry"),
        ([Dense(3)], kb.Genome.random(kb.Rule(layers=2), 0), "for 2 layers of synapses"),
    ],
)
def test_chains_that_do_not_fit(layers, genome, message):
    with pytest.raises(ValueError, match=message):
        kb.Sequential([keras.Input((5,)), *layers], genome=genome)


CHAINS = {
    "dropout at the end": ([Dense(3), kl.Dropout(0.1)], LOGITS),
    "softmax between": ([Dense(4), kl.Softmax(), Dense(3)], LOGITS),
    "softmax at the end": ([Dense(4), Dense(3), kl.Softmax()], "sparse_categorical_crossentropy"),
    "positions": ([kl.Reshape((5, 1)), Dense(3), kl.GlobalAveragePooling1D()], LOGITS),
    "one output a position": ([kl.Reshape((1, 5)), Dense(3), kl.Flatten()], LOGITS),
}


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("genome", [GENOME, kb.genomes.backprop(0.1)], ids=["random", "backprop"])
def test_chains_of_any_layers_learn(name, genome):
    layers, loss = CHAINS[name]
    layers = [type(layer).from_config(layer.get_config()) for layer in layers]
    x, y = data()
    model = kb.Sequential([keras.Input((5,)), *layers], genome=genome)
    model.compile(loss=loss, **EAGER)
    before = weights(model)
    losses = [model.train_on_batch(x, y) for _ in range(8)]
    assert np.isfinite(losses).all()
    assert any(np.abs(new - old).max() > 1e-3 for new, old in zip(weights(model), before, strict=True))
    assert model.predict(x, verbose=0).shape == (24, 3)
    if genome.rule.feedback == "error":
        assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "adam", "loss": LOGITS}, "`optimizer` must be left out.*'adam'"),
        ({}, "`loss` must be a Keras loss or its name. Received: loss=None"),
        ({"loss": "nonsense"}, "`loss` must be a keras.losses.Loss or its name.*Received: 'nonsense'"),
        ({"loss": LOGITS, "targets": "odd"}, "`targets` must be one of"),
    ],
)
def test_compile_errors(options, message):
    model = kb.Sequential([keras.Input((5,)), Dense(3)], genome=GENOME)
    with pytest.raises(ValueError, match=message):
        model.compile(**options)


def test_loss_without_known_derivative_is_refused_at_compile():
    model = kb.Sequential([keras.Input((5,)), Dense(3)], genome=kb.genomes.backprop())
    for loss, message in (
        (keras.losses.Circle(), "`loss` must be one whose derivative.*Received: loss=Circle"),
        (lambda y, p: p - y, "`loss` must be one whose derivative.*Received: loss=<lambda>"),
        (keras.losses.CategoricalCrossentropy(), "use from_logits=True. Received"),
        ("sparse_categorical_crossentropy", "use from_logits=True. Received"),
    ):
        with pytest.raises(ValueError, match=message):
            model.compile(loss=loss)


X, Y = data()
BAD = X.copy()
BAD[7, 2] = np.nan


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (X, Y + 1, "`y` must hold integers from 0 to 2.*from 1 to 3"),
        (X, Y - 1, "`y` must hold integers from 0 to 2"),
        (BAD, Y, "`x` must be finite"),
        (X, None, "`y` must (be given|hold numbers)"),
        (X, np.where(Y == 0, np.nan, Y), "`y` must be finite"),
    ],
)
@pytest.mark.parametrize("form", ["fit", "train_on_batch", "PyDataset"])
def test_bad_arrays_are_refused_before_any_step(form, x, y, message):
    model = make()
    before = weights(model)
    learn = {
        "fit": lambda: model.fit(x, y, verbose=0),
        "train_on_batch": lambda: model.train_on_batch(x, y),
        "PyDataset": lambda: model.fit(Batches(x, [None] * 24 if y is None else y, 24), verbose=0),
    }
    with pytest.raises(ValueError, match=message):
        learn[form]()
    for new, old in zip(weights(model), before, strict=True):
        np.testing.assert_array_equal(new, old)


@pytest.mark.parametrize(("x", "y", "message"), [(X, Y + 1, "`y` must hold integers"), (BAD, Y, "must be finite")])
def test_bad_batches_of_a_dataset_are_refused(x, y, message):
    with pytest.raises(ValueError, match=message):
        make().fit(dataset(x, y), verbose=0)


def test_labels_of_a_wrong_shape():
    with pytest.raises(ValueError, match=r"`y` must have shape \(batch, 3\)"):
        make(loss="hinge").fit(X, np.ones((24, 4)), verbose=0)
    with pytest.raises(ValueError, match="must be compiled first"):
        kb.Sequential([keras.Input((5,)), Dense(3)], genome=GENOME).fit(X, Y)
