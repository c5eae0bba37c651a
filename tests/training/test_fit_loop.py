"""What Keras's trainer does around its steps, both trainers do: hooks, validation, callbacks,
limits. Its own `fit` is the oracle wherever it has one."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from duties import (
    MSE,
    ONES,
    SGD,
    Scale,
    assert_close,
    batches,
    bilevel_trainer,
    data,
    meta_trainer,
    network,
    several,
    single,
)

from keras_blur import Rule, learners, meta, tasks


class Log(keras.callbacks.Callback):
    """Which hooks are called, with which numbers."""

    def __init__(self):
        super().__init__()
        self.calls, self.end = [], None

    def on_train_begin(self, logs=None):
        self.calls.append("train")

    def on_epoch_begin(self, epoch, logs=None):
        self.calls.append(("epoch", epoch))

    def on_train_batch_begin(self, batch, logs=None):
        self.calls.append(("begin", batch))

    def on_train_batch_end(self, batch, logs=None):
        self.calls.append(("end", batch))

    def on_test_begin(self, logs=None):
        self.calls.append("test")

    def on_epoch_end(self, epoch, logs=None):
        self.calls.append(("epoch end", epoch, sorted(logs)))

    def on_train_end(self, logs=None):
        self.end = sorted(logs)


@pytest.mark.parametrize("options", [{}, {"steps_per_execution": 2}])
def test_hooks_and_history_are_those_of_keras(options):
    x, y = data()
    fit = {"validation_data": (x, y), "validation_freq": 2, "initial_epoch": 1, "epochs": 4, "verbose": 0}
    plain, logs = network(), (Log(), Log())
    plain.compile(SGD(0.1), MSE, jit_compile=False, **options)
    wanted = plain.fit(batches(x, y), callbacks=[logs[0]], shuffle=False, **fit)
    made = bilevel_trainer(network(), SGD(0.1), **options)
    found = made.fit(batches(x, y), meta_data=batches(x, y), callbacks=[logs[1]], **fit)

    def of_keras(calls):  # without what only this trainer logs
        extra = {"meta_loss", "skipped"}
        return [(*call[:2], [name for name in call[2] if name not in extra]) if len(call) == 3 else call for call in calls]

    assert of_keras(logs[1].calls) == logs[0].calls
    assert set(logs[1].end) - {"meta_loss", "skipped"} == set(logs[0].end)
    assert found.epoch == wanted.epoch == [1, 2, 3]
    assert len(found.history["val_loss"]) == len(wanted.history["val_loss"]) == 2
    np.testing.assert_allclose(found.history["val_loss"], wanted.history["val_loss"], rtol=1e-4)


def test_hooks_of_meta_training():
    logs = [Log(), Log()]
    made = meta_trainer(SGD(0.1), steps_per_execution=2)
    found = made.fit(3, 3, initial_epoch=1, callbacks=[logs[0]], verbose=0)
    assert found.epoch == [1, 2]
    batch = [("begin", 0), ("end", 1), ("begin", 2), ("end", 3)]
    assert [call for call in logs[0].calls if call[0] in ("begin", "end")] == batch * 2
    assert int(made.meta_step.numpy()) == 6
    plain = meta_trainer(SGD(0.1))
    plain.fit(2, 3, verbose=0)
    assert_close(made.parameters().values(), plain.parameters().values(), rtol=1e-6)


def test_eager_meta_training():
    plain, eager = meta_trainer(SGD(0.1), run_eagerly=False), meta_trainer(SGD(0.1), run_eagerly=True)
    for made in (plain, eager):
        made.fit(1, 1, verbose=0)
    assert_close(eager.parameters().values(), plain.parameters().values(), rtol=1e-4, atol=1e-6)


def validated(trainer, x, y, w):
    return trainer.evaluate(x, y, sample_weight=w, batch_size=8, verbose=0, return_dict=True)


def test_validation_has_weights_and_a_length():
    x, y = data(20)
    w = np.linspace(0.0, 3.0, 20).astype("float32")
    made = bilevel_trainer(network(), SGD(0.1), metrics=["mae"], weighted_metrics=["mse"])
    fit = {"meta_data": (x, y), "batch_size": 8, "verbose": 0}
    history = made.fit(x, y, validation_data=(x, y, w), **fit).history
    wanted = validated(made, x, y, w)
    for name in ("loss", "mae", "mse"):
        assert history[f"val_{name}"] == pytest.approx([wanted[name]], rel=1e-5)
    assert wanted["mse"] == pytest.approx(np.average(np.square(made.predict(x, verbose=0) - y).mean(1), weights=w), rel=1e-4)
    whole = tf.data.Dataset.from_tensor_slices((x, y, w)).batch(4)
    history = made.fit(x, y, validation_data=whole, validation_steps=2, **fit).history
    assert history["val_loss"] == pytest.approx([validated(made, x[:8], y[:8], w[:8])["loss"]], rel=1e-5)
    history = made.fit(x, y, validation_data=(x, y), validation_batch_size=5, validation_freq=[2], epochs=3, **fit).history
    assert len(history["val_loss"]) == 1
    assert len(history["loss"]) == 3


class Stop(keras.callbacks.Callback):
    def __init__(self, when):
        super().__init__()
        self.when = when

    def __getattribute__(self, name):
        if name == object.__getattribute__(self, "when"):
            return self.stop
        return object.__getattribute__(self, name)

    def stop(self, *_, **__):
        self.model.stop_training = True


@pytest.mark.parametrize("when", ["on_train_begin", "on_epoch_begin", "on_train_batch_end", "on_epoch_end"])
def test_training_stops_where_keras_stops(when):
    x, y = data()
    plain = network()
    plain.compile(SGD(0.1), MSE, jit_compile=False)
    wanted = plain.fit(batches(x, y), epochs=2, callbacks=[Stop(when)], shuffle=False, verbose=0)
    made = bilevel_trainer(network(), SGD(0.1))
    found = made.fit(batches(x, y), meta_data=batches(x, y), epochs=2, callbacks=[Stop(when)], verbose=0)
    assert found.epoch == wanted.epoch
    assert int(made.meta_step.numpy()) == int(plain.optimizer.iterations)
    trainer = meta_trainer(SGD(0.1))
    assert trainer.fit(2, 3, callbacks=[Stop(when)], verbose=0).epoch == wanted.epoch
    assert int(trainer.meta_step.numpy()) == int(plain.optimizer.iterations)


def callbacks_of(folder):
    return [
        keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / (1 + epoch)),
        keras.callbacks.EarlyStopping("loss", patience=1, min_delta=1e9, restore_best_weights=True),
        keras.callbacks.TerminateOnNaN(),
        keras.callbacks.ModelCheckpoint(
            str(folder / "best.weights.h5"), "loss", save_best_only=True, save_weights_only=True
        ),
        keras.callbacks.CSVLogger(str(folder / "log.csv")),
    ]


def test_callbacks_of_keras_work_in_bilevel_training(tmp_path):
    x, y = data()
    made, plain = bilevel_trainer(network(), SGD(0.1)), network()
    plain.compile(SGD(0.1), MSE, jit_compile=False)
    for name in ("mine", "keras"):
        (tmp_path / name).mkdir()
    wanted = plain.fit(batches(x, y), epochs=5, callbacks=callbacks_of(tmp_path / "keras"), shuffle=False, verbose=0)
    found = made.fit(batches(x, y), meta_data=batches(x, y), epochs=5, callbacks=callbacks_of(tmp_path / "mine"), verbose=0)
    assert found.epoch == wanted.epoch == [0, 1]
    np.testing.assert_allclose(found.history["learning_rate"], wanted.history["learning_rate"], rtol=1e-6)
    assert_close(made.model.get_weights(), plain.get_weights(), rtol=1e-5, atol=1e-6)
    for name in ("best.weights.h5", "log.csv"):
        assert (tmp_path / "mine" / name).exists()
    assert len((tmp_path / "mine" / "log.csv").read_text().splitlines()) == 3
    made.load_weights(str(tmp_path / "mine" / "best.weights.h5"))


def test_callbacks_of_keras_work_in_meta_training(tmp_path):
    made = meta_trainer(SGD(0.1))
    found = made.fit(5, 2, callbacks=callbacks_of(tmp_path), verbose=0)
    assert found.epoch == [0, 1]
    np.testing.assert_allclose(found.history["learning_rate"], [0.1, 0.05], rtol=1e-6)
    once = meta_trainer(SGD(0.1))
    once.fit(1, 2, verbose=0)
    assert_close(made.parameters().values(), once.parameters().values(), rtol=1e-6)


@pytest.mark.parametrize("kind", ["bilevel", "meta"])
def test_a_plateau_lowers_the_rate(kind):
    plateau = keras.callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=1, min_delta=1e9)
    if kind == "meta":
        made = meta_trainer(SGD(0.1))
        made.fit(3, 1, callbacks=[plateau], verbose=0)
    else:
        made = bilevel_trainer(single(), SGD(0.1))
        made.fit(ONES, ONES, meta_data=(ONES, ONES), batch_size=8, epochs=3, callbacks=[plateau], verbose=0)
    assert float(made.optimizer.learning_rate) == pytest.approx(0.025)


class Kill(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 2:
            raise KeyboardInterrupt


@pytest.mark.parametrize("kind", ["bilevel", "meta"])
def test_backup_and_restore_goes_on_where_it_was(tmp_path, kind):
    x, y = data()

    def run(callbacks):
        if kind == "meta":
            made = meta_trainer(keras.optimizers.Adam(0.01))
            return made, made.fit(4, 2, callbacks=callbacks, verbose=0).epoch
        made = bilevel_trainer(network(), keras.optimizers.Adam(0.01), meta_model=Scale())
        return made, made.fit(x, y, meta_data=(x, y), batch_size=8, epochs=4, callbacks=callbacks, verbose=0).epoch

    whole, _ = run([])
    folder = str(tmp_path / "backup")
    with pytest.raises(KeyboardInterrupt):
        run([keras.callbacks.BackupAndRestore(folder), Kill()])
    resumed, epochs = run([keras.callbacks.BackupAndRestore(folder)])
    assert epochs == [2, 3]
    assert_close(resumed.get_weights(), whole.get_weights(), rtol=0, atol=0)


def test_a_loss_that_is_not_a_number_ends_training():
    made = bilevel_trainer(single(), SGD(1e30))
    history = made.fit(
        ONES,
        2 * ONES,
        meta_data=(ONES, ONES),
        batch_size=2,
        epochs=9,
        callbacks=[keras.callbacks.TerminateOnNaN()],
        verbose=0,
    )
    assert len(history.epoch) == 1


@pytest.mark.parametrize("verbose", [0, 1, 2, "auto"])
def test_verbosity_is_that_of_keras(capsys, verbose):
    made = bilevel_trainer(single(), SGD(0.1))
    made.fit(ONES, ONES, meta_data=(ONES, ONES), batch_size=4, epochs=2, validation_data=(ONES, ONES), verbose=verbose)
    lines = capsys.readouterr().out
    assert ("Epoch" in lines) == (verbose != 0)
    assert ("val_loss" in lines) == (verbose != 0)


def test_debugging_limits_of_keras():
    keras.config.set_max_epochs(2)
    keras.config.set_max_steps_per_epoch(1)
    try:
        made = meta_trainer(SGD(0.1))
        with pytest.warns(UserWarning, match="is limited to"):
            assert len(made.fit(5, 4, verbose=0).epoch) == 2
        assert int(made.meta_step.numpy()) == 2
    finally:
        keras.config.set_max_epochs(None)
        keras.config.set_max_steps_per_epoch(None)


def test_an_optimizer_keeps_its_state_when_compiled_again():
    made = bilevel_trainer(single(), keras.optimizers.Adam(0.1))
    fit = {"meta_data": (ONES, ONES), "batch_size": 8, "verbose": 0}
    made.fit(ONES, ONES, **fit)
    optimizers = made.optimizer, made.meta_optimizer
    made.compile(*optimizers, loss=MSE, jit_compile=False)
    assert len(made.optimizer.variables) == 4  # iterations, rate, two moments
    assert int(made.optimizer.iterations) == 1
    made.fit(ONES, ONES, **fit)


def evolution():
    learner = learners.Blur((4,), Rule(batch_reduction="mean", last_activation="linear"))
    made = meta.MetaTrainer(tasks.images("digits"), learner, meta.Evolution(1, population=4), batch_size=4, query_size=4)
    made.compile(jit_compile=False)
    return made


def fit_bilevel(optimizer=None, **options):
    made = bilevel_trainer(single(), optimizer or SGD(0.1))
    made.fit(ONES, ONES, **{"meta_data": (ONES, ONES), "batch_size": 8, "verbose": 0, **options})


def same_twice():
    one = SGD(0.1)
    bilevel_trainer(single(), one, one)


def of_another_model():
    one = SGD(0.1)
    one.build(single().trainable_variables)
    bilevel_trainer(single(), one)


def same_for_the_start():
    model, names = learners.warped(1, (4,), 1)
    learner = learners.Warp(model, names, SGD(0.05), loss="squared")
    made, one = meta.MetaTrainer(tasks.sines(), learner, meta.WarpGrad(2)), SGD(0.1)
    made.compile(one, start_optimizer=one)


def scheduled_start():
    """MAML has nothing but a start, so the other optimizer updates nothing."""
    made = meta.MetaTrainer(
        tasks.functions("xor"), learners.MAML(SGD(0.1), (4,)), meta.Unroll(1), batch_size=4, query_size=4
    )
    made.compile(SGD(0.1), start_optimizer=SGD(0.1), run_eagerly=True)
    made.fit(1, 1, callbacks=[SCHEDULER], verbose=0)


SCHEDULE = keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5)


SCHEDULER = keras.callbacks.LearningRateScheduler(lambda epoch: 0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: evolution().fit(1, 1, callbacks=[SCHEDULER]), "where the optimizer has none"),
        (lambda: fit_bilevel(SGD(SCHEDULE), callbacks=[SCHEDULER]), "follows a schedule of the optimizer"),
        (
            lambda: fit_bilevel(callbacks=[keras.callbacks.ModelCheckpoint("model.keras")]),
            "ModelCheckpoint with save_weights_only=True",
        ),
        (lambda: fit_bilevel(validation_data=(ONES, ONES), validation_freq=0), "`validation_freq` must be a positive"),
        (lambda: fit_bilevel(epochs=-1), "`epochs` must be an integer of at least 0"),
        (lambda: fit_bilevel(initial_epoch=0.5), "`initial_epoch` must be an integer of at least 0"),
        (lambda: meta_trainer().fit(1, 0), "`steps_per_epoch` must be a positive integer"),
        (lambda: meta_trainer(steps_per_execution=0), "`steps_per_execution` must be a positive integer"),
        (lambda: bilevel_trainer(single(), SGD(0.1), steps_per_execution=True), "`steps_per_execution` must be a positive"),
        (lambda: meta_trainer(SGD(0.1, clipnorm=1.0)), "must not clip"),
        (lambda: meta_trainer(keras.optimizers.LossScaleOptimizer(SGD(0.1, clipnorm=1.0))), "must not clip"),
        (lambda: meta_trainer(keras.optimizers.Lamb(), members=2), "must not mix members, as Lamb does"),
        (lambda: bilevel_trainer(single(), several()), "`rate` of the estimator must be given"),
        (same_twice, "must be different objects"),
        (same_for_the_start, "`start_optimizer` must be a different object"),
        (scheduled_start, "must not set the learning rate of `optimizer` if it updates nothing"),
        (of_another_model, "must be new, or have been compiled for the same weights"),
    ],
)
def test_what_cannot_work_is_refused_before_training(make, message):
    with pytest.raises(ValueError, match=message):
        make()
