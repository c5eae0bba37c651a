"""Outer parameters learned inside one training run: it learns, it resumes, it touches nothing that
it should not."""

import math
import signal

import keras
import numpy as np
import pytest
from bilevel_table import ESTIMATORS
from keras import ops
from marks import slow_but
from on_backend import JAX, dataset, slopes

from keras_blur import bilevel, convert, genomes, meta, random, tasks
from keras_blur.bilevel.batches import Batches, Passes
from keras_blur.bilevel.training_losses import rotated

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def blobs(count, seed, noise=0.0):
    """Six classes around a circle."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 6, count)
    angle = truth * (math.pi / 3)
    x = np.stack([np.cos(angle), np.sin(angle)], axis=1) + 0.12 * rng.standard_normal((count, 2))
    return x.astype("float32"), truth, tasks.noisy_labels(truth, 6, noise, seed=seed)


def network(seed=0, *, extras=False):
    first, second = (keras.initializers.GlorotUniform(10 * seed + number) for number in (1, 2))
    between = [keras.layers.BatchNormalization(), keras.layers.Dropout(0.2, seed=1)] if extras else []
    return keras.Sequential(
        [keras.Input((2,)), keras.layers.Dense(32, "relu", kernel_initializer=first), *between,
         keras.layers.Dense(6, kernel_initializer=second)]
    )  # fmt: skip


def trainer(
    estimator=None, *, extras=False, rate=1e-2, meta_rate=3e-3, seed=0, jit_compile=False, run_eagerly=None, **options
):
    """A trainer whose few steps end soonest uncompiled on TensorFlow, compiled on JAX."""
    # From other starts every weight rises to 1, and a seed draws other numbers on JAX.
    net = bilevel.SampleWeightNet(20, seed=2 if JAX else 0)
    made = bilevel.BilevelTrainer(network(extras=extras), net, estimator, seed=seed, **options)
    made.compile(
        keras.optimizers.Adam(rate), keras.optimizers.Adam(meta_rate), LOSS, ["accuracy"],
        jit_compile=jit_compile, run_eagerly=not (jit_compile or JAX) if run_eagerly is None else run_eagerly,
    )  # fmt: skip
    return made


@pytest.mark.parametrize("name", ["batch_size", "meta_batch_size"])
def test_a_batch_must_be_dealt_out_evenly(monkeypatch, name):
    x, _, y = blobs(40, 0)
    made = trainer()
    monkeypatch.setattr(type(made.runner), "shares", 4)
    sizes = {"batch_size": 8, "meta_batch_size": 8, name: 10}
    with pytest.raises(ValueError, match=rf"^`{name}` must be a multiple of the 4 devices. Received: {name}=10$"):
        made.fit(x, y, meta_data=(x, y), epochs=1, verbose=0, **sizes)
    monkeypatch.setattr(type(made.runner), "shares", 3)
    batches = dataset(x, y).unbatch().batch(8, drop_remainder=True)
    with pytest.raises(ValueError, match=r"^Batches of `x` must be a multiple of the 3 devices. Received: batches of 8$"):
        made.fit(batches, meta_data=(x, y), batch_size=9, epochs=1, verbose=0)


def state(made):
    return [ops.convert_to_numpy(v) for v in [*made.weights, *made.optimizer.variables, *made.meta_optimizer.variables]]


def assert_equal(one, other):
    for first, second in zip(state(one), state(other), strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("name", slow_but(["cut", "sampler"], ESTIMATORS))
def test_wrong_labels_come_to_weigh_less(name):
    x, truth, y = blobs(600, 0, noise=0.6)
    clean = blobs(100, 1)[:2]
    made = trainer(ESTIMATORS[name], jit_compile=True, meta_rate=1e-2)
    history = made.fit(x, y, meta_data=clean, batch_size=50, epochs=20, verbose=0).history
    assert set(history) == {"loss", "accuracy", "meta_loss", "skipped", *made.estimator.logged}
    weights = ops.convert_to_numpy(made.learned(LOSS.call(y, made.predict(x, verbose=0))))
    correct = y == truth
    assert weights[correct].mean() > (1.05 if name == "evograd" else 1.3) * weights[~correct].mean()
    assert sum(history["skipped"]) == 0.0


def test_compiled_is_uncompiled():
    x, _, y = blobs(200, 0, noise=0.4)
    runs = [trainer(jit_compile=jit, run_eagerly=not jit) for jit in (False, True)]
    for made in runs:
        made.fit(x, y, meta_data=(x, y), batch_size=20, epochs=1, verbose=0)
    for one, other in zip(*map(state, runs), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


def test_virtual_passes_leave_no_trace():
    x, _, y = blobs(100, 0)
    # With an outer rate of 0 only the model's own steps are left, and these must be those of Keras.
    made, plain = trainer(extras=True, meta_rate=0.0), network(extras=True)
    made._training_loss = bilevel.TrainingLoss().training_loss  # the plain mean
    made.fit(x, y, meta_data=(x, y), batch_size=25, epochs=2, verbose=0)
    plain.compile(keras.optimizers.Adam(1e-2), LOSS)
    for step in range(8):  # the same batches
        batch = next(iter(made._sources[0].stream(random.fold_in(random.seed_of(made.seed), 0), step, 0, 1)))
        plain.train_on_batch(*batch)
    for one, other in zip(made.model.weights, plain.weights, strict=True):
        one, other = map(ops.convert_to_numpy, (one, other))
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("first", slow_but(["model"], ["meta", "model"]))
def test_resume_is_bit_for_bit(tmp_path, first):
    x, _, y = blobs(100, 0, noise=0.3)
    path = str(tmp_path / "run.weights.h5")
    options = {"meta_data": (x[:40], y[:40]), "batch_size": 20, "meta_every": 2, "verbose": 0}
    sampler = ESTIMATORS["sampler"]
    unbroken, broken, resumed = (trainer(sampler, extras=True, first=first) for _ in range(3))
    unbroken.fit(x, y, epochs=3, **options)
    broken.fit(x, y, epochs=1, checkpoint=path, **options)
    history = resumed.fit(x, y, epochs=3, checkpoint=path, **options)
    assert history.epoch == [1, 2]
    assert_equal(resumed, unbroken)
    with pytest.raises(ValueError, match=r"was made with .*; this run has "):
        trainer().fit(x, y, epochs=3, checkpoint=path, **options)


def test_a_seeded_dataset_resumes_bit_for_bit(tmp_path):
    x, _, y = blobs(60, 0, noise=0.3)
    path, runs = str(tmp_path / "run.weights.h5"), [trainer() for _ in range(3)]
    for made, epochs, checkpoint in zip(runs, (2, 1, 2), (None, path, path), strict=True):
        keras.utils.set_random_seed(0)  # as a new process would
        data = dataset(x, y).unbatch().shuffle(60, 1).batch(20)  # a pass ends inside the second epoch
        options = {"meta_data": (x, y), "batch_size": 20, "steps_per_epoch": 2, "verbose": 0}
        made.fit(data, epochs=epochs, checkpoint=checkpoint, **options)
    assert_equal(runs[2], runs[0])


class Shaky(bilevel.TrainingLoss):
    """Weighs examples, with noise of a layer and of a generator of its own."""

    def __init__(self):
        super().__init__()
        self.scale = self.add_weight(name="scale", shape=(), initializer="ones")
        self.drop, self.noise = keras.layers.Dropout(0.5, seed=3), keras.random.SeedGenerator(4)

    def training_loss(self, model, x, y, losses):
        each = self.drop(losses(y, model(x, training=True)), training=True)
        return keras.ops.mean(self.scale * each * keras.random.uniform(each.shape, seed=self.noise))


def test_the_random_state_of_a_training_loss_resumes_bit_for_bit(tmp_path):
    x, _, y = blobs(40, 0)
    path, runs = str(tmp_path / "run.weights.h5"), []
    for epochs, checkpoint in ((2, None), (1, path), (2, path)):
        made = bilevel.BilevelTrainer(network(), Shaky())
        made.compile("sgd", "sgd", LOSS, run_eagerly=not JAX)
        made.fit(x, y, meta_data=(x, y), batch_size=20, epochs=epochs, checkpoint=checkpoint, verbose=0)
        runs.append(made)
    assert_equal(runs[2], runs[0])


@pytest.mark.parametrize("layer", [keras.layers.Dropout(0.5, seed=1), keras.layers.BatchNormalization()])
def test_a_function_that_changes_other_variables_is_refused(layer):
    x, _, y = blobs(20, 0)
    layer.build((None, 2))
    made = bilevel.BilevelTrainer(
        network(), [keras.Variable(1.0)],
        training_loss=lambda model, x, y, losses: keras.ops.mean(losses(y, model(layer(x, training=True)))),
    )  # fmt: skip
    made.compile("sgd", "sgd", LOSS, run_eagerly=not JAX)
    with pytest.raises(ValueError, match=r"^`training_loss` must not change variables outside `model`"):
        made.fit(x, y, meta_data=(x, y), batch_size=20, verbose=0)


class Counting(keras.layers.Layer):
    """Counts the examples that pass, in a metric."""

    def __init__(self):
        super().__init__()
        self.seen = keras.metrics.Sum(name="seen")

    def call(self, x):
        self.seen.update_state(keras.ops.ones((keras.ops.shape(x)[0],)))
        return x


def test_a_layer_may_update_a_metric():
    x, _, y = blobs(20, 0)
    model = keras.Sequential([keras.Input((2,)), Counting(), keras.layers.Dense(6)])
    made = bilevel.BilevelTrainer(
        model, [keras.Variable(1.0)],
        training_loss=lambda model, x, y, losses: keras.ops.mean(losses(y, model(x, training=True))),
    )  # fmt: skip
    made.compile("sgd", "sgd", LOSS, run_eagerly=not JAX)
    assert np.isfinite(made.fit(x, y, meta_data=(x, y), batch_size=20, verbose=0).history["loss"][0])


def test_only_what_can_be_saved_is_asked_to_be(tmp_path):
    x, _, y = blobs(40, 0)
    scale = keras.Variable(0.0, name="scale")
    made = bilevel.BilevelTrainer(
        network(), [scale], training_loss=lambda model, x, y, losses: scale + keras.ops.mean(losses(y, model(x)))
    )
    made.compile("sgd", "sgd", LOSS)
    with pytest.raises(ValueError, match=r"SaveLearned needs a result with `save\(path\)`"):
        made.fit(x, y, meta_data=(x, y), batch_size=20, callbacks=[meta.SaveLearned(tmp_path / "s.json")], verbose=0)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_metrics_of_training_are_those_of_keras(jit_compile):
    x, truth, y = blobs(100, 0, noise=0.3)
    model = network()
    made = bilevel.BilevelTrainer(model, bilevel.SampleWeightNet(20))
    wanted = ["accuracy", keras.metrics.SparseTopKCategoricalAccuracy(2, name="top")]
    made.compile(keras.optimizers.SGD(0.0), keras.optimizers.SGD(0.0), LOSS, wanted, jit_compile=jit_compile)
    history = made.fit(x, y, meta_data=(x, truth), batch_size=25, epochs=2, validation_data=(x, truth), verbose=0).history
    prediction = model.predict(x, verbose=0)
    order = np.argsort(-prediction, axis=1)
    for labels, prefix in ((y, ""), (truth, "val_")):
        assert history[f"{prefix}accuracy"] == pytest.approx([np.mean(order[:, 0] == labels)] * 2, abs=1e-6)
        top = np.mean((order[:, :2] == labels[:, None]).any(axis=1))
        assert history[f"{prefix}top"] == pytest.approx([top] * 2, abs=1e-6)


def test_metrics_of_training_go_on_within_an_epoch(tmp_path):
    x, _, y = blobs(100, 0, noise=0.3)
    path = str(tmp_path / "run.weights.h5")
    options = {"meta_data": (x, y), "batch_size": 20, "epochs": 2, "verbose": 0}

    class Leave(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 2:
                signal.raise_signal(signal.SIGTERM)

    unbroken, broken, resumed = (trainer() for _ in range(3))
    wanted = unbroken.fit(x, y, **options).history
    with pytest.raises(SystemExit):
        broken.fit(x, y, checkpoint=path, callbacks=[Leave()], **options)
    found = resumed.fit(x, y, checkpoint=path, **options).history
    assert found["accuracy"] == wanted["accuracy"]
    assert_equal(resumed, unbroken)


def test_metrics_of_another_compilation_leave_nothing_behind(tmp_path):
    x, _, y = blobs(40, 0)
    path, options = str(tmp_path / "run.weights.h5"), {"meta_data": (x, y), "batch_size": 20, "verbose": 0}
    first, again = trainer(), trainer()
    first.fit(x, y, epochs=1, **options)
    first.compile("sgd", "sgd", LOSS, ["accuracy"], run_eagerly=not JAX)
    first.fit(x, y, epochs=1, checkpoint=path, **options)
    again.compile("sgd", "sgd", LOSS, ["accuracy"], run_eagerly=not JAX)
    assert again.fit(x, y, epochs=2, checkpoint=path, **options).epoch == [1]


def test_weights_load_without_the_state_of_metrics(tmp_path):
    x, _, y = blobs(40, 0)
    path, made, other = tmp_path / "trained.weights.h5", trainer(), trainer()
    made.fit(x, y, meta_data=(x, y), batch_size=20, verbose=0)
    made.save_weights(path)
    other.load_weights(path)
    assert other.evaluate(x, y, verbose=0) == pytest.approx(made.evaluate(x, y, verbose=0))


def test_weighted_metrics_are_settings(tmp_path):
    x, _, y = blobs(40, 0)
    path, runs = str(tmp_path / "run.weights.h5"), [trainer(), trainer()]
    options = {"meta_data": (x, y), "batch_size": 20, "checkpoint": path, "verbose": 0}
    for made, name in zip(runs, ("accuracy", "sparse_top_k_categorical_accuracy"), strict=True):
        made.compile("sgd", "sgd", LOSS, weighted_metrics=[name], run_eagerly=not JAX)
    runs[0].fit(x, y, **options)
    with pytest.raises(
        ValueError, match=r"was made with weighted_metrics=.*accuracy.*; this run has weighted_metrics=.*top_k"
    ):
        runs[1].fit(x, y, **options)


def test_metrics_of_a_loss_that_asks_for_no_others():
    x, _, y = blobs(100, 0)
    model, scale = network(), keras.Variable(1.0, name="scale")

    def training_loss(model, x, y, losses):
        return scale * keras.ops.mean(keras.ops.square(model(x, training=True) - keras.ops.one_hot(y, 6)))

    made = bilevel.BilevelTrainer(model, [scale], training_loss=training_loss)
    made.compile(keras.optimizers.SGD(0.0), keras.optimizers.SGD(0.0), LOSS, ["accuracy"])
    history = made.fit(x, y, meta_data=(x, y), batch_size=25, verbose=0).history
    assert history["accuracy"] == pytest.approx([np.mean(model.predict(x, verbose=0).argmax(1) == y)], abs=1e-6)


def test_a_training_loss_reads_the_rate_that_a_callback_sets():
    x, _, y = blobs(50, 0)
    model, scale, rates = network(), keras.Variable(1.0, name="scale"), [0.0625, 0.25]

    def training_loss(model, x, y, losses):
        return ops.convert_to_tensor(made.optimizer.learning_rate) + 0.0 * scale * ops.mean(
            losses(y, model(x, training=True))
        )

    made = bilevel.BilevelTrainer(model, [scale], training_loss=training_loss)
    made.compile(keras.optimizers.SGD(rates[0]), keras.optimizers.SGD(0.0), LOSS)
    follow = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rates[epoch])
    history = made.fit(x, y, meta_data=(x, y), batch_size=25, epochs=2, callbacks=[follow], verbose=0).history
    assert history["loss"] == rates


def test_the_meta_loss_reads_outer_parameters_that_the_model_reads():
    x, _, y = blobs(50, 0)
    scale = keras.Variable(1.0, name="scale")
    model = keras.Sequential([keras.Input((2,)), keras.layers.Lambda(lambda x: x * scale), keras.layers.Dense(6)])
    made = bilevel.BilevelTrainer(
        model, [scale], training_loss=lambda model, x, y, losses: ops.mean(losses(y, model(x, training=True)))
    )
    made.compile(keras.optimizers.SGD(0.0), keras.optimizers.SGD(0.0), LOSS)
    for value in (1.0, 3.0):
        scale.assign(value)
        history = made.fit(x, y, meta_data=(x, y), batch_size=50, verbose=0).history
        assert history["meta_loss"] == pytest.approx([float(LOSS(y, model(x)))], rel=1e-5)


def test_outer_parameters_change_in_their_turn_alone():
    x, _, y = blobs(100, 0)
    made, seen = trainer(), []

    class See(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(float(np.abs(ops.convert_to_numpy(made.meta_model.first.kernel)).sum()))

    made.fit(x, y, meta_data=(x, y), batch_size=10, meta_every=4, callbacks=[See()], verbose=0)
    moved = np.flatnonzero(np.diff(seen)) + 1
    assert moved.tolist() == [4, 8]


def test_datasets_and_variables():
    x, _, y = blobs(120, 0)
    scale = keras.Variable(0.0, name="scale")
    model = network()

    def training_loss(model, x, y, losses):
        return keras.ops.exp(scale) * keras.ops.mean(losses(y, model(x, training=True)))

    made = bilevel.BilevelTrainer(model, [scale], bilevel.OneStep(), training_loss=training_loss)
    made.compile(keras.optimizers.SGD(0.05), keras.optimizers.Adam(1e-2), LOSS, ["accuracy"])
    data = dataset(x, y)
    history = made.fit(data, meta_data=data, epochs=10, validation_data=data, verbose=0).history
    assert float(made.learned["0_scale"]) > 0.1  # a larger step would have been better
    assert history["val_accuracy"][-1] > history["val_accuracy"][0]
    assert len(history["loss"]) == 10


@pytest.mark.parametrize("policy", ["mixed_float16"], indirect=True)
def test_in_half_precision_losses_are_scaled(policy):
    x, _, y = blobs(100, 0)
    made = trainer(jit_compile=True)
    loss = made.fit(x, y, meta_data=(x, y), batch_size=20, epochs=5, verbose=0).history["loss"]
    assert loss[-1] < 0.8 * loss[0]
    assert [int(ops.convert_to_numpy(one.step_counter)) for one in (made.optimizer, made.meta_optimizer)] == [25, 25]
    assert float(ops.convert_to_numpy(made.optimizer.dynamic_scale)) == 2.0**15


class Shuffled(keras.utils.PyDataset):
    """Batches in another order in each pass."""

    def __init__(self, x, y, batch):
        super().__init__()
        self.x, self.y, self.batch, self.ended = x, y, batch, 0
        self.order = np.arange(len(x))

    def __len__(self):
        return len(self.x) // self.batch

    def __getitem__(self, index):
        chosen = self.order[index * self.batch : (index + 1) * self.batch]
        return self.x[chosen], self.y[chosen]

    def on_epoch_end(self):
        self.ended += 1
        self.order = np.random.default_rng(self.ended).permutation(len(self.x))


@pytest.mark.slow
def test_a_pydataset_is_repeated_and_resumes_bit_for_bit(tmp_path):
    x, _, y = blobs(100, 0, noise=0.3)
    path, runs = str(tmp_path / "run.weights.h5"), [trainer() for _ in range(3)]
    for made, epochs, checkpoint in zip(runs, (3, 1, 3), (None, path, path), strict=True):
        data = Shuffled(x, y, 20)
        made.fit(data, meta_data=(x, y), batch_size=20, epochs=epochs, checkpoint=checkpoint, verbose=0)
    assert data.ended >= 2
    assert_equal(runs[2], runs[0])
    labels = next(iter(Batches(Passes(Shuffled(x, y, 20))).stream(None, 7, 0, 1)))[1]
    np.testing.assert_array_equal(labels, y[np.random.default_rng(1).permutation(100)][40:60])  # the third of pass two


def test_a_gradient_that_is_not_finite_is_skipped_and_counted():
    x, _, y = blobs(40, 0)
    scale = keras.Variable(0.0, name="scale")

    def training_loss(model, x, y, losses):
        return keras.ops.mean(losses(y, model(x, training=True))) + 0.0 * keras.ops.sqrt(scale) * model.weights[0][0, 0]

    made = bilevel.BilevelTrainer(network(), [scale], training_loss=training_loss)
    made.compile(keras.optimizers.SGD(0.0), keras.optimizers.Adam(1e-2), LOSS)
    history = made.fit(x, y, meta_data=(x, y), batch_size=20, verbose=0).history
    assert history["skipped"] == [1.0]
    assert float(ops.convert_to_numpy(scale)) == 0.0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "uint8"])
def test_images_of_few_digits_are_rotated_as_exactly_as_others(dtype):
    images = np.random.default_rng(0).integers(0, 200, (1, 50, 60, 1)).astype("float32")
    given, exact = ops.cast(images, dtype), ops.convert_to_tensor(images)
    exact = ops.cast(ops.cast(exact, dtype), "float32")
    for angle in (0.0, 0.4):
        found = rotated(given, ops.convert_to_tensor(angle))
        wanted = rotated(exact, ops.convert_to_tensor(angle))
        assert keras.backend.standardize_dtype(found.dtype) == ("float32" if dtype == "uint8" else dtype)
        np.testing.assert_allclose(ops.cast(found, "float32"), wanted, rtol=1e-2, atol=1e-3)
    np.testing.assert_array_equal(ops.cast(rotated(given, ops.convert_to_tensor(0.0)), "float32"), exact)


@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_weights_of_two_classes_are_mixed_by_soft_labels(shape):
    loss = bilevel.Hyperparameters(class_weights=2)
    loss.class_logits.assign([0.0, np.log(3.0)])  # 1/4 and 3/4, times 2
    labels = ops.reshape(ops.convert_to_tensor([0.0, 0.5, 1.0]), shape)
    np.testing.assert_allclose(loss._weights_of(labels, ops.zeros((3, 1))), [0.5, 1.0, 1.5], rtol=1e-6)


def test_rotation_turns_counterclockwise_and_has_a_derivative():
    image = np.zeros((1, 5, 5, 1), "float32")
    image[0, 2, 4] = 1.0  # in the east
    north = ops.convert_to_numpy(rotated(ops.convert_to_tensor(image), math.pi / 2))[0, :, :, 0]
    assert north[0, 2] == pytest.approx(1.0, abs=1e-6)
    assert north.sum() == pytest.approx(1.0, abs=1e-5)
    images, weights = (ops.convert_to_tensor(np.random.default_rng(seed).random((2, 7, 6, 3))) for seed in (0, 1))
    np.testing.assert_array_equal(rotated(images, 0.0), images)

    def loss(angle):
        return ops.sum(weights * rotated(images, angle))

    angle = ops.convert_to_tensor(0.3, "float64")
    width, rel = (1e-4, 1e-2) if JAX else (1e-6, 1e-6)  # Keras's sine has float32 on JAX
    quotient = (float(loss(angle + width)) - float(loss(angle - width))) / (2 * width)
    assert float(slopes(loss, (angle,))[0]) == pytest.approx(quotient, rel=rel)


class Turn(bilevel.TrainingLoss):
    """Points of the plane turned by a learned angle."""

    def __init__(self):
        super().__init__()
        self.angle = self.add_weight(name="angle", shape=(), initializer="zeros")

    def training_loss(self, model, x, y, losses):
        cosine, sine = keras.ops.cos(self.angle), keras.ops.sin(self.angle)
        turned = keras.ops.stack([cosine * x[:, 0] - sine * x[:, 1], sine * x[:, 0] + cosine * x[:, 1]], axis=1)
        return keras.ops.mean(losses(y, model(turned, training=True)))

    def read(self):
        return {"degrees": keras.ops.convert_to_tensor(self.angle) * (180 / math.pi)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["evograd", "one step"])
def test_a_learned_rotation_of_blobs(name):
    estimator = {"evograd": bilevel.EvoGrad(), "one step": bilevel.OneStep()}[name]
    turn = math.radians(30.0)
    matrix = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]], "float32")
    for seed in range(3):
        (x, y, _), (valid, valid_y, _), (test, test_y, _) = (blobs(2000, 10 * seed + part) for part in range(3))
        made = bilevel.BilevelTrainer(network(seed), Turn(), estimator, first="model", seed=seed)
        made.compile(keras.optimizers.Adam(1e-2), keras.optimizers.Adam(1e-2), LOSS, ["accuracy"])
        keras.utils.set_random_seed(seed)
        plain = network(seed)
        plain.compile(keras.optimizers.Adam(1e-2), LOSS, metrics=["accuracy"])
        plain.fit(x, y, batch_size=128, epochs=20, verbose=0)
        assert plain.evaluate(test @ matrix, test_y, verbose=0)[1] <= 0.6
        data = (valid @ matrix, valid_y)
        history = made.fit(x, y, meta_data=data, batch_size=128, epochs=100, verbose=0).history
        assert made.evaluate(test @ matrix, test_y, verbose=0, return_dict=True)["accuracy"] >= 0.95
        assert 12 <= float(made.meta_model.read()["degrees"]) <= 40
        assert history["degrees"][0] < history["degrees"][-1]


@pytest.mark.parametrize(
    ("options", "name", "sign"),
    [({"weight_decay": 1e-2}, "weight_decay", -1), ({"label_smoothing": 0.3}, "label_smoothing", -1)],
)
def test_hyperparameters_that_hurt_shrink(options, name, sign):
    x, _, y = blobs(300, 0)
    model = network()
    made = bilevel.BilevelTrainer(model, bilevel.Hyperparameters(**options), bilevel.OneStep(rate=0.1))
    made.compile(keras.optimizers.Adam(1e-2), keras.optimizers.Adam(3e-2), LOSS)
    start = float(made.meta_model.read()[name])
    history = made.fit(x, y, meta_data=blobs(300, 1)[:2], batch_size=50, epochs=20, verbose=0).history
    assert sign * (float(made.meta_model.read()[name]) - start) > 0.1 * start
    assert name in history


def test_a_class_that_many_get_by_mistake_weighs_least():
    x, truth, _ = blobs(1500, 0)
    wrong = np.where(np.random.default_rng(0).random(len(truth)) < 0.4, 2, truth)
    made = bilevel.BilevelTrainer(network(), bilevel.Hyperparameters(class_weights=6), bilevel.OneStep(rate=0.1))
    made.compile(keras.optimizers.SGD(0.1), keras.optimizers.Adam(3e-2), LOSS)
    made.fit(x, wrong, meta_data=blobs(600, 1)[:2], batch_size=100, epochs=5, verbose=0)
    assert int(np.argmin(ops.convert_to_numpy(made.meta_model.class_logits))) == 2


@pytest.mark.parametrize(
    "made",
    [
        bilevel.SampleWeightNet(7, seed=3),
        bilevel.LearnedRotation(20.0),
        bilevel.Hyperparameters(weight_decay=0.1, class_weights=3),
    ],
)
def test_what_was_learned_is_saved(tmp_path, made):
    path = str(tmp_path / "learned.keras")
    made.trainable_variables[0].assign(made.trainable_variables[0] + 0.25)
    made.save(path)
    again = keras.models.load_model(path)
    assert type(again) is type(made)
    for one, other in zip(again.weights, made.weights, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(one), ops.convert_to_numpy(other))


def test_equal_losses_have_equal_weights_and_these_sum_to_one():
    net = bilevel.SampleWeightNet(5)
    assert ops.convert_to_numpy(net(np.array([0.1, 3.0], "float32"))).tolist() == [0.5, 0.5]  # at first it is the plain mean
    net.second.kernel.assign(np.linspace(-1, 1, 5)[:, None])
    weights = ops.convert_to_numpy(net(np.array([1.0, 1.0, 3.0], "float32")))
    assert weights[0] == weights[1] != weights[2]
    x, _, y = blobs(10, 0)
    model = network()
    each = LOSS.call(y, model(x))
    loss = net.training_loss(model, x, y, LOSS.call)
    share = net(each) / ops.sum(net(each))
    assert float(loss) == pytest.approx(float(ops.sum(share * each)), rel=1e-5)


class SmallLoss(bilevel.TrainingLoss):
    """A rule made by hand: the half of a batch with the smaller losses counts."""

    def __init__(self):
        super().__init__()
        self.unused = self.add_weight(shape=(), initializer="zeros", name="unused")

    def training_loss(self, model, x, y, losses):
        each = losses(y, model(x, training=True))
        small = ops.cast(each <= ops.sort(each)[each.shape[0] // 2], each.dtype)
        return ops.sum(small * each) / ops.sum(small) + 0.0 * self.unused


@pytest.mark.slow
def test_weights_follow_the_meta_data_where_wrong_labels_have_the_small_losses():
    """A network that was taught the mistakes: a rule that trusts small losses keeps them, a learned
    one turns around."""
    x, truth, _ = blobs(600, 0)
    y = tasks.noisy_labels(truth, 6, 0.4, "flip", seed=0)
    wrong, losses = y != truth, {}
    for name, made in (("by hand", SmallLoss()), ("learned", bilevel.SampleWeightNet(20))):
        model = network()
        model.compile(keras.optimizers.Adam(1e-2), LOSS)
        model.fit(x, (truth + 1) % 6, batch_size=50, epochs=10, verbose=0)
        before = ops.convert_to_numpy(LOSS.call(y, model(x)))
        assert before[wrong].mean() < 0.1 < 3.0 < before[~wrong].mean()
        tuned = bilevel.BilevelTrainer(model, made, bilevel.OneStep())
        tuned.compile(keras.optimizers.SGD(0.01), keras.optimizers.Adam(1e-2), LOSS)
        tuned.fit(x, y, meta_data=blobs(100, 1)[:2], batch_size=50, epochs=4, verbose=0)
        each = ops.convert_to_numpy(LOSS.call(y, model(x)))
        losses[name] = each[~wrong].mean() / before[~wrong].mean()
    weights = ops.convert_to_numpy(made(each))
    assert weights[~wrong].mean() > 1.5 * weights[wrong].mean()
    assert losses["learned"] < 0.8 < 0.85 < losses["by hand"]


def test_a_pseudo_clean_split_finds_most_correct_labels():
    x, truth, y = blobs(600, 0, noise=0.6)
    model = network()
    model.compile(keras.optimizers.Adam(1e-2), LOSS)
    model.fit(x, y, batch_size=50, epochs=5, verbose=0)
    chosen = bilevel.PseudoCleanSplit().split(model, x, y, LOSS)
    correct = y == truth
    assert correct[chosen].mean() > 0.9 > 0.6 > correct.mean()
    assert chosen[correct].mean() > 0.8
    order = np.random.default_rng(0).permutation(len(x))
    np.testing.assert_array_equal(bilevel.PseudoCleanSplit().split(model, x[order], y[order], LOSS), chosen[order])


def test_a_sampler_of_layers_trains_in_float64(float64):
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(4, "tanh"), keras.layers.Dense(3)])
    estimator = bilevel.LayerwiseMetaGradient("last:2", bilevel.GradientSampler(target=2, hidden=3))
    trainer = bilevel.BilevelTrainer(model, bilevel.SampleWeightNet(4), estimator)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    trainer.compile(keras.optimizers.SGD(0.1), None, loss, jit_compile=False)
    x, y = np.random.default_rng(0).standard_normal((8, 5)), np.arange(8) % 3
    assert np.isfinite(trainer.fit(x, y, meta_data=(x, y), batch_size=4, verbose=0).history["loss"][0])


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ([1.0, np.nan], "`losses` must be finite"),
        ([1.0, 1.0], "not all the same"),
        ([1.0, 1.0 + 1e-7], "not all the same"),
        ([[1.0]], r"\[n\]"),
        ([], "`losses` must be finite"),
    ],
)
def test_losses_that_cannot_be_split_are_refused(losses, message):
    with pytest.raises(ValueError, match=message):
        bilevel.PseudoCleanSplit().probabilities(np.array(losses))
    with pytest.raises(ValueError, match="`threshold` must be a number strictly between 0 and 1"):
        bilevel.PseudoCleanSplit(threshold=1.0)


def test_noise_is_as_often_as_it_says():
    y = np.arange(50000) % 10
    assert np.mean(tasks.noisy_labels(y, 10, 0.6) == y) == pytest.approx(0.46, abs=0.01)
    flipped = tasks.noisy_labels(y, 10, 0.4, "flip", seed=1)
    assert set(np.unique((flipped - y) % 10)) == {0, 1}
    assert np.mean(flipped != y) == pytest.approx(0.4, abs=0.01)
    for options, message in (
        ({"share": 1.5}, "`share` must be a finite number of at least 0 and at most 1"),
        ({"share": 0.1, "kind": "x"}, "`kind` must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            tasks.noisy_labels(y, 10, **options)
    with pytest.raises(ValueError, match="`y` must be integer labels"):
        tasks.noisy_labels(y, 9, 0.1)


X, Y = np.zeros((8, 2), "float32"), np.zeros(8, int)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bilevel.BilevelTrainer(None, bilevel.SampleWeightNet()), "`model` must be a built Keras model"),
        (
            lambda: bilevel.BilevelTrainer(convert(network(), genomes.load("fast")), bilevel.SampleWeightNet()),
            "`model` must be a Keras model that an optimizer trains.*learn with a genome",
        ),
        (lambda: trainer(first="last"), "`first` must be one of 'meta', 'model'"),
        (lambda: trainer(meta.Unroll(3)), "`estimator` must be one of OneStep"),
        (lambda: trainer(bilevel.EvoGrad(scope=("no",))), "`scope` must be names of layers with weights"),
        (lambda: bilevel.BilevelTrainer(network(), [keras.Variable(1.0)]), "`meta_model` must be a TrainingLoss, or a list"),
        (lambda: bilevel.BilevelTrainer(network(), bilevel.TrainingLoss()), "`meta_model` must have trainable variables"),
        (lambda: trainer().compile("sgd"), "`loss` must be given"),
        (lambda: trainer().fit(X, Y, meta_data=X, batch_size=4), "`meta_data` must be a tf.data.Dataset or"),
        (lambda: trainer().fit(X, Y, meta_data=(X, Y)), "`x` must hold at least `batch_size` examples, 32. Received: 8"),
        (lambda: trainer().fit(X + np.nan, Y, meta_data=(X, Y), batch_size=4), "`x` must be finite"),
        (
            lambda: trainer().fit(X, Y, meta_data=(X, Y + 6), batch_size=4),
            "`y` of `meta_data` must hold integers from 0",
        ),
        (lambda: bilevel.Hyperparameters(), "One of `weight_decay`, `label_smoothing` and `class_weights`"),
        (
            lambda: bilevel.Hyperparameters(label_smoothing=1.0),
            "`label_smoothing` must be a number strictly between 0 and 1",
        ),
    ],
)
def test_a_wrong_argument_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", ["batch_size", "meta_batch_size", "validation_batch_size", "steps_per_epoch", "meta_every"])
def test_zero_is_no_default(name):
    sizes = {"batch_size": 4, name: 0}
    with pytest.raises(ValueError, match=f"^`{name}` must be a positive integer. Received: {name}=0$"):
        trainer().fit(X, Y, meta_data=(X, Y), validation_data=(X, Y), epochs=1, verbose=0, **sizes)


def test_few_meta_data_are_compared_with_their_own_batch_size():
    message = "^`meta_data` must hold at least `meta_batch_size` examples, 9. Received: 8$"
    with pytest.raises(ValueError, match=message):
        trainer().fit(X, Y, meta_data=(X, Y), batch_size=4, meta_batch_size=9)


def test_labels_keep_to_their_dtype():
    y = np.array([255, 0], "uint8")
    assert tasks.noisy_labels(y, 256, 1.0, "flip").tolist() == [0, 1]
    assert tasks.noisy_labels(np.array([127], "int8"), 128, 1.0, "flip").tolist() == [0]
    for dtype, classes in (("uint8", 256), ("int8", 128), ("bool", 2), ("float16", 2049)):
        assert tasks.noisy_labels(np.zeros(2, dtype), classes, 1.0, "flip").dtype == dtype
        message = f"^`classes` must be at most {classes} for labels of dtype {dtype}. Received: classes={classes + 1}$"
        with pytest.raises(ValueError, match=message):
            tasks.noisy_labels(np.zeros(2, dtype), classes + 1, 1.0)
