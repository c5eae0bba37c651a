"""Numbers that stand for the worst or for nothing: what diverged is last and is logged as NaN,
never as 0."""

import os

import keras
import numpy as np
import pytest
from keras import ops
from on_backend import JAX

from keras_blur import bilevel, learners, meta, tasks
from keras_blur.meta.estimator import accuracy, correct_bits, explained

HUGE = 1e25  # weights this large overflow every loss


class Spoiled(learners.MAML):
    """MAML whose members of some numbers start where every loss overflows."""

    def __init__(self, bad, **options):
        super().__init__(keras.optimizers.SGD(0.001), (4,), "tanh", loss="squared", **options)
        self.bad = bad

    def draw(self, seed, members, features, outputs):
        made = super().draw(seed, members, features, outputs)
        for own in made.values():
            own[[number for number in self.bad if number < members]] = HUGE
        return made


def trainer(bad=(), members=1, estimator=None, **options):
    made = meta.MetaTrainer(
        tasks.sines(), Spoiled(bad), estimator or meta.Unroll(1), members=members, batch_size=4, query_size=6, **options
    )
    made.compile(None if isinstance(made.estimator, meta.Evolution) else keras.optimizers.SGD(1e-6), run_eagerly=not JAX)
    return made


def largest(made, member):
    return max(float(np.abs(value.numpy()[member]).max()) for value in made.outer.values())


@pytest.mark.parametrize("bad", [(0,), (1,), (0, 2)])
def test_a_diverged_member_is_last_and_is_never_copied(bad):
    made = trainer(bad, members=3)
    history = made.fit(1, 4, verbose=0).history
    scores, sound = made.member_score.numpy(), [member for member in range(3) if member not in bad]
    assert (scores[list(bad)] == -np.inf).all()
    assert np.isfinite(scores[sound]).all()
    assert made.best == max(sound, key=lambda member: scores[member])
    assert history["skipped"] == [pytest.approx(len(bad) / 3)]
    assert np.isfinite(history["loss"][0])
    made.synchronize()
    assert all(largest(made, member) < HUGE / 2 for member in range(3))
    np.testing.assert_array_equal(made.member_score.numpy(), np.full(3, scores[sound].max()))


def test_a_negative_r_squared_is_better_than_none():
    made = trainer((1,), members=2)
    for variable in made.outer.values():
        value = variable.numpy()
        value[0] = 10.0
        variable.assign(value)
    made.fit(1, 2, verbose=0)
    assert made.member_score.numpy()[0] < 0.0
    assert made.best == 0


def spoil(made, member, factor):
    for variable in made.outer.values():
        value = variable.numpy()
        value[member] = value[member] * factor
        variable.assign(value)


def test_a_member_that_diverges_late_is_last_at_once_and_may_come_back():
    made = trainer(members=2)
    made.fit(1, 5, verbose=0)
    first = made.best
    spoil(made, first, HUGE)
    made.fit(1, 1, verbose=0)
    assert made.best == 1 - first
    assert made.member_score.numpy()[first] == -np.inf
    spoil(made, first, 1.0 / HUGE)
    made.fit(1, 1, verbose=0)
    assert np.isfinite(made.member_score.numpy()).all()


def test_a_skipped_step_never_raises_a_running_score():
    made = trainer(members=1)
    made.fit(1, 3, verbose=0)
    for start in (-5.0, 0.5):
        made.member_mean.assign([start])
        made._follow(ops.array([np.nan]), ops.array([False]))
        assert made.member_score.numpy()[0] == -np.inf
        rate = 1.0 / 4.0
        assert made.member_mean.numpy()[0] == pytest.approx(min(start, (1.0 - rate) * start))


def test_where_all_diverged_nothing_is_said_to_be_best_and_nothing_is_copied(capsys):
    made = trainer((0, 1), members=2)
    history = made.fit(2, 2, verbose=2).history
    for name in ("loss", "r2", "gradient_norm"):
        assert np.isnan(history[name]).all()
    assert history["skipped"] == [1.0, 1.0]
    assert "Epoch 2 skipped all of its outer steps" in capsys.readouterr().out
    assert not made.sound
    assert made.best == 0
    spoil(made, 1, 2.0)
    before = {name: value.numpy() for name, value in made.outer.items()}
    made.synchronize()
    for name, value in made.outer.items():
        np.testing.assert_array_equal(value.numpy(), before[name])


def test_when_all_diverge_the_best_is_the_one_that_was(tmp_path):
    made, path = trainer(members=2), tmp_path / "learned.keras"
    made.fit(1, 4, callbacks=[meta.SaveLearned(path)], verbose=0)
    best, saved = made.best, path.read_bytes()
    for member in (0, 1):
        spoil(made, member, HUGE)
    made.fit(1, 2, callbacks=[meta.SaveLearned(path)], verbose=0)
    assert made.best == best
    assert path.read_bytes() == saved


def test_what_evolution_cannot_score_counts_as_nothing():
    made = trainer(estimator=meta.Evolution(1, population=6, sigma=0.1))
    made.fit(1, 2, verbose=0)
    assert np.isfinite(made.member_score.numpy()).all()
    mean = made.strategy.state["mean"].numpy()
    made.strategy.state["mean"].assign(np.full_like(mean, HUGE))
    history = made.fit(1, 2, verbose=0).history
    assert np.isnan([history[name][0] for name in ("loss", "r2", "best")]).all()
    assert history["skipped"] == [1.0]
    np.testing.assert_array_equal(made.strategy.state["mean"].numpy(), np.full_like(mean, HUGE))
    assert made.member_score.numpy()[0] == -np.inf


class Turns(keras.callbacks.Callback):
    """Spoils the only member in some epochs."""

    def __init__(self, epochs):
        super().__init__()
        self.epochs, self.sound = epochs, None

    def on_epoch_begin(self, epoch, logs=None):
        if epoch in self.epochs:
            self.sound = {name: value.numpy() for name, value in self.model.outer.items()}
            spoil(self.model, 0, HUGE)

    def on_epoch_end(self, epoch, logs=None):
        if epoch in self.epochs:
            for name, value in self.model.outer.items():
                value.assign(self.sound[name])


@pytest.mark.parametrize("bad", [(0,), (1,)])
@pytest.mark.parametrize(("monitor", "mode"), [("loss", "min"), ("r2", "max")])
def test_callbacks_of_keras_keep_the_sound_epoch(monitor, mode, bad, tmp_path):
    path = str(tmp_path / "{epoch}.weights.h5")
    stop = keras.callbacks.EarlyStopping(monitor, mode=mode, patience=10, restore_best_weights=True)
    keep = keras.callbacks.ModelCheckpoint(path, monitor, mode=mode, save_best_only=True, save_weights_only=True)
    slow = keras.callbacks.ReduceLROnPlateau(monitor, mode=mode, patience=10)
    made = trainer()
    # What spoils the weights comes last, so that those before it see the spoiled ones at the end of
    # an epoch.
    history = made.fit(4, 2, callbacks=[stop, keep, slow, Turns(bad)], verbose=0).history
    values = np.array(history[monitor])
    assert np.isnan(values).tolist() == [epoch in bad for epoch in range(4)]
    wanted = np.nanmin(values) if mode == "min" else np.nanmax(values)
    assert stop.best == keep.best == slow.best == pytest.approx(wanted)
    assert stop.best_epoch == int(np.nanargmin(values) if mode == "min" else np.nanargmax(values))
    assert largest(made, 0) < HUGE / 2
    assert f"{stop.best_epoch + 1}.weights.h5" in os.listdir(tmp_path)


def test_validation_of_what_diverged_is_nan_and_never_the_best(tmp_path):
    path = tmp_path / "best.keras"
    made = trainer()
    check = meta.MetaValidate(tasks.sines(), episodes=3, path=path)

    class Spoil(Turns):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch in self.epochs:
                self.sound = {name: value.numpy() for name, value in self.model.outer.items()}
                for value in self.model.outer.values():
                    value.assign(np.full_like(value.numpy(), np.nan))

    history = made.fit(3, 1, callbacks=[check, Spoil((0, 2))], verbose=0).history
    assert np.isnan(history["val_r2"]).tolist() == [True, False, True]
    assert check.best == history["val_r2"][1]
    for own in made.learner.parameters(path).values():
        assert np.isfinite(own).all()


def bilevel_trainer(outer_start):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((8, 3)).astype("float32"), rng.integers(0, 2, 8)
    scale = keras.Variable(outer_start, name="scale")

    def training_loss(model, x, y, losses):
        return keras.ops.mean(losses(y, model(x, training=True))) * keras.ops.sqrt(scale)

    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    made = bilevel.BilevelTrainer(model, [scale], training_loss=training_loss)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    made.compile(keras.optimizers.SGD(0.1), keras.optimizers.SGD(0.0), loss, jit_compile=False)
    return made, x, y


@pytest.mark.parametrize("start", [0.0, 1.0])
def test_a_skipped_outer_step_has_no_loss(start):
    made, x, y = bilevel_trainer(start)
    history = made.fit(x, y, meta_data=(x, y), batch_size=4, verbose=0).history
    assert np.isnan(history["meta_loss"][0]) == (start == 0.0)
    assert history["skipped"] == [float(start == 0.0)]
    assert np.isfinite(history["loss"][0])


def test_an_epoch_without_an_outer_step_has_no_meta_loss():
    made, x, y = bilevel_trainer(1.0)
    history = made.fit(x, y, meta_data=(x, y), batch_size=4, epochs=2, meta_every=4, verbose=0).history
    assert np.isnan(history["meta_loss"]).tolist() == [False, True]
    assert np.isnan(history["skipped"]).tolist() == [False, True]


def test_a_prediction_that_is_not_finite_is_wrong():
    y = ops.array([[1.0, -1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, 1.0]])
    prediction = ops.array([[1.0, 0.0], [np.nan, np.nan], [np.inf, 0.0], [0.0, np.inf]])
    assert float(accuracy(prediction, y)) == 0.25
    assert float(accuracy(ops.array([[np.nan], [-1.0]]), ops.array([[-1.0], [-1.0]]))) == 0.5
    assert float(correct_bits(ops.array([[np.nan, -1.0]]), ops.array([[-1.0, -1.0]]))) == 0.5


def test_bits_of_which_none_is_scored_have_no_share():
    assert np.isnan(correct_bits(ops.ones((2, 3)), ops.zeros((2, 3))))


@pytest.mark.parametrize(("predicted", "wanted"), [(0.3, 1.0), (0.4, 0.0), (np.nan, np.nan)])
@pytest.mark.parametrize("count", [1, 7])
def test_values_that_do_not_vary_have_an_r_squared_of_zero_or_one(predicted, wanted, count):
    found = explained(ops.full((count, 1), predicted), ops.full((count, 1), 0.3))
    np.testing.assert_array_equal(found, np.float32(wanted))


def test_r_squared_of_values_that_vary_is_that_of_keras():
    rng = np.random.default_rng(0)
    y = rng.standard_normal((9, 1)).astype("float32")
    prediction = y + 0.3 * rng.standard_normal((9, 1)).astype("float32")
    metric = keras.metrics.R2Score()
    metric.update_state(y, prediction)
    assert float(explained(ops.array(prediction), ops.array(y))) == pytest.approx(float(metric.result()), rel=1e-5)
